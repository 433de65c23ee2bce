"""What may be called better than what: decided here, once; tables, plots and pages only show it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evenbits.fingerprints import differing_fields, name_fields, protocol_of
from evenbits.measure import fingerprint_id
from evenbits.record import Record
from evenbits.rows import Cell, Column, Row
from evenbits.significance import difference, holm
from evenbits.statistics import PairedDifference

Outcome = Literal["better", "worse", "not distinguishable", "not comparable"]
Mark = Literal["", "*", "~", "-"]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a against b in one metric, and why."""

    outcome: Outcome
    reason: str


def verdict(a: Row, b: Row, column: Column, level: float = 0.95) -> Verdict:
    """Whether a may be called better than b: at no more bits, same recovery stage, same calibration tokens, tested.

    A method that reads no calibration text was offered the same tokens and is comparable with one that does. What a
    model costs (bytes, time, energy) is compared as it is, whatever the bits: that is no claim of quality.
    """
    if (a.model.name, a.model.revision) != (b.model.name, b.model.revision):
        return Verdict("not comparable", "different models")
    cells = a.cells.get(column.key), b.cells.get(column.key)
    if cells[0] is None or cells[1] is None:
        return Verdict("not comparable", _absence(a, b, column))
    if column.quality:
        if a.stage_key != b.stage_key:
            return Verdict("not comparable", f"different recovery stages: {a.stage} and {b.stage}")
        if not _same_calibration(a.records, b.records):
            return Verdict("not comparable", "different calibration tokens")
        if a.budget is not None and b.budget is not None and a.budget.on != b.budget.on:
            return Verdict("not comparable", "budgets matched on different bits")
    differs, how = _differ(cells[0], cells[1], column, level)
    if differs is None:
        return Verdict("not comparable", how)
    if not differs:
        return Verdict("not distinguishable", how)
    first = not np.isfinite(cells[1].value) or column.ahead(cells[0].value, cells[1].value)
    winner, loser = (a, b) if first else (b, a)
    if column.quality and winner.budget_bits > loser.budget_bits + 1e-9:
        bits = f"{winner.budget_bits:.4f} against {loser.budget_bits:.4f}"
        return Verdict("not comparable", f"{winner.name} is ahead with more bits ({bits})")
    return Verdict("better" if first else "worse", how)


def run_test(a: Cell, b: Cell, level: float = 0.95, resamples: int = 2000) -> PairedDifference | None:
    """a - b with its interval, its p-value and the test; None where neither items nor seeds allow one."""
    if not (np.isfinite(a.value) and np.isfinite(b.value)):
        return None
    paired = a.items is not None and b.items is not None and a.items.shape[1] == b.items.shape[1]
    paired = paired and a.transform is not None and a.transform == b.transform
    if not paired and len(a.by_seed) < 2 and len(b.by_seed) < 2:
        return None
    # without common items seeds alone may tell, and only where both sides have some
    if not paired and not all(cell.fixed or len(cell.by_seed) > 1 for cell in (a, b)):
        return None
    return difference(a.sampled(items=paired), b.sampled(items=paired), level, resamples)


def place(row: Row, column: Column) -> tuple[bool, float]:
    cell = row.cells.get(column.key)
    if cell is None or not np.isfinite(cell.value):
        return True, 0.0
    return False, cell.value if column.better == "lower" else -cell.value


def mark_rows(rows: Sequence[Row], peers: Sequence[int], column: Column) -> dict[tuple[int, tuple[str, str]], Mark]:
    """Among `peers`, rows of one budget and recovery stage; none where fewer than two have a number.

    "*" the best number, "~" not told apart from it, "-" some row is better by `verdict`. A section is read as a whole
    and its best was picked from many, so the p-values against it are adjusted (Holm) to keep 5 % for the section;
    `verdict` answers for one pair, at 5 % for that pair.
    """
    entered = [i for i in peers if not place(rows[i], column)[0]]
    if len(entered) < 2:
        return {}
    best = min(entered, key=lambda i: place(rows[i], column))
    others = [i for i in entered if i != best]
    cells = {i: rows[i].cells[column.key] for i in entered}
    # the smallest p-value that a bootstrap can give must survive the adjustment
    resamples = max(2000, 100 * len(others))
    found = {i: run_test(cells[best], cells[i], resamples=resamples) for i in others}
    p_values = holm([np.nan if (test := found[i]) is None else test.p_value for i in others])
    marks: dict[tuple[int, tuple[str, str]], Mark] = {(best, column.key): "*"}
    for i, p_value in zip(others, p_values, strict=True):
        differs = p_value <= 0.05 if np.isfinite(p_value) else _differ(cells[best], cells[i], column, 0.95)[0]
        if not differs and differs is not None:
            marks[i, column.key] = "~"
        elif any(verdict(rows[j], rows[i], column).outcome == "better" for j in (best, *others) if j != i):
            marks[i, column.key] = "-"
    return marks


def _differ(a: Cell, b: Cell, column: Column, level: float) -> tuple[bool | None, str]:
    """Whether two numbers differ beyond chance (None: cannot be told), and how that was found."""
    finite = np.isfinite(a.value), np.isfinite(b.value)
    if not all(finite):
        return (True, "one of them diverged") if any(finite) else (None, "both diverged")
    if not column.quality and not column.volatile:
        return a.value != b.value, "counted exactly"
    found = run_test(a, b, level)
    if found is not None:
        if not np.isfinite(found.p_value):
            return None, f"too few common items to test with ({found.items})"
        return bool(found.p_value <= 1 - level + 1e-12), describe(found, len(a.by_seed), len(b.by_seed))
    if a.items is not None and b.items is not None and a.items.shape[1] != b.items.shape[1] and column.quality:
        return None, f"not the same items ({a.items.shape[1]} and {b.items.shape[1]})"
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None, "no per-item values or intervals to test with"
    if column.volatile:
        return a.high < b.low or b.high < a.low, "by intervals over repeats, in one process each"
    return a.high < b.low or b.high < a.low, "by intervals, no common per-item values"


def describe(found: PairedDifference, seeds_a: int, seeds_b: int) -> str:
    """The test in words, with its p-value."""
    items = f" on {found.items} items" if found.items else ""
    if found.discordant is not None:
        how = f"exact McNemar test{items} ({found.discordant[0]} against {found.discordant[1]} discordant)"
    elif found.test == "paired bootstrap":
        how = f"paired test{items}"
    else:
        how = f"t test over {seeds_a} and {seeds_b} seeds{items.replace(' on', ' and')}"
    return f"{how}: p {format_p(found.p_value)}"


def format_p(p_value: float) -> str:
    """ "= 0.0123"; below a millionth no test here knows the figure."""
    return f"= {p_value:.3g}" if p_value >= 1e-6 else "< 1e-06"


def _absence(a: Row, b: Row, column: Column) -> str:
    """Why one of them has no number in this column: another protocol, or none at all."""
    without, other = (a, b) if column.key not in a.cells else (b, a)
    for record in without.records:
        for metric in record.metrics:
            wanted = _protocol(other, column)
            if metric.name == column.name and wanted is not None:
                mine, theirs = protocol_of(record, metric), wanted
                fields = differing_fields(*((mine, theirs) if without is a else (theirs, mine)))
                return f"different protocols: {name_fields(fields)}"
    return f"no {column.title} for {without.name}"


def _protocol(row: Row, column: Column) -> dict[str, object] | None:
    for record in row.records:
        for metric in record.metrics:
            fields = protocol_of(record, metric)
            if metric.name == column.name and fingerprint_id(fields) == column.protocol:
                return fields
    return None


def _same_calibration(a: Sequence[Record], b: Sequence[Record]) -> bool:
    drawn = [
        {r.seed: json.dumps(r.calibration, sort_keys=True) for r in side if r.calibration is not None}
        for side in (a, b)
    ]
    if not all(drawn):
        return True
    common = drawn[0].keys() & drawn[1].keys()
    return bool(common) and all(drawn[0][seed] == drawn[1][seed] for seed in common)
