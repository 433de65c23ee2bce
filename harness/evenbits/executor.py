"""Where trials run: child processes of a fork server that has torch loaded. Other executors are plugins.

A child that is killed, runs out of memory or of time is a `StageFailure`, never the end of the run. Children die
with the parent, whatever kills it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from evenbits.errors import EvenbitsError

if TYPE_CHECKING:
    from evenbits.job import Job, StageResult

Report = Callable[[int, int, str], None]
PRELOAD = ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
WAKE_SECONDS = 0.05
MEMORY_CHECK_SECONDS = 0.2  # a look reads every process of the machine
GRACE_SECONDS = 5.0  # for a child to end once it has said its last word; a plugin's thread may keep it


@dataclass(frozen=True)
class StageFailure:
    """Why a stage gave no result. known: the error was one of ours, its message says all."""

    kind: Literal["error", "signal", "timeout", "memory"]
    message: str
    signal: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class StageOutcome:
    """A result or a failure, with the child's wall seconds and peak resident bytes above its start."""

    result: StageResult | None
    failure: StageFailure | None
    seconds: float
    peak_bytes: int


class Executor(Protocol):
    """Runs stages, from threads of their own: those of `workers` trials at the same time, and beside these the
    "profile" stages of up to `evenbits.run.PROFILES_AT_ONCE`, which are to wait until they have their machine alone."""

    workers: int

    def run(self, job: Job, log: Path, report: Report) -> StageOutcome:
        """Blocks until the stage has ended. Whatever becomes of it is the outcome; what is raised ends the run."""
        ...

    def close(self) -> None:
        """Kill what runs, so that its `run` returns soon with a failure, as does every later one. May come twice."""
        ...


# -- in the child ----------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """Be killed when the fork server goes (Linux), and when the parent goes (anywhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    """Most resident bytes this process ever had (a forked child counts from its fork)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _child(job: Job, log: str, pipe: Connection) -> None:
    """Run one stage with output to the log file; send progress and when limits hold, then a result or an error."""
    os.setsid()
    _die_with_parent()
    begun_with = _resident_bytes()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print(f"== {job.stage} {job.trial.title} ({job.trial.id})", flush=True)
    last = 0.0

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.1 or done >= total:
            last = now
            pipe.send(("progress", (done, total, what)))

    try:
        from evenbits.stages import prepare, run_stage

        pipe.send(("limits", False))
        prepare(job, report)
        pipe.send(("limits", True))
        result = run_stage(job, report)
    except EvenbitsError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        # a plugin's own exception, reported with the layer it came from: where it was raised matters
        trace = traceback.format_exc() if error.__cause__ is not None else None
        print(trace or "", end="", flush=True)
        pipe.send(("error", (str(error), trace)))
    except MemoryError:
        traceback.print_exc()
        pipe.send(("memory", None))
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        pipe.send(("error", (message, traceback.format_exc())))
    else:
        result.peak_bytes += max(0, _peak_bytes() - begun_with)
        pipe.send(("result", result))
    pipe.close()
    sys.stdout.flush()


# -- in the parent ---------------------------------------------------------------------------------------------


class _Machine:
    """Many may share the machine's cores, or one may have it alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sharing = 0
        self._alone = False
        self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._alone and not self._sharing)
            finally:
                self._waiting -= 1
                self._condition.notify_all()
            self._alone = True
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()


_starting = threading.Lock()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide where the parent's main module lies while a child is started.

    multiprocessing would import it again in every child; a stage needs nothing of it, and the command line's own
    imports cost a tenth of a second.
    """
    main = sys.modules["__main__"]
    names = [name for name in ("__spec__", "__file__") if name in main.__dict__]
    hidden: dict[str, Any] = {name: main.__dict__[name] for name in names}
    with _starting:
        main.__dict__.update(dict.fromkeys(hidden))
        try:
            yield
        finally:
            main.__dict__.update(hidden)


class LocalExecutor:
    """Child processes on this machine; profilers get it alone."""

    def __init__(self, workers: int = 1, preload: tuple[str, ...] = ()) -> None:
        """preload: modules that the fork server imports beside torch, e.g. the models' own."""
        self.workers = workers
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["evenbits.stages", *PRELOAD, *preload])
        forkserver.ensure_running()  # its imports take seconds: let them begin while the parent plans
        self._machine = _Machine()
        self._running: set[Any] = set()
        self._closed = False

    def run(self, job: Job, log: Path, report: Report) -> StageOutcome:
        """One stage in a child. Blocks; `report` gets its progress. Once closed, nothing is started any more."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._machine.alone() if job.stage == "profile" else self._machine.shared():
            if self._closed:
                return StageOutcome(None, StageFailure("signal", f"{job.stage} was stopped"), 0.0, 0)
            return self._run(job, log, report)

    def _run(self, job: Job, log: Path, report: Report) -> StageOutcome:
        begun = time.monotonic()
        receiver, sender = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_child, args=(job, str(log), sender), name=f"evenbits {job.stage}")
        with _without_main():
            child.start()
        sender.close()
        self._running.add(child)
        if self._closed:  # meanwhile, which can be long: a new fork server imports torch first
            _kill(child)
        try:
            message, peak, stopped = self._watch(child, receiver, job, report, begun)
        except BaseException:
            _kill(child)  # nobody waits for it any more
            raise
        finally:
            self._running.discard(child)
            receiver.close()
        child.join(GRACE_SECONDS)
        _kill(child)  # and what it left running
        seconds = time.monotonic() - begun
        if stopped is not None:
            return StageOutcome(None, stopped, seconds, peak)
        return self._outcome(message, child.exitcode, seconds, peak, job, log)

    def _watch(
        self, child: Any, receiver: Connection, job: Job, report: Report, begun: float
    ) -> tuple[tuple[str, Any] | None, int, StageFailure | None]:
        """Until the child has said its last word, died, or gone past a limit.

        What it prepares for all trials is within no limit, and the time of its stage counts from the end of that.
        """
        limits, limited, since = job.trial.limits, True, begun
        memory = _Memory(child.pid)
        final: tuple[str, Any] | None = None
        while True:
            ready = wait([receiver, child.sentinel], timeout=WAKE_SECONDS)
            memory.look()
            if receiver in ready:
                try:
                    kind, payload = receiver.recv()
                except (EOFError, OSError):
                    break
                if kind == "progress":
                    report(*payload)
                elif kind == "limits":
                    limited, since = payload, time.monotonic()
                else:
                    final = (kind, payload)
                    break
            elif child.sentinel in ready:
                break
            if not limited:
                continue
            if limits.timeout_seconds is not None and time.monotonic() - since > limits.timeout_seconds:
                _kill(child)
                reason = f"{job.stage} took longer than {limits.timeout_seconds:g} s"
                return None, memory.growth, StageFailure("timeout", reason, "SIGKILL")
            if limits.memory_gib is not None and memory.now > limits.memory_gib * 2**30:
                _kill(child)
                reason = f"{job.stage} used more than {limits.memory_gib:g} GiB of resident memory"
                return None, memory.growth, StageFailure("memory", reason, "SIGKILL")
        return final, memory.growth, None

    @staticmethod
    def _outcome(
        message: tuple[str, Any] | None, exit_code: int | None, seconds: float, peak: int, job: Job, log: Path
    ) -> StageOutcome:
        if message is not None and message[0] == "result":
            return StageOutcome(message[1], None, seconds, message[1].peak_bytes)
        if message is not None and message[0] == "error":
            text, trace = message[1]
            return StageOutcome(None, StageFailure("error", text, traceback=trace), seconds, peak)
        if message is not None:
            return StageOutcome(None, StageFailure("memory", f"{job.stage} ran out of memory"), seconds, peak)
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            text = f"{job.stage} was killed by {name}"
            if name == "SIGKILL":
                text += " (often the system, out of memory)"
            return StageOutcome(None, StageFailure("signal", text, name), seconds, peak)
        text = f"{job.stage} ended with exit code {exit_code} and no result; see {log.name}"
        return StageOutcome(None, StageFailure("error", text), seconds, peak)

    def close(self) -> None:
        """Kill what still runs; what waits for its turn is not begun."""
        self._closed = True
        for child in list(self._running):
            _kill(child)


class _Memory:
    """Resident bytes of a child and of what it started."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._errors = (psutil.NoSuchProcess, psutil.AccessDenied)
        self.now = self.peak = self.start = 0
        self._looked = 0.0
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except self._errors:
            self._process = None
        self.look()
        self.start = self.now

    def look(self) -> None:
        if self._process is None or time.monotonic() - self._looked < MEMORY_CHECK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            family = [self._process, *self._process.children(recursive=True)]
            self.now = sum(process.memory_info().rss for process in family)
        except self._errors:
            return
        self.peak = max(self.peak, self.now)

    @property
    def growth(self) -> int:
        """Peak above what the child had when it began: the fork server's share is not the stage's."""
        return max(0, self.peak - self.start)


def _kill(child: Any) -> None:
    """Kill a child with all that it started; it leads a process group of its own once it has begun."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # no such group before its setsid, or once all of it has ended
    if child.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child.pid, signal.SIGKILL)
        child.join(GRACE_SECONDS)
