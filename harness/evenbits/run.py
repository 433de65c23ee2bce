"""The loop over trials: compress, measure, record, announce; resumes where it stopped."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evenbits.attempt import Attempt
from evenbits.environment import describe_environment
from evenbits.errors import ArtifactError
from evenbits.executor import Executor
from evenbits.plan import Plan, Skip, Trial, budget_facts
from evenbits.plugins import Registry
from evenbits.record import Failure, Record, write_record
from evenbits.store import Results
from evenbits.suite import Suite

UNPROFILED = "not profiled yet; run the suite again, what was evaluated is kept"
PROFILES_AT_ONCE = 8
"""Profilers need the machine alone, and each time the other workers wait for the longest stage under way. So trials
side by side wait for each other and are profiled together. Meanwhile what they were evaluated to is kept as the record
of a failure, and whoever runs the suite again after a kill only profiles them."""


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
    """One run of a plan on a results folder that the caller has locked.

    conclude: called when all records are there, before plugins hear of the end, so that a mirror finds the report.
    """

    plan: Plan
    registry: Registry
    results: Results
    executor: Executor
    display: Display = field(default_factory=Display)
    conclude: Callable[[], None] = lambda: None

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
        self._evaluated: dict[str, Record] = {}
        self._to_profile: list[Attempt] = []

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
                for future in as_completed(futures):  # whichever raises first ends the run
                    future.result()
                # not in this thread: it hears of Ctrl-C, and must be free to stop the others
                pool.submit(self._profile, self._to_profile).result()
            except BaseException:
                self._stopping.set()
                for future in futures:
                    future.cancel()
                self.executor.close()
                raise
            finally:
                self.display.end()
        ordered = [records[trial_id] for trial_id in self.plan.order]
        try:
            self.conclude()
        finally:
            self._announce("on_finish", records=ordered)
        return ordered

    def _found(self, trial: Trial) -> Record | None:
        """A record to keep. Failed ones are tried again, from where they failed if that was in being profiled; a
        damaged one is set aside with a notice."""
        try:
            record = self.results.record(trial.suite, trial.id)
        except ArtifactError as error:
            if "newer" in str(error):
                raise
            self.display.notice(f"{error}: measured again")
            return None
        if record is None or record.status == "done":
            return record
        if record.failure is not None and record.failure.stage == "profile":
            self._evaluated[trial.id] = record
        return None

    def _attempt(self, trial: Trial) -> Attempt:
        display = self.display
        return Attempt(
            trial,
            self.results,
            self.executor,
            lambda stage, done, total, what: display.stage(trial, stage, done, total, what),
            self._artifact_lock(trial.chain[0] if trial.chain else trial.id),
            self._known(trial),
        )

    def _known(self, trial: Trial) -> Record | None:
        """The record of an earlier run that evaluated this trial and did not come to profile it, if it is whole."""
        record, folder = self._evaluated.get(trial.id), self.results.trial_folder(trial.suite, trial.id)
        if record is None:
            return None
        files = [name for metric in record.metrics for name in (metric.items, *metric.attachments) if name is not None]
        return record if all((folder / name).is_file() for name in files) else None

    # -- one trial ------------------------------------------------------------------------------------------

    def _trial(self, trial: Trial) -> None:
        """Compress and evaluate; then profile, with those that wait for it once they are enough."""
        self._announce("on_trial_start", trial=trial)
        attempt = self._attempt(trial)
        failure = attempt.measure_quality()
        if failure is not None or not trial.profilers:
            self._finish(attempt, failure)
            return
        # what was evaluated may have taken hours: a kill while it waits, or a profiler that fails, does not cost it
        self._keep(attempt, Failure(kind="error", stage="profile", message=UNPROFILED))
        ready: list[Attempt] = []
        with self._guard:
            self._to_profile.append(attempt)
            if len(self._to_profile) >= (PROFILES_AT_ONCE if self.executor.workers > 1 else 1):
                ready, self._to_profile = self._to_profile, []
        self._profile(ready)

    def _profile(self, ready: Sequence[Attempt]) -> None:
        """All at once: the executor lets them through one by one, and nothing else in between."""
        if ready:
            with ThreadPoolExecutor(max_workers=len(ready)) as pool:
                list(pool.map(lambda attempt: self._finish(attempt, attempt.profile()), ready))

    def _finish(self, attempt: Attempt, failure: Failure | None) -> None:
        trial = attempt.trial
        if failure is not None and self._stopping.is_set():
            raise InterruptedError(f"{trial.title}: stopped by the user")  # its child was killed by us: no failure
        record = self._keep(attempt, failure)
        self._records[trial.id] = record
        self._publish(record, resumed=False)
        if failure is not None:
            self._announce("on_trial_failed", trial=trial, record=record)

    def _keep(self, attempt: Attempt, failure: Failure | None) -> Record:
        """Write the record of what the stages came to so far."""
        record = attempt.record(failure, self.context.environment)
        self._write(attempt.folder, record, attempt.items, attempt.attachments)
        attempt.items, attempt.attachments = {}, {}  # they are on disk
        return record

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

    def _artifact_lock(self, key: str) -> threading.Lock:
        """Two trials that share an artifact: the second waits for the first."""
        with self._guard:
            return self._artifact_locks.setdefault(key, threading.Lock())
