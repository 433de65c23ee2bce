"""What each night measured, kept for years: one small JSON file a night.

A file is a digest of a run's records. It holds what a series needs and no items, so that records may go. A record that
a night kept from an earlier one, because nothing it depends on had changed, is marked as such in the series: that is no
new observation.
"""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evenbits.environment import describe_environment
from evenbits.errors import ArtifactError, SuiteError
from evenbits.files import write_atomically
from evenbits.record import Record
from evenbits.report_format import format_budget
from evenbits.rows import Cell, Column, Row, why
from evenbits.store import Results
from evenbits.tables import ModelTable, gather

SCHEMA = 1
DIGITS = 6  # of a number kept; whole ones (bytes) are kept whole
NIGHTS = "[0-9][0-9][0-9][0-9]-*-*.json"  # files of nights in a folder


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NightMetric(_Frozen):
    """What a metric is. protocol: numbers with different ones are not compared."""

    unit: str
    better: Literal["lower", "higher"]
    protocol: str
    volatile: bool = False
    quality: bool = False


class Reading(_Frozen):
    """One metric of a row in one night: the mean over seeds with its 95 % interval, as in a report.

    value: None where the model diverged. by_seed: where there were several seeds.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    by_seed: tuple[float | None, ...] = ()


class NightRow(_Frozen):
    """A method at a setting. measured: when its records were finished, the latest; of a kept record that is before the
    night. commits: at which its records were computed."""

    model: str
    name: str = Field(description="label and recovery stages; dense for the model as it is")
    budget: str = ""
    settings: str = ""
    linear_bits: float
    model_bits: float
    linear_bytes: int
    model_bytes: int
    trials: tuple[str, ...]
    artifacts: tuple[str, ...] = ()
    measured: str
    commits: tuple[str, ...] = ()
    processor: str = ""
    readings: dict[str, Reading] = Field(description="by metric")

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.name, self.budget


class NightFailure(_Frozen):
    """A trial that failed or was skipped. `skipped` ones are asked for and impossible, no fault."""

    name: str
    budget: str = ""
    seed: int = 0
    status: str
    reason: str


class Night(_Frozen):
    """One night's run of a suite. date: when it was planned, UTC. commit: of the checkout that ran it; None: no git."""

    schema_version: int = SCHEMA
    suite: str
    id: str = Field(description="hash of suite, commit and the records: the same run has the same")
    date: str
    commit: str | None = None
    dirty: bool = False
    versions: dict[str, str] = {}
    python: str = ""
    platform: str = ""
    processor: str = ""
    metrics: dict[str, NightMetric]
    rows: tuple[NightRow, ...]
    failures: tuple[NightFailure, ...] = ()
    missing: int = Field(default=0, description="planned trials without a record: the run was stopped")

    @property
    def short_commit(self) -> str:
        return (self.commit or "no commit")[:9] + ("+" if self.dirty else "")

    @property
    def file_name(self) -> str:
        return f"{self.date[:10]}-{self.id}.json"


def make_night(store: Results, suite: str, environment: dict[str, Any] | None = None) -> Night:
    """The digest of the latest run of a suite. Raises SuiteError where there is none or nothing of it is recorded.

    environment: as `describe_environment` gives it, of this process unless given.
    """
    planned = store.planned(suite)
    records, folders = store.records(suite)
    if not records:
        raise SuiteError(f"{store.run_folder(suite)}: no trial of suite {suite!r} has a record; run it first")
    here = describe_environment() if environment is None else environment
    git = here.get("git") or {}
    commit, dirty = git.get("commit"), bool(git.get("dirty"))
    states = sorted((r.trial, r.status, r.finished) for r in records)
    text = json.dumps([suite, commit, dirty, states, len(planned) - len(records)])
    run_at = (store.run_folder(suite) / "plan.json").stat().st_mtime
    models = gather(records, folders).models
    rows = [
        _row(model, row)
        for model in models
        for row in (*model.dense, *(r for s in model.sections for r in (*s.rows, *s.outside)))
    ]
    return Night(
        suite=suite,
        id=hashlib.sha256(text.encode()).hexdigest()[:12],
        date=datetime.fromtimestamp(run_at, UTC).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        versions=dict(here.get("versions", {})),
        python=str(here.get("python", "")),
        platform=str(here.get("platform", "")),
        processor=str(here.get("processor", "")),
        metrics={column.title: _metric(column) for model in models for column in model.columns},
        rows=tuple(rows),
        failures=tuple(_failure(record) for record in records if record.status != "done"),
        missing=len(planned) - len(records),
    )


def add_night(night: Night, folder: Path) -> tuple[Path, bool]:
    """Write it into the folder unless it is there already. Returns its path, and whether it is new.

    Raises ArtifactError where the folder holds the nights of another suite, or cannot be written.
    """
    if found := sorted(folder.glob(f"*-{night.id}.json")):
        return found[0], False
    if others := {other.suite for other in read_history(folder)} - {night.suite}:
        raise ArtifactError(
            f"{folder}: holds the history of suite {min(others)!r}, not of {night.suite!r}; give another"
        )
    path = folder / night.file_name
    text = json.dumps(
        night.model_dump(mode="json", exclude_defaults=True) | {"schema_version": SCHEMA}, allow_nan=False
    )
    try:
        write_atomically(path, text.replace('{"model": ', '\n{"model": ').encode() + b"\n")  # a line a row, for diffs
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None
    return path, True


def read_night(path: Path) -> Night:
    """Raises ArtifactError for a damaged file and for one of a schema newer than this version knows."""
    try:
        data = json.loads(path.read_text())
        version = data["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not the record of a night ({error!r}); remove it or restore it") from None
    if not isinstance(version, int) or version > SCHEMA:
        raise ArtifactError(f"{path}: schema {version} is not known to this evenbits ({SCHEMA}); upgrade evenbits")
    try:
        return Night.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: {where}: {first['msg']}; remove it or restore it") from None


def read_history(folder: Path) -> list[Night]:
    """All nights in a folder, the earliest first; none where there is no such folder."""
    return sorted((read_night(path) for path in folder.glob(NIGHTS)), key=lambda night: (night.date, night.id))


def _row(model: ModelTable, row: Row) -> NightRow:
    columns = [column for column in model.columns if column.key in row.cells]
    names = [record.environment.get("git") or {} for record in row.records]
    return NightRow(
        model=row.model.name,
        name=row.full_name,
        budget="" if row.method == "dense" else format_budget(row.budget),
        settings=row.settings,
        linear_bits=_kept(row.bits.linear) or 0.0,
        model_bits=_kept(row.bits.model) or 0.0,
        linear_bytes=round(row.linear_bytes),
        model_bytes=round(row.model_bytes),
        trials=tuple(record.trial for record in row.records),
        artifacts=tuple(record.artifact for record in row.records if record.artifact is not None),
        measured=max(record.finished for record in row.records),
        commits=tuple(sorted({str(git["commit"]) for git in names if git.get("commit")})),
        processor=", ".join(sorted({str(record.environment.get("processor", "")) for record in row.records})),
        readings={column.title: _reading(row.cells[column.key]) for column in columns},
    )


def _metric(column: Column) -> NightMetric:
    return NightMetric(
        unit=column.unit,
        better=column.better,
        protocol=column.protocol,
        volatile=column.volatile,
        quality=column.quality,
    )


def _reading(cell: Cell) -> Reading:
    return Reading(
        value=_kept(cell.value),
        low=_kept(cell.low),
        high=_kept(cell.high),
        by_seed=tuple(map(_kept, cell.by_seed)) if len(cell.by_seed) > 1 else (),
    )


def _failure(record: Record) -> NightFailure:
    name = "+".join([record.label or record.method, *record.recovery])
    budget = "" if record.budget is None else format_budget(record.budget)
    return NightFailure(name=name, budget=budget, seed=record.seed, status=record.status, reason=why(record))


def _kept(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if value.is_integer() else float(f"{value:.{DIGITS}g}")
