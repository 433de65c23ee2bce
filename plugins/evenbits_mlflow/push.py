"""Delivers what a server missed: from the records of a finished, interrupted or unreachable run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from evenbits.environment import describe_environment
from evenbits.errors import ArtifactError, EvenbitsError
from evenbits.plugins import discover
from evenbits.record import Record, read_record
from evenbits.suite import read_suite
from evenbits_mlflow.deliver import Mirror, default_uri, delivery_errors, first_line
from evenbits_mlflow.options import read_options


def push_run(target: Path, tracking_uri: str | None, results: Path) -> tuple[int, int]:
    """Deliver the records of a suite's run, each once. Returns how many were sent, and how many were there already.

    target: a suite, whose [plugins.mlflow] counts, or the folder of a run. Raises ArtifactError where there are no
    records or the server cannot be reached.
    """
    table: Mapping[str, object] = {}
    folder = target
    if target.suffix == ".toml":
        suite = read_suite(target, discover())
        folder = results / "runs" / suite.name
        table = suite.plugins.get("mlflow", {})
    options = read_options(table)
    found = [(read_record(path), path.parent) for path in sorted(folder.rglob("record.json"))]
    if not found:
        raise ArtifactError(f"{folder}: no records there; run the suite first, or name its results by --results")
    first = found[0][0]
    uri = tracking_uri or options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(results)
    sent = 0
    try:
        mirror = Mirror(uri, first.suite, folder, results, describe_environment(), options.timeout_seconds)
        for record, place in found:
            sent += mirror.add(record, place, _artifact(record, results))
        mirror.close([record for record, _ in found])
    except delivery_errors() as error:
        if isinstance(error, EvenbitsError):
            raise
        raise ArtifactError(f"{uri}: {sent} of {len(found)} records delivered: {first_line(error)}") from None
    return sent, len(found) - sent


def _artifact(record: Record, results: Path) -> Path | None:
    return None if record.artifact is None else results / "artifacts" / record.artifact
