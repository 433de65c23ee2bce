"""`evenbits compare A B`: two trials, or two methods over their seeds, number by number on the same items.

Pure functions of records: nothing is printed, nothing is measured. A number is compared only with one of the same
protocol; where protocols differ, the fields are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evenbits.cells import join_seeds, make_column, recovered
from evenbits.errors import SuiteError
from evenbits.fingerprints import Difference, differing_fields, name_fields, protocol_of
from evenbits.measure import KERNEL_POLICY
from evenbits.named_trials import Named, near_names, some_of
from evenbits.record import MetricFacts, Record
from evenbits.report_protocols import ran_words
from evenbits.rows import Cell, Column, Recovered, Row, why
from evenbits.statistics import PairedDifference
from evenbits.tables import with_settings
from evenbits.verdict import Verdict, run_test, verdict

MOST_LEVEL = 0.999  # beyond it percentiles take more resamples than a command should wait for


@dataclass(frozen=True)
class Compared:
    """One metric under one protocol. difference: a - b with its test, None where there is none (a count, no items)."""

    column: Column
    a: Cell
    b: Cell
    difference: PairedDifference | None
    verdict: Verdict
    recovery_a: Recovered | None
    recovery_b: Recovered | None


@dataclass(frozen=True)
class Refused:
    """A metric that cannot be compared, and why. fields: in what the protocols differ."""

    name: str
    reason: str
    fields: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Comparison:
    a: Row
    b: Row
    level: float
    metrics: tuple[Compared, ...]
    refused: tuple[Refused, ...]
    notes: tuple[str, ...] = ()


def compare(a: Named, b: Named, metrics: Sequence[str] = (), level: float = 0.95) -> Comparison:
    """All metrics that both have, or those named; qualities first.

    Raises SuiteError when none can be compared (with the reasons), for a metric that neither has, and for a level that
    resampling cannot give.
    """
    if not 0.5 <= level <= MOST_LEVEL:
        raise SuiteError(f"--level {level:g}: a share between 0.5 and {MOST_LEVEL:g}, such as 0.95")
    rows = [join_seeds(side.records, side.folders, level) for side in (a, b)]
    row_a, row_b = with_settings(rows)
    names = list(dict.fromkeys(m.name for side in (a, b) for record in side.records for m in record.metrics))
    for metric in metrics:
        if metric not in names:
            raise SuiteError(f"--metric {metric}: neither {a.name} nor {b.name} has it{near_names(metric, names)}")
    compared: list[Compared] = []
    refused: list[Refused] = []
    for name in dict.fromkeys(metrics or names):
        columns = [_columns(side.records, name) for side in (a, b)]
        common = [column for key, column in columns[0].items() if key in columns[1]]
        compared += [_compared(row_a, row_b, column, (a, b), level) for column in common]
        if not common:
            refused.append(_refused(name, a, b))
    if not compared:
        raise SuiteError(f"{a.name} and {b.name} have no number to compare: {_reasons(refused)}")
    compared.sort(key=lambda one: not one.column.quality)
    notes = list(_kernels(compared, a, b))
    notes += list(_without_items((a, b)))
    notes += [f"{side.name}: seed {r.seed} {r.status}: {why(r)}" for side in (a, b) for r in side.left_out]
    return Comparison(row_a, row_b, level, tuple(compared), tuple(refused), tuple(notes))


def _compared(a: Row, b: Row, column: Column, sides: tuple[Named, Named], level: float) -> Compared:
    cells = a.cells[column.key], b.cells[column.key]
    shares: list[Recovered | None] = []
    for cell, side in zip(cells, sides, strict=True):
        dense = _dense_cell(side, column, level) if column.quality else None
        shares.append(None if dense is None else recovered(cell, dense, level))
    exact = not column.quality and not column.volatile
    found = None if exact else run_test(*cells, level)
    return Compared(column, *cells, found, verdict(a, b, column, level), *shares)


def _kernels(compared: Sequence[Compared], a: Named, b: Named) -> Iterator[str]:
    """A simulated method is never sold as fast, and of what ran from packed weights it is said what that was."""
    restored: list[str] = []
    packed: dict[tuple[str, ...], list[str]] = {}
    for one in compared:
        record, metric = _measured(a.records, one.column.name)[0]
        kernel = protocol_of(record, metric).get("kernel")
        if kernel == KERNEL_POLICY["restored"] and one.column.volatile:
            restored.append(one.column.name)
        elif kernel in (KERNEL_POLICY["packed"], KERNEL_POLICY["approximate"]):
            said = tuple(_said(side, one.column) for side in (a, b))
            packed.setdefault(said, []).append(one.column.name)
    if restored:
        yield (
            f"{', '.join(restored)}: both ran on weights restored to dense ones, so what these differ by is not what "
            "the methods' own kernels would"
        )
    for said, names in packed.items():
        ran = [f"{side.name}: {text}" for side, text in zip((a, b), said, strict=True) if text]
        if ran:
            yield f"{', '.join(names)}: with packed weights, {'; '.join(ran)}"


def _said(side: Named, column: Column) -> str:
    """What computed the layers of one side, as its first record says."""
    for record, metric in _measured(side.records, column.name):
        if make_column(record, metric).key == column.key:
            return "; ".join(ran_words(metric.details.get("kernels")))
    return ""


def _without_items(sides: Sequence[Named]) -> Iterator[str]:
    """A record copied without the files beside it is compared by its intervals, which tells less."""
    for side in sides:
        for record in side.records:
            folder = side.folders.get(record.trial)
            gone = [m.name for m in record.metrics if m.items and folder and not (folder / m.items).exists()]
            if gone:
                yield f"{side.name}: seed {record.seed}: per-item values of {some_of(gone)} are missing in {folder}"


def _dense_cell(side: Named, column: Column, level: float) -> Cell | None:
    """The uncompressed model's number under the same protocol, measured in the same run."""
    for record in side.around:
        cell = join_seeds([record], side.folders, level).cells.get(column.key)
        if cell is not None:
            return cell
    return None


def _columns(records: Sequence[Record], name: str) -> dict[tuple[str, str], Column]:
    found = [make_column(record, metric) for record, metric in _measured(records, name)]
    return {column.key: column for column in found}


def _measured(records: Sequence[Record], name: str) -> list[tuple[Record, MetricFacts]]:
    return [(record, metric) for record in records for metric in record.metrics if metric.name == name]


def _refused(name: str, a: Named, b: Named) -> Refused:
    found = [_measured(side.records, name) for side in (a, b)]
    for side, own in zip((a, b), found, strict=True):
        if not own:
            return Refused(name, f"not measured for {side.name}")
    fields = differing_fields(*(protocol_of(*own[0]) for own in found))
    return Refused(name, f"different protocols: {name_fields(fields)}", tuple(fields))


def _reasons(refused: Sequence[Refused]) -> str:
    """Protocols in full, one by one; metrics that one side lacks together."""
    texts = [f"{one.name}: {one.reason}" for one in refused if one.fields]
    for reason in dict.fromkeys(one.reason for one in refused if not one.fields):
        texts.append(f"{some_of([one.name for one in refused if one.reason == reason])}: {reason}")
    return "; ".join(texts) or "nothing was measured of either"
