"""Delivers each record as it comes in a run, and never loses one: what a server misses waits for a push."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from evenbits.environment import describe_environment
from evenbits.errors import ArtifactError, EvenbitsError, MissingExtra
from evenbits.plugins import load_plugins
from evenbits.record import Record
from evenbits.store import Results
from evenbits.suite import read_suite
from evenbits_mlflow.options import read_options
from evenbits_mlflow.tracking import Mirror, client_settings, default_uri

if TYPE_CHECKING:
    from evenbits.run import RunContext

_running: dict[Path, Mirror] = {}
"""Open mirrors by run folder, from `begin` to `finish`; one that failed is gone, so that it is told only once."""


def begin(context: RunContext) -> None:
    """Open the mirror of a run. Without MLflow, or its server, one notice: the run goes on and `push` catches up."""
    _running.pop(context.folder, None)
    options = read_options(context.plugin_options("mlflow"))
    if not options.enabled:
        return
    with _noticed(context, "runs are not mirrored"):
        _running[context.folder] = Mirror(
            options.tracking_uri or default_uri(context.results),
            context.suite_name,
            context.folder,
            context.results,
            context.environment,
            options.timeout_seconds,
            context.suite.description,
        )


def deliver(record: Record, folder: Path, context: RunContext) -> None:
    """Mirror one record, unless that was done before."""
    found = _running.get(context.folder)
    if found is not None:
        with _noticed(context, f"trial {record.trial} and later ones are not mirrored"):
            found.add(record, folder, context.artifact_folder(record))


def finish(records: Sequence[Record], context: RunContext) -> None:
    """End the parent run, with the report as its artifact."""
    found = _running.get(context.folder)
    if found is not None:
        with _noticed(context, "the report is not mirrored"):
            found.close(records)
    _running.pop(context.folder, None)


def push_run(target: Path, tracking_uri: str | None = None, results: Path | None = None) -> tuple[int, int]:
    """Deliver the records of a suite's latest run, each once. Returns how many were sent, how many were there already.

    target: a suite, whose [plugins.mlflow] counts and whose run lies in `results`; or a run's folder,
    RESULTS/runs/SUITE. Raises SuiteError where there was no run, ArtifactError where MLflow cannot be reached.
    """
    table: Mapping[str, object] = {}
    if target.suffix == ".toml":
        suite = read_suite(target, load_plugins())
        store, name = Results(results or Path("results")), suite.name
        table = suite.plugins.get("mlflow", {})
    else:
        folder = target.resolve()
        if folder.parent.name != "runs":
            raise ArtifactError(f"{target}: neither a suite (*.toml) nor the folder of a run (RESULTS/runs/SUITE)")
        store, name = Results(folder.parent.parent), folder.name
    options = read_options(table)
    records, folders = store.records(name)
    uri = tracking_uri or options.tracking_uri or default_uri(store.root)
    sent = 0
    try:
        mirror = Mirror(uri, name, store.run_folder(name), store.root, describe_environment(), options.timeout_seconds)
        for record in records:
            artifact = None if record.artifact is None else store.artifacts / record.artifact
            sent += mirror.add(record, folders[record.trial], artifact)
        mirror.close(records)
    except delivery_errors() as error:
        if isinstance(error, EvenbitsError):
            raise
        raise ArtifactError(f"{uri}: {sent} of {len(records)} records delivered: {first_line(error)}") from None
    return sent, len(records) - sent


def delivery_errors() -> tuple[type[Exception], ...]:
    """What a missing, unreachable or refusing MLflow raises; a mistake in this plugin is not among these."""
    errors: list[type[Exception]] = [MissingExtra, ArtifactError, ImportError, OSError]  # requests' are OSErrors
    if find_spec("mlflow") is not None:
        with client_settings(5):
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        errors += [MlflowException, SQLAlchemyError]
    return tuple(errors)


def first_line(error: Exception) -> str:
    """Of a long one its two ends: what was asked for, and at last why it failed."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:80]} … {text[-117:]}"


@contextlib.contextmanager
def _noticed(context: RunContext, consequence: str) -> Iterator[None]:
    """Turn a failed delivery into one line to the user, and give this run's mirror up."""
    try:
        yield
    except delivery_errors() as error:
        _running.pop(context.folder, None)
        later = f"records are kept; deliver them by: evenbits push {context.folder}"
        context.notice(f"mlflow: {consequence}: {first_line(error)} ({later})")
