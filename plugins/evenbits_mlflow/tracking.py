"""An open way to one tracking server for one run of a suite. Uses MLflow's client alone, so the process's own active
run is not touched.

A ledger beside the records says what was delivered where; a tag on each run says so on the server, in case the ledger
was not written (a kill between the two).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evenbits.errors import ArtifactError, MissingExtra
from evenbits.record import Record, write_atomically
from evenbits_mlflow.files import trial_files
from evenbits_mlflow.mirror import (
    FORMAT,
    FORMAT_TAG,
    LEFT_TAG,
    NOTE_TAG,
    RECORD_TAG,
    RUN_TAG,
    TRIAL_TAG,
    Mirrored,
    environment_tags,
    mirror,
    texts,
)
from evenbits_mlflow.reports import report_of
from evenbits_mlflow.view import views

LEDGER = "mlflow.json"
LOCK = ".mlflow.lock"
PARAMS_A_CALL = 100  # more are refused
NUMBERS_A_CALL = 900  # with the params of the first call no more than the 1000 that are allowed
LARGEST_FILE = 4 << 20
"""Bytes of a file beside the record that is still mirrored; larger ones are named in a tag and stay where they are."""
KNOWN_BY = 3  # records that are asked for to find a run by what it holds
ITEMS = "items"  # folder of the values of each item and what evaluators attached

_PARENT = "mlflow.parentRunId"
_REPORT_TAG = "evenbits.report"
_ABOUT_TAG = "evenbits.description"


def default_uri(results: Path) -> str:
    return f"sqlite:///{results.resolve() / 'mlflow.db'}"


class Mirror:
    """Raises what `evenbits_mlflow.deliver.delivery_errors` lists.

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
        description: str = "",
    ) -> None:
        if find_spec("mlflow") is None:
            raise MissingExtra("mlflow", "mlflow")
        self.uri = uri
        self.suite = suite
        self.folder = folder
        self.timeout_seconds = timeout_seconds
        self._description = description
        self._delivered: dict[str, str] = {}
        own = uri == default_uri(results)
        # a folder's name is enough in its own database; on a shared server two people may run suites of one name
        place = hashlib.sha256(f"{platform.node()}:{folder.resolve()}".encode()).hexdigest()[:12]
        self._run = folder.name if own else f"{folder.name}-{place}"
        self._address = "own" if own else uri
        with self._talking():
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._find_experiment(suite, own)
            self._parent, tags = self._find_parent(suite, environment)
        self._description = description or tags.get(_ABOUT_TAG, "")
        self._reported = tags.get(_REPORT_TAG)
        noted = self._read_ledger().get(self._address, {})
        # else the database is another, or holds what an older evenbits mirrored
        if noted.get("parent") == self._parent and noted.get("format") == FORMAT:
            self._delivered = dict(noted.get("delivered", {}))

    def add(self, record: Record, folder: Path, artifact: Path | None) -> bool:
        """Mirror the record in `folder`; whether anything was sent. A record that changed replaces its run."""
        digest = _digest(folder)
        if self._delivered.get(record.trial) == digest:
            return False
        with self._talking():
            found = self._search(f"tags.`{TRIAL_TAG}` = '{record.trial}' and tags.`{_PARENT}` = '{self._parent}'")
            wanted = {RECORD_TAG: digest, FORMAT_TAG: FORMAT}
            whole = [run for run in found if wanted.items() <= run.data.tags.items()]
            if not whole:
                self._send(record, folder, artifact, digest)
            for run in found:
                if run not in whole[:1]:
                    self._client.delete_run(run.info.run_id)
            self._delivered[record.trial] = digest
            self._write_ledger()
        return not whole

    def close(self, records: Sequence[Record]) -> None:
        """Put the report of all records on the parent run and end it, failed if any trial did."""
        from mlflow.entities import RunTag

        folders = {record.trial: self.folder / record.trial for record in records}
        drawing = report_of(self.folder, self.suite, self._description, records, folders, self._reported)
        with drawing as report, self._talking():
            if report is not None:
                self._client.log_artifacts(self._parent, str(report.folder), "report")
                for name, view in views(report.table).items():
                    self._client.set_experiment_tag(self._experiment, name, view)
                # last, as it says that all else is there
                tags = texts({NOTE_TAG: report.note, _REPORT_TAG: report.digest})
                self._client.log_batch(self._parent, tags=[RunTag(*pair) for pair in tags.items()])
                self._reported = report.digest
            failed = any(record.status == "failed" for record in records)
            self._client.set_terminated(self._parent, "FAILED" if failed else "FINISHED")

    def _send(self, record: Record, folder: Path, artifact: Path | None, digest: str) -> None:
        """Few calls: each is a transaction on sqlite, and a way to the server and back."""
        seen = mirror(record)
        now = seen.ended or round(time.time() * 1000)
        with tempfile.TemporaryDirectory() as name:
            left = _lay_out(Path(name), record, folder, artifact)
            tags = {**seen.tags, TRIAL_TAG: record.trial, _PARENT: self._parent}
            if left:
                tags |= texts({LEFT_TAG: ", ".join(left)})
            run = self._client.create_run(
                self._experiment, start_time=seen.started or now, tags=tags, run_name=seen.name
            ).info.run_id
            self._send_numbers(run, seen, now)
            self._client.log_artifacts(run, name)
        self._client.set_terminated(run, seen.status, now)
        self._client.set_tag(run, RECORD_TAG, digest)

    def _send_numbers(self, run: str, seen: Mirrored, now: int) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        params = [Param(name, text) for name, text in seen.params.items()]
        points = [Metric(point.name, point.value, now, point.step) for point in seen.metrics]
        while params or points:
            self._client.log_batch(run, metrics=points[:NUMBERS_A_CALL], params=params[:PARAMS_A_CALL])
            params, points = params[PARAMS_A_CALL:], points[NUMBERS_A_CALL:]
        inputs = [
            DatasetInput(
                Dataset(data.name, data.digest, "evenbits", data.source),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in seen.data
        ]
        if inputs:
            self._client.log_inputs(run, inputs)

    def _find_experiment(self, suite: str, own: bool) -> str:
        place = None  # a server decides itself
        if self.uri.startswith("sqlite:///"):
            place = (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
        found = self._client.get_experiment_by_name(suite)
        if found is None:
            # the kind is what the page would else ask the user for
            tags = {"mlflow.experimentKind": "custom_model_development"}
            if self._description:
                tags |= texts({NOTE_TAG: self._description})
            return str(self._client.create_experiment(suite, artifact_location=place, tags=tags))
        if own and found.artifact_location != place:
            raise ArtifactError(
                f"{self.uri.removeprefix('sqlite:///')}: a copy, its artifacts lie in {found.artifact_location}; "
                "remove this file and push again, nothing but records is needed"
            )
        if found.lifecycle_stage == "deleted":
            raise ArtifactError(
                f"experiment {suite!r} is deleted there; restore it in MLflow's page, or rename the suite"
            )
        return str(found.experiment_id)

    def _find_parent(self, suite: str, environment: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
        """The parent's id and its tags: by this folder's tag; of a folder that was moved or copied, by its records."""
        found = self._search(f"tags.`{RUN_TAG}` = '{self._run}'")
        if not found:
            found = self._holding_our_records()
        if found:
            run = str(found[0].info.run_id)
            self._client.update_run(run, status="RUNNING")
            return run, dict(found[0].data.tags)
        tags = {RUN_TAG: self._run, "mlflow.source.name": "evenbits", **environment_tags(environment)}
        if self._description:
            tags |= texts({_ABOUT_TAG: self._description})
        return str(self._client.create_run(self._experiment, tags=tags, run_name=suite).info.run_id), tags

    def _holding_our_records(self) -> list[Any]:
        """A parent with a child whose record is one of ours to the byte, times and all: it is this run."""
        for path in sorted(self.folder.glob("*/record.json"), key=lambda path: path.stat().st_mtime)[:KNOWN_BY]:
            for child in self._search(f"tags.`{RECORD_TAG}` = '{_digest(path.parent)}'"):
                parent = self._client.get_run(child.data.tags[_PARENT])
                if parent.info.lifecycle_stage == "active":
                    return [parent]
        return []

    def _search(self, condition: str) -> list[Any]:
        """Runs that are not deleted, oldest first."""
        return list(self._client.search_runs([self._experiment], condition, order_by=["attributes.start_time ASC"]))

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """With MLflow's settings, and alone: a push beside a run, or beside another push, would send twice."""
        with (self.folder / LOCK).open("a") as file, client_settings(self.timeout_seconds):
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

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
        noted = {"parent": self._parent, "format": FORMAT, "delivered": self._delivered}
        text = json.dumps(self._read_ledger() | {self._address: noted}, indent=1)
        write_atomically(self.folder / LEDGER, (text + "\n").encode())


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()[:16]


def _lay_out(target: Path, record: Record, folder: Path, artifact: Path | None) -> list[str]:
    """Everything of a trial as its artifacts shall lie; what is on disk already is only linked. Returns what is left
    out, and why."""
    for name, data in trial_files(record).items():
        (target / name).write_bytes(data)
    (target / "record.json").symlink_to((folder / "record.json").resolve())
    if artifact is not None and (artifact / "manifest.json").exists():
        (target / "manifest.json").symlink_to((artifact / "manifest.json").resolve())
    names = [name for metric in record.metrics for name in (metric.items, *metric.attachments) if name is not None]
    left = []
    for name in dict.fromkeys(names):
        path = folder / name
        if not path.is_file():
            left.append(f"{name} (not there)")
        elif (size := path.stat().st_size) > LARGEST_FILE:
            left.append(f"{name} ({size:,} bytes)")
        else:
            (target / ITEMS / name).parent.mkdir(parents=True, exist_ok=True)
            (target / ITEMS / name).symlink_to(path.resolve())
    return left


@contextlib.contextmanager
def client_settings(timeout_seconds: int) -> Iterator[None]:
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
