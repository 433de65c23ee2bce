"""Records gathered into comparable rows: seeds joined, protocols kept apart, budgets ranked. No text, no files written.

What may be called better than what is decided here, once, by `verdict`; tables, plots and pages only show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evenbits.measure import fingerprint_id
from evenbits.record import Bits, BudgetFacts, MetricFacts, ModelFacts, Record, read_items
from evenbits.statistics import Floats, Statistic, paired_difference, statistic_of

PER_TRIAL = frozenset({"trial", "artifact", "method", "label", "seed"})
"""Fingerprint fields that say which trial was measured, not how: they do not split a column."""
COST_UNITS = frozenset({"B", "byte", "bytes", "bit", "bits", "s", "ms", "seconds", "J", "W", "Wh", "tokens/s", "x"})

Outcome = Literal["better", "worse", "not distinguishable", "not comparable"]
Mark = Literal["", "*", "~", "-"]


@dataclass(frozen=True)
class Column:
    """One metric under one protocol. `letter` tells apart several protocols of one metric, "" where there is one."""

    name: str
    protocol: str
    unit: str
    better: Literal["lower", "higher"]
    volatile: bool
    letter: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.protocol

    @property
    def title(self) -> str:
        return f"{self.name} [{self.letter}]" if self.letter else self.name

    @property
    def quality(self) -> bool:
        """Whether it says how good the model is; else what it costs."""
        return not self.volatile and self.unit not in COST_UNITS

    def ahead(self, a: float, b: float) -> bool:
        """Whether a is the better number."""
        return a < b if self.better == "lower" else a > b


@dataclass(frozen=True)
class Cell:
    """A number of a row: the mean over seeds; the range over seeds where they differ, else the record's own interval.

    items: (seeds, items) or None where a seed keeps none; transform: how items make the value.
    """

    value: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    items: Floats | None = None
    transform: Statistic | None = None


@dataclass(frozen=True)
class Row:
    """One method with one setting under one budget and recovery stage, all its seeds together."""

    model: ModelFacts
    name: str
    options: Mapping[str, Any]
    budget: BudgetFacts | None
    recovery: tuple[str, ...]
    records: tuple[Record, ...]
    bits: Bits
    linear_bytes: float
    model_bytes: float
    cells: Mapping[tuple[str, str], Cell]
    within: bool
    settings: str = ""

    @property
    def method(self) -> str:
        return self.records[0].method

    @property
    def stage(self) -> str:
        return " + ".join(self.recovery) or "none"

    @property
    def budget_bits(self) -> float:
        """The number its budget is matched on."""
        return self.bits.model if self.budget is not None and self.budget.on == "model" else self.bits.linear

    @property
    def ratios(self) -> dict[str, float]:
        """How many times smaller: linear layers and whole model, against fp32 and against the stored dtype."""
        linear_fp32 = 4 * self.model.linear_weights / self.linear_bytes
        model_fp32 = 4 * self.model.parameters / self.model_bytes
        stored = self.model.stored_bits / 32
        return {
            "linear_fp32": linear_fp32,
            "linear_stored": linear_fp32 * stored,
            "model_fp32": model_fp32,
            "model_stored": model_fp32 * stored,
        }


@dataclass(frozen=True)
class Verdict:
    """What may be said of a against b in one metric, and why."""

    outcome: Outcome
    reason: str


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

    def against_dense(self, row: Row, column: Column) -> float | None:
        """Recovery: the row's number over the dense model's, under the same protocol."""
        base = next((r for r in self.dense if not r.recovery), None)
        if base is None or column.key not in row.cells or column.key not in base.cells:
            return None
        reference = base.cells[column.key].value
        return row.cells[column.key].value / reference if reference else None


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
            fields = _protocol(record, metric)
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


def verdict(a: Row, b: Row, column: Column) -> Verdict:
    """Whether a may be called better than b: at no more bits, same recovery stage, same calibration tokens, tested.

    A method that reads no calibration text was offered the same tokens and is comparable with one that does.
    """
    if (a.model.name, a.model.revision) != (b.model.name, b.model.revision):
        return Verdict("not comparable", "different models")
    cells = a.cells.get(column.key), b.cells.get(column.key)
    if cells[0] is None or cells[1] is None:
        return Verdict("not comparable", f"no {column.title} for {a.name if cells[0] is None else b.name}")
    if _stages(a) != _stages(b):
        return Verdict("not comparable", f"different recovery stages: {a.stage} and {b.stage}")
    if not _same_calibration(a.records, b.records):
        return Verdict("not comparable", "different calibration tokens")
    differs, how = _differ(cells[0], cells[1])
    if differs is None:
        return Verdict("not comparable", how)
    if not differs:
        return Verdict("not distinguishable", how)
    first = not np.isfinite(cells[1].value) or column.ahead(cells[0].value, cells[1].value)
    winner, loser = (a, b) if first else (b, a)
    if winner.budget_bits > loser.budget_bits + 1e-9:
        bits = f"{winner.budget_bits:.4f} against {loser.budget_bits:.4f}"
        return Verdict("not comparable", f"{winner.name} is ahead with more bits ({bits})")
    return Verdict("better" if first else "worse", how)


def dense_bits(model: ModelFacts) -> Bits:
    """The bits of the uncompressed model at the dtype it is evaluated in."""
    linear = 8 * model.linear_bytes / model.linear_weights
    return Bits(index=linear, paper=linear, linear=linear, model=8 * model.model_bytes / model.parameters)


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as dotted names with their JSON text."""
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return flat


def _protocol(record: Record, metric: MetricFacts) -> dict[str, Any]:
    fields = record.fingerprints.get(metric.fingerprint, {"fingerprint": metric.fingerprint})
    return {key: value for key, value in fields.items() if key not in PER_TRIAL}


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def _notes(protocols: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[str]:
    """For each metric measured under several protocols: the fields in which they differ."""
    for name, found in protocols.items():
        if len(found) == 1:
            continue
        flat = [flatten(fields) for fields in found.values()]
        odd = [key for key in sorted(set().union(*flat)) if len({f.get(key) for f in flat}) > 1]
        parts = [
            f"[{_letter(number)}] " + ", ".join(f"{key}={fields.get(key, '(absent)')}" for key in odd)
            for number, fields in enumerate(flat)
        ]
        yield f"{name} was measured under {len(found)} protocols, never compared: {'; '.join(parts)}"


def _model_table(
    records: Sequence[Record], folders: Mapping[str, Path], letters: Mapping[tuple[str, str], str]
) -> ModelTable:
    columns: dict[tuple[str, str], Column] = {}
    groups: dict[str, list[Record]] = {}
    for record in records:
        for metric in record.metrics:
            key = metric.name, fingerprint_id(_protocol(record, metric))
            columns.setdefault(key, Column(*key, metric.unit, metric.better, metric.volatile, letters[key]))
        if record.status == "done":
            identity = record.model_dump(
                mode="json", include={"method", "label", "options", "budget", "recovery", "recovery_options"}
            )
            groups.setdefault(json.dumps(identity, sort_keys=True), []).append(record)
    rows = _with_settings([_row(group, folders) for group in groups.values()])
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


def _row(records: Sequence[Record], folders: Mapping[str, Path]) -> Row:
    first = records[0]
    measured = [
        (r.ledger.bits, r.ledger.linear_bytes, r.ledger.model_bytes)
        if r.ledger is not None
        else (dense_bits(r.model), r.model.linear_bytes, r.model.model_bytes)
        for r in records
    ]
    bits = Bits(**{k: float(np.mean([getattr(b, k) for b, _, _ in measured])) for k in Bits.model_fields})
    found: dict[tuple[str, str], list[tuple[MetricFacts, Path | None]]] = {}
    for record in records:
        for metric in record.metrics:
            key = metric.name, fingerprint_id(_protocol(record, metric))
            found.setdefault(key, []).append((metric, folders.get(record.trial)))
    return Row(
        model=first.model,
        name=first.label or first.method,
        options=first.options,
        budget=first.budget,
        recovery=first.recovery,
        records=tuple(records),
        bits=bits,
        linear_bytes=float(np.mean([linear for _, linear, _ in measured])),
        model_bytes=float(np.mean([model for _, _, model in measured])),
        cells={key: _cell(metrics) for key, metrics in found.items()},
        within=all(_within(record, b) for record, (b, _, _) in zip(records, measured, strict=True)),
    )


def _within(record: Record, bits: Bits) -> bool:
    if record.budget is None or record.within_budget is not None:
        return record.within_budget is not False
    number = bits.linear if record.budget.on == "linear" else bits.model
    return abs(number - record.budget.centre) <= record.budget.window + 1e-9


def _cell(metrics: Sequence[tuple[MetricFacts, Path | None]]) -> Cell:
    values = tuple(metric.value for metric, _ in metrics)
    if len(set(values)) > 1:
        low, high = float(np.min(values)), float(np.max(values))
    else:
        low, high = metrics[0][0].low, metrics[0][0].high  # type: ignore[assignment]
    read = [
        read_items(folder, metric) if folder is not None and metric.items and (folder / metric.items).exists() else None
        for metric, folder in metrics
    ]
    arrays = [np.asarray(items, dtype=np.float64) for items in read if items is not None]
    items: Floats | None = None
    transform: Statistic | None = None
    if len(arrays) == len(metrics) and len({a.shape for a in arrays}) == 1 and arrays[0].ndim == 1 and arrays[0].size:
        items = np.stack(arrays)
        transform = statistic_of(items[0], values[0]) if np.isfinite(items).all() else None
    return Cell(float(np.mean(values)), low, high, values, items, transform)


def _section(rows: Sequence[Row], columns: Sequence[Column]) -> Section:
    quality = [c for c in columns if c.quality]
    inside = [r for r in rows if r.within]
    for column in reversed(quality):  # stable sorts: the first column decides, later ones break ties
        inside.sort(key=lambda row, c=column: _place(row, c))  # type: ignore[misc]
    inside.sort(key=lambda row: (len(row.recovery), _stages(row)))
    budget = rows[0].budget
    marks: dict[tuple[int, tuple[str, str]], Mark] = {}
    if budget is not None:
        for column in quality:
            for stages in dict.fromkeys(map(_stages, inside)):
                marks |= _marks(inside, [i for i, row in enumerate(inside) if _stages(row) == stages], column)
    outside = sorted((r for r in rows if not r.within), key=lambda row: row.budget_bits)
    return Section(budget, tuple(inside), tuple(outside), marks)


def _place(row: Row, column: Column) -> tuple[bool, float]:
    cell = row.cells.get(column.key)
    if cell is None or not np.isfinite(cell.value):
        return True, 0.0
    return False, cell.value if column.better == "lower" else -cell.value


def _marks(rows: Sequence[Row], peers: Sequence[int], column: Column) -> dict[tuple[int, tuple[str, str]], Mark]:
    """Among `peers`, rows of one budget and recovery stage; none where fewer than two have a number.

    "*" the best number, "~" not told apart from it by the paired test, "-" some row is better by `verdict`.
    """
    entered = [i for i in peers if not _place(rows[i], column)[0]]
    if len(entered) < 2:
        return {}
    best = min(entered, key=lambda i: _place(rows[i], column))
    marks: dict[tuple[int, tuple[str, str]], Mark] = {(best, column.key): "*"}
    for i in entered:
        if i == best:
            continue
        differs, _ = _differ(rows[best].cells[column.key], rows[i].cells[column.key])
        if differs is False:
            marks[i, column.key] = "~"
        elif any(verdict(rows[j], rows[i], column).outcome == "better" for j in entered if j != i):
            marks[i, column.key] = "-"
    return marks


def _differ(a: Cell, b: Cell) -> tuple[bool | None, str]:
    """Whether two numbers differ beyond chance (None: cannot be told), and how that was found.

    With several seeds both must hold: the paired test on items averaged over seeds, and no overlap between seeds.
    """
    finite = np.isfinite(a.value), np.isfinite(b.value)
    if not all(finite):
        return (True, "one of them diverged") if any(finite) else (None, "both diverged")
    apart = max(a.by_seed) < min(b.by_seed) or max(b.by_seed) < min(a.by_seed)
    if a.items is not None and b.items is not None and a.transform is not None and a.transform == b.transform:
        if a.items.shape[1] == b.items.shape[1]:
            found = paired_difference(a.items.mean(axis=0), b.items.mean(axis=0), a.transform)
            how = f"paired test on {found.items} items: p = {found.p_value:.3g}"
            if found.p_value <= 0.05 and not apart:
                return False, f"{how}, but the seeds overlap"
            return bool(found.p_value <= 0.05), how
        return None, f"not the same items ({a.items.shape[1]} and {b.items.shape[1]})"
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None, "no per-item values or intervals to test with"
    return a.high < b.low or b.high < a.low, "by intervals, no common per-item values"


def _stages(row: Row) -> str:
    return json.dumps([row.recovery, row.records[0].recovery_options], sort_keys=True)


def _same_calibration(a: Sequence[Record], b: Sequence[Record]) -> bool:
    drawn = [
        {r.seed: json.dumps(r.calibration, sort_keys=True) for r in side if r.calibration is not None}
        for side in (a, b)
    ]
    if not all(drawn):
        return True
    common = drawn[0].keys() & drawn[1].keys()
    return bool(common) and all(drawn[0][seed] == drawn[1][seed] for seed in common)


def _with_settings(rows: Sequence[Row]) -> list[Row]:
    """Name each row's settings shortly: what differs between rows of one name comes first."""
    flat = [{k: v for k, v in flatten(row.options).items() if v != "null"} for row in rows]
    named: list[Row] = []
    for row, own in zip(rows, flat, strict=True):
        peers = [f for other, f in zip(rows, flat, strict=True) if other.name == row.name]
        varying = [k for k in own if len({f.get(k) for f in peers}) > 1]
        keys = [*varying, *(k for k in own if k not in varying)]
        named.append(replace(row, settings=" ".join(_setting(k, own[k]) for k in keys)))
    return named


def _setting(key: str, value: str) -> str:
    return {"true": key, "false": f"no-{key}"}.get(value, f"{key}={value}")
