"""An author's road: the tutorial's project and what `evenbits new` writes, installed outside the tree, tested, run."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evenbits.commands_new import Kind, _typed, check_name, project_files, write_project
from evenbits.errors import PluginError
from evenbits.plugins import load_plugins
from evenbits.store import Results

TUTORIAL = Path(__file__).parent / "tutorial"
NAMES = {kind: f"own_{kind}" for kind in Kind}
LONGEST = "mixed_precision_rounding"
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Author:
    """Projects in `folder`, installed into `site`, which no other process sees."""

    folder: Path
    site: Path

    def __call__(self, *command: Any, folder: Path | None = None, **environment: str) -> str:
        """What an author types, and what it says; fails where that fails."""
        path = os.pathsep.join(filter(None, (str(self.site), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "EVENBITS_DISABLE": "mlflow", "COLUMNS": "200", "PYTHONPATH": path, **environment}
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=folder or self.folder, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def projects(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("*/pyproject.toml"))

    def values(self, suite: str) -> Mapping[tuple[str, str], float]:
        """Of the suite's only run: by label and metric."""
        records, _ = Results(self.folder / "results").records(suite)
        assert all(record.status == "done" for record in records), [record.reason for record in records]
        return {(record.label, metric.name): metric.value for record in records for metric in record.metrics}


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Author:
    """Built and installed by pip, without network: hatchling is there already."""
    made = Author(tmp_path_factory.mktemp("author"), tmp_path_factory.mktemp("site"))
    left_out = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "dist", "build")
    shutil.copytree(TUTORIAL, made.folder / "tutorial", ignore=left_out)
    for kind, name in NAMES.items():
        write_project(name, kind, made.folder)
    offline = ("--no-index", "--no-build-isolation", "--no-deps", "--no-compile", "--target", made.site)
    made("pip", "install", "--quiet", *offline, *made.projects)
    return made


def lines_of(path: Path) -> int:
    """Without blank ones."""
    return sum(bool(line.strip()) for line in path.read_text().splitlines())


def test_the_tutorials_compressor_is_short() -> None:
    package = TUTORIAL / "evenbits_tutorial"
    assert lines_of(package / "compressor.py") + lines_of(package / "options.py") < 60


@pytest.mark.slow
def test_every_project_passes_its_own_tests(author: Author) -> None:
    strict = ("-W", "error", "-W", "ignore:builtin type (SwigPyPacked|SwigPyObject|swigvarlink):DeprecationWarning")
    tests = [project / "tests" for project in author.projects]
    told = author("pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-rA", *strict, *tests)
    for contract in ("test_powers", "test_next_token", "test_load_time", *(f"test_own_{kind}.py" for kind in Kind)):
        assert f"{contract}[" in told or f"{contract}::test_contract[" in told, told
    assert "test_gaussian_weights_lose_what_the_integral_says[3]" in told


@pytest.mark.slow
def test_the_tutorials_suite_runs_to_a_report(author: Author) -> None:
    author("evenbits.cli", "run", "tutorial/suite.toml")
    value = author.values("tutorial")
    dense, even, powers = (value[label, "top1_accuracy"] for label in ("dense", "rtn", "powers"))
    assert 0.8 * dense < min(powers, even)
    assert 0.3 < dense < 1
    assert all(value[label, "time_load"] > 0 for label in ("dense", "rtn", "powers"))
    report = (author.folder / "results" / "runs" / "tutorial" / "report" / "report.md").read_text()
    assert "| powers |" in report
    assert "top1_accuracy (share)" in report
    assert "time_load (s)" in report


@pytest.mark.slow
def test_a_new_compressors_suite_runs_to_a_report(author: Author) -> None:
    name = NAMES[Kind.COMPRESSOR]
    author("evenbits.cli", "run", f"evenbits_{name}/suite.toml")
    value = author.values(name)
    assert value["dense", "perplexity"] < value[name, "perplexity"] < 1.2 * value["dense", "perplexity"]
    assert f"| {name} |" in (author.folder / "results" / "runs" / name / "report" / "report.md").read_text()


def test_every_new_suite_can_be_planned(author: Author, tmp_path: Path) -> None:
    for name in NAMES.values():
        told = author("evenbits.cli", "plan", f"evenbits_{name}/suite.toml", "--results", tmp_path)
        assert name in told
        assert "(0 already recorded), 0 skipped" in told, told


def test_they_are_listed_with_where_they_come_from(author: Author) -> None:
    told = author("evenbits.cli", "plugins")
    for name in NAMES.values():
        assert f"ok {name} (evenbits-{name.replace('_', '-')} 0.1.0): provide_" in told
    assert "ok tutorial (evenbits-tutorial 0.1.0): provide_compressors, provide_evaluators, provide_profilers" in told
    assert "problems" not in told


def test_listing_them_imports_no_torch(author: Author) -> None:
    (author.folder / "listed.py").write_text(
        "import json, sys\n"
        "from evenbits.plugins import load_plugins\n"
        "load_plugins().collect_all()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    loaded = json.loads(author("listed"))
    assert "evenbits_tutorial" in loaded
    assert not {"torch", "transformers"} & set(loaded)


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason='ruff is not installed: pip install -e ".[dev]"')
@pytest.mark.parametrize("name", ["q", LONGEST])
def test_what_is_written_is_in_order(tmp_path: Path, name: str) -> None:
    """Also where names are so long, or so short, that lines would be broken elsewhere."""
    for kind in Kind:
        (tmp_path / kind).mkdir()
        write_project(name, kind, tmp_path / kind)
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason='mypy is not installed: pip install -e ".[dev]"')
def test_types_hold(author: Author) -> None:
    packages = [path for project in author.projects for path in project.glob("evenbits_*")]
    author("mypy", "--strict", "--cache-dir", author.folder / ".mypy", *packages)


def test_new_says_what_to_type_next(author: Author, tmp_path: Path) -> None:
    told = author("evenbits.cli", "new", "halves", "--into", tmp_path, folder=tmp_path).splitlines()
    assert told[0].startswith(f"wrote {tmp_path / 'evenbits_halves'}; ")
    install, check, run = told[1:]
    assert install.endswith(f"python -m pip install -e {tmp_path}/evenbits_halves")
    assert check.endswith("evenbits check halves")
    assert run.endswith(f"evenbits run {tmp_path}/evenbits_halves/suite.toml")
    assert (tmp_path / "evenbits_halves" / "tests" / "test_halves.py").is_file()


def test_what_to_type_survives_a_shell(tmp_path: Path) -> None:
    for name in ("plain", "two words", "a$b", "it's", "`x`"):
        assert shlex.split(_typed(Path(name))) == [f"./{name}"]
        assert shlex.split(_typed(tmp_path / name)) == [f"{tmp_path}/{name}"]


@pytest.mark.parametrize(("name", "kind", "said"), [
    ("Halves", Kind.COMPRESSOR, "no plugin's name"),
    ("two words", Kind.COMPRESSOR, "no plugin's name"),
    ("half__", Kind.COMPRESSOR, "no plugin's name"),
    ("class", Kind.COMPRESSOR, "no plugin's name"),
    ("../halves", Kind.COMPRESSOR, "no plugin's name"),
    (LONGEST + "s", Kind.COMPRESSOR, "at most 24"),
    ("evenbits_halves", Kind.COMPRESSOR, "leave evenbits_ out"),
    ("layer", Kind.COMPRESSOR, "evenbits has classes of that name"),
    ("rtn", Kind.COMPRESSOR, r"already the method of rtn \(evenbits"),
    ("llm_codebook", Kind.COMPRESSOR, r"already the method of llm_codebook \(evenbits"),
    ("distill", Kind.RECOVERY, r"already the recovery stage of distill \(evenbits"),
    ("lm_eval", Kind.EVALUATOR, r"already the evaluator of lmeval \(evenbits"),
    ("energy", Kind.PROFILER, r"already the profiler of hardware \(evenbits"),
    ("reference", Kind.COMPRESSOR, r"already the plugin reference \(evenbits"),
])  # fmt: skip
def test_names_that_cannot_be(name: str, kind: Kind, said: str) -> None:
    with pytest.raises(PluginError, match=said) as caught:
        check_name(name, kind, load_plugins())
    assert "\n" not in str(caught.value)


def test_a_package_that_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evenbits_halves.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="evenbits_halves can already be imported"):
        check_name("halves", Kind.COMPRESSOR, load_plugins())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    kept = tmp_path / "evenbits_halves" / "kept"
    kept.mkdir(parents=True)
    with pytest.raises(PluginError, match="exists: nothing is written over"):
        write_project("halves", Kind.COMPRESSOR, tmp_path)
    assert list((tmp_path / "evenbits_halves").iterdir()) == [kept]
    with pytest.raises(PluginError, match="no such folder"):
        write_project("halves", Kind.COMPRESSOR, tmp_path / "nowhere")


@pytest.mark.parametrize("kind", list(Kind))
def test_no_placeholder_is_left(kind: Kind) -> None:
    for place, text in project_files("halves", kind).items():
        assert "$" not in text, place
        assert "halves" in text or "Halves" in text or place == "README.md", place
