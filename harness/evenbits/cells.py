"""Records of one method joined over their seeds: a row, and in each of its cells what statistics need to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evenbits.errors import ArtifactError
from evenbits.fingerprints import protocol_of
from evenbits.measure import fingerprint_id
from evenbits.record import Bits, MetricFacts, Record, read_items
from evenbits.rows import Cell, Column, Recovered, Row, dense_bits
from evenbits.significance import interval, recovery
from evenbits.statistics import Floats, Statistic, bootstrap_interval, check_strata, check_weights, statistic_of


def make_column(record: Record, metric: MetricFacts, letter: str = "") -> Column:
    protocol = fingerprint_id(protocol_of(record, metric))
    return Column(metric.name, protocol, metric.unit, metric.better, metric.volatile, letter)


def join_seeds(records: Sequence[Record], folders: Mapping[str, Path], level: float = 0.95) -> Row:
    """One row of done records that differ in their seed alone. Raises ArtifactError for items that contradict them."""
    first = records[0]
    dense = first.method == "dense" and not first.recovery
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
            key = metric.name, fingerprint_id(protocol_of(record, metric))
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
        cells={key: _cell(metrics, level, fixed=dense) for key, metrics in found.items()},
        within=all(_within(record, b) for record, (b, _, _) in zip(records, measured, strict=True)),
    )


def _within(record: Record, bits: Bits) -> bool:
    if record.budget is None or record.within_budget is not None:
        return record.within_budget is not False
    number = bits.linear if record.budget.on == "linear" else bits.model
    return abs(number - record.budget.centre) <= record.budget.window + 1e-9


def _cell(metrics: Sequence[tuple[MetricFacts, Path | None]], level: float, *, fixed: bool) -> Cell:
    values = tuple(metric.value for metric, _ in metrics)
    first, folder = metrics[0]
    arrays = [found for metric, folder in metrics if (found := _items(metric, folder)) is not None]
    items: Floats | None = None
    transform: Statistic | None = None
    strata: tuple[int, ...] | None = None
    weights: Floats | None = None
    if len(arrays) == len(metrics) and len({a.shape for a in arrays}) == 1 and arrays[0].ndim == 1 and arrays[0].size:
        items = np.stack(arrays)
        # timings are no items that another model shares
        comparable = np.isfinite(items).all() and not first.volatile
        transform = statistic_of(items[0], values[0]) if comparable else None
        strata, weights = _design(first, items.shape[1], folder)
    cell = Cell(
        float(np.mean(values)),
        first.low,
        first.high,
        values,
        items,
        transform,
        strata,
        weights,
        fixed and not first.volatile,
    )
    low, high = _limits(cell, first, level)
    return replace(cell, low=low, high=high)


def _items(metric: MetricFacts, folder: Path | None) -> Floats | None:
    """Per-item values; None where none were kept, or where records were copied without them."""
    if folder is None or metric.items is None or not (folder / metric.items).exists():
        return None
    try:
        return np.asarray(read_items(folder, metric), dtype=np.float64)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ArtifactError(
            f"{folder / metric.items}: not per-item values ({error}); remove this record and run again"
        ) from None


def _limits(cell: Cell, metric: MetricFacts, level: float) -> tuple[float | None, float | None]:
    """low and high as `Cell` says. Of one seed the record has them for 95 %."""
    if len(set(cell.by_seed)) > 1:
        quality = Column(metric.name, "", metric.unit, metric.better, metric.volatile).quality
        found = interval(cell.sampled(), level) if quality and np.isfinite(cell.value) else None
        if found is None or not np.isfinite(found).all():
            return float(np.min(cell.by_seed)), float(np.max(cell.by_seed))
        return (max(found[0], 0.0), min(found[1], 1.0)) if metric.unit == "accuracy" else found
    if level == 0.95:
        return metric.low, metric.high
    if cell.items is None or cell.transform is None or cell.items.shape[1] < 2:
        return None, None
    return bootstrap_interval(cell.items[0], cell.transform, level, strata=cell.strata, weights=cell.weights)


def _design(metric: MetricFacts, items: int, folder: Path | None) -> tuple[tuple[int, ...] | None, Floats | None]:
    """How the items were drawn, from the metric's details."""
    try:
        strata, weights = metric.details.get("strata"), metric.details.get("weights")
        return None if strata is None else check_strata(strata, items), check_weights(weights, items)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: {metric.name}: {error}; remove this record and run again") from None


def recovered(cell: Cell, dense: Cell, level: float = 0.95) -> Recovered | None:
    """A number over the dense model's, which was measured under the same protocol; None where that is 0."""
    if not dense.value:
        return None
    if not (np.isfinite(cell.value) and np.isfinite(dense.value)):
        return Recovered(cell.value / dense.value, None, None)
    paired = cell.items is not None and dense.items is not None and cell.items.shape[1] == dense.items.shape[1]
    return Recovered(*recovery(cell.sampled(items=paired), dense.sampled(items=paired), level))
