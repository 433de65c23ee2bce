"""The command line as processes: exit codes, one line a mistake, machine-readable reports."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from evenbits import cli

KEYS = {
    "model", "method", "options", "budget", "seed", "recovery", "status", "bits", "bytes", "seconds", "metrics",
    "fingerprint",
}  # fmt: skip


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_run_plan_and_report(evenbits: Any, suites: Any, tmp_path: Path) -> None:
    """One trial done, one failed, one skipped, beside the dense model."""
    methods = '["nf4", { name = "rtn", budget = "free" }, { name = "trouble", budget = "free", options.what = "kill" }]'
    suite = suites.text(methods, top="budgets = [{ centre = 3, window = 0.1 }]")
    done = evenbits.run(suite)
    assert done.returncode == 1
    assert "1 of 4 trials failed" in one_line(done.stderr)
    assert "skip tiny nf4 @ 3: no setting within 3 +- 0.1 linear bits" in done.stdout
    assert "fail tiny trouble seed 0: compress: compress was killed by SIGKILL" in done.stdout

    planned = evenbits("plan", "suite.toml", "--results", "results")
    assert planned.returncode == 0
    assert "skip tiny nf4 @ 3: no setting within" in planned.stdout
    assert "3 trials (2 already recorded), 1 skipped" in planned.stdout

    report = evenbits("report", "suite.toml", "--results", "results", "--format", "json")
    assert report.returncode == 0, report.stderr
    trials = json.loads(report.stdout)
    assert {(trial["method"], trial["status"]) for trial in trials} == {
        ("dense", "done"), ("rtn", "done"), ("trouble", "failed"), ("nf4", "skipped")
    }  # fmt: skip
    assert all(trial.keys() >= KEYS for trial in trials)
    rtn = next(trial for trial in trials if trial["method"] == "rtn")
    assert rtn["bits"].keys() == {"index", "paper", "linear", "model"}
    assert rtn["metrics"]["perplexity"]["value"] > 1
    assert rtn["fingerprint"]["perplexity"]
    for form in ("markdown", "csv"):
        shown = evenbits("report", "suite.toml", "--results", "results", "--format", form)
        assert shown.returncode == 0, shown.stderr
        assert "rtn" in shown.stdout
    table = evenbits("report", "suite.toml", "--results", "results")
    assert table.returncode == 0, table.stderr
    assert "no setting within" in table.stdout + (tmp_path / "results/runs/tiny/report/report.md").read_text()

    record = next((tmp_path / "results/runs/tiny").glob("*/record.json"))
    record.write_text("{")
    damaged = evenbits("report", "suite.toml", "--results", "results", "--format", "json")
    assert damaged.returncode == 2
    assert str(record.relative_to(tmp_path)) in one_line(damaged.stderr)


def test_mistakes_are_one_line_and_exit_2(evenbits: Any, suites: Any, tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(suites.text('["rtm"]', top="budgets = [4]"))
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "evenbits.json").write_text('{"schema": 99}')
    (tmp_path / "file").write_text("")
    (tmp_path / "good.toml").write_text(suites.text())
    for arguments, said in (
        (("plan", path), "unknown method 'rtm'"),
        (("run", path), "unknown method 'rtm'"),
        (("run", tmp_path / "none.toml"), "cannot be read"),
        (("run", "good.toml", "--model", "nowhere"), "nowhere"),
        (("run", "good.toml", "--results", "newer"), "schema 99, newer than"),
        (("report", "good.toml", "--results", "newer"), "schema 99, newer than"),
        (("run", "good.toml", "--results", "file"), "file"),
        (("report", "good.toml", "--results", "nothing"), "no run of suite 'tiny'"),
        (("clean", "--results", "nothing"), "no such results folder"),
    ):
        done = evenbits(*arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert said in one_line(done.stderr), arguments
        assert done.stderr.startswith("error ")
    assert not (tmp_path / "nothing").exists()
    assert not list(tmp_path.glob("results/runs"))


def test_a_plan_says_what_it_takes_and_a_seed_replaces_the_suites(evenbits: Any, suites: Any, tmp_path: Path) -> None:
    text = suites.text('[{ name = "rtn", sizes.bits = 3 }, "kmeans"]', top="budgets = [{ centre = 4.5, window = 2 }]")
    (tmp_path / "suite.toml").write_text(text)
    arguments = ("plan", "suite.toml", "--model", suites.tiny.model, "--seed", "3", "--seed", "5")
    done = evenbits(*arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "note elsewhere: sizes of 1 method left to fit"
    seeds = {(line.split()[1], line.split()[3]) for line in lines if line.startswith(("model  rtn", "model  kmeans"))}
    assert seeds == {("rtn", "3"), ("kmeans", "3"), ("kmeans", "5")}
    assert [line.split()[0] for line in lines[1:6]] == ["download", "disk", "memory", "device", "hours"]
    assert lines[1] == "download  nothing"
    assert lines[4] == "device    cpu, as the suite asks"
    assert "4 trials (0 already recorded), 0 skipped" in lines
    assert evenbits(*arguments[:4], "--seed", "-1").returncode == 2
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("target", ["evenbits.json", "digests.json", "plan.json"])
def test_full_disk(
    here: Any, suites: Any, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.replace

    def replace(source: Any, name: Any) -> None:
        if Path(name).name == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))
        real(source, name)

    here.read(suites.text())
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(cli.err, "file", None)
    monkeypatch.setattr(
        sys, "argv", ["evenbits", "run", str(here.folder / "suite.toml"), "--results", str(here.folder)]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "No space left on device" in one_line(capsys.readouterr().err)
    assert not list(here.folder.rglob(f".{target}.*"))


def test_without_the_extra_for_plots(evenbits: Any, suites: Any, tmp_path: Path) -> None:
    """All but the plots is there, and a run that went well says so."""
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "matplotlib.py").write_text("raise ModuleNotFoundError('matplotlib', name='matplotlib')")
    evenbits.path = (*evenbits.path, tmp_path / "absent")
    (tmp_path / "suite.toml").write_text(suites.text('[{ name = "rtn", budget = "free" }]'))
    done = evenbits("run", "suite.toml", "--results", "results")
    assert done.returncode == 0, done.stderr
    assert 'pip install "evenbits[plots]"' in one_line(done.stderr)
    written = {path.name for path in (tmp_path / "results/runs/tiny/report").iterdir()}
    assert written == {"report.md", "report.csv", "report.json", "layers.md", "layers.csv"}


@pytest.mark.parametrize("command", ["run", "plan", "report", "compare", "plugins", "clean"])
def test_help(evenbits: Any, command: str) -> None:
    done = evenbits(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
