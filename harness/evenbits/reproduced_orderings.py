"""A paper's claim that one entry stands ahead of others, by the rules of `verdict`.

A claim may set unequal bits, stages or calibration against each other. Then nothing is decided, and it is only said
which way the numbers point. The dense model is no competitor but a mark: against it neither bits nor stages count, and
the paired test alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evenbits.published import NEVER_GATE, Ordering, Origin
from evenbits.report_format import format_number
from evenbits.reproduced import Outcome, ReproducedOrdering
from evenbits.reproduced_cells import protocol_barrier
from evenbits.reproduced_entries import DENSE, Names, columns_of, fields_of, find_entry, split_name
from evenbits.rows import Column, Row
from evenbits.statistics import PairedDifference
from evenbits.tables import ModelTable
from evenbits.verdict import Verdict, format_p, run_test, verdict

# of several pairs the first of these is said of the claim
_WORST: Sequence[Outcome] = ("differs", "published only", "not measured", "not comparable", "agrees")


def judge_ordering(
    ordering: Ordering,
    origin: Origin,
    table: ModelTable | None,
    known: Names | None,
    *,
    same_model: bool,
) -> ReproducedOrdering:
    """The claim holds where `first` is ahead of every other, and fails where any is ahead of it."""
    gates = same_model and origin.trust is not None and origin.trust not in NEVER_GATE
    first = find_entry(table, *split_name(ordering.first), known)
    pairs: list[tuple[Outcome, str]] = []
    prefix = "" if same_model or table is None else f"on {table.model.name}, not the paper's model: "
    if first.row is None or table is None:
        pairs.append((first.outcome, _named(ordering.first, first.reason)))
    else:
        for name in ordering.behind:
            other = find_entry(table, *split_name(name), known)
            if other.row is None:
                pairs.append((other.outcome, _named(name, other.reason)))
                continue
            column = _column(table, first.row, other.row, ordering.metric, origin)
            if column is None:
                pairs.append(("not measured", f"no {ordering.metric} of {ordering.first}"))
                continue
            barrier = protocol_barrier(column, fields_of(first.row, column), origin)
            if barrier is not None:
                gates = False
                prefix += "" if barrier in prefix else f"{barrier}: "
            pairs.append(_judge_pair((ordering.first, first.row), (name, other.row), column, ordering.at_least))
    outcome = next(one for one in _WORST if any(one == found for found, _ in pairs))
    reason = prefix + "; ".join(dict.fromkeys(reason for _, reason in pairs))
    return ReproducedOrdering(ordering.claim, ordering.metric, outcome, reason, origin, gates, ordering.note)


def _named(name: str, reason: str) -> str:
    return reason if reason.startswith(name) else f"{name}: {reason}"


def _judge_pair(a: tuple[str, Row], b: tuple[str, Row], column: Column, at_least: bool) -> tuple[Outcome, str]:
    (_, first), (name, other) = a, b
    cells = first.cells.get(column.key), other.cells.get(column.key)
    if cells[0] is None or cells[1] is None:
        return "not comparable", f"{name}: {verdict(first, other, column).reason}"
    numbers = " against ".join(_shown(cell.value, column) for cell in cells if cell is not None)
    test = run_test(cells[0], cells[1])
    against_mark = any(row.method == DENSE and not row.recovery for row in (first, other))
    found = _against_mark(first, other, column, test) if against_mark else verdict(first, other, column)
    said = f"{numbers}; {found.reason}"
    if found.outcome == "better":
        return "agrees", f"ahead of {name} ({said})"
    if found.outcome == "worse":
        return "differs", f"behind {name} ({said})"
    if found.outcome == "not distinguishable":
        limits = "" if test is None else f"; difference {_interval(test, column)}"
        # few items tell nothing apart: that holds no claim up which the numbers themselves speak against
        holds = at_least and not column.ahead(cells[1].value, cells[0].value)
        return "agrees" if holds else "not comparable", f"not told apart from {name} ({said}{limits})"
    ahead = column.ahead(cells[0].value, cells[1].value)
    equal = cells[0].value == cells[1].value
    points = "are equal" if equal else "point the claimed way" if ahead else "point the other way"
    return "not comparable", f"not comparable with {name}: {found.reason}; the numbers ({numbers}) {points}"


def _against_mark(a: Row, b: Row, column: Column, test: PairedDifference | None) -> Verdict:
    """As `verdict`, without what has to be even between competitors."""
    cells = a.cells[column.key], b.cells[column.key]
    ahead = column.ahead(cells[0].value, cells[1].value)
    if not all(np.isfinite(cell.value) for cell in cells):
        return Verdict("better" if np.isfinite(cells[0].value) else "worse", "one of them diverged")
    if test is not None and np.isfinite(test.p_value):
        items = f" on {test.items} items" if test.items else ""
        how = f"{test.test}{items}: p {format_p(test.p_value)}"
        return Verdict(("better" if ahead else "worse") if test.p_value <= 0.05 else "not distinguishable", how)
    limits = [(cell.low, cell.high) for cell in cells]
    (low_a, high_a), (low_b, high_b) = limits
    if low_a is None or high_a is None or low_b is None or high_b is None:
        return Verdict("not comparable", "no per-item values or intervals to test with")
    apart = high_a < low_b or high_b < low_a
    how = "by intervals, no common per-item values"
    return Verdict(("better" if ahead else "worse") if apart else "not distinguishable", how)


def _column(table: ModelTable, a: Row, b: Row, metric: str, origin: Origin) -> Column | None:
    """The metric under a protocol that both have, the origin's own first; else any that one of them has."""
    columns = columns_of(table, a, metric)
    columns.sort(key=lambda one: (one.key not in b.cells, protocol_barrier(one, fields_of(a, one), origin) is not None))
    return columns[0] if columns else None


def _shown(value: float, column: Column) -> str:
    return f"{100 * value:.2f}" if column.unit == "accuracy" else format_number(value)


def _interval(test: PairedDifference, column: Column) -> str:
    times = 100 if column.unit == "accuracy" else 1
    return f"[{times * test.low:+.3g}, {times * test.high:+.3g}]"
