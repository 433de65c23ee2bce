"""The documents say what the code does: hooks, suites, and the help that the README shows."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evenbits import hookspecs
from evenbits.plugins import Registry, load_plugins
from evenbits.suite import read_suite

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
AUTHORS = "plugins/README.md"
SUITES = sorted(path for path in (ROOT / "suites").rglob("*.toml") if not path.name.endswith(".published.toml"))


def section(document: str, marker: str) -> str:
    """What stands between <!-- marker --> and <!-- /marker -->."""
    found = re.search(rf"^<!-- {marker} -->\n(.*?)^<!-- /{marker} -->", (ROOT / document).read_text(), re.M | re.S)
    assert found, f"{document} lost its <!-- {marker} --> section"
    return found[1]


def fences(language: str) -> list[tuple[str, str]]:
    """(document, content) of every fenced block in that language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [(name, block) for name in DOCUMENTS for block in pattern.findall((ROOT / name).read_text())]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()


def script(name: str) -> Any:
    """A module of tests/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reading_order_counts_its_lines() -> None:
    documents = script("documents")
    found = dict(re.findall(r"^\| \[`(\w+)`\]\([^)]*\) \| (\d+) \|", section("CONTRIBUTING.md", "reading-order"), re.M))
    assert found.keys() == documents.READING.keys()
    for module, lines in found.items():
        actual = documents.count_lines(module)
        assert abs(int(lines) - actual) <= 0.2 * actual, f"{module}: run python tests/documents.py"


def test_every_hook_stands_in_the_docs_with_its_arguments() -> None:
    expected = script("documents").hook_lines()
    assert section(AUTHORS, "hooks") == expected, "run python tests/documents.py"
    for name in hookspecs.HOOKS:
        assert f"- `{name}(" in expected


def test_every_descriptor_stands_in_the_docs_with_its_fields() -> None:
    documents = script("documents")
    expected = documents.descriptor_lines()
    assert section(AUTHORS, "descriptors") == expected, "run python tests/documents.py"
    shown = {cls.__name__ for cls in documents.DESCRIPTORS}
    for name in hookspecs.HOOKS:
        returned = re.search(r"-> '?Sequence\[(\w+)\]", str(inspect.signature(getattr(hookspecs, name))))
        assert returned is None or returned[1] in shown, f"{name} returns {returned[1]}: add it to DESCRIPTORS"


def test_the_tutorial_on_the_page_is_the_project_that_the_tests_run() -> None:
    documents, text = script("documents"), (ROOT / AUTHORS).read_text()
    assert documents.authors_page(text) == text, "run python tests/documents.py"
    shown = set(re.findall(r"^<!-- tutorial: (\S+) -->", text, re.M))
    files = {p.relative_to(documents.TUTORIAL).as_posix() for p in documents.TUTORIAL.rglob("*") if p.is_file()}
    assert shown == {name for name in files if "__pycache__" not in name and not name.startswith(".")}


def test_every_hook_says_what_for() -> None:
    for name in hookspecs.HOOKS:
        assert hookspecs.describe(name)[0].isupper(), name


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_suites_read(path: Path, registry: Registry) -> None:
    read_suite(path, registry, environment={"EVENBITS_DATA": "data", **os.environ})


def test_suites_are_shipped() -> None:
    assert SUITES


def test_suites_in_the_docs_read(registry: Registry, tmp_path: Path) -> None:
    for document, block in fences("toml"):
        if "methods" in block:
            path = tmp_path / document
            path.write_text(block)
            read_suite(path, registry, environment={"EVENBITS_DATA": "data", **os.environ})


def test_python_in_the_docs_is_python() -> None:
    for document, block in fences("python"):
        ast.parse(block, document)


def test_the_readme_shows_the_help_as_it_is() -> None:
    """The fenced block under <!-- ci:help --> is the output of `evenbits --help` in 80 columns without colour."""
    found = re.search(r"^<!-- ci:help -->\n+```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found, "README.md has no fenced block under <!-- ci:help -->"
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    command = Path(sys.executable).with_name("evenbits")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shown, actual = ([line.rstrip() for line in text.strip().splitlines()] for text in (found[1], done.stdout))
    # a block may open with the command that printed it
    shown = shown[1:] if shown and shown[0].startswith("$ ") else shown
    assert shown == actual, done.stdout


def test_links_to_files_exist() -> None:
    for document in (*DOCUMENTS, AUTHORS):
        path = ROOT / document
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{document} links to {target}"


def marked(marker: str, language: str) -> str:
    """The fenced block of README.md under <!-- marker -->."""
    found = re.search(rf"^<!-- {marker} -->\n```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found, f"README.md has no {language} block under <!-- {marker} -->"
    return found[1]


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(marked("ci:door", "python"), "README.md", "exec"), {})  # its last line is an assertion
    assert "codes" in capsys.readouterr().out


def test_the_readmes_plugin_keeps_the_contract() -> None:
    from evenbits.compressor import Compressor
    from evenbits.testing import check_compressor

    names: dict[str, Any] = {}
    exec(compile(marked("ci:plugin", "python"), "README.md", "exec"), names)
    (descriptor,) = names["provide_compressors"]()
    assert isinstance(descriptor, Compressor)
    check_compressor(descriptor)
