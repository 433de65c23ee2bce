"""The loop over trials: compress, measure, record, announce; resumes where it stopped."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from evenbits.environment import describe_environment
from evenbits.errors import ArtifactError
from evenbits.executor import Executor, StageFailure, StageOutcome
from evenbits.files import write_atomically
from evenbits.plan import Plan, Skip, Stage, Trial, budget_facts
from evenbits.plugins import Registry
from evenbits.record import Failure, Record, SampleFacts, write_record
from evenbits.store import Results
from evenbits.suite import Suite

COST = "cost.json"
PROFILES_AT_ONCE = 8
"""Profilers need the machine alone, and each time the other workers wait for the longest stage under way. So trials
side by side wait for each other and are profiled together; a killed run measures the waiting ones again."""


@dataclass(frozen=True)
class RunContext:
    """What event hooks are told about a run."""

    results: Path
    folder: Path
    suite: Suite
    environment: Mapping[str, Any]
    notice: Callable[[str], None]

    @property
    def suite_name(self) -> str:
        return self.suite.name

    def plugin_options(self, name: str) -> Mapping[str, Any]:
        """The suite's [plugins.NAME] table."""
        return self.suite.plugins.get(name, {})

    def artifact_folder(self, record: Record) -> Path | None:
        if record.artifact is None:
            return None
        folder = Results(self.results).artifacts / record.artifact
        return folder if folder.is_dir() else None


class Display:
    """Where a run says how it goes; this one says nothing."""

    def notice(self, message: str) -> None: ...

    def begin(self, total: int, done: int) -> None: ...

    def stage(self, trial: Trial, stage: str, done: int, total: int, what: str) -> None: ...

    def finished(self, record: Record, *, resumed: bool) -> None: ...

    def end(self) -> None: ...


@dataclass
class Run:
    """One run of a plan on a results folder that the caller has locked."""

    plan: Plan
    registry: Registry
    results: Results
    executor: Executor
    display: Display = field(default_factory=Display)

    def __post_init__(self) -> None:
        suite = self.plan.suite
        self.context = RunContext(
            results=self.results.root,
            folder=self.results.run_folder(suite.name),
            suite=suite,
            environment=describe_environment(),
            notice=self.display.notice,
        )
        self._artifact_locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._announcing = threading.Lock()
        self._stopping = threading.Event()
        self._records: dict[str, Record] = {}
        self._to_profile: list[_Stages] = []

    def go(self) -> list[Record]:
        """All records in the plan's order. Raises ArtifactError when records cannot be written (a full disk)."""
        suite = self.plan.suite
        if left := self.results.remove_leftovers():
            self.display.notice(f"removed {left} unfinished file(s) of a run that was killed")
        artifacts = [key for trial in self.plan.trials for key in trial.chain]
        self.results.write_plan(suite.name, self.plan.order, artifacts)
        records = self._records
        found = {trial.id: self._found(trial) for trial in self.plan.trials}
        self.display.begin(len(self.plan.order), 0)
        self._announce("on_plan", plan=self.plan)
        for skip in self.plan.skips:
            records[skip.id] = self._skipped(skip)
        for trial_id, record in found.items():
            if record is not None:
                records[trial_id] = record
                self._publish(record, resumed=True)
        pending = [trial for trial in self.plan.trials if trial.id not in records]
        with ThreadPoolExecutor(max_workers=self.executor.workers) as pool:
            futures = [pool.submit(self._trial, trial) for trial in pending]
            try:
                for future in futures:
                    future.result()
                self._profile(self._to_profile)
            except BaseException:
                self._stopping.set()
                for future in futures:
                    future.cancel()
                self.executor.close()
                raise
            finally:
                self.display.end()
        ordered = [records[trial_id] for trial_id in self.plan.order]
        self._announce("on_finish", records=ordered)
        return ordered

    def _found(self, trial: Trial) -> Record | None:
        """A record to keep. Failed ones are tried again; a damaged one is set aside with a notice."""
        try:
            record = self.results.record(trial.suite, trial.id)
        except ArtifactError as error:
            if "newer" in str(error):
                raise
            self.display.notice(f"{error}: measured again")
            return None
        return record if record is not None and record.status == "done" else None

    # -- one trial ------------------------------------------------------------------------------------------

    def _trial(self, trial: Trial) -> None:
        """Compress and evaluate; then profile, with those that wait for it once they are enough."""
        self._announce("on_trial_start", trial=trial)
        stages = _Stages(self, trial, self.results.trial_folder(trial.suite, trial.id) / "log.txt")
        failure = stages.measure_quality()
        if failure is not None or not trial.profilers:
            self._finish(stages, failure)
            return
        ready: list[_Stages] = []
        with self._guard:
            self._to_profile.append(stages)
            if len(self._to_profile) >= (PROFILES_AT_ONCE if self.executor.workers > 1 else 1):
                ready, self._to_profile = self._to_profile, []
        self._profile(ready)

    def _profile(self, ready: Sequence[_Stages]) -> None:
        """All at once: the executor lets them through one by one, and nothing else in between."""
        if ready:
            with ThreadPoolExecutor(max_workers=len(ready)) as pool:
                list(pool.map(lambda stages: self._finish(stages, stages.profile()), ready))

    def _finish(self, stages: _Stages, failure: Failure | None) -> None:
        trial, folder = stages.trial, stages.log.parent
        if failure is not None and self._stopping.is_set():
            raise InterruptedError(f"{trial.title}: stopped by the user")  # its child was killed by us: no failure
        record = Record(
            **_identity(trial),
            status="done" if failure is None else "failed",
            failure=failure,
            within_budget=stages.within_budget(),
            ledger=stages.ledger,
            layers=stages.layers,
            metrics=tuple(stages.metrics),
            fingerprints=stages.fingerprints,
            samples=tuple(stages.samples),
            remarks=tuple(stages.remarks),
            seconds=stages.seconds,
            peaks=stages.peaks,
            environment=dict(self.context.environment),
            started=stages.started,
            finished=_now(),
        )
        self._write(folder, record, stages.items, stages.attachments)
        self._records[trial.id] = record
        self._publish(record, resumed=False)
        if failure is not None:
            self._announce("on_trial_failed", trial=trial, record=record)

    def _skipped(self, skip: Skip) -> Record:
        record = Record(
            trial=skip.id,
            artifact=None,
            suite=self.plan.suite.name,
            model=skip.model.facts,
            method=skip.method,
            label=skip.label,
            options=dict(skip.options),
            budget=budget_facts(skip.budget),
            recovery=tuple(stage.name for stage in skip.recovery),
            recovery_options=tuple(dict(stage.options) for stage in skip.recovery),
            status="skipped",
            reason=skip.reason,
        )
        self._write(self.results.trial_folder(record.suite, record.trial), record, {}, {})
        self._publish(record, resumed=False)
        return record

    def _write(
        self,
        folder: Path,
        record: Record,
        items: Mapping[str, np.ndarray[Any, Any]],
        attachments: Mapping[str, bytes],
    ) -> None:
        try:
            write_record(folder, record, items, attachments)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ArtifactError(
                    f"{folder}: the disk is full; free some space and run again, finished trials are kept"
                ) from None
            raise ArtifactError(f"{folder}: the record cannot be written ({error})") from None

    def _publish(self, record: Record, *, resumed: bool) -> None:
        folder = self.results.trial_folder(record.suite, record.trial)
        self.display.finished(record, resumed=resumed)
        self._announce("on_record", record=record, folder=folder)

    def _announce(self, hook: str, **arguments: Any) -> None:
        with self._announcing:
            self.registry.announce(hook, self.display.notice, **arguments, context=self.context)

    def artifact_lock(self, key: str) -> threading.Lock:
        """Two trials that share an artifact: the second waits for the first."""
        with self._guard:
            return self._artifact_locks.setdefault(key, threading.Lock())


class _Stages:
    """The stages of one trial, in order, until one fails."""

    def __init__(self, run: Run, trial: Trial, log: Path) -> None:
        self._run = run
        self.trial = trial
        self.log = log
        self.started = _now()
        self.metrics: list[Any] = []
        self.fingerprints: dict[str, dict[str, Any]] = {}
        self.items: dict[str, np.ndarray[Any, Any]] = {}
        self.attachments: dict[str, bytes] = {}
        self.samples: list[SampleFacts] = []
        self.remarks: list[str] = []
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.ledger: Any = None
        self.layers: tuple[Any, ...] = ()

    def measure_quality(self) -> Failure | None:
        """Compress what is not there yet, and evaluate."""
        return self._guarded(lambda: self._compress() or self._measure("evaluate"))

    def profile(self) -> Failure | None:
        return self._guarded(lambda: self._measure("profile"))

    @staticmethod
    def _guarded(stages: Callable[[], Failure | None]) -> Failure | None:
        try:
            return stages()
        except OSError as error:
            return Failure(kind="error", stage="run", message=f"{type(error).__name__}: {error}")

    def within_budget(self) -> bool | None:
        budget = self.trial.budget
        if budget is None or self.ledger is None:
            return None
        bits = self.ledger.bits
        return (bits.linear if budget.on == "linear" else bits.model) in budget

    def _compress(self) -> Failure | None:
        trial, results = self.trial, self._run.results
        if trial.artifact is None:
            return None
        cost = results.artifacts / trial.artifact / COST
        with self._run.artifact_lock(trial.chain[0]):
            if not results.has_artifact(trial.artifact):
                outcome = self._do("compress")
                if outcome.failure is not None:
                    for key in trial.chain:
                        results.remove_unfinished(key)
                    return _failure("compress", outcome.failure)
                facts = {"seconds": _seconds(outcome), "peak_bytes": outcome.peak_bytes}
                if outcome.result is not None and outcome.result.device_peak_bytes is not None:
                    facts["device_peak_bytes"] = outcome.result.device_peak_bytes
                write_atomically(cost, json.dumps(facts).encode())
        if cost.is_file():
            facts = json.loads(cost.read_text())
            self.seconds["compress"] = facts["seconds"]
            self.peaks["compress"] = facts["peak_bytes"]
            if "device_peak_bytes" in facts:
                self.peaks["compress_device"] = facts["device_peak_bytes"]
        return None

    def _measure(self, stage: str) -> Failure | None:
        outcome = self._do(stage)
        if outcome.failure is not None:
            return _failure(stage, outcome.failure)
        result = outcome.result
        assert result is not None
        self.ledger, self.layers = result.ledger, result.layers
        self.metrics += result.metrics
        self.fingerprints |= result.fingerprints
        self.items |= result.arrays()
        self.attachments |= result.attachments
        self.samples += result.samples
        self.remarks += result.remarks
        self.seconds[stage] = _seconds(outcome)
        self.peaks[stage] = outcome.peak_bytes
        return None

    def _do(self, stage: str) -> StageOutcome:
        from evenbits.job import Job

        job = Job(
            stage=stage,  # type: ignore[arg-type]
            trial=self.trial,
            artifacts=self._run.results.artifacts,
            cache=self._run.results.cache,
            compress_peak_bytes=self.peaks.get("compress"),
            compress_device_peak_bytes=self.peaks.get("compress_device"),
            compress_seconds=self.seconds.get("compress"),
        )
        display, trial = self._run.display, self.trial
        display.stage(trial, stage, 0, 0, stage)
        return self._run.executor.run(
            job, self.log, lambda done, total, what: display.stage(trial, stage, done, total, what)
        )


def _seconds(outcome: StageOutcome) -> float:
    """By the child's own clock: waiting for the fork server is not the stage's work."""
    return outcome.seconds if outcome.result is None else outcome.result.seconds


def _failure(stage: str, failure: StageFailure) -> Failure:
    return Failure(
        kind=failure.kind, stage=stage, message=failure.message, signal=failure.signal, traceback=failure.traceback
    )


def _identity(trial: Trial) -> dict[str, Any]:
    def names(stages: Sequence[Stage]) -> tuple[str, ...]:
        return tuple(stage.name for stage in stages)

    return {
        "trial": trial.id,
        "artifact": trial.artifact,
        "chain": trial.chain,
        "suite": trial.suite,
        "model": trial.model.facts,
        "method": trial.method,
        "distribution": trial.distribution,
        "label": trial.label,
        "options": dict(trial.options),
        "shown": trial.shown,
        "budget": budget_facts(trial.budget),
        "seed": trial.seed,
        "recovery": names(trial.recovery),
        "recovery_options": tuple(dict(stage.options) for stage in trial.recovery),
        "calibration": None if trial.calibration is None else dict(trial.calibration),
        "predicted": trial.predicted,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
