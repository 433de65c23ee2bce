"""SIGKILL of a run at any moment: the same records in the end, and nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from evenbits.artifact import Artifact
from evenbits.store import Results


def session_members(run: str) -> list[psutil.Process]:
    """Living processes that a run started: they have its mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("EVENBITS_TEST_RUN") == run:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def check_whole(root: Path) -> None:
    """Whatever stands under its final name is whole."""
    for folder in root.glob("artifacts/[!.]*"):
        Artifact(folder)  # compares all hashes
    store = Results(root)
    for path in root.glob("runs/tiny/*/record.json"):
        record = store.record("tiny", path.parent.name)
        assert record is not None
        assert all(metric.items is None or (path.parent / metric.items).is_file() for metric in record.metrics)


def wait_for_work(root: Path, process: Any) -> None:
    """Until a child of this run writes to its log."""

    def written() -> int:
        return sum(path.stat().st_size for path in root.glob("runs/tiny/*/log.txt"))

    before = written()
    while written() == before and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_at_any_moment(evenbits: Any, suites: Any, tmp_path: Path) -> None:
    suite = suites.text(top="limits = { workers = 2 }\nseeds = [0, 1, 2]")
    begun = time.monotonic()
    undisturbed = evenbits.run(suite, "undisturbed")
    duration = time.monotonic() - begun
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = {record.trial: record.comparable() for record in evenbits.records("undisturbed")}

    draw = random.Random(0)
    killed, folders = 0, [tmp_path / "results-0"]
    while killed < 10:
        evenbits.environment = {"EVENBITS_TEST_RUN": str(killed)}
        results = folders[-1]
        process = evenbits.popen("run", tmp_path / "suite.toml", "--results", results, "--no-report")
        if killed % 4 == 3:  # anywhere in the run; else once children are at work, where there is more to break
            moment = duration * draw.uniform(0.1, 0.8)
        else:
            wait_for_work(results, process)
            moment = draw.uniform(0, 1)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it got to its end: begin anew
            folders.append(tmp_path / f"results-{len(folders)}")
            continue
        assert process.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 1
        while (left := session_members(str(killed))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == [], f"kill {killed}, a second later: {[p.cmdline() for p in left]}"
        killed += 1
        check_whole(results)
        with Results(results).lock():
            pass

    for folder in folders:
        done = evenbits.run(suite, folder.name)
        assert done.returncode == 0, done.stderr
        assert {record.trial: record.comparable() for record in evenbits.records(folder.name)} == expected
        check_whole(folder)
        assert sorted(folder.rglob(".*")) == [folder / ".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(evenbits: Any, suites: Any, tmp_path: Path, order: signal.Signals) -> None:
    """A polite signal ends the run soon, with its children, and a finished trial is kept."""
    (tmp_path / "suite.toml").write_text(suites.trouble("sleep"))
    evenbits.environment = {"EVENBITS_TEST_RUN": order.name}
    process = evenbits.popen("run", tmp_path / "suite.toml", "--results", tmp_path / "results", "--no-report")
    try:
        deadline = time.monotonic() + 60
        while not any(
            "compress tiny sleep" in path.read_text() for path in tmp_path.glob("results/runs/tiny/*/log.txt")
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(order)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    if order is signal.SIGINT:
        assert process.returncode == 130
        assert error.strip().count("\n") == 0
        assert "finished trials are kept" in error
    time.sleep(1)
    assert session_members(order.name) == []
    assert [record.label for record in evenbits.records() if record.status == "done"] == ["dense"]
