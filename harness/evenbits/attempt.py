"""One trial of a run: compress what is not there yet, evaluate, profile."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from evenbits.executor import Executor, StageFailure, StageOutcome
from evenbits.files import write_atomically
from evenbits.findings import writable
from evenbits.plan import Stage, Trial, budget_facts
from evenbits.record import Failure, Record, SampleFacts
from evenbits.store import Results

COST = "cost.json"
Report = Callable[[str, int, int, str], None]
"""Stage, steps done, steps in all, what is done."""


class Attempt:
    """The stages of one trial, in order, until one fails, and the record of what they came to."""

    def __init__(
        self,
        trial: Trial,
        results: Results,
        executor: Executor,
        report: Report,
        lock: threading.Lock,
        known: Record | None,
    ) -> None:
        """lock: of the trial's artifacts, which others may want too. known: the record of an earlier run that evaluated
        this trial and did not come to profile it."""
        self.trial = trial
        self.folder = results.trial_folder(trial.suite, trial.id)
        self._results = results
        self._executor = executor
        self._report = report
        self._lock = lock
        self._known = known
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
        self.made_with: dict[str, str] = {}

    def measure_quality(self) -> Failure | None:
        """Compress what is not there yet, and evaluate."""
        return self._guarded(lambda: self._compress() or self._evaluate())

    def profile(self) -> Failure | None:
        return self._guarded(lambda: self._measure("profile"))

    @staticmethod
    def _guarded(stages: Callable[[], Failure | None]) -> Failure | None:
        try:
            return stages()
        except OSError as error:
            return Failure(kind="error", stage="run", message=writable(f"{type(error).__name__}: {error}"))

    def record(self, failure: Failure | None, environment: Mapping[str, Any]) -> Record:
        """What the stages came to so far."""
        return Record(
            **_identity(self.trial),
            status="done" if failure is None else "failed",
            failure=failure,
            within_budget=self._within_budget(),
            ledger=self.ledger,
            layers=self.layers,
            metrics=tuple(self.metrics),
            fingerprints=self.fingerprints,
            samples=tuple(self.samples),
            remarks=tuple(self.remarks),
            made_with=self.made_with,
            seconds=self.seconds,
            peaks=self.peaks,
            environment=dict(environment),
            started=self.started,
            finished=_now(),
        )

    def _within_budget(self) -> bool | None:
        budget = self.trial.budget
        if budget is None or self.ledger is None:
            return None
        bits = self.ledger.bits
        return (bits.linear if budget.on == "linear" else bits.model) in budget

    def _compress(self) -> Failure | None:
        trial, results = self.trial, self._results
        if trial.artifact is None:
            return None
        cost: dict[str, Any] = {}
        with self._lock:
            if results.has_artifact(trial.artifact):
                cost = self._cost(trial.artifact)
            else:
                made = [key for key in trial.chain[:-1] if results.has_artifact(key)]
                outcome = self._do("compress")
                if outcome.failure is not None:
                    for key in trial.chain:
                        results.remove_unfinished(key)
                    return _failure("compress", outcome.failure)
                cost = {"seconds": _seconds(outcome), "peak_bytes": outcome.peak_bytes}
                if outcome.result is not None and outcome.result.device_peak_bytes is not None:
                    cost["device_peak_bytes"] = outcome.result.device_peak_bytes
                if made:  # by another trial: what it took belongs to this one as well
                    cost = _joined(self._cost(made[-1]), cost)
                write_atomically(results.artifacts / trial.artifact / COST, json.dumps(cost).encode())
        if cost:
            self.seconds["compress"] = cost["seconds"]
            self.peaks["compress"] = cost["peak_bytes"]
            if "device_peak_bytes" in cost:
                self.peaks["compress_device"] = cost["device_peak_bytes"]
        return None

    def _cost(self, key: str) -> dict[str, Any]:
        """What all stages up to this artifact took; empty where it came in one go with a later one, or of a kill."""
        path = self._results.artifacts / key / COST
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def _evaluate(self) -> Failure | None:
        known = self._known
        if known is None:
            return self._measure("evaluate")
        self.started = known.started
        self.ledger, self.layers, self.made_with = known.ledger, known.layers, dict(known.made_with)
        self.metrics, self.fingerprints = list(known.metrics), dict(known.fingerprints)
        self.samples, self.remarks = list(known.samples), list(known.remarks)
        self.seconds["evaluate"], self.peaks["evaluate"] = known.seconds["evaluate"], known.peaks["evaluate"]
        return None

    def _measure(self, stage: str) -> Failure | None:
        outcome = self._do(stage)
        if outcome.failure is not None:
            return _failure(stage, outcome.failure)
        result = outcome.result
        assert result is not None
        known = {name for metric in self.metrics for name in (metric.name, *metric.attachments)}
        if twice := sorted(known & {name for metric in result.metrics for name in (metric.name, *metric.attachments)}):
            message = f"{twice[0]!r} names a metric or file of an evaluator and one of a profiler; give one a label"
            return Failure(kind="error", stage="run", message=message)
        self.ledger, self.layers, self.made_with = result.ledger, result.layers, result.made_with
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
            artifacts=self._results.artifacts,
            cache=self._results.cache,
            compress_peak_bytes=self.peaks.get("compress"),
            compress_device_peak_bytes=self.peaks.get("compress_device"),
            compress_seconds=self.seconds.get("compress"),
        )
        self._report(stage, 0, 0, stage)
        return self._executor.run(
            job, self.folder / "log.txt", lambda done, total, what: self._report(stage, done, total, what)
        )


def _seconds(outcome: StageOutcome) -> float:
    """By the child's own clock: waiting for the fork server is not the stage's work."""
    return outcome.seconds if outcome.result is None else outcome.result.seconds


def _joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The cost of two stretches of a chain, one after the other; empty where that of the first is not known."""
    if not before:
        return {}
    peaks = {name: max(before.get(name, 0), value) for name, value in after.items() if name != "seconds"}
    return {"seconds": before["seconds"] + after["seconds"], **peaks}


def _failure(stage: str, failure: StageFailure) -> Failure:
    trace = None if failure.traceback is None else writable(failure.traceback)
    message = writable(failure.message)
    return Failure(kind=failure.kind, stage=stage, message=message, signal=failure.signal, traceback=trace)


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
