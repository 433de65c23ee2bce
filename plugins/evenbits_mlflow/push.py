"""Delivers what a server missed: from the records of a finished, interrupted or unreachable run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evenbits.environment import describe_environment
from evenbits.errors import ArtifactError, EvenbitsError
from evenbits.plugins import load_plugins
from evenbits.store import Results
from evenbits.suite import read_suite
from evenbits_mlflow.deliver import Mirror, default_uri, delivery_errors, first_line
from evenbits_mlflow.options import read_options


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
