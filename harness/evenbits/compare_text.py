"""A comparison of two trials as text: for a terminal, as Markdown, as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from evenbits.compare import Compared, Comparison
from evenbits.fingerprints import flatten
from evenbits.markdown import plain, table_lines
from evenbits.report_format import format_bytes, format_number
from evenbits.rows import Cell, Column, Recovered, Row
from evenbits.verdict import format_p

WIDTH = 120
SIDES = ("", "method", "settings", "recovery", "calibration", "linear bits", "model bits", "seeds", "trials")
NUMBERS = ("metric", "A", "B", "A vs dense", "B vs dense")
TESTS = ("metric", "A - B", "p", "test", "verdict")

Lines = Sequence[tuple[str, ...]]


def as_terminal(found: Comparison, console: Console) -> None:
    if not console.is_terminal and console.width < WIDTH:
        console.width = WIDTH
    for title, lines, left in _tables(found):
        shown = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        shown.padding, shown.pad_edge = (0, 1, 0, 0), False
        for number, name in enumerate(lines[0]):
            words = number < left or name in ("test", "verdict", "trials")
            shown.add_column(escape(name), justify="left" if words else "right", overflow="fold")
        for line in lines[1:]:
            shown.add_row(*(escape(text) for text in line))
        console.print(shown)
    for text in _remarks(found):
        console.print(escape(text), highlight=False)
    console.print(escape(_legend(found)), style="dim", highlight=False)


def as_markdown(found: Comparison) -> str:
    parts = ["# Comparison"]
    for title, lines, left in _tables(found):
        parts += [f"## {title}", table_lines(lines, left)]
    remarks = [f"- {plain(text)}" for text in _remarks(found)]
    parts += ["\n".join(remarks)] if remarks else []
    return "\n\n".join([*parts, plain(_legend(found))]) + "\n"


def as_json(found: Comparison) -> dict[str, Any]:
    """Numbers that JSON has no form for are null."""
    return {
        "level": found.level,
        "a": _side_json(found.a),
        "b": _side_json(found.b),
        "metrics": [_metric_json(one) for one in found.metrics],
        "refused": [
            {
                "name": one.name,
                "reason": one.reason,
                "fields": [{"field": field, "a": a, "b": b} for field, a, b in one.fields],
            }
            for one in found.refused
        ],
        "notes": list(found.notes),
    }


def verdict_words(one: Compared) -> str:
    """The verdict as a sentence about A and B."""
    outcome, reason = one.verdict.outcome, one.verdict.reason
    if outcome == "not comparable":
        return f"not comparable: {reason}"
    if outcome == "not distinguishable":
        return "the same" if one.a.value == one.b.value and one.difference is None else "not distinguishable"
    ahead, behind = ("A", "B") if outcome == "better" else ("B", "A")
    if one.column.quality:
        return f"{ahead} is better than {behind} at no more bits"
    return f"{ahead} is {one.column.better}"


def _tables(found: Comparison) -> Iterator[tuple[str, Lines, int]]:
    """(title, lines with the header first, how many of the first columns are words)."""
    yield "What is compared", [SIDES, _side("A", found.a), _side("B", found.b)], 5
    numbers = [
        (
            one.column.name,
            _cell(one.a, one.column),
            _cell(one.b, one.column),
            _recovered(one.recovery_a),
            _recovered(one.recovery_b),
        )
        for one in found.metrics
    ]
    yield f"Numbers, with their {_percent(found)} intervals", [NUMBERS, *numbers], 1
    tests = [
        (one.column.name, _difference(one), _p_value(one), _test(one), verdict_words(one)) for one in found.metrics
    ]
    yield "Differences", [TESTS, *tests], 1


def _side(letter: str, row: Row) -> tuple[str, ...]:
    budget = "" if row.budget is None or row.method == "dense" else f" @ {row.budget.centre:g}"
    return (
        letter,
        row.name + budget,
        row.settings,
        row.stage,
        _calibration(row),
        f"{row.bits.linear:.4f}",
        f"{row.bits.model:.4f}",
        " ".join(str(record.seed) for record in row.records),
        " ".join(record.trial for record in row.records),
    )


def _calibration(row: Row) -> str:
    """Of the first seed; the seeds of a row differ in their draw alone."""
    drawn = row.records[0].calibration
    if drawn is None:
        return "none"
    return " ".join(f"{key}={value}" for key, value in flatten(drawn).items() if value != "null")


def _cell(cell: Cell, column: Column) -> str:
    write = _writer(column)
    return write(cell.value) + _limits(cell.low, cell.high, column)


def _difference(one: Compared) -> str:
    write = _writer(one.column)
    if one.difference is None:
        return write(one.a.value - one.b.value)
    return write(one.difference.difference) + _limits(one.difference.low, one.difference.high, one.column)


def _limits(low: float | None, high: float | None, column: Column) -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    write = _writer(column)
    return f" [{write(low)}, {write(high)}]"


def _recovered(share: Recovered | None) -> str:
    if share is None:
        return "-"
    limits = "" if share.low is None or share.high is None else f" [{share.low:.4f}, {share.high:.4f}]"
    return f"{share.value:.4f}{limits}"


def _writer(column: Column) -> Callable[[float], str]:
    return _bytes if column.unit in ("bytes", "B") else format_number


def _bytes(count: float) -> str:
    return f"-{format_bytes(-count)}" if count < 0 else format_bytes(count)


def _p_value(one: Compared) -> str:
    found = one.difference
    return "-" if found is None or not math.isfinite(found.p_value) else format_p(found.p_value).removeprefix("= ")


def _test(one: Compared) -> str:
    found = one.difference
    if found is None:
        return one.verdict.reason if one.verdict.outcome != "not comparable" else "none"
    items = f", {found.items} items" if found.items else ""
    if found.discordant is not None:
        items += f", {found.discordant[0]} only A right, {found.discordant[1]} only B"
    if found.test.startswith("t test"):
        items += f", {len(one.a.by_seed)} and {len(one.b.by_seed)} seeds"
    return found.test + items


def _remarks(found: Comparison) -> Iterator[str]:
    for one in found.refused:
        yield f"refused: {one.name}: {one.reason}"
    yield from (f"note: {note}" for note in found.notes)


def _legend(found: Comparison) -> str:
    return (
        f"Intervals and tests at {_percent(found)}, for each metric by itself. Better: tested on the same items, at no "
        "more bits, with the same recovery stage and calibration tokens. vs dense: the number over the uncompressed "
        "model's under the same protocol. Several seeds: the mean, with the chance of seeds and of items; of costs "
        "the smallest and the largest."
    )


def _percent(found: Comparison) -> str:
    return f"{100 * found.level:.4g} %"


def _side_json(row: Row) -> dict[str, Any]:
    return {
        "model": row.model.name,
        "method": row.method,
        "label": row.name,
        "options": dict(row.options),
        "budget": None if row.budget is None else row.budget.model_dump(),
        "bits": row.bits.model_dump(),
        "recovery": list(row.recovery),
        "calibration": row.records[0].calibration,
        "seeds": [record.seed for record in row.records],
        "trials": [record.trial for record in row.records],
    }


def _metric_json(one: Compared) -> dict[str, Any]:
    test: dict[str, Any] | None = None
    if one.difference is not None:
        found = one.difference
        test = {"test": found.test, "p_value": _finite(found.p_value), "items": found.items}
        if found.discordant is not None:
            test["discordant"] = {"only_a": found.discordant[0], "only_b": found.discordant[1]}
    gap = one.difference
    return {
        "name": one.column.name,
        "unit": one.column.unit,
        "better": one.column.better,
        "volatile": one.column.volatile,
        "protocol": one.column.protocol,
        "a": _cell_json(one.a, one.recovery_a),
        "b": _cell_json(one.b, one.recovery_b),
        "difference": {
            "value": _finite(one.a.value - one.b.value if gap is None else gap.difference),
            "low": None if gap is None else _finite(gap.low),
            "high": None if gap is None else _finite(gap.high),
        },
        "test": test,
        "verdict": {"outcome": one.verdict.outcome, "reason": one.verdict.reason, "words": verdict_words(one)},
    }


def _cell_json(cell: Cell, share: Recovered | None) -> Mapping[str, Any]:
    found: dict[str, Any] = {"value": _finite(cell.value), "low": _finite(cell.low), "high": _finite(cell.high)}
    found["by_seed"] = [_finite(value) for value in cell.by_seed]
    if share is not None:
        found["recovery"] = {
            "value": _finite(share.value),
            "low": _finite(share.low),
            "high": _finite(share.high),
        }
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
