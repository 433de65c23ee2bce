"""Runs: what comes of good trials, bad input and children that die."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest

from evenbits import executor as executors
from evenbits.errors import ArtifactError
from evenbits.executor import LocalExecutor, StageOutcome
from evenbits.findings import take
from evenbits.job import Job, StageResult
from evenbits.measure import Measurement
from evenbits.plan import Stage
from evenbits.plugins import load_plugins
from evenbits.record import read_items, read_record
from evenbits.run import UNPROFILED, Run
from evenbits.store import Results


def comparable(records: list[Any]) -> list[dict[str, Any]]:
    return [record.comparable() for record in records]


def by_label(records: list[Any]) -> dict[str, Any]:
    return {record.label: record for record in records}


# -- equal runs, resumed runs -----------------------------------------------------------------------------------


def test_same_suite_gives_the_same_records(here: Any, suites: Any) -> None:
    first, _ = here.run(suites.text(top="seeds = [0, 1]"), "one")
    second, _ = here.run(suites.text(top="seeds = [0, 1]\nlimits = { workers = 2 }"), "two")
    assert [record.status for record in first] == ["done"] * len(first)
    assert len(first) == 1 + 1 + 2 + 2 + 1  # dense, rtn and nf4 do not depend on the seed
    assert comparable(first) == comparable(second)
    for a, b in zip(first, second, strict=True):
        items = [read_items(here.folder / n / "runs" / "tiny" / r.trial, r.metrics[0]) for n, r in
                 (("one", a), ("two", b))]  # fmt: skip
        assert items[0] is not None
        assert np.array_equal(items[0], cast(Any, items[1]))


def test_second_run_does_nothing(here: Any, suites: Any) -> None:
    first, _ = here.run(suites.text())
    logs = {path: path.read_text() for path in here.folder.glob("results/runs/tiny/*/log.txt")}
    again, notes = here.run(suites.text())
    assert again == first
    assert notes.stages == []
    assert {path: path.read_text() for path in here.folder.glob("results/runs/tiny/*/log.txt")} == logs


def test_other_evaluator_options_compress_nothing(here: Any, suites: Any) -> None:
    first, _ = here.run(suites.text())
    stamps = {path: path.stat().st_mtime_ns for path in here.folder.glob("results/artifacts/*/manifest.json")}
    assert len(stamps) == 4
    second, notes = here.run(suites.text().replace("options.context = 32", "options.context = 16"))
    assert {stage for _, stage in notes.stages} == {"evaluate"}
    assert {path: path.stat().st_mtime_ns for path in here.folder.glob("results/artifacts/*/manifest.json")} == stamps
    assert [record.artifact for record in second] == [record.artifact for record in first]
    assert all(a.trial != b.trial for a, b in zip(first, second, strict=True))
    assert all("compress" in record.seconds for record in second if record.artifact)


def test_failed_trials_are_tried_again(here: Any, suites: Any) -> None:
    methods = '[{ name = "rtn", budget = "free" }]'
    failed, _ = here.run(suites.text(methods, top="limits = { memory_gib = 0.01 }"))
    assert [record.failure.kind for record in failed] == ["memory", "memory"]
    mended, notes = here.run(suites.text(methods))
    assert [record.status for record in mended] == ["done", "done"]
    assert [record.trial for record in mended] == [record.trial for record in failed]
    assert notes.stages == [("dense", "evaluate"), ("rtn", "compress"), ("rtn", "evaluate")]
    again, notes = here.run(suites.text(methods))
    assert again == mended


def test_predicted_bits_are_the_measured_ones(here: Any, suites: Any) -> None:
    methods = """[
        "rtn", "gptq", "kmeans", "nf4",
        { name = "gptq", label = "ordered", options = { act_order = true, group_size = 8 } },
        { name = "rtn", label = "row", budget = "free", options = { group_size = 24, symmetric = false, bits = 3 } },
        { name = "kmeans", label = "model", budget = "free", options = { d = 5, codebook_size = 8, scope = "model" } },
        { name = "nf4", label = "double", budget = "free", options = { double_quant = true } },
    ]"""
    records, _ = here.run(suites.text(methods, top="budgets = [{ centre = 4.5, window = 0.6 }]"))
    done = [record for record in records if record.predicted is not None]
    assert len(done) == 8
    for record in done:
        assert record.status == "done", record.failure
        assert record.ledger.bits.linear == record.predicted.linear, record.label
        assert record.ledger.bits.index == pytest.approx(record.predicted.index, rel=0.3)
        assert record.within_budget is (True if record.budget else None)


# -- children that die ------------------------------------------------------------------------------------------


def test_children_that_die_are_failed_records(here: Any, suites: Any) -> None:
    whats = ("kill", "segfault", "raise", "exit", "print", "wrong-shape")
    records, _ = here.run(suites.trouble(*whats, top="limits = { workers = 2 }"))
    found = by_label(records)
    assert [found[name].status for name in ("dense", "rtn", "print")] == ["done"] * 3
    failures = {name: found[name].failure for name in whats if name != "print"}
    assert {name: (f.kind, f.stage, f.signal) for name, f in failures.items()} == {
        "kill": ("signal", "compress", "SIGKILL"),
        "segfault": ("signal", "compress", "SIGSEGV"),
        "raise": ("error", "compress", None),
        "exit": ("error", "compress", None),
        "wrong-shape": ("error", "compress", None),
    }
    assert failures["raise"].message == "model.layers.1.mlp.down_proj: RuntimeError: first line second line"
    assert "in trouble" in failures["raise"].traceback
    assert "exit code 3" in failures["exit"].message
    assert "model.layers.0.self_attn.q_proj" in failures["wrong-shape"].message
    log = (here.folder / "results/runs/tiny" / found["print"].trial / "log.txt").read_text()
    assert "hello from print" in log
    assert "hello from stderr" in log
    assert "hello from the descriptor" in log
    assert {path.name for path in here.folder.glob("results/artifacts/*")} == {
        found["rtn"].artifact, found["print"].artifact
    }  # fmt: skip


def test_limits_of_time_and_memory(here: Any, suites: Any) -> None:
    records, _ = here.run(suites.trouble("sleep", top="limits = { timeout_seconds = 4 }"), "time")
    failure = by_label(records)["sleep"].failure
    assert (failure.kind, failure.stage, failure.signal) == ("timeout", "compress", "SIGKILL")
    assert by_label(records)["rtn"].status == "done"
    records, _ = here.run(suites.trouble("memory", top="limits = { memory_gib = 1.5, timeout_seconds = 60 }"), "memory")
    failure = by_label(records)["memory"].failure
    assert (failure.kind, failure.stage) == ("memory", "compress"), failure.message
    assert by_label(records)["rtn"].status == "done"


def test_what_a_killed_child_started_dies_too(here: Any, suites: Any) -> None:
    here.run(suites.trouble("offspring", top="limits = { timeout_seconds = 4 }"))
    left = [process for process in psutil.process_iter(["cmdline"]) if "evenbits-offspring" in
            " ".join(process.info["cmdline"] or [])]  # fmt: skip
    assert left == []


def test_a_child_that_does_not_end_after_its_result(here: Any, suites: Any) -> None:
    """A plugin's thread keeps the process alive; the result is there and the run goes on."""
    begun = time.monotonic()
    records, _ = here.run(suites.trouble("linger", top="limits = { timeout_seconds = 30 }"))
    assert [record.status for record in records] == ["done"] * 3
    assert time.monotonic() - begun < 100


@pytest.mark.parametrize("what", ["odd-details", "nan", "raise", "kill"])
def test_an_evaluator_that_misbehaves(here: Any, suites: Any, what: str) -> None:
    tables = f'[[evaluators]]\nname = "trouble-eval"\noptions.what = "{what}"'
    records, _ = here.run(suites.text('[{ name = "rtn", budget = "free" }]', tables=tables))
    assert [record.status for record in records] == ["failed", "failed"]
    assert {record.failure.stage for record in records} == {"evaluate"}
    if what in ("odd-details", "nan"):
        assert "trouble" in records[0].failure.message


# -- profilers alone --------------------------------------------------------------------------------------------


def spans_of(here: Any, suites: Any, top: str) -> list[tuple[str, float, float]]:
    """(kind, begun, ended) of the evaluators and profilers of five trials, in the order in which they began."""
    spans = here.folder / "spans.txt"
    tables = "".join(
        f'[[{kind}s]]\nname = "span-{name}"\noptions.file = "{spans}"\noptions.kind = "{name}"\n'
        f"options.seconds = {seconds}\n"
        for kind, name, seconds in (("evaluator", "eval", 1.2), ("profiler", "profile", 0.1))
    )
    records, _ = here.run(suites.text(top=top, tables=tables))
    assert {record.status for record in records} == {"done"}
    assert {len(record.metrics) for record in records} == {len(records[0].metrics)}
    lines = [line.split() for line in spans.read_text().splitlines()]
    found = sorted((float(begun), float(ended), kind) for kind, begun, ended in lines)
    assert len(found) == 10
    return [(kind, begun, ended) for begun, ended, kind in found]


def test_nothing_runs_beside_a_profiler(here: Any, suites: Any) -> None:
    found = spans_of(here, suites, "limits = { workers = 3 }")
    overlaps = [
        (a[0], b[0]) for i, a in enumerate(found) for b in found[i + 1 :] if a[1] < b[2] and b[1] < a[2]
    ]  # fmt: skip
    assert ("eval", "eval") in overlaps  # they do share the machine, or the test shows nothing
    assert set(overlaps) == {("eval", "eval")}
    assert [kind for kind, *_ in found] == ["eval"] * 5 + ["profile"] * 5  # fewer than are profiled together


def test_trials_wait_for_each_other_to_be_profiled(here: Any, suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenbits.run.PROFILES_AT_ONCE", 2)
    kinds = "".join(kind[0] for kind, *_ in spans_of(here, suites, "limits = { workers = 2 }"))
    assert kinds.endswith("p")
    assert max(kinds.count("e", 0, i) - kinds.count("p", 0, i) for i in range(11)) <= 3  # two waiting, one at work
    assert "pp" in kinds


def test_one_worker_profiles_at_once(here: Any, suites: Any) -> None:
    assert [kind for kind, *_ in spans_of(here, suites, "limits = { workers = 1 }")] == ["eval", "profile"] * 5


def test_a_closed_executor_begins_nothing(tmp_path: Path) -> None:
    executor = LocalExecutor()
    executor.close()
    outcome = executor.run(cast(Any, SimpleNamespace(stage="profile")), tmp_path / "log.txt", lambda *_: None)
    assert outcome.failure is not None
    assert "stopped" in outcome.failure.message


class Asleep:
    """Keeps the process that unpickles it busy."""

    def __reduce__(self) -> Any:
        return time.sleep, (600,)


def test_a_child_that_was_being_started_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the fork server still imports torch: the child is there only after `close` has looked."""
    executor = LocalExecutor()
    hide = executors._without_main

    @contextlib.contextmanager
    def start() -> Iterator[None]:
        with hide():
            yield
        executor.close()

    monkeypatch.setattr(executors, "_without_main", start)
    limits = SimpleNamespace(timeout_seconds=60, memory_gib=None)
    job = SimpleNamespace(stage="evaluate", trial=SimpleNamespace(limits=limits, asleep=Asleep()))
    outcome = executor.run(cast(Any, job), tmp_path / "log.txt", lambda *_: None)
    assert outcome.failure is not None
    assert (outcome.failure.kind, outcome.failure.signal) == ("signal", "SIGKILL")


class Sleeping:
    """A child as the executor watches one: a process that does nothing, and what is said in its name."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "60"], start_new_session=True)
        self.pid = self.process.pid
        self.sentinel, self._ends = Pipe(duplex=False)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self, seconds: float) -> None:
        self.process.wait(seconds)


@pytest.mark.parametrize("prepares", [True, False])
def test_what_is_prepared_for_all_trials_is_within_no_limit(prepares: bool) -> None:
    """An environment takes minutes to make; the time of the stage counts from then on."""
    child, (receiver, sender) = Sleeping(), Pipe(duplex=False)
    limits = SimpleNamespace(timeout_seconds=0.4, memory_gib=None)
    job: Any = SimpleNamespace(stage="compress", trial=SimpleNamespace(limits=limits))

    def report(done: int, total: int, what: str) -> None:
        time.sleep(1.0)
        sender.send(("limits", True))
        sender.send(("result", what))

    sender.send(("limits", not prepares))
    sender.send(("progress", (0, 0, "environment")))
    try:
        final, _, failure = LocalExecutor()._watch(child, receiver, job, report, time.monotonic())
    finally:
        child.process.kill()
        child.process.wait()
    if prepares:
        assert (final, failure) == (("result", "environment"), None)
    else:
        assert failure is not None
        assert (final, failure.kind) == (None, "timeout")


def test_a_display_that_fails_leaves_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = LocalExecutor()
    children: list[Any] = []

    def watch(child: Any, *_: Any) -> None:
        children.append(child)
        raise ValueError("no terminal")

    monkeypatch.setattr(executor, "_watch", watch)
    job = SimpleNamespace(stage="evaluate", trial=SimpleNamespace(asleep=Asleep()))
    with pytest.raises(ValueError, match="no terminal"):
        executor.run(cast(Any, job), tmp_path / "log.txt", lambda *_: None)
    assert not children[0].is_alive()


# -- what waits to be profiled ----------------------------------------------------------------------------------


def profiled(suites: Any, evaluated: Path, spans: Path, seconds: float) -> str:
    """Two trials side by side whose evaluators and profilers leave a line each."""
    tables = "".join(
        f'[[{kind}s]]\nname = "span-{name}"\noptions.file = "{path}"\noptions.kind = "{name}"\n'
        f"options.seconds = {seconds if name == 'profile' else 0}\n"
        for kind, name, path in (("evaluator", "eval", evaluated), ("profiler", "profile", spans))
    )
    text: str = suites.text('[{ name = "rtn", budget = "free" }]', top="limits = { workers = 2 }", tables=tables)
    return text


@pytest.mark.slow
def test_stopped_while_trials_are_profiled(evenbits: Any, here: Any, suites: Any, tmp_path: Path) -> None:
    """Ctrl-C ends the run at once; what was evaluated is kept, and only profiled when the run is resumed."""
    evaluated, spans, suite = tmp_path / "evaluated.txt", tmp_path / "spans.txt", tmp_path / "suite.toml"
    text = profiled(suites, evaluated, spans, 3)
    suite.write_text(text)
    process = evenbits.popen("run", suite, "--results", tmp_path / "results", "--no-report")
    try:
        deadline = time.monotonic() + 100
        logs = list[Path]()
        while not any("== profile" in path.read_text() for path in logs):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
            logs = list(tmp_path.glob("results/runs/tiny/*/log.txt"))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert not spans.exists()  # neither the profiler at work nor the one that waited for it came to its end
    waiting = evenbits.records()
    assert [(record.status, record.failure.message) for record in waiting] == [("failed", UNPROFILED)] * 2
    assert all(record.metric("perplexity") is not None for record in waiting)
    records, _ = here.run(text)
    assert len(evaluated.read_text().splitlines()) == len(spans.read_text().splitlines()) == 2
    for before, after in zip(waiting, records, strict=True):
        assert after.status == "done"
        assert after.metrics == before.metrics
        assert (after.started, after.seconds["evaluate"]) == (before.started, before.seconds["evaluate"])
        assert read_items(tmp_path / "results/runs/tiny" / after.trial, after.metrics[0]) is not None


def test_a_profiler_that_fails_costs_no_evaluation(here: Any, suites: Any) -> None:
    evaluated, spans = here.folder / "evaluated.txt", here.folder / "later" / "spans.txt"
    text = profiled(suites, evaluated, spans, 0)
    failed, _ = here.run(text)
    assert [record.failure.stage for record in failed] == ["profile"] * 2  # its file has no folder
    spans.parent.mkdir()
    folder = here.folder / "results/runs/tiny" / failed[1].trial
    (folder / failed[1].metrics[0].items).unlink()  # of this one not all is there
    records, notes = here.run(text)
    assert [record.status for record in records] == ["done"] * 2
    assert set(notes.stages) == {("dense", "profile"), ("rtn", "evaluate"), ("rtn", "profile")}
    assert len(evaluated.read_text().splitlines()) == 3
    assert [record.metrics for record in records] == [record.metrics for record in failed]
    assert records[1].comparable() == read_record(folder / "record.json").comparable()


class Scripted:
    """An executor of another kind: every stage that measures finds what it is told to."""

    workers = 2

    def __init__(self, **found: Sequence[Measurement]) -> None:
        self.found = found

    def run(self, job: Job, log: Path, report: Any) -> StageOutcome:
        result = StageResult(seconds=1.0)
        for finding in self.found.get(job.stage, ()):
            take(result, Stage("scripted", {}, ""), finding)
        return StageOutcome(result, None, 1.0, 0)

    def close(self) -> None: ...


class Chained(Scripted):
    """Makes what is missing of a chain, 10 seconds a link; the first link takes 7 bytes, later ones 5."""

    def run(self, job: Job, log: Path, report: Any) -> StageOutcome:
        missing = [key for key in job.trial.chain if not (job.artifacts / key / "manifest.json").is_file()]
        for key in missing:
            (job.artifacts / key).mkdir(parents=True)
            (job.artifacts / key / "manifest.json").touch()
        peak = 7 if missing[:1] == list(job.trial.chain[:1]) else 5
        seconds = 10.0 * len(missing) if job.stage == "compress" else 1.0
        return StageOutcome(StageResult(seconds=seconds, device_peak_bytes=10 * peak), None, seconds, peak)


@pytest.mark.parametrize("first", ["plain", "tuned"])
def test_what_compressing_took_counts_all_links(here: Any, suites: Any, first: str) -> None:
    """Whoever made the first link; a peak that nobody measured by itself is left out."""
    tuned = '{ name = "rtn", label = "tuned", budget = "free", recovery = ["distill"] }'
    plain = '{ name = "rtn", label = "plain", budget = "free" }'
    methods = f"[{', '.join([plain, tuned] if first == 'plain' else [tuned, plain])}]"
    plan = here.plan(suites.text(methods))
    records = Run(plan, load_plugins(), Results(here.folder / "results"), Chained()).go()
    found = by_label(records)
    assert found["tuned"].seconds["compress"] == 20
    assert (found["tuned"].peaks["compress"], found["tuned"].peaks["compress_device"]) == (7, 70)
    assert found["plain"].seconds.get("compress") == (10 if first == "plain" else None)
    assert found["plain"].peaks.get("compress") == (7 if first == "plain" else None)


@pytest.mark.parametrize("of", ["record.json", "choices.jsonl"])
def test_a_disk_that_fills_while_a_record_is_written(
    here: Any, suites: Any, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """One line, no half files, and what a trial that waits to be profiled was evaluated to is good for the next run."""
    found = Measurement("acc", 1.0, "points", "higher", items=np.ones(2), attachments={"choices.jsonl": b"{}"})
    cost = Measurement("ms", 1.0, "ms", "lower", volatile=True, attachments={"times.txt": b"1"})
    text = profiled(suites, here.folder / "e", here.folder / "p", 0)
    plan, results = here.plan(text), Results(here.folder / "results")
    real, calls = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal calls
        calls += Path(target).name == of
        if Path(target).name == of and calls > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(ArtifactError, match="the disk is full"):
            Run(plan, load_plugins(), results, Scripted(evaluate=[found], profile=[cost])).go()
    assert list(here.folder.glob("results/runs/tiny/*/.*")) == []
    kept = [read_record(path) for path in here.folder.glob("results/runs/tiny/*/record.json")]
    assert [record.failure.message for record in kept if record.failure] == [UNPROFILED]
    for record in Run(plan, load_plugins(), results, Scripted(evaluate=[found], profile=[cost])).go():
        folder = results.trial_folder("tiny", record.trial)
        assert [metric.name for metric in record.metrics] == ["acc", "ms"]
        assert {path.name for path in folder.iterdir()} >= {"items-acc.npy", "choices.jsonl", "times.txt"}


@pytest.mark.parametrize(("name", "file"), [("same", "p.txt"), ("other", "e.txt")])
def test_a_profiler_cannot_overwrite_an_evaluators_numbers(here: Any, suites: Any, name: str, file: str) -> None:
    def found(name: str, file: str) -> list[Measurement]:
        return [Measurement(name, 1.0, "points", "higher", items=np.ones(2), attachments={file: b"x"})]

    plan = here.plan(profiled(suites, here.folder / "e", here.folder / "p", 0))
    executor = Scripted(evaluate=found("same", "e.txt"), profile=found(name, file))
    for record in Run(plan, load_plugins(), Results(here.folder / "results"), executor).go():
        assert record.failure is not None
        assert "of an evaluator and one of a profiler" in record.failure.message
        assert [metric.name for metric in record.metrics] == ["same"]


# -- bad input --------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_an_artifact(here: Any, suites: Any) -> None:
    first, _ = here.run(suites.text())
    artifact = here.folder / "results/artifacts" / by_label(first)["rtn"].artifact
    damaged = artifact / "blocks/block-0001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-7] ^= 1
    damaged.write_bytes(data)
    records, _ = here.run(suites.text().replace("options.context = 32", "options.context = 16"))
    found = by_label(records)
    assert found["rtn"].status == "failed"
    assert found["rtn"].failure.kind == "error"
    assert found["rtn"].failure.stage == "evaluate"
    assert str(damaged) in found["rtn"].failure.message
    assert {name: record.status for name, record in found.items() if name != "rtn"} == dict.fromkeys(
        ("dense", "gptq", "kmeans", "nf4"), "done"
    )


@pytest.mark.parametrize(("which", "stage", "labels"), [
    ("train", "compress", {"gptq"}),
    ("test", "evaluate", {"dense", "rtn", "gptq", "kmeans", "nf4"}),
])  # fmt: skip
def test_text_that_is_too_short(here: Any, suites: Any, tiny: Any, which: str, stage: str, labels: set[str]) -> None:
    short = here.folder / "short.txt"
    short.write_text("w1 w2 w3")
    records, _ = here.run(suites.text().replace(str(getattr(tiny, which)), str(short)))
    failed = {record.label: record.failure for record in records if record.status == "failed"}
    assert failed.keys() == labels
    for failure in failed.values():
        assert failure.stage == stage
        assert failure.traceback is None  # one of ours: the message says all
        assert "3 tokens" in failure.message


def test_a_damaged_record_is_measured_again(here: Any, suites: Any) -> None:
    first, _ = here.run(suites.text())
    path = here.folder / "results/runs/tiny" / first[1].trial / "record.json"
    path.write_text(path.read_text()[:100])
    again, notes = here.run(suites.text())
    assert len(notes.notices) == 1
    assert str(path) in notes.notices[0]
    assert notes.stages == [("rtn", "evaluate")]
    assert comparable(again) == comparable(first)


def test_a_record_of_a_newer_schema_is_kept(here: Any, suites: Any) -> None:
    first, _ = here.run(suites.text())
    path = here.folder / "results/runs/tiny" / first[1].trial / "record.json"
    newer = path.read_text().replace('"schema_version": 1', '"schema_version": 2').replace('"schema_version":1', "")
    path.write_text(newer)
    with pytest.raises(ArtifactError, match="schema 2 is newer"):
        here.run(suites.text())
    assert path.read_text() == newer


# -- full disk --------------------------------------------------------------------------------------------------


def test_full_disk_for_a_record(here: Any, suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent cannot write the third record: one line, and the first two are whole."""
    written: list[Path] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "record.json":
            if len(written) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            written.append(Path(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ArtifactError, match="disk is full"):
        here.run(suites.text())
    monkeypatch.undo()
    assert sorted(here.folder.glob("results/runs/tiny/*/record.json")) == sorted(written)
    assert list(here.folder.glob("results/runs/tiny/*/.*")) == []


def test_full_disk_for_an_artifact(evenbits: Any, suites: Any, tmp_path: Path) -> None:
    """Files larger than 18 KiB cannot be written, so float16 blocks are too large: that trial fails with the reason."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (18 * 1024, resource.RLIM_INFINITY))

    methods = '[{ name = "trouble", label = "large", budget = "free" }, { name = "rtn", budget = "free" }]'
    done = evenbits.run(suites.text(methods), preexec_fn=small_files)
    found = by_label(evenbits.records())
    assert done.returncode == 1, done.stderr
    assert found["dense"].status == found["rtn"].status == "done"
    assert found["large"].failure.stage == "compress"
    assert "File too large" in found["large"].failure.message
    assert len(list(tmp_path.glob("results/artifacts/*"))) == 1
    done = evenbits.run(suites.text(methods))
    assert done.returncode == 0, done.stderr
    assert {record.status for record in evenbits.records()} == {"done"}


# -- what plugins are told --------------------------------------------------------------------------------------


def test_what_plugins_hear_when_and_that_theirs_raise(here: Any, suites: Any) -> None:
    from types import ModuleType

    from evenbits.hookspecs import hookimpl
    from evenbits.plugins import PluginInfo

    def fail(*arguments: Any) -> None:
        raise ValueError("no\nserver")

    seen: list[str] = []
    broken, listener = ModuleType("broken"), ModuleType("listener")
    for name, function in {
        "on_plan": lambda plan: fail(),
        "on_trial_start": lambda trial: fail(),
        "on_record": lambda record, folder, context: fail(),
        "on_finish": lambda records: fail(),
    }.items():
        setattr(broken, name, hookimpl(cast(Any, function)))
    listener.on_record = hookimpl(lambda record, context: seen.append(f"{context.suite_name} {record.label}"))  # type: ignore[attr-defined]
    listener.on_finish = hookimpl(lambda records: seen.append("finish"))  # type: ignore[attr-defined]
    registry = load_plugins()
    for module in (broken, listener):
        registry.manager.register(module, module.__name__)
        registry.plugins.append(PluginInfo(module.__name__, module.__name__, "test", "1", "ok"))
    suite = suites.text('[{ name = "rtn", budget = "free" }]')
    records, notes = here.run(suite, registry=registry, conclude=lambda: seen.append("report"))
    assert [record.status for record in records] == ["done", "done"]
    assert seen == ["tiny dense", "tiny rtn", "report", "finish"]
    assert len(notes.notices) == 1 + 2 + 2 + 1
    assert notes.notices[0] == "plugin broken (test 1): on_plan: ValueError: no server"

    def stopped() -> None:
        raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):  # in the report: the records are there, so their mirror is ended
        here.run(suite, registry=registry, conclude=stopped)
    assert seen == ["tiny dense", "tiny rtn", "finish"]


def test_the_fork_server_dies(here: Any, suites: Any) -> None:
    """Killed with all its children: the trials at work fail, later ones get a new server."""
    import threading
    from multiprocessing import forkserver

    def kill() -> None:
        for _ in range(600):
            time.sleep(0.1)
            if any(
                "compress tiny sleep" in path.read_text() for path in here.folder.glob("results/runs/tiny/*/log.txt")
            ):
                break
        time.sleep(0.3)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]

    killer = threading.Thread(target=kill)
    killer.start()
    records, _ = here.run(suites.trouble("sleep", top="limits = { timeout_seconds = 90 }"))
    killer.join()
    found = by_label(records)
    assert found["sleep"].status == "failed"
    assert found["sleep"].failure.kind != "timeout"
    assert found["rtn"].status == "done"


def test_results_are_found_by_the_store(here: Any, suites: Any) -> None:
    records, _ = here.run(suites.text())
    stored, folders = Results(here.folder / "results").records("tiny")
    assert stored == records
    assert all((folders[record.trial] / "log.txt").is_file() for record in records)


def test_two_runs_on_one_folder(here: Any, evenbits: Any, suites: Any) -> None:
    with Results(here.folder / "results").lock():
        done: subprocess.CompletedProcess[str] = evenbits.run(suites.text())
        assert done.returncode == 2
        assert done.stderr.strip().count("\n") == 0
        assert f"is in use by process {os.getpid()}" in done.stderr
    assert not (here.folder / "results" / "runs").exists()


def test_one_evaluator_twice_under_labels(here: Any, suites: Any) -> None:
    again = f"""
[[evaluators]]
name = "perplexity"
label = "train"
options.corpus = {{ name = "text", path = "{suites.tiny.train}" }}
options.context = 32
"""
    records, _ = here.run(suites.text('[{ name = "rtn", budget = "free" }]', tables=again))
    for record in records:
        assert [metric.name for metric in record.metrics] == ["perplexity", "train_perplexity"]
        assert record.metrics[0].fingerprint != record.metrics[1].fingerprint
