"""Environments of other libraries: declared, made without a network, checked, removed; and trials that run in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from evenbits import environments, workers
from evenbits.environment_files import Environment, environments_of, find_environment, read_environment
from evenbits.environments import Made, check, find, folder_of, listed, locked, make, remove
from evenbits.errors import PluginError, SuiteError, TrialFailed
from evenbits.files import write_atomically
from evenbits.installed import interpreter
from evenbits.installing import Installer, find_uv, reason_in, tethered
from evenbits.plan_text import print_plan
from evenbits.plugins import load_plugins
from evenbits.store import Results

HERE = Path(__file__).parent
PLUGIN = "evenbits_gauge"
UV = pytest.param("uv", marks=pytest.mark.skipif(find_uv() is None, reason="uv is not installed"))


def write_wheel(folder: Path, version: str) -> None:
    info = f"gauge-{version}.dist-info"
    files = {
        "gauge.py": f"LEVELS = 127\nVERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: gauge\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"gauge-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the plugin as an installation would have left it."""
    folder = tmp_path_factory.mktemp("gauge-site")
    shutil.copytree(HERE / "foreign" / PLUGIN, folder / PLUGIN, ignore=shutil.ignore_patterns("__pycache__"))
    info = folder / f"{PLUGIN}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[evenbits]\ngauge = {PLUGIN}\n")
    return folder


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheelhouse")
    for version in ("1.0", "2.0"):
        write_wheel(folder, version)
    return folder


@pytest.fixture
def root(tmp_path: Path, plugin: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where environments are made, from the wheelhouse alone."""
    monkeypatch.syspath_prepend(str(plugin))
    monkeypatch.setenv("EVENBITS_ENVIRONMENTS", str(tmp_path / "environments"))
    monkeypatch.setenv("EVENBITS_DISABLE", "mlflow")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    monkeypatch.setenv("UV_CACHE_DIR", str(wheelhouse / "cache"))
    return tmp_path / "environments"


@pytest.fixture
def gauge(root: Path) -> Environment:
    return find_environment(PLUGIN, "gauge")


def pretend(environment: Environment, made: str = "2026-01-01") -> Path:
    """A folder that looks whole: an interpreter without a library, for what never runs one."""
    folder = folder_of(environment)
    interpreter(folder).parent.mkdir(parents=True)
    interpreter(folder).symlink_to(sys.executable)
    facts = {"python": "3.11.0", "bytes": 10, "made": made, "versions": {}}
    (folder / "complete.json").write_text(json.dumps(facts))
    return folder


def running(mark: str) -> list[psutil.Process]:
    """Living processes whose command line has the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and mark in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


# -- declared ---------------------------------------------------------------------------------------------------


TEXT = """# summary: Two libraries
# python: >=3.11,<3.14
# imports: one two.three
# device: cuda
# set: ONE_THREADS=2
# set: ONE_FLAGS=a=b
one[extra]==1.2; python_version >= "3.8"  # why
--find-links https://example.org/wheels
two @ https://example.org/two-1.0-py3-none-any.whl#sha256=00
three @ git+https://example.org/three@0123456789012345678901234567890123456789
"""


def test_a_declaration_is_a_requirements_file(tmp_path: Path) -> None:
    file = tmp_path / "both.txt"
    file.write_text(TEXT)
    found = read_environment(file, "pack")
    assert (found.name, found.title, found.summary, found.python) == (
        "both",
        "pack:both",
        "Two libraries",
        ">=3.11,<3.14",
    )
    assert found.imports == ("one", "two.three")
    assert found.device == "cuda"
    assert found.variables == {"ONE_THREADS": "2", "ONE_FLAGS": "a=b"}
    assert list(found.pins()) == ["one", "two", "three"]
    assert found.requirements[2].endswith("#sha256=00")  # a comment begins after a blank


def test_the_digest_is_of_what_decides_a_result(tmp_path: Path) -> None:
    file = tmp_path / "both.txt"

    def digest(old: str = "", new: str = "") -> str:
        file.write_text(TEXT.replace(old, new) if old else TEXT)
        return read_environment(file, "pack").digest

    first = digest()
    assert digest("Two libraries", "Two good libraries") == first
    assert digest("# why", "# because") == first
    changed = [digest("==1.2", "==1.3"), digest("<3.14", "<3.15"), digest("THREADS=2", "THREADS=1")]
    assert len({first, *changed}) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one>=1.0", r"env\.txt:2: 'one>=1\.0' is not pinned: give one version, one==\.\.\."),
        ("one==1.*", "is not pinned"),
        ("one", "is not pinned"),
        ("one == ", "is no requirement"),
        ("-e .", "only pip's long options"),
        ("--constraint more.txt", "neither pinned nor in the digest; list its requirements here"),
        ("# python: three", "no range of versions"),
        ("# device: tpu", "neither any nor cuda"),
        ("# set: NAME", "NAME=VALUE"),
        ("# set: =1", "NAME=VALUE"),
        ("one @ git+https://example.org/one@main", "not pinned: give a commit after @"),
    ],
)
def test_what_is_no_declaration_is_told(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "env.txt"
    file.write_text(f"ok==1.0\n{line}\n")
    with pytest.raises(PluginError, match=message):
        read_environment(file, "pack")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PluginError, match=r"env\.txt: cannot be read"):
        read_environment(file, "pack")


def test_unknown_environments_are_told_with_near_names(root: Path) -> None:
    with pytest.raises(SuiteError, match=r'evenbits_gauge declares no environment \'gague\'; did you mean "gauge"\?'):
        find_environment(PLUGIN, "gague")


def test_all_declared_environments_read(root: Path) -> None:
    """Those of the plugins in this repository, for they are read by path and nothing else would."""
    for folder in (HERE.parents[1] / "plugins").glob("*/environments"):
        assert environments_of(folder.parent.name), f"{folder} is empty"


# -- made -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [UV, "pip"])
def test_made_checked_and_removed(tool: Any, gauge: Environment, root: Path) -> None:
    assert check(gauge) == ["not made; `evenbits env create gauge` makes it"]
    said: list[str] = []
    made = make(gauge, tool=tool, say=said.append)
    assert made.folder == root / PLUGIN / f"gauge-{gauge.digest}"
    assert made.facts["versions"]["gauge"] == "1.0"
    assert made.facts["tool"].split()[0] == tool
    assert len(said) == 1
    assert make(gauge, say=said.append).facts == made.facts
    assert len(said) == 1  # it was there
    assert check(gauge) == []
    with pytest.raises(ModuleNotFoundError):
        __import__("gauge")

    (info,) = made.folder.rglob("gauge-1.0.dist-info")
    # put in their places, not written into: uv links files to its cache
    write_atomically(info / "METADATA", b"Metadata-Version: 2.1\nName: gauge\nVersion: 2.0\n")
    write_atomically(info.parent / "gauge.py", b"raise RuntimeError('two\\nlines')")
    shutil.rmtree(info.parent / "__pycache__", ignore_errors=True)
    extra = info.parent / "other-1.0.dist-info"
    extra.mkdir()
    (extra / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    assert check(gauge) == [
        "gauge is 2.0, ==1.0 is asked for",
        "other is 1.0, it was not there when the environment was made",
        "import gauge: RuntimeError: two lines",
    ]
    assert remove(PLUGIN, "gauge") == [made.folder]
    assert not list(root.glob("*/gauge-*"))
    with pytest.raises(SuiteError, match="evenbits_gauge:gauge is not made: nothing to remove"):
        remove(PLUGIN, "gauge")


def test_wheels_stay_for_what_is_being_made(gauge: Environment, root: Path) -> None:
    folder, wheels = pretend(gauge), root / "wheels"
    being_made = root / PLUGIN / f"gpu-{gauge.digest}"
    for one in (wheels, being_made):
        one.mkdir()
    remove(PLUGIN, "gauge")
    assert wheels.is_dir()
    assert not folder.exists()
    remove(PLUGIN, "gpu")
    assert not wheels.exists()


def test_a_failed_install_is_one_line_and_leaves_nothing(root: Path) -> None:
    absent = find_environment(PLUGIN, "absent")
    with pytest.raises(TrialFailed) as told:
        make(absent)
    message = str(told.value)
    assert message.startswith("environment 'absent' cannot be installed: ")
    assert "gauge==3.0" in message
    assert "\n" not in message
    log = Path(message.rpartition("log: ")[2])
    assert "gauge==3.0" in log.read_text()
    assert not folder_of(absent).exists()


def test_a_failure_is_not_waited_for_by_every_trial(gauge: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def install(self: Installer, say: Any) -> None:
        tried.append("")
        raise TrialFailed("environment 'gauge' cannot be installed: no network")

    monkeypatch.setattr(Installer, "install", install)
    with pytest.raises(TrialFailed, match=r"no network$"):
        make(gauge)
    for _ in range(2):
        with pytest.raises(
            TrialFailed, match=r"no network \(that was \d+ s ago, .* `evenbits env create gauge` tries now"
        ):
            make(gauge)
    assert len(tried) == 1
    assert find(gauge) is None
    with pytest.raises(TrialFailed, match=r"no network$"):
        make(gauge, again=True)
    assert len(tried) == 2
    monkeypatch.setattr(environments, "RETRY_SECONDS", 0.0)
    with pytest.raises(TrialFailed, match=r"no network$"):
        make(gauge)
    assert len(tried) == 3

    monkeypatch.setattr(Installer, "install", lambda self, say: None)
    monkeypatch.setattr(Installer, "tool_version", lambda self: "none")
    found = {"python": "3.11.0", "versions": {"gauge": "1.0"}, "failed": {}}
    monkeypatch.setattr(environments, "look", lambda folder, imports=(): folder.mkdir() or found)
    make(gauge, again=True)
    assert not list(folder_of(gauge).parent.glob("*.failed.json"))


def test_reasons_are_the_last_error_with_its_causes() -> None:
    uv = (
        "Using Python\nerror: Request failed after 3 retries\n  cause: tcp connect error\n\nhint: is there a network?\n"
    )
    assert reason_in(uv) == "Request failed after 3 retries; tcp connect error"
    older = "  \u00d7 No solution found:\n  \u2570\u2500\u25b6 Because a was not found\n      in the registry\n"
    assert reason_in(older) == "No solution found:; Because a was not found; in the registry"
    pip = "ERROR: Could not find a version\nERROR: No matching distribution found for a==3\n[notice] A new pip\n"
    assert reason_in(pip) == "No matching distribution found for a==3"
    assert reason_in("a\nlast words\n") == "last words"
    assert len(reason_in("ERROR: " + "a" * 1000)) == 300


def test_two_at_once_make_one(gauge: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Made] = []
    installs: list[str] = []

    def install(self: Installer, say: Any) -> None:
        installs.append("begun")
        time.sleep(0.3)
        pretend(gauge)
        (folder_of(gauge) / "complete.json").unlink()

    monkeypatch.setattr(Installer, "install", install)
    monkeypatch.setattr(Installer, "tool_version", lambda self: "none")
    found = {"python": "3.11.0", "versions": {"gauge": "1.0"}, "failed": {}}
    monkeypatch.setattr(environments, "look", lambda folder, imports=(): found)
    threads = [threading.Thread(target=lambda: made.append(make(gauge))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert installs == ["begun"]
    assert len({one.folder for one in made}) == 1
    assert len(made) == 3


def test_what_an_interrupted_one_left_is_made_again(gauge: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    (pretend(gauge) / "complete.json").unlink()
    assert find(gauge) is None
    (folder_of(gauge) / "junk").touch()

    def install(self: Installer, say: Any) -> None:
        assert not self.folder.exists()
        self.folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Installer, "install", install)
    with pytest.raises(KeyboardInterrupt):
        make(gauge)
    assert not folder_of(gauge).exists()


def test_a_changed_declaration_outdates_what_is_there(gauge: Environment, root: Path) -> None:
    folder = pretend(gauge)
    newer = Environment("gauge", PLUGIN, gauge.file, ("gauge==2.0",))
    assert [(line.name, line.state) for line in listed([gauge])] == [("gauge", "made")]
    (line,) = listed([newer])
    assert (line.state, line.folder) == ("outdated", str(folder))
    assert find(newer) is None
    assert [line.state for line in listed([])] == ["undeclared"]
    other = Environment("gauge", "another_package", gauge.file, gauge.requirements)
    assert folder_of(other) != folder  # two plugins may use one name
    assert [line.state for line in listed([gauge, other])] == ["made", "not made"]
    with locked(folder, shared=True), pytest.raises(SuiteError, match="in use by another run"):
        remove(PLUGIN, "gauge")
    kept = root / PLUGIN / "gauge-notes"
    kept.mkdir()
    remove(PLUGIN, "gauge")
    assert kept.is_dir()
    assert not folder.exists()


def test_never_in_the_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENBITS_ENVIRONMENTS", str(Path(sys.prefix) / "more"))
    with pytest.raises(SuiteError, match="lies in evenbits' own environment"):
        environments.root()


def test_without_a_wheel_of_torch_for_the_cpu_nothing_is_fetched(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheelhouse has none, and the network is off: the pin would bring CUDA."""
    if sys.platform != "linux":
        pytest.skip("elsewhere torch of the index is for the CPU")
    monkeypatch.setattr("evenbits.installing.cuda_devices", lambda: ())
    folder = tmp_path / "made"
    folder.mkdir()
    one = Environment("heavy", PLUGIN, tmp_path / "heavy.txt", ("torch==0.0.1",))

    def asked(cuda_torch: bool = False) -> str | None:
        installer = Installer(one, folder, Path(sys.executable), tmp_path / "wheels", None, cuda_torch)
        return installer._cpu_torch("3.11.7")

    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(TrialFailed, match=r"pip finds no torch 0\.0\.1\+cpu, and torch for CUDA takes gigabytes"):
        asked()
    assert asked(cuda_torch=True) is None
    (tmp_path / "wheels" / "torch-0.0.1+cpu-cp311-none-any.whl").touch()
    assert asked() == "0.0.1+cpu"
    monkeypatch.setattr("evenbits.installing.cuda_devices", lambda: ("a GPU",))
    assert asked() is None


# -- the command ------------------------------------------------------------------------------------------------


def test_the_command(gauge: Environment, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenbits.cli import app

    def env(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["env", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    states = {one["name"]: one["state"] for one in json.loads(env("list", "--json")) if one["package"] == PLUGIN}
    assert states == {"absent": "not made", "gauge": "not made", "gpu": "not made"}
    assert "gauge: not made; `evenbits env create gauge` makes it" in env("check", "gauge", code=1)
    pretend(gauge)
    assert "made already: gauge" in env("create", "gauge")
    lines = env("list").splitlines()
    assert [line.split()[:5] for line in lines if line.startswith("gauge")] == [
        ["gauge", PLUGIN, "made", "3.11.0", "10"]
    ]  # fmt: skip
    assert "gauge is not installed, ==1.0 is asked for" in env("check", f"{PLUGIN}:gauge", code=1)
    assert "removed" in env("remove", "gauge")
    with pytest.raises(SuiteError, match="unknown environment 'gague'"):
        CliRunner().invoke(app, ["env", "remove", "gague"], catch_exceptions=False)
    with pytest.raises(SuiteError, match="give names, or --all"):
        CliRunner().invoke(app, ["env", "create"], catch_exceptions=False)
    read = ([], ["mine.txt:3: 'one' is not pinned"])  # of all plugins': none of theirs is made here
    monkeypatch.setattr("evenbits.environment_files.declared_environments", lambda registry: read)
    assert "failed: mine.txt:3: 'one' is not pinned" in env("create", "--all", code=1)


# -- workers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("open('error.json', 'w').write('{\"message\": \"two\\\\nlines\"}'); raise SystemExit(1)", "two lines"),
        ("print('ok'); raise ValueError('odd')", "exit code 1: ValueError: odd"),
        ("import os; os.kill(os.getpid(), 9)", r"killed by SIGKILL \(often the system, out of memory\)"),
        ("raise SystemExit(3)", "exit code 3: it said nothing"),
    ],
)
def test_a_worker_that_ends_badly_is_one_line(code: str, message: str, gauge: Environment, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    launch = workers.WorkerLaunch(gauge, Made(pretend(gauge)), threads=1)
    with pytest.raises(TrialFailed, match=f"^worker in environment 'gauge': {message}$"):
        launch(worker, tmp_path)


def test_a_worker_sees_nothing_of_this_python(
    gauge: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, json; print(json.dumps(dict(os.environ))); held = b'1' * 10**7; __import__('time').sleep(.3)"
    )
    made = Made(pretend(gauge))
    launch = workers.WorkerLaunch(gauge, made, threads=3)
    launch(worker, tmp_path)
    seen = json.loads(capfd.readouterr().out)
    assert "PYTHONPATH" not in seen
    assert seen["PATH"].split(os.pathsep)[0] == str(made.python.parent)
    expected = {"OMP_NUM_THREADS": "3", "GAUGE_STEPS": "127", "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    assert {name: seen[name] for name in expected} == expected
    assert launch.peak_bytes > 10**7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group takes it along")
def test_what_is_tethered_dies_with_its_parent(tmp_path: Path) -> None:
    mark = f"evenbits-{tmp_path.name}"
    command = [sys.executable, "-c", f"import time; time.sleep(600)  # {mark}"]
    parent = (
        f"import subprocess; from evenbits.installing import tethered; subprocess.Popen(tethered({command!r})).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    name = ["-c", command[2]]
    assert until(lambda: any(one.cmdline()[1:3] == name for one in running(mark)))
    process.kill()
    process.wait()
    assert until(lambda: not running(mark))
    assert tethered(command)[-3:] == command


# -- trials -----------------------------------------------------------------------------------------------------


def methods(*whats: str, environment: str = "gauge") -> list[str]:
    head = '{ name = "gauge", budget = "free"'
    return [
        f'{head}, label = "{what}", options = {{ what = "{what}", environment = "{environment}" }} }}' for what in whats
    ]


def test_trials_in_an_environment(evenbits: Any, suites: Any, root: Path, plugin: Path, tmp_path: Path) -> None:
    evenbits.path = (plugin,)
    make(find_environment(PLUGIN, "gauge"))
    unmade = methods("work", environment="absent")[0].replace('label = "work"', 'label = "absent"')
    done = evenbits.run(suites.text(f"[{', '.join([*methods('work', 'raise'), unmade])}]"))
    assert done.returncode == 1, done.stderr
    found = {record.label: record for record in evenbits.records()}
    work = found["work"]
    assert {label: record.status for label, record in found.items()} == {
        "dense": "done", "work": "done", "raise": "failed", "absent": "failed"
    }  # fmt: skip
    assert work.made_with == {"gauge": "1.0"}
    assert work.ledger.bits == work.predicted.model_copy(update={"model": work.ledger.bits.model})
    assert work.ledger.roles == {"code": 20480, "scale": 2304}
    assert found["dense"].made_with == {}
    log = (tmp_path / "results/runs/tiny" / work.trial / "log.txt").read_text()
    assert "gauging with 127 steps" in log
    assert found["raise"].failure.message == "worker in environment 'gauge': ValueError: the gauge is stuck"
    absent = found["absent"].failure
    assert (absent.kind, absent.stage) == ("error", "compress")
    assert absent.message.startswith("environment 'absent' cannot be installed: ")
    assert f"fail tiny absent seed 0: compress: {absent.message[:40]}" in done.stdout


def test_a_limit_of_time_ends_the_worker(evenbits: Any, suites: Any, root: Path, plugin: Path, tmp_path: Path) -> None:
    evenbits.path = (plugin,)
    make(find_environment(PLUGIN, "gauge"))
    for seconds in (6, 30, 120):  # a busy machine may not come to the worker in time
        evenbits.run(suites.text(f"[{methods('sleep')[0]}]", top=f"limits.timeout_seconds = {seconds}"))
        (record,) = [record for record in evenbits.records() if record.label == "sleep"]
        assert record.failure.kind == "timeout"
        if "gauging" in (tmp_path / "results/runs/tiny" / record.trial / "log.txt").read_text():
            break
    else:
        pytest.fail("the worker never began")
    assert not running(str(plugin / PLUGIN / "worker.py"))


def test_plans_know_environments(here: Any, suites: Any, root: Path, gauge: Environment, plugin: Path) -> None:
    entries = [*methods("work")] + [
        one.replace('label = "work"', f'label = "{name}"')
        for name in ("gpu", "gague")
        for one in methods("work", environment=name)
    ]
    text = suites.text(f"[{', '.join(entries)}]", top='device = "cpu"')
    plan = here.plan(text)
    (trial,) = [trial for trial in plan.trials if trial.method == "gauge"]
    assert trial.environment == gauge
    assert trial.calibration is not None  # the worker gets its tokens
    assert {skip.label: skip.reason for skip in plan.skips} == {
        "gpu": "environment 'gpu' needs a CUDA device: the suite asks for \"cpu\"",
        "gague": "evenbits_gauge declares no environment 'gague'; did you mean \"gauge\"?",
    }

    def told() -> str:
        text = StringIO()
        print_plan(plan, 0, load_plugins(), Results(here.folder / "results"), Console(file=text, width=200))
        return text.getvalue()

    assert "making    environment gauge, which downloads what it pins; `evenbits env create gauge`" in told()
    pretend(gauge)
    assert "making" not in told()
    assert here.plan(text).trials == plan.trials  # made or not, it is the same trial
    file = plugin / PLUGIN / "environments" / "gauge.txt"
    kept = file.read_text()
    try:
        file.write_text(kept.replace("STEPS=127", "STEPS=126"))
        changed = [trial for trial in here.plan(text).trials if trial.method == "gauge"]
    finally:
        file.write_text(kept)
    assert changed[0].artifact != trial.artifact
