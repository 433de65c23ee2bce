"""One printed number beside the measured one: whether the two may be compared, and how near they have to be.

A whole test set is the paper's own sample, so that a number measured on it differs by the method alone and the class of
tolerance decides. It would be wrong to add the interval over items there: on ARC-Challenge's 1172 that is 2.8 points
either way, and nothing would ever differ. On the first n of N items (a limit) the other N - n would move the mean by
chance: then the half of the interval that faces the printed value, times sqrt(1 - n / N), is allowed too, which is 0
for the whole set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evenbits.published import NEVER_GATE, TOLERANCES, Origin, PublishedRow, Tolerance, decimals_of
from evenbits.reproduced import Outcome, ReproducedCell, in_source
from evenbits.reproduced_entries import DENSE, Entry, columns_of, fields_of
from evenbits.rows import Cell, Column, Row
from evenbits.tables import ModelTable

Number = tuple[float | None, float | None, float | None]  # value, low and high, as papers print them

SHARE = " vs dense"  # "NAME vs dense": the share of the dense model's number, in per cent

WHOLE = {
    "winogrande": 1267,
    "piqa": 1838,
    "hellaswag": 10042,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "boolq": 3270,
    "openbookqa": 500,
    "lambada_openai": 5153,
    "lambada_standard": 5153,
}
"""Items of the test sets that papers print; a task outside this list is taken to be whole."""
CROPS = 256  # windows of the papers' C4

_EPSILON = 1e-9


def judge_value(
    printed: PublishedRow, origin: Origin, metric: str, entry: Entry, table: ModelTable | None, *, same_model: bool
) -> ReproducedCell:
    """The printed value of a metric against the entry's."""
    value, decimals = printed.values[metric], printed.decimals_of(metric)
    tolerance = TOLERANCES[printed.tolerance]
    gates = _gates(printed, origin, metric, tolerance, same_model=same_model)

    def cell(
        outcome: Outcome, reason: str, number: Number = (None, None, None), limit: float | None = None
    ) -> ReproducedCell:
        difference = number[0] - value if limit is not None and number[0] is not None else None
        mixed = printed.mixed.get(metric, "")
        reason += in_source(mixed)
        return ReproducedCell(metric, value, *number, difference, outcome, reason, gates, limit, mixed, decimals)

    if entry.row is None or table is None:
        return cell(entry.outcome, entry.reason)
    found = _number(table, entry.row, metric, origin)
    if found is None:
        return cell("not measured", f"the suite measured no {metric.removesuffix(SHARE)} of it")
    column, fields, number = found
    if not same_model:
        return cell("not comparable", "another model", number)
    if (barrier := protocol_barrier(column, fields, origin, share=metric.endswith(SHARE))) is not None:
        return cell("not comparable", barrier, number)
    allowed = _allowed(column, value, tolerance, share=metric.endswith(SHARE))
    if allowed is None:
        return cell(*_stable(table, entry.row, column, tolerance), number)
    limit, said = _limit(number, value, allowed, fields, column)
    return cell(*_near(number, value, limit, said, decimals), number, limit)


def judge_bits(printed: PublishedRow, origin: Origin, entry: Entry, *, same_model: bool) -> ReproducedCell | None:
    """The printed average bits against what the method's own formula gives for the setting that was run."""
    if printed.bits is None:
        return None
    tolerance = TOLERANCES[printed.tolerance]
    gates = _gates(printed, origin, "bits", tolerance, same_model=same_model)
    measured: float | None = None
    difference: float | None = None
    allowed: float | None = None
    outcome: Outcome = entry.outcome
    reason = entry.reason
    if (row := entry.row) is not None:
        measured = float(row.model.stored_bits) if row.method == DENSE else row.bits.paper
        difference = measured - printed.bits
        near = abs(difference) <= tolerance.bits + _EPSILON
        allowed = tolerance.bits
        outcome = "agrees" if near else "differs"
        how = "as stored" if row.method == DENSE else "by the method's formula"
        reason = f"{'within' if near else 'outside'} ±{tolerance.bits:g}, {how}"
        if not same_model:
            outcome, reason, difference, allowed = "not comparable", "another model's shapes", None, None
    mixed = printed.mixed.get("bits", "")
    reason += in_source(mixed)
    places = decimals_of(printed.bits)
    return ReproducedCell(
        "bits", printed.bits, measured, None, None, difference, outcome, reason, gates, allowed, mixed, places
    )


def bits_note(printed: PublishedRow, row: Row | None) -> str:
    """Where the bytes on disk come to other bits than are printed, "" where they do not."""
    if row is None or row.method == DENSE:
        return ""
    notes = []
    if printed.bits is not None and abs(row.bits.linear - printed.bits) > TOLERANCES[printed.tolerance].bits + _EPSILON:
        difference = row.bits.linear - printed.bits
        notes.append(f"{row.bits.linear:.3f} bits on disk where {printed.bits:g} are printed ({difference:+.3f})")
    if not row.within:
        notes.append("outside its budget's window")
    return "; ".join(notes)


def protocol_barrier(column: Column, fields: Mapping[str, Any], origin: Origin, *, share: bool = False) -> str | None:
    """Why a number of this protocol is not to be set against the origin's; None where it may be.

    share: a share of the dense model's number, for which a source need not say its protocol.
    """
    for unit, key, said in (("perplexity", "context", "context"), ("accuracy", "era", "lm-eval era")):
        if column.unit != unit:
            continue
        mine, theirs = fields.get(key), getattr(origin, key)
        if theirs is None and mine is not None and not share:
            return f"the source does not say its {said} (here {mine})"
        if theirs is not None and mine != theirs:
            return f"{said} {mine or 'unknown'} against {theirs}"
    return None


def _number(
    table: ModelTable, row: Row, metric: str, origin: Origin
) -> tuple[Column, Mapping[str, Any], Number] | None:
    """Column, protocol, and (value, low, high) as papers print them; of several protocols the origin's own first."""
    share = metric.endswith(SHARE)
    columns = columns_of(table, row, metric.removesuffix(SHARE))
    columns.sort(key=lambda one: protocol_barrier(one, fields_of(row, one), origin) is not None)
    for column in columns:
        if not share:
            return column, fields_of(row, column), _as_printed(row.cells[column.key], column)
        if (found := table.recovery(row, column)) is not None:
            part = (found.value, found.low, found.high)
            value, low, high = (None if one is None else 100 * one for one in part)
            return column, fields_of(row, column), (value, low, high)
    return None


def _as_printed(cell: Cell, column: Column) -> tuple[float, float | None, float | None]:
    times = 100 if column.unit == "accuracy" else 1
    low, high = (None if one is None else times * one for one in (cell.low, cell.high))
    return times * cell.value, low, high


def _allowed(column: Column, printed: float, tolerance: Tolerance, *, share: bool) -> float | None:
    """Absolute, in the unit that is printed; None where no value is expected at all."""
    if tolerance.times_dense is not None:
        return None
    if column.unit == "accuracy" or share:
        return tolerance.accuracy
    if tolerance.perplexity is not None:
        return tolerance.perplexity
    return None if tolerance.relative is None else tolerance.relative * abs(printed)


def _limit(
    number: Number, printed: float, allowed: float, fields: Mapping[str, Any], column: Column
) -> tuple[float, str]:
    """How far the two may lie apart, and of what that is made."""
    measured, low, high = number
    points = " points" if column.unit == "accuracy" else ""
    said = f"±{allowed:.3g}{points}"
    part = part_measured(column, fields)
    if part is None or measured is None or low is None or high is None:
        return allowed, said
    facing = high - measured if printed > measured else measured - low
    chance = max(facing, 0.0) * math.sqrt(1 - part[0] / part[1])
    what = "items" if points else "windows"
    return allowed + chance, f"{said} and ±{chance:.3g} for being the first {part[0]} of {part[1]} {what}"


def _near(number: Number, printed: float, limit: float, said: str, decimals: int) -> tuple[Outcome, str]:
    measured, low, high = number
    if measured is None or not math.isfinite(measured):
        return "differs", "the model diverged"
    # as many digits as the source prints: a measured 5.134 is its 5.13
    if abs(round(measured, decimals) - printed) <= limit + _EPSILON:
        return "agrees", f"within {said}"
    holds = low is not None and high is not None and low <= printed <= high
    return "differs", f"outside {said}" + ("; its 95 % interval holds the printed value" if holds else "")


def part_measured(column: Column, fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """(n, N) where a number is of the first n of a test set's N items or windows; None for all of them.

    Of a mean over tasks: of the task of which the smallest part was measured.
    """
    if column.unit == "accuracy":
        tasks = fields.get("tasks")
        each = [{**fields, **own} for own in tasks.values()] if isinstance(tasks, Mapping) else [fields]
        counts = [(one.get("items"), WHOLE.get(str(one.get("task")))) for one in each]
    else:
        windows, tokens, context = (fields.get(key) for key in ("windows", "tokens", "context"))
        whole = tokens // context if isinstance(tokens, int) and isinstance(context, int) else None
        rule = fields.get("windows_rule")
        counts = [(windows, CROPS if rule == "sampled" else whole if rule == "joined" else None)]
    parts = [(n, whole) for n, whole in counts if isinstance(n, int) and whole is not None and n < whole]
    return min(parts, key=lambda one: one[0] / one[1]) if parts else None


def _stable(table: ModelTable, row: Row, column: Column, tolerance: Tolerance) -> tuple[Outcome, str]:
    """For a class without a stable value: whether the perplexity is as far from the dense model's as all agree on."""
    times = tolerance.times_dense
    ratio = table.against_dense(row, column)
    if column.unit != "perplexity" or times is None:
        return "not comparable", "no stable value is expected"
    if ratio is None:
        return "not comparable", "no stable value is expected, and the dense model was not measured"
    far = ratio > times
    said = f"{ratio:.3g} times the dense model's, {'' if far else 'not '}above {times:g}"
    return "agrees" if far else "differs", said


def _gates(printed: PublishedRow, origin: Origin, metric: str, tolerance: Tolerance, *, same_model: bool) -> bool:
    trusted = origin.trust is not None and origin.trust not in NEVER_GATE
    return same_model and trusted and metric not in printed.mixed and not tolerance.advisory
