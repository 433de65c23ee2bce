"""What a run came to, small enough to be committed: a snapshot of its records.

A run of tonight and a baseline are the same kind of thing, so that one comparison serves. Reading needs no plugin. Of
a trial there stays what a comparison asks for: sizes, every number with its protocol, per-item values as float32
(zlib, base64), the error of each layer, ids, and what it was made with. Samples and logs stay with the records.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evenbits.cells import join_seeds
from evenbits.errors import ArtifactError
from evenbits.fingerprints import protocol_of
from evenbits.measure import fingerprint_id
from evenbits.record import Bits, BudgetFacts, Record
from evenbits.rows import Cell, Column, Row, why
from evenbits.statistics import Floats, Statistic
from evenbits.store import Results

SCHEMA = 1
ENVIRONMENT = ("versions", "python", "processor", "cores", "git")


LAYER_ERROR = "layer_error"
"""Geometric mean over layers of what compression did to each: the calibrated error where a method read statistics,
else the error of the weights. Its items are the layers. It scatters by tenths of a per cent between seeds where
perplexities scatter as much by a tenth of what they lose, so that a fault in a single block is seen here first."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KeptItems(_Frozen):
    """Per-item values (seeds, items), little-endian float32 by rows, and the statistic of them that is the value."""

    seeds: int = Field(ge=1)
    items: int = Field(ge=1)
    statistic: Statistic
    data: str

    def array(self) -> Floats:
        """(seeds, items). Raises ArtifactError for data of another size."""
        try:
            found = np.frombuffer(zlib.decompress(base64.b64decode(self.data, validate=True)), dtype="<f4")
            return found.reshape(self.seeds, self.items).astype(np.float64)
        except (zlib.error, binascii.Error, ValueError) as error:
            raise ArtifactError(f"per-item values of the baseline are damaged ({error}); restore the file") from None


class Design(_Frozen):
    """How the items of a metric were drawn, as in `evenbits.statistics`; the same for all rows of a protocol."""

    strata: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None


class KeptMetric(_Frozen):
    """values: one a seed; seeds: which. protocol, design: keys into the snapshot's tables."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    volatile: bool
    protocol: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    design: str | None = None
    items: KeptItems | None = None

    @property
    def quality(self) -> bool:
        return Column(self.name, "", self.unit, self.better, self.volatile).quality


class KeptRow(_Frozen):
    """One method at one budget and recovery stage; of the tuples one entry a seed."""

    model: str
    method: str
    label: str
    budget: BudgetFacts | None
    recovery: tuple[str, ...]
    recovery_options: tuple[dict[str, Any], ...]
    options: dict[str, Any]
    within: bool
    seeds: tuple[int, ...]
    trials: tuple[str, ...]
    artifacts: tuple[str | None, ...]
    made_with: tuple[str, ...] = Field(description="keys into the snapshot's environments")
    bits: tuple[Bits, ...]
    linear_bytes: tuple[int, ...]
    model_bytes: tuple[int, ...]
    metrics: tuple[KeptMetric, ...]
    measured_at: tuple[str, ...] = Field(default=(), description="ISO times, one a seed; () in older snapshots")

    @property
    def place(self) -> str:
        """Which row this is, whatever its settings: model, name, stages, budget."""
        return place_of(self.model, self.label, self.recovery, self.budget)


class Update(_Frozen):
    """An entry of the log. accepted: the alarms that the gate raised against the baseline before."""

    reason: str = Field(min_length=1)
    date: str
    commit: str | None
    accepted: tuple[str, ...] = ()


class Snapshot(_Frozen):
    schema_version: int = SCHEMA
    suite: str
    updates: tuple[Update, ...] = ()
    environments: dict[str, dict[str, Any]]
    protocols: dict[str, dict[str, Any]]
    designs: dict[str, Design]
    rows: tuple[KeptRow, ...]

    def rows_by_place(self) -> dict[str, KeptRow]:
        """By `KeptRow.place`; several rows in one place are told apart by their options."""
        places = [row.place for row in self.rows]
        return {
            place if places.count(place) == 1 else f"{place} {json.dumps(row.options, sort_keys=True)}": row
            for place, row in zip(places, self.rows, strict=True)
        }


@dataclass(frozen=True)
class Absence:
    """A trial of the plan that has no numbers, and why. place: its row's, "" for one that left no record at all."""

    place: str
    trial: str
    status: Literal["missing", "failed", "skipped"]
    reason: str


@dataclass(frozen=True)
class NightRun:
    snapshot: Snapshot
    absences: tuple[Absence, ...]

    @property
    def incomplete(self) -> tuple[Absence, ...]:
        """Trials that should have numbers: a skip is the plan's own decision, and no accident."""
        return tuple(one for one in self.absences if one.status != "skipped")


def place_of(model: str, label: str, recovery: Sequence[str], budget: BudgetFacts | None) -> str:
    at = "" if budget is None else f" @ {budget.centre:g}" + (" model" if budget.on == "model" else "")
    return f"{model} {'+'.join([label, *recovery])}{at}"


def take_run(store: Results, suite: str) -> NightRun:
    """The latest run of a suite. Raises SuiteError where there is none, ArtifactError for damaged records."""
    records, folders = store.records(suite)
    absences = [
        Absence(_place(record), record.trial, record.status, why(record))
        for record in records
        if record.status != "done"
    ]
    found = {record.trial for record in records}
    reason = f"no record in {store.run_folder(suite)}"
    absences += [Absence("", trial, "missing", reason) for trial in store.planned(suite) if trial not in found]
    return NightRun(take_snapshot(suite, records, folders), tuple(absences))


def take_snapshot(suite: str, records: Sequence[Record], folders: Mapping[str, Path]) -> Snapshot:
    """Of the records that are done, seeds joined."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.status == "done":
            facts = [_place(record), record.method, record.options, record.recovery_options]
            groups.setdefault(json.dumps(facts, sort_keys=True), []).append(record)
    environments: dict[str, dict[str, Any]] = {}
    protocols: dict[str, dict[str, Any]] = {}
    designs: dict[str, Design] = {}
    rows = []
    for group in groups.values():
        for record in group:
            made_with = {key: record.environment[key] for key in ENVIRONMENT if key in record.environment}
            environments[fingerprint_id(made_with)] = made_with
            for metric in record.metrics:
                measured = protocol_of(record, metric)
                protocols[fingerprint_id(measured)] = measured
        row = _row(join_seeds(group, folders), designs)
        if (found := _layer_errors(group)) is not None:
            fields, errors = found
            protocols[errors.protocol] = fields
            row = row.model_copy(update={"metrics": (*row.metrics, errors)})
        rows.append(row)
    return Snapshot(suite=suite, environments=environments, protocols=protocols, designs=designs, rows=tuple(rows))


def _place(record: Record) -> str:
    return place_of(record.model.name, record.label or record.method, record.recovery, record.budget)


def _row(row: Row, designs: dict[str, Design]) -> KeptRow:
    records = row.records
    made_with = [{key: r.environment[key] for key in ENVIRONMENT if key in r.environment} for r in records]
    sizes = [
        (r.ledger.bits, r.ledger.linear_bytes, r.ledger.model_bytes)
        if r.ledger is not None
        else (row.bits, r.model.linear_bytes, r.model.model_bytes)
        for r in records
    ]
    return KeptRow(
        model=row.model.name,
        method=row.method,
        label=row.name,
        budget=row.budget,
        recovery=row.recovery,
        recovery_options=records[0].recovery_options,
        options=dict(row.options),
        within=row.within,
        seeds=tuple(r.seed for r in records),
        trials=tuple(r.trial for r in records),
        artifacts=tuple(r.artifact for r in records),
        made_with=tuple(fingerprint_id(one) for one in made_with),
        bits=tuple(bits for bits, _, _ in sizes),
        linear_bytes=tuple(linear for _, linear, _ in sizes),
        model_bytes=tuple(model for _, _, model in sizes),
        metrics=tuple(_metrics(row, designs)),
        measured_at=tuple(r.finished for r in records),
    )


def _metrics(row: Row, designs: dict[str, Design]) -> Iterable[KeptMetric]:
    for (name, protocol), cell in row.cells.items():
        measured = [
            (record.seed, metric)
            for record in row.records
            for metric in record.metrics
            if metric.name == name and fingerprint_id(protocol_of(record, metric)) == protocol
        ]
        first = measured[0][1]
        kept = _items(cell)
        design = _design(cell) if kept is not None else None
        key = None
        if design is not None:
            key = fingerprint_id(design.model_dump(mode="json"))
            designs[key] = design
        yield KeptMetric(
            name=name,
            unit=first.unit,
            better=first.better,
            volatile=first.volatile,
            protocol=protocol,
            seeds=tuple(seed for seed, _ in measured),
            values=cell.by_seed,
            design=key,
            items=kept,
        )


def _layer_errors(records: Sequence[Record]) -> tuple[dict[str, Any], KeptMetric] | None:
    """A metric of the layers' errors with its protocol; None where there are none, or seeds differ in which."""
    calibrated = all(layer.calibrated_error for record in records for layer in record.layers)
    found = []
    for record in records:
        pairs = [(layer.name, layer.calibrated_error if calibrated else layer.error) for layer in record.layers]
        found.append({name: error for name, error in pairs if error})
    if not found[0] or any(one.keys() != found[0].keys() for one in found):
        return None
    logs = np.log(np.array([[one[name] for name in found[0]] for one in found], dtype=np.float64))
    if not np.isfinite(logs).all():
        return None
    first = records[0]
    protocol = {
        "metric": "calibrated error" if calibrated else "error of the weights",
        "model": first.model.name,
        "revision": first.model.revision,
        "layers": list(found[0]),
    }
    return protocol, KeptMetric(
        name=LAYER_ERROR,
        unit="relative",
        better="lower",
        volatile=False,
        protocol=fingerprint_id(protocol),
        seeds=tuple(record.seed for record in records),
        values=tuple(np.exp(logs.mean(axis=1)).tolist()),
        items=_packed(logs, "exp-mean"),
    )


def _items(cell: Cell) -> KeptItems | None:
    if cell.items is None or cell.transform is None:
        return None
    return _packed(cell.items, cell.transform)


def _packed(values: Floats, statistic: Statistic) -> KeptItems:
    packed = zlib.compress(np.ascontiguousarray(values, dtype="<f4").tobytes(), 9)
    seeds, items = values.shape
    return KeptItems(seeds=seeds, items=items, statistic=statistic, data=base64.b64encode(packed).decode())


def _design(cell: Cell) -> Design | None:
    if cell.strata is None and cell.weights is None:
        return None
    weights = None if cell.weights is None else tuple(round(float(one), 9) for one in cell.weights)
    return Design(strata=cell.strata, weights=weights)
