"""Records gathered into comparable rows: seeds joined, protocols kept apart, budgets ranked. No text, no files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evenbits.cells import join_seeds, make_column, recovered
from evenbits.fingerprints import PER_TRIAL, differing_fields, flatten, protocol_of
from evenbits.measure import fingerprint_id
from evenbits.record import BudgetFacts, ModelFacts, Record
from evenbits.rows import Cell, Column, Recovered, Row
from evenbits.verdict import Mark, mark_rows, place

__all__ = ["PER_TRIAL", "ModelTable", "Section", "Table", "flatten", "gather", "with_settings"]


@dataclass(frozen=True)
class Section:
    """The rows of one budget by recovery stage, and there best first by the first quality column.

    budget None: suite entries without one, never ranked.
    """

    budget: BudgetFacts | None
    rows: tuple[Row, ...]
    outside: tuple[Row, ...]
    marks: Mapping[tuple[int, tuple[str, str]], Mark]  # (index in rows, column key)


@dataclass(frozen=True)
class ModelTable:
    """All that was tried on one model. `dense`: the uncompressed model, then dense models after a recovery stage."""

    model: ModelFacts
    columns: tuple[Column, ...]
    dense: tuple[Row, ...]
    sections: tuple[Section, ...]
    skipped: tuple[Record, ...]
    failed: tuple[Record, ...]
    _found: dict[tuple[Any, ...], Recovered | None] = field(default_factory=dict, repr=False, compare=False)

    def against_dense(self, row: Row, column: Column) -> float | None:
        """Recovery: the row's number over the dense model's, under the same protocol."""
        cells = self._beside_dense(row, column)
        return cells[0].value / cells[1].value if cells is not None and cells[1].value else None

    def recovery(self, row: Row, column: Column, level: float = 0.95) -> Recovered | None:
        """`against_dense` with its interval: both resampled by the same items, several seeds counted in."""
        key = tuple(record.trial for record in row.records), column.key, level
        if key not in self._found:  # asked for by every table and plot of a report
            cells = self._beside_dense(row, column)
            self._found[key] = None if cells is None else recovered(*cells, level)
        return self._found[key]

    def _beside_dense(self, row: Row, column: Column) -> tuple[Cell, Cell] | None:
        base = next((r for r in self.dense if not r.recovery), None)
        if base is None or column.key not in row.cells or column.key not in base.cells:
            return None
        return row.cells[column.key], base.cells[column.key]


@dataclass(frozen=True)
class Table:
    models: tuple[ModelTable, ...]
    notes: tuple[str, ...] = field(default=())


def gather(records: Sequence[Record], folders: Mapping[str, Path] | None = None) -> Table:
    """Rows by model and budget. folders: trial id -> folder of its record, for per-item values; may lack some.

    Numbers measured under different protocols come to stand in different columns of one metric.
    """
    folders = folders or {}
    protocols: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        for metric in record.metrics:
            fields = protocol_of(record, metric)
            protocols.setdefault(metric.name, {}).setdefault(fingerprint_id(fields), fields)
    letters = {
        (name, key): _letter(number) if len(found) > 1 else ""
        for name, found in protocols.items()
        for number, key in enumerate(found)
    }
    by_model: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        by_model.setdefault((record.model.name, record.model.revision, record.model.dtype), []).append(record)
    models = tuple(_model_table(group, folders, letters) for group in by_model.values())
    return Table(models, tuple(_notes(protocols)))


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def _notes(protocols: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[str]:
    """For each metric measured under several protocols: the fields in which they differ."""
    for name, found in protocols.items():
        if len(found) == 1:
            continue
        first, *others = found.values()
        values: dict[str, list[str]] = {}  # by field, one value a protocol
        for number, fields in enumerate(others, start=1):
            for key, mine, theirs in differing_fields(first, fields):
                values.setdefault(key, [mine] * len(found))[number] = theirs
        parts = [
            f"[{_letter(number)}] " + ", ".join(f"{key}={values[key][number]}" for key in sorted(values))
            for number in range(len(found))
        ]
        yield f"{name} was measured under {len(found)} protocols, never compared: {'; '.join(parts)}"


def _model_table(
    records: Sequence[Record], folders: Mapping[str, Path], letters: Mapping[tuple[str, str], str]
) -> ModelTable:
    columns: dict[tuple[str, str], Column] = {}
    groups: dict[str, list[Record]] = {}
    for record in records:
        for metric in record.metrics:
            key = metric.name, fingerprint_id(protocol_of(record, metric))
            columns.setdefault(key, make_column(record, metric, letters[key]))
        if record.status == "done":
            identity = record.model_dump(
                mode="json", include={"method", "label", "options", "budget", "recovery", "recovery_options"}
            )
            groups.setdefault(json.dumps(identity, sort_keys=True), []).append(record)
    rows = with_settings([join_seeds(group, folders) for group in groups.values()])
    dense = sorted((r for r in rows if r.method == "dense"), key=lambda r: len(r.recovery))
    budgets: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.method != "dense":
            b = row.budget
            budgets.setdefault((0,) if b is None else (1, b.on, b.centre, b.window), []).append(row)
    ordered = sorted(columns.values(), key=lambda c: not c.quality)
    return ModelTable(
        records[0].model,
        tuple(ordered),
        tuple(dense),
        tuple(_section(budgets[key], ordered) for key in sorted(budgets)),
        tuple(r for r in records if r.status == "skipped"),
        tuple(r for r in records if r.status == "failed"),
    )


def _section(rows: Sequence[Row], columns: Sequence[Column]) -> Section:
    quality = [c for c in columns if c.quality]
    inside = [r for r in rows if r.within]
    for column in reversed(quality):  # stable sorts: the first column decides, later ones break ties
        inside.sort(key=lambda row, c=column: place(row, c))  # type: ignore[misc]
    inside.sort(key=lambda row: (len(row.recovery), row.stage_key))
    budget = rows[0].budget
    marks: dict[tuple[int, tuple[str, str]], Mark] = {}
    if budget is not None:
        for column in quality:
            for stages in dict.fromkeys(row.stage_key for row in inside):
                marks |= mark_rows(inside, [i for i, row in enumerate(inside) if row.stage_key == stages], column)
    outside = sorted((r for r in rows if not r.within), key=lambda row: row.budget_bits)
    return Section(budget, tuple(inside), tuple(outside), marks)


def with_settings(rows: Sequence[Row]) -> list[Row]:
    """Name each row's settings shortly: what differs between rows of one name comes first."""
    flat = [{k: v for k, v in flatten(_shown(row)).items() if v != "null"} for row in rows]
    named: list[Row] = []
    for row, own in zip(rows, flat, strict=True):
        peers = [f for other, f in zip(rows, flat, strict=True) if other.name == row.name]
        varying = [k for k in own if len({f.get(k) for f in peers}) > 1]
        keys = [*varying, *(k for k in own if k not in varying)]
        words = [_setting(k, own[k]) for k in keys]
        named.append(replace(row, settings=" ".join([*words, *_stage_settings(row, rows)])))
    return named


def _stage_settings(row: Row, rows: Sequence[Row]) -> list[str]:
    """Options of recovery stages in which rows of one name with the same stages differ."""
    peers = [other for other in rows if (other.name, other.recovery) == (row.name, row.recovery)]
    found = [flatten(dict(zip(r.recovery, r.records[0].recovery_options, strict=False))) for r in (row, *peers)]
    return [_setting(k, v) for k, v in found[0].items() if any(other.get(k) != v for other in found)]


def _shown(row: Row) -> Mapping[str, Any]:
    names = row.records[0].shown or row.options
    return {name: _said(row.options[name]) for name in names if name in row.options}


def _said(value: Any) -> Any:
    """A value without what its nested tables leave unsaid: nulls, and what is false."""
    if isinstance(value, list | tuple):
        return [_said(one) for one in value]
    if isinstance(value, dict):
        return {key: _said(one) for key, one in value.items() if one is not None and one is not False}
    return value


def _setting(key: str, value: str) -> str:
    return {"true": key, "false": f"no-{key}"}.get(value, f"{key}={value}")
