"""What may be called better than what: decided here, once; tables, plots and pages only show it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evenbits.record import Record
from evenbits.rows import Cell, Column, Row
from evenbits.statistics import paired_difference

Outcome = Literal["better", "worse", "not distinguishable", "not comparable"]
Mark = Literal["", "*", "~", "-"]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a against b in one metric, and why."""

    outcome: Outcome
    reason: str


def verdict(a: Row, b: Row, column: Column) -> Verdict:
    """Whether a may be called better than b: at no more bits, same recovery stage, same calibration tokens, tested.

    A method that reads no calibration text was offered the same tokens and is comparable with one that does.
    """
    if (a.model.name, a.model.revision) != (b.model.name, b.model.revision):
        return Verdict("not comparable", "different models")
    cells = a.cells.get(column.key), b.cells.get(column.key)
    if cells[0] is None or cells[1] is None:
        return Verdict("not comparable", f"no {column.title} for {a.name if cells[0] is None else b.name}")
    if a.stage_key != b.stage_key:
        return Verdict("not comparable", f"different recovery stages: {a.stage} and {b.stage}")
    if not _same_calibration(a.records, b.records):
        return Verdict("not comparable", "different calibration tokens")
    if a.budget is not None and b.budget is not None and a.budget.on != b.budget.on:
        return Verdict("not comparable", "budgets matched on different bits")
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


def place(row: Row, column: Column) -> tuple[bool, float]:
    cell = row.cells.get(column.key)
    if cell is None or not np.isfinite(cell.value):
        return True, 0.0
    return False, cell.value if column.better == "lower" else -cell.value


def mark_rows(rows: Sequence[Row], peers: Sequence[int], column: Column) -> dict[tuple[int, tuple[str, str]], Mark]:
    """Among `peers`, rows of one budget and recovery stage; none where fewer than two have a number.

    "*" the best number, "~" not told apart from it by the paired test, "-" some row is better by `verdict`.
    """
    entered = [i for i in peers if not place(rows[i], column)[0]]
    if len(entered) < 2:
        return {}
    best = min(entered, key=lambda i: place(rows[i], column))
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
            if not np.isfinite(found.p_value):
                return None, f"too few common items to test with ({found.items})"
            how = f"paired test on {found.items} items: p = {found.p_value:.3g}"
            if found.p_value <= 0.05 and not apart:
                return False, f"{how}, but the seeds overlap"
            return bool(found.p_value <= 0.05), how
        return None, f"not the same items ({a.items.shape[1]} and {b.items.shape[1]})"
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None, "no per-item values or intervals to test with"
    return a.high < b.low or b.high < a.low, "by intervals, no common per-item values"


def _same_calibration(a: Sequence[Record], b: Sequence[Record]) -> bool:
    drawn = [
        {r.seed: json.dumps(r.calibration, sort_keys=True) for r in side if r.calibration is not None}
        for side in (a, b)
    ]
    if not all(drawn):
        return True
    common = drawn[0].keys() & drawn[1].keys()
    return bool(common) and all(drawn[0][seed] == drawn[1][seed] for seed in common)
