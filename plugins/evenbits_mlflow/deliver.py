"""Delivers each record once, to whichever MLflow the suite names, and never loses one: what a server misses waits.

A ledger beside the records says what was delivered where; a tag on each run says so on the server, in case the ledger
was not written (a kill between the two). Uses MLflow's client alone, so the process's own active run is not touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenbits.errors import ArtifactError, MissingExtra
from evenbits.record import Record, write_atomically
from evenbits.report import write_report
from evenbits_mlflow.mirror import (
    LEFT_TAG,
    RECORD_TAG,
    RUN_TAG,
    TRIAL_TAG,
    environment_tags,
    mirror,
    samples_page,
)
from evenbits_mlflow.options import read_options

if TYPE_CHECKING:
    from evenbits.run import RunContext

LEDGER = "mlflow.json"
PARAMS_A_CALL = 100  # more are refused
LARGEST_FILE = 4 << 20
"""Bytes of a file beside the record that is still mirrored; larger ones are named in a tag and stay where they are."""

_running: dict[Path, Mirror] = {}
"""Open mirrors by run folder, from `begin` to `finish`; one that failed is gone, so that it is told only once."""


def default_uri(results: Path) -> str:
    return f"sqlite:///{results.resolve() / 'mlflow.db'}"


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


class Mirror:
    """An open way to one tracking server for one run of a suite. Raises what `delivery_errors` lists.

    folder: of the run (its records, its ledger). timeout_seconds: per call to a server; a call is not tried again.
    """

    def __init__(
        self,
        uri: str,
        suite: str,
        folder: Path,
        results: Path,
        environment: Mapping[str, Any],
        timeout_seconds: int = 5,
    ) -> None:
        if find_spec("mlflow") is None:
            raise MissingExtra("mlflow", "mlflow")
        self.uri = uri
        self.folder = folder
        self.timeout_seconds = timeout_seconds
        self._delivered: dict[str, str] = {}
        own = uri == default_uri(results)
        # a folder's name is enough in its own database; on a shared server two people may run suites of one name
        place = hashlib.sha256(f"{platform.node()}:{folder.resolve()}".encode()).hexdigest()[:12]
        self._run = folder.name if own else f"{folder.name}-{place}"
        self._address = "own" if own else uri
        with _settings(timeout_seconds):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._find_experiment(suite)
            self._parent = self._find_parent(suite, environment)
        noted = self._read_ledger().get(self._address, {})
        if noted.get("parent") == self._parent:  # else the database is another: what is noted is not in it
            self._delivered = dict(noted.get("delivered", {}))

    def add(self, record: Record, folder: Path, artifact: Path | None) -> bool:
        """Mirror the record in `folder`; whether anything was sent. A record that changed replaces its run."""
        path = folder / "record.json"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if self._delivered.get(record.trial) == digest:
            return False
        with _settings(self.timeout_seconds):
            found = self._search(f"tags.`{TRIAL_TAG}` = '{record.trial}' and tags.`{_PARENT}` = '{self._parent}'")
            whole = [run for run in found if run.data.tags.get(RECORD_TAG) == digest]
            if not whole:
                self._send(record, path, artifact, digest)
            for run in found:
                if run not in whole[:1]:
                    self._client.delete_run(run.info.run_id)
        self._delivered[record.trial] = digest
        self._write_ledger()
        return not whole

    def close(self, records: Sequence[Record]) -> None:
        """Put the report of all records on the parent run and end it, failed if any trial did."""
        with _settings(self.timeout_seconds), tempfile.TemporaryDirectory() as name:
            folders = {record.trial: self.folder / record.trial for record in records}
            write_report(Path(name), records, folders, plots=find_spec("matplotlib") is not None)
            self._client.log_artifacts(self._parent, name, "report")
            failed = any(record.status == "failed" for record in records)
            self._client.set_terminated(self._parent, "FAILED" if failed else "FINISHED")

    def _send(self, record: Record, path: Path, artifact: Path | None, digest: str) -> None:
        from mlflow.entities import Metric, Param, RunTag

        seen = mirror(record)
        now = seen.ended or round(time.time() * 1000)
        run = self._client.create_run(
            self._experiment,
            start_time=seen.started or now,
            tags={TRIAL_TAG: record.trial, _PARENT: self._parent},
            run_name=seen.name,
        ).info.run_id
        params = [Param(name, text) for name, text in seen.params.items()]
        for start in range(0, len(params), PARAMS_A_CALL):
            self._client.log_batch(run, params=params[start : start + PARAMS_A_CALL])
        self._client.log_batch(
            run,
            metrics=[Metric(name, value, now, 0) for name, value in seen.metrics.items()],
            tags=[RunTag(name, text) for name, text in seen.tags.items()],
        )
        self._client.log_artifact(run, str(path))
        if record.samples:
            self._client.log_text(run, samples_page(record), "samples.md")
        self._send_files(run, record, path.parent)
        manifest = None if artifact is None else artifact / "manifest.json"
        if manifest is not None and manifest.exists():
            self._client.log_artifact(run, str(manifest))
        self._client.set_terminated(run, seen.status, now)
        self._client.set_tag(run, RECORD_TAG, digest)

    def _send_files(self, run: str, record: Record, folder: Path) -> None:
        """What stands beside the record: values of each item, and what evaluators attached."""
        names = [name for metric in record.metrics for name in (metric.items, *metric.attachments) if name is not None]
        left = []
        for name in dict.fromkeys(names):
            path = folder / name
            if not path.is_file():
                left.append(f"{name} (not there)")
            elif (size := path.stat().st_size) > LARGEST_FILE:
                left.append(f"{name} ({size:,} bytes)")
            else:
                self._client.log_artifact(run, str(path))
        if left:
            self._client.set_tag(run, LEFT_TAG, ", ".join(left)[:5000])

    def _find_experiment(self, suite: str) -> str:
        found = self._client.get_experiment_by_name(suite)
        if found is not None:
            return str(found.experiment_id)
        place = None  # a server decides itself
        if self.uri.startswith("sqlite:///"):
            place = (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(suite, artifact_location=place))

    def _find_parent(self, suite: str, environment: Mapping[str, Any]) -> str:
        found = self._search(f"tags.`{RUN_TAG}` = '{self._run}'")
        if found:
            run = str(found[0].info.run_id)
            self._client.update_run(run, status="RUNNING")
            return run
        tags = {RUN_TAG: self._run, "mlflow.source.name": "evenbits", **environment_tags(environment)}
        return str(self._client.create_run(self._experiment, tags=tags, run_name=suite).info.run_id)

    def _search(self, condition: str) -> list[Any]:
        """Runs that are not deleted, oldest first."""
        return list(self._client.search_runs([self._experiment], condition, order_by=["attributes.start_time ASC"]))

    def _read_ledger(self) -> dict[str, Any]:
        path = self.folder / LEDGER
        if not path.exists():
            return {}
        try:
            data = json.loads(path.read_text())
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ArtifactError(f"{path}: not readable; remove it: what the server has is found there by tag")
        return data

    def _write_ledger(self) -> None:
        noted = {"parent": self._parent, "delivered": self._delivered}
        text = json.dumps(self._read_ledger() | {self._address: noted}, indent=1)
        write_atomically(self.folder / LEDGER, (text + "\n").encode())


_PARENT = "mlflow.parentRunId"


def delivery_errors() -> tuple[type[Exception], ...]:
    """What a missing, unreachable or refusing MLflow raises; a mistake in this module is not among these."""
    errors: list[type[Exception]] = [MissingExtra, ArtifactError, ImportError, OSError]  # requests' are OSErrors
    if find_spec("mlflow") is not None:
        with _settings(5):
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        errors += [MlflowException, SQLAlchemyError]
    return tuple(errors)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


@contextlib.contextmanager
def _noticed(context: RunContext, consequence: str) -> Iterator[None]:
    """Turn a failed delivery into one line to the user, and give this run's mirror up."""
    try:
        yield
    except delivery_errors() as error:
        _running.pop(context.folder, None)
        later = f"records are kept; deliver them by: evenbits push {context.folder}"
        context.notice(f"mlflow: {consequence}: {first_line(error)} ({later})")


@contextlib.contextmanager
def _settings(timeout_seconds: int) -> Iterator[None]:
    """MLflow is steered by the environment only: quiet, no telemetry, no patience. All is put back afterwards."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds),
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": str(10 * timeout_seconds),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # pooled sqlite connections are left open at exit
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
