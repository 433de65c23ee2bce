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
from evenbits.significance import Sampled, against_best, difference, p_value_of
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
    model costs (bytes, time, energy) is compared as it is, whatever the bits: that is no claim of quality. Times need
    several processes (seeds) a side.
    """
    if (a.model.name, a.model.revision) != (b.model.name, b.model.revision):
        return Verdict("not comparable", "different models")
    cells = a.cells.get(column.key), b.cells.get(column.key)
    if cells[0] is None or cells[1] is None:
        return Verdict("not comparable", _absence(a, b, column))
    if column.quality and (barrier := _barrier(a, b)) is not None:
        return Verdict("not comparable", barrier)
    differs, how = _differ(cells[0], cells[1], column, level)
    if differs is None:
        return Verdict("not comparable", how)
    if not differs:
        return Verdict("not distinguishable", how)
    first = not np.isfinite(cells[1].value) or column.ahead(cells[0].value, cells[1].value)
    winner, loser = (a, b) if first else (b, a)
    if column.quality and (bits := _more_bits(winner, loser)):
        return Verdict("not comparable", f"{winner.name} is ahead with more bits ({bits})")
    return Verdict("better" if first else "worse", how)


def _barrier(a: Row, b: Row) -> str | None:
    """Why the quality of one may not be called better than that of the other, whatever the numbers."""
    if a.stage_key != b.stage_key:
        return f"different recovery stages: {a.stage} and {b.stage}"
    if not _same_calibration(a.records, b.records):
        return "different calibration tokens"
    if a.budget is not None and b.budget is not None and a.budget.on != b.budget.on:
        return "budgets matched on different bits"
    return None


def _more_bits(a: Row, b: Row) -> str:
    """By how many bits a has more than b, "" where it has not; a row without a budget is held to the other's kind."""
    on_model = any(row.budget is not None and row.budget.on == "model" for row in (a, b))
    mine, theirs = (row.bits.model if on_model else row.bits.linear for row in (a, b))
    return f"{mine:.4f} against {theirs:.4f}" if mine > theirs + 1e-9 else ""


def run_test(a: Cell, b: Cell, level: float = 0.95) -> PairedDifference | None:
    """a - b with its interval, its p-value and the test; None where neither items nor seeds allow one."""
    pair = _testable(a, b)
    return None if pair is None else difference(*pair, level)


def _testable(a: Cell, b: Cell) -> tuple[Sampled, Sampled] | None:
    """What there is to test: common items, or without them several seeds."""
    if not (np.isfinite(a.value) and np.isfinite(b.value)):
        return None
    paired = a.items is not None and b.items is not None and a.items.shape[1] == b.items.shape[1]
    paired = paired and a.transform is not None and a.transform == b.transform
    # without common items seeds alone may tell, where both sides have some, and not where these change nothing
    by_seeds = all(cell.fixed or len(cell.by_seed) > 1 for cell in (a, b))
    by_seeds = by_seeds and any(len(set(cell.by_seed)) > 1 for cell in (a, b))
    return (a.sampled(items=paired), b.sampled(items=paired)) if paired or by_seeds else None


def place(row: Row, column: Column) -> tuple[bool, float]:
    cell = row.cells.get(column.key)
    if cell is None or not np.isfinite(cell.value):
        return True, 0.0
    return False, cell.value if column.better == "lower" else -cell.value


def mark_rows(rows: Sequence[Row], peers: Sequence[int], column: Column) -> dict[tuple[int, tuple[str, str]], Mark]:
    """Among `peers`, rows of one budget and recovery stage; none where fewer than two have a number.

    "*" the best number, "~" not told apart from it, "-" some row is better by the rules of `verdict`. A section is read
    as a whole and its best was picked from many, so tests are adjusted to keep 5 % for the section: against the best
    by `against_best`, against another row for the number of all pairs. `verdict` answers for one pair, at 5 % for it.
    """
    entered = sorted((i for i in peers if not place(rows[i], column)[0]), key=lambda i: place(rows[i], column))
    if len(entered) < 2:
        return {}
    best, *others = entered
    cells = {i: rows[i].cells[column.key] for i in entered}
    pairs = len(entered) * len(others) / 2
    p_values = against_best([_p_value(cells[best], cells[i]) for i in others])
    marks: dict[tuple[int, tuple[str, str]], Mark] = {(best, column.key): "*"}
    for i, p_value in zip(others, p_values, strict=True):
        differs = p_value <= 0.05 if np.isfinite(p_value) else _differ(cells[best], cells[i], column)[0]
        if not differs and differs is not None:
            marks[i, column.key] = "~"
            continue
        # the best of those that may be called better
        rival = next((j for j in entered if j != i and _may_lead(rows[j], rows[i], column)), None)
        if rival is None or (rival == best and differs is None):
            continue
        if rival != best:
            p_value = pairs * _p_value(cells[rival], cells[i])
            differs = p_value <= 0.05 if np.isfinite(p_value) else _differ(cells[rival], cells[i], column)[0]
        if differs:
            marks[i, column.key] = "-"
    return marks


def _may_lead(a: Row, b: Row, column: Column) -> bool:
    """Whether a has the better number, and may be called better if a test agrees."""
    ahead = column.ahead(a.cells[column.key].value, b.cells[column.key].value)
    return ahead and _barrier(a, b) is None and not _more_bits(a, b)


def _p_value(a: Cell, b: Cell) -> float:
    return p_value_of(*pair) if (pair := _testable(a, b)) is not None else np.nan


def _differ(a: Cell, b: Cell, column: Column, level: float = 0.95) -> tuple[bool | None, str]:
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
    if column.volatile:
        # on 25 models that ran the same matrices 7 in 10 pairs of latencies had intervals that do not overlap
        return None, "one process on a side: how much processes differ is not known"
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None, "no per-item values or intervals to test with"
    return a.high < b.low or b.high < a.low, "by intervals, no common per-item values"


def describe(found: PairedDifference, seeds_a: int, seeds_b: int) -> str:
    """The test in words, with its p-value."""
    items = f" on {found.items} items" if found.items else ""
    if found.discordant is not None:
        how = f"exact McNemar test{items} ({found.discordant[0]} against {found.discordant[1]} discordant)"
    elif found.test.startswith("paired"):
        how = f"{found.test.replace('bootstrap', 'test')}{items}"
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
