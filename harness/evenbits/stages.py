"""The stages of a trial as child processes run them: compress, evaluate, profile.

The evaluating child sees only the artifact folder, or the dense model's own.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from threadpoolctl import threadpool_limits
from torch import Tensor

from evenbits import __version__
from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import Needs, Recovery
from evenbits.driver import Driver, Work
from evenbits.environments import Made, make
from evenbits.errors import EvenbitsError, TrialFailed
from evenbits.findings import take
from evenbits.job import Job, StageResult
from evenbits.ledger import dense_ledger, measure_bits, measure_layers
from evenbits.manifest import MANIFEST, read_manifest
from evenbits.measure import KERNEL_POLICY
from evenbits.models import guarded_randomness, torch_dtype
from evenbits.plan import COMPRESS_MODULES, DENSE, Stage, Trial, content_hash
from evenbits.plugins import Registry, load_plugins
from evenbits.provenance import source_digest
from evenbits.record import LayerFacts, Ledger
from evenbits.recovery import LeaveDense, RecoveryWork, recover
from evenbits.subject import MeasuredModel, choose_device, make_compressor
from evenbits.suite import check_options
from evenbits.tokens import calibration_tokens
from evenbits.workers import WorkerLaunch

Report = Callable[[int, int, str], None]


@cache
def registry() -> Registry:
    """Plugins as this process sees them; read once in the fork server, inherited by its children."""
    return load_plugins()


# -- compress ------------------------------------------------------------------------------------------------


def prepare(job: Job, report: Report) -> None:
    """Make the environment that a stage runs in, where it is not there: once for all trials that name it.

    Apart from the stage, so that an executor can leave it out of the trial's limits: it takes minutes. A stage that was
    not prepared makes it itself. Raises TrialFailed.
    """
    if job.stage == "compress" and _lacks_base(job):
        _environment(job, report)


def _lacks_base(job: Job) -> bool:
    return not (job.artifacts / job.trial.chain[0] / MANIFEST).is_file()


def compress(job: Job, report: Report) -> StageResult:
    """Make what is missing of the trial's chain of artifacts."""
    trial = job.trial
    folder = job.artifacts / trial.chain[0]
    # before the clock: making an environment is no part of what compressing costs, and comes once
    launch = _launch(job, report) if _lacks_base(job) else None
    begun = time.perf_counter()
    report(0, 1, "calibration text")
    tokens, facts = calibration_tokens(trial, registry(), job.cache)
    device = choose_device(trial.device)
    if _lacks_base(job):
        _compress_base(job, folder, tokens, facts, device, report, launch)
    for index, stage in enumerate(trial.recovery):
        before, folder = folder, job.artifacts / trial.chain[index + 1]
        if not (folder / MANIFEST).is_file():
            _recover(job, before, folder, index, stage, tokens, facts, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    beside = 0 if launch is None else launch.peak_bytes
    return StageResult(seconds=time.perf_counter() - begun, peak_bytes=beside, device_peak_bytes=peak)


def _environment(job: Job, report: Report) -> Made | None:
    """That of the trial's method, made where it is not there yet; None where it names none."""
    environment = job.trial.environment
    if environment is None:
        return None

    def say(line: str) -> None:
        print(line, flush=True)  # into the log
        report(0, 0, f"environment {environment.name}")

    return make(environment, say=say)


def _launch(job: Job, report: Report) -> WorkerLaunch | None:
    environment, made = job.trial.environment, _environment(job, report)
    if environment is None or made is None:
        return None
    return WorkerLaunch(environment, made, torch.get_num_threads())  # limited by now to what the stage may use


def _compress_base(
    job: Job,
    folder: Path,
    tokens: Tensor | None,
    calibration: dict[str, Any] | None,
    device: torch.device,
    report: Report,
    launch: WorkerLaunch | None = None,
) -> None:
    trial, model = job.trial, job.trial.model
    if trial.method == DENSE:
        compressor: Any = LeaveDense(torch_dtype(model.dtype))
        needs, paper = Needs(), 8.0 * model.facts.linear_bytes / model.facts.linear_weights
    else:
        descriptor = registry().find("compressors", trial.method, "method").value
        options = check_options(descriptor.options, trial.options, f"method {trial.method}")
        compressor = make_compressor(registry(), trial.method, trial.options)
        needs, paper = descriptor.needs_of(options), descriptor.predict(options, model.shapes).paper_bits
    if needs.device == "cuda" and device.type != "cuda":
        raise TrialFailed(f"method {trial.method!r} needs a CUDA device, and there is none here")
    done = 0

    def advance(weights: int) -> None:
        nonlocal done
        done += weights
        report(done, model.shapes.weights, "compress")

    work = Work(
        model_folder=model.source.folder,
        dtype=model.dtype,
        device=device,
        compressor=compressor,
        needs=needs,
        budget=trial.budget,
        seed=trial.seed,
        tokens=tokens,
        moments_folder=_moments_folder(job, calibration),
        trust_remote_code=model.source.trust_remote_code,
        advance=advance,
        launch=launch,
    )
    with ArtifactWriter(folder) as writer:
        stored = Driver(work, writer).run()
        writer.copy_base_files(model.source.folder)
        writer.finish(
            **_manifest_facts(trial, trial.chain[0], calibration, stages=0),
            paper_bits=paper,
            model_form=stored.form,
            layers=tuple(stored.layers),
            shared=stored.shared,
            whole=stored.whole,
            whole_weights=stored.whole_weights,
            made_with=stored.made_with,
        )


def _moments_folder(job: Job, calibration: dict[str, Any] | None) -> Path | None:
    if calibration is None:
        return None
    model = job.trial.model
    facts = {
        "model": model.facts.revision,
        "dtype": model.dtype,
        "tokens": calibration["sha256"],
        "device": choose_device(job.trial.device).type,
        "torch": torch.__version__,
    }
    return job.cache / "moments" / content_hash({**facts, "digest": source_digest(*COMPRESS_MODULES)})


def _manifest_facts(trial: Trial, key: str, calibration: dict[str, Any] | None, stages: int) -> dict[str, Any]:
    budget = trial.budget
    return {
        "key": key,
        "evenbits": __version__,
        "model": {"name": trial.model.facts.name, "revision": trial.model.facts.revision},
        "method": trial.method,
        "distribution": trial.distribution,
        "options": dict(trial.options),
        "budget": None if budget is None else {"centre": budget.centre, "window": budget.window, "on": budget.on},
        "seed": trial.seed,
        "recovery": tuple({"name": s.name, "options": dict(s.options)} for s in trial.recovery[:stages]),
        "calibration": calibration,
        "dtype": trial.model.dtype,
        "trust_remote_code": trial.model.source.trust_remote_code,
    }


def _recover(
    job: Job,
    before: Path,
    folder: Path,
    index: int,
    stage: Stage,
    tokens: Tensor | None,
    calibration: dict[str, Any] | None,
    device: torch.device,
) -> None:
    trial = job.trial
    if tokens is None:
        raise TrialFailed(f"recovery stage {stage.name!r} needs calibration data; give the suite a [calibration] table")
    descriptor: Recovery = registry().find("recoveries", stage.name, "recovery stage").value
    options = check_options(descriptor.options, stage.options, f"recovery stage {stage.name}")
    dense = trial.method == DENSE
    work = RecoveryWork(
        before=Artifact(before),
        compressor=LeaveDense(torch_dtype(trial.model.dtype))
        if dense
        else make_compressor(registry(), trial.method, trial.options),
        stage=descriptor.make(options),
        name=stage.name,
        base=trial.model.source.folder,
        tokens=tokens,
        seed=trial.seed,
        device=device,
    )
    with ArtifactWriter(folder) as writer:
        facts = _manifest_facts(trial, trial.chain[index + 1], calibration, stages=index + 1)
        recover(work, writer, {name: facts[name] for name in ("key", "recovery", "calibration", "budget")})


# -- measure -------------------------------------------------------------------------------------------------


def made_with(job: Job) -> dict[str, str]:
    """Versions of the libraries of another program that made the artifact; {} where there was none."""
    folder = job.artifact_folder
    return {} if folder is None else read_manifest(folder).made_with


def account(job: Job) -> tuple[Ledger, tuple[LayerFacts, ...]]:
    """The ledger of what is on disk, and the layers' own figures. Needs no model in memory."""
    folder = job.artifact_folder
    if folder is None:
        return dense_ledger(job.trial.model.facts), ()
    Artifact(folder)  # every hash is checked before anything is billed
    return measure_bits(folder, job.trial.model.facts), measure_layers(folder)


def _subject(job: Job, report: Report) -> tuple[MeasuredModel, Ledger, tuple[LayerFacts, ...]]:
    trial, model = job.trial, job.trial.model
    folder = job.artifact_folder
    ledger, layers = account(job)
    device = choose_device(trial.device)
    facts = {
        "model": model.facts.name,
        "revision": model.facts.revision,
        "dtype": model.dtype,
        "kernel": KERNEL_POLICY["restored"],  # what is measured with packed weights says so (measure.facts_of)
        "device": device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    subject = MeasuredModel(
        registry=registry(),
        folder=folder or model.source.folder,
        artifact=folder is not None,
        dtype=model.dtype,
        device=device,
        seed=trial.seed,
        base_facts=facts,
        sizes={
            "linear": ledger.linear_bytes,
            "model": ledger.model_bytes,
            "dense_linear": model.facts.linear_bytes,
            "dense_model": model.facts.model_bytes,
        },
        compress_peak_bytes=job.compress_peak_bytes,
        compress_device_peak_bytes=job.compress_device_peak_bytes,
        compress_seconds=job.compress_seconds,
        trust_remote_code=model.source.trust_remote_code,
        report=report,
    )
    return subject, ledger, layers


def evaluate(job: Job, report: Report) -> StageResult:
    """Run every evaluator on the stored model."""
    return _measure(job, report, "evaluators", "evaluator", job.trial.evaluators, "evaluate")


def profile(job: Job, report: Report) -> StageResult:
    """Run every profiler; the executor sees to it that nothing else runs meanwhile."""
    return _measure(job, report, "profilers", "profiler", job.trial.profilers, "profile")


def _measure(job: Job, report: Report, kind: str, what: str, stages: Sequence[Stage], method: str) -> StageResult:
    begun = time.perf_counter()
    subject, ledger, layers = _subject(job, report)
    result = StageResult(ledger=ledger, layers=layers, made_with=made_with(job))
    for stage in stages:
        descriptor = registry().find(kind, stage.name, what).value
        made = descriptor.make(check_options(descriptor.options, stage.options, f"{what} {stage.name}"))
        with guarded_randomness(job.trial.seed):
            findings = getattr(made, method)(subject)
        for finding in findings:
            take(result, stage, finding)
    result.seconds = time.perf_counter() - begun
    return result


STAGES: Mapping[str, Callable[[Job, Report], StageResult]] = {
    "compress": compress,
    "evaluate": evaluate,
    "profile": profile,
}


def threads_of(job: Job) -> int:
    """The suite's number of threads; else this process's share of the cores, all of them for a profiler."""
    limits = job.trial.limits
    if limits.threads is not None:
        return limits.threads
    sharing = 1 if job.stage == "profile" else limits.workers
    return max(1, torch.get_num_threads() // sharing)


def limit_threads(threads: int) -> None:
    """Of torch, and of the pools that numpy's and scipy's linear algebra have of their own."""
    import scipy.linalg.lapack  # noqa: F401  # a pool can only be limited once it is there

    torch.set_num_threads(threads)
    threadpool_limits(threads)


def run_stage(job: Job, report: Report) -> StageResult:
    """Carry out one stage. Known errors pass as they are; a full disk is said in words."""
    limit_threads(threads_of(job))
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return STAGES[job.stage](job, report)
    except EvenbitsError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(job, error) from error
        raise
    except SafetensorError as error:
        if "No space left" in str(error):
            raise _disk_full(job, error) from error
        raise


def _disk_full(job: Job, error: Exception) -> TrialFailed:
    return TrialFailed(f"{job.stage}: the disk is full ({error}); free some space and run again")
