"""The workflows and the night's script: what they name exists, nothing is hidden, and the exit code is the gate's."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from tests.harness.trials import Trials, perplexity
from typer.main import get_command
from typer.testing import CliRunner

from evenbits.cli import app
from evenbits.history import read_history
from evenbits.suite import read_suite

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = (ROOT / "tests" / "nightly.sh", ROOT / "tests" / "keep_nights.sh")
# (lowest, highest) of minute, hour, day, month, weekday
CRON = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
# `make` of an action that runs on what GitHub's runners have; a new action is looked at before it is let in
ACTIONS = {
    "checkout", "setup-python", "cache/restore", "cache/save", "upload-artifact", "download-artifact",
    "upload-pages-artifact", "deploy-pages",
}  # fmt: skip


def workflow(name: str) -> dict[Any, Any]:
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text()))


def steps(found: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in found["jobs"].values() for step in job["steps"]]


def commands(text: str) -> list[list[str]]:
    """Every command line of evenbits in a script, in words; variables stay as they are."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if match := re.match(r'\s*(?:step )?(?:"\$EVENBITS"|\S*\bevenbits) (.+)', line):
            found.append(shlex.split(match[1], comments=True))
    return found


def test_there_are_workflows_for_changes_and_for_nights() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "nightly.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_asks_for_little(path: Path) -> None:
    text, found = path.read_text(), workflow(path.name)
    assert found["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert "pull_request_target" not in text
    for name, job in found["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        writing = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert writing <= {"publish": {"pages", "id-token"}, "keep": {"contents"}}.get(name, set()), name
        # a job that may write runs nothing of the project beyond the script that does it
        assert not writing or not any("pip install" in step.get("run", "") for step in job["steps"]), name
    for step in steps(found):
        if "uses" in step:
            action = re.fullmatch(r"actions/([\w/-]+)@v\d+", step["uses"])
            assert action, f"{step['uses']}: pin the action's major version"
            assert action[1] in ACTIONS
        # what comes from outside never becomes part of a script
        assert "github.event" not in step.get("run", "")
        assert "github.head_ref" not in step.get("run", "")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_exists(path: Path) -> None:
    for step in steps(workflow(path.name)):
        for script in re.findall(r"(?<![\w./$-])(?:\.ci|tests)/[\w./-]+", step.get("run", "")):
            assert os.access(ROOT / script, os.X_OK), script
        files = step.get("with", {}).get("cache-dependency-path", "")
        for name in files.split():
            assert (ROOT / name).is_file(), name
    environments = re.search(r"^env_list = (.*)$", (ROOT / "tox.ini").read_text(), re.M)
    assert environments
    for job in workflow(path.name)["jobs"].values():
        for check in job.get("strategy", {}).get("matrix", {}).get("check", []):
            assert check in environments[1].split(", ")


def test_changes_run_what_ci_runs() -> None:
    found = workflow("ci.yml")
    assert set(found[True]) == {"push", "pull_request"}  # YAML reads the key `on` as true
    assert found["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert ".ci/run" in [step.get("run") for step in found["jobs"]["tests"]["steps"]]
    assert found["jobs"]["checks"]["strategy"]["matrix"]["check"] == ["lint", "type"]


def test_nights_come_by_the_clock_and_by_hand() -> None:
    found = workflow("nightly.yml")
    assert set(found[True]) == {"schedule", "workflow_dispatch"}
    (entry,) = found[True]["schedule"]
    fields = entry["cron"].split()
    assert len(fields) == 5
    for text, (low, high) in zip(fields, CRON, strict=True):
        assert text == "*" or low <= int(text) <= high
    assert fields[0] not in ("0", "*"), "GitHub delays or drops what is asked for at the full hour"


def test_nights_install_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    installs = [step["run"] for step in steps(workflow("nightly.yml")) if "pip install" in step.get("run", "")]
    assert len(installs) == 1
    assert f"{installs[0]} && .venv/bin/evenbits run" in readme


def test_the_gate_decides_and_the_rest_is_written_anyway() -> None:
    jobs = workflow("nightly.yml")["jobs"]
    names = [step.get("run", step.get("uses", "")) for step in jobs["night"]["steps"]]
    gate = names.index("tests/nightly.sh")
    assert "continue-on-error" not in jobs["night"]["steps"][gate]
    for step in jobs["night"]["steps"][gate + 1 :]:
        assert "!cancelled()" in step["if"]
    for name in ("publish", "keep"):
        assert jobs[name]["needs"] == "night"
        assert "!cancelled()" in jobs[name]["if"]


def test_what_is_restored_can_hide_no_change() -> None:
    """Any earlier cache is restored, for ids are hashes of all that counts; each night saves one of its own."""
    restore, save = (
        next(step["with"] for step in steps(workflow("nightly.yml")) if step.get("uses", "").startswith(action))
        for action in ("actions/cache/restore", "actions/cache/save")
    )
    assert restore["path"] == save["path"] == "build/nightly/results"
    assert restore["key"] == save["key"]
    assert "github.run_id" in save["key"]
    assert save["key"].startswith(restore["restore-keys"])


@pytest.mark.parametrize("path", [*WORKFLOWS, *SCRIPTS], ids=lambda path: path.name)
def test_every_command_and_flag_exists(path: Path) -> None:
    if path.suffix == ".yml":
        text = "\n".join(step.get("run", "") for step in steps(workflow(path.name)))
    else:
        text = path.read_text()
    found = commands(text)
    assert found or path.name != "nightly.sh"
    for words in found:
        command: Any = get_command(app)
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            assert words[0] in command.commands, f"evenbits has no command {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        flags = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        for word in words:
            assert not word.startswith("--") or word in flags, f"{command.name} has no {word}"


def test_the_nights_script_does_all_that_a_night_is() -> None:
    text = SCRIPTS[0].read_text()
    done = [" ".join(word for word in words[:2] if not word.startswith(("$", "-"))) for words in commands(text)]
    assert done == ["run", "history add", "history show", "report", "gate", "clean"]
    suite = re.search(r"SUITE:-([^}]+)}", text)
    assert suite
    assert read_suite(ROOT / suite[1], _registry(), environment=dict(os.environ)).name == "nightly"
    baseline = re.search(r"BASELINE:-([^}]+)}", text)
    assert baseline
    path = ROOT / baseline[1]
    assert path.is_file(), f"make it: evenbits gate {baseline[1]} --suite {suite[1]} --update REASON"
    assert json.loads(path.read_text())["suite"] == "nightly"


def _registry() -> Any:
    from evenbits.plugins import load_plugins

    return load_plugins()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


FAKE = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$1" in
    run)
        if [ -z "${UNPLANNED:-}" ]; then mkdir -p "$4/runs/small"; echo {} >"$4/runs/small/plan.json"; fi
        exit "${RUN_CODE:-0}"
        ;;
    report) mkdir -p "$4/runs/small/report"; echo page >"$4/runs/small/report/page.html" ;;
    gate)
        while [ $# -gt 0 ]; do [ "$1" = --markdown ] && echo "the gate's word" >"$2"; shift; done
        exit "${GATE_CODE:-0}"
        ;;
esac
"""


@pytest.mark.parametrize(
    ("run", "gate", "code"), [(0, 0, 0), (0, 1, 1), (1, 3, 3), (1, 0, 3), (2, 2, 2), (0, 2, 2), (130, 3, 130)]
)
def test_a_nights_exit_code(run: int, gate: int, code: int, tmp_path: Path) -> None:
    """The gate's; but a run that broke before the gate could judge it is told as such."""
    fake, suite = tmp_path / "evenbits", tmp_path / "small.toml"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    suite.write_text('name = "small"\n')
    done = _night(tmp_path, suite, fake, RUN_CODE=str(run), GATE_CODE=str(gate), CALLS=str(tmp_path / "calls"))
    assert done.returncode == code, done.stderr
    called = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert called == ["run", "history", "history", "report", "gate", "clean"]
    assert (tmp_path / "site" / "index.html").read_text() == "page\n"
    assert (tmp_path / "step-summary").read_text() == "the gate's word\n"


@pytest.mark.parametrize(("run", "code"), [(2, 2), (1, 3)])
def test_a_run_that_never_began_keeps_nothing_of_the_night_before(run: int, code: int, tmp_path: Path) -> None:
    """Records restored from a cache, under today's commit, would be a night that never was."""
    fake, suite = tmp_path / "evenbits", tmp_path / "small.toml"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    suite.write_text('name = "small"\n')
    before = tmp_path / "results" / "runs" / "small" / "plan.json"
    before.parent.mkdir(parents=True)
    before.write_text("{}")
    done = _night(tmp_path, suite, fake, RUN_CODE=str(run), UNPLANNED="1", CALLS=str(tmp_path / "calls"))
    assert done.returncode == code
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()] == ["run"]
    assert (tmp_path / "step-summary").read_text() == "The run did not start: see the log.\n"
    assert not (tmp_path / "site" / "index.html").exists()


def _night(folder: Path, suite: Path, command: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "SUITE": str(suite), "BASELINE": str(folder / "baseline.json"),
        "RESULTS": str(folder / "results"), "HISTORY": str(folder / "history"), "SITE": str(folder / "site"),
        "EVENBITS": str(command), "EVENBITS_DISABLE": "mlflow", "GITHUB_STEP_SUMMARY": str(folder / "step-summary"),
        **more,
    }  # fmt: skip
    return subprocess.run([str(SCRIPTS[0])], env=environment, capture_output=True, text=True)


REAL_BUT_RUN = """#!/usr/bin/env bash
if [ "$1" = run ]; then cp "$PLAN" "$4/runs/small"; exit 0; fi
exec "$REAL" "$@"
"""


def test_a_small_night(tmp_path: Path) -> None:
    """The script with evenbits itself, over records that are there: compared, written, put into history."""
    trials = Trials(tmp_path / "results", "small")
    for method, more in (("dense", 0.0), ("rtn", 0.2)):
        trials.add(method, perplexity(np.linspace(0.4, 0.6, 120) + more), finished="2026-01-01T00:00:00+00:00")
    suite, command = tmp_path / "small.toml", tmp_path / "evenbits"
    suite.write_text('name = "small"\n')
    command.write_text(REAL_BUT_RUN)
    command.chmod(0o755)
    made = CliRunner().invoke(
        app, ["gate", str(tmp_path / "baseline.json"), "--suite", "small", "--results", str(tmp_path / "results"),
              "--update", "the first"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    shutil.copy(tmp_path / "results" / "runs" / "small" / "plan.json", tmp_path)
    real = str(Path(sys.executable).with_name("evenbits"))
    done = _night(tmp_path, suite, command, REAL=real, PLAN=str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    assert "<html" in (site / "index.html").read_text()
    assert (site / "summary.md").read_text() == (tmp_path / "step-summary").read_text() != ""
    assert "<testsuite" in (site / "gate.xml").read_text()
    assert {"history.json"} <= {path.name for path in (site / "history").iterdir()}
    (night,) = read_history(site / "nights")
    assert [row.name for row in night.rows] == ["dense", "rtn"]


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_nights_are_kept_on_a_branch_of_their_own(tmp_path: Path) -> None:
    """The first night makes the branch, later ones add to it; one that is there is neither changed nor committed."""
    git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "clone")
    clone, nights = tmp_path / "clone", tmp_path / "nights"
    (clone / "code.py").write_text("code\n")
    (clone / ".gitignore").write_text("*.json\n")
    git(clone, "add", ".")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    git(clone, *identity, "commit", "--quiet", "--message", "first")
    git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/main")
    nights.mkdir()
    for number in (1, 2):
        (nights / f"2026-01-0{number}-abc.json").write_text(f"{number}\n")
        for _ in range(2):
            subprocess.run([SCRIPTS[1], nights, "kept"], cwd=clone, check=True, capture_output=True)
    (nights / "2026-01-01-abc.json").write_text("other\n")
    subprocess.run([SCRIPTS[1], nights, "kept"], cwd=clone, check=True, capture_output=True)
    origin = tmp_path / "origin.git"
    assert git(origin, "ls-tree", "--name-only", "kept").split() == ["2026-01-01-abc.json", "2026-01-02-abc.json"]
    assert git(origin, "show", "kept:2026-01-01-abc.json") == "1\n"
    assert git(origin, "rev-list", "--count", "kept").strip() == "2"
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "worktree", "list").count("\n") == 1


METHODS = {"methods": ["rtn", "kmeans", "gptq"]}  # some of the suite's: choosing settings is most of planning
PLANS = f"""METHODS = {METHODS}
import json, sys
from pathlib import Path

import evenbits
from evenbits import provenance
from evenbits.plan import make_plan
from evenbits.plugins import load_plugins
from evenbits.suite import read_suite

tree, suite, *edits = map(Path, sys.argv[1:])
assert Path(evenbits.__file__).is_relative_to(tree), evenbits.__file__
registry = load_plugins()
read = read_suite(suite, registry, overrides=METHODS)
found = []
for edited in (None, *edits):
    before = None if edited is None else edited.read_text()
    if edited is not None:
        edited.write_text(before + "\\nCHANGED = True\\n")
    for cached in vars(provenance).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    found.append({{trial.title: [trial.id, trial.artifact] for trial in make_plan(read, registry).trials}})
    if edited is not None:
        edited.write_text(before)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str | None]]]:
    """The nightly suite planned in a copy of the tree: as it is, then with one file changed in turn."""
    tree = tmp_path_factory.mktemp("copy")
    for name in ("harness", "plugins"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    edits = [f"plugins/{name}" for name in ("evenbits_kmeans/compressor.py", "evenbits_perplexity/__init__.py")]
    edits.append("harness/evenbits/history.py")
    path = os.pathsep.join(str(tree / name) for name in ("harness", "plugins"))
    words = [sys.executable, "-c", PLANS, str(tree), str(ROOT / "suites" / "nightly.toml")]
    done = subprocess.run(
        [*words, *(str(tree / name) for name in edits)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_unchanged_code_is_not_run_again(plans: list[dict[str, list[str | None]]]) -> None:
    """Ids do not hang on where the code lies, or on when it was written."""
    from evenbits.plan import make_plan

    registry = _registry()
    here = make_plan(read_suite(ROOT / "suites" / "nightly.toml", registry, overrides=METHODS), registry)
    assert {trial.title: [trial.id, trial.artifact] for trial in here.trials} == plans[0]
    assert len(plans[0]) == 7  # two budgets, and the dense model


def test_a_changed_plugin_is_run_again_and_nothing_else(plans: list[dict[str, list[str | None]]]) -> None:
    before, kmeans, perplexity, history = plans
    changed = {title for title, ids in kmeans.items() if ids != before[title]}
    assert changed == {title for title in before if title.startswith("reference kmeans @")}
    assert len(changed) == 2
    assert history == before, "what only reads records decides nothing"
    # another evaluator measures again, on the artifacts that are there
    assert all(ids[0] != before[title][0] and ids[1] == before[title][1] for title, ids in perplexity.items())
