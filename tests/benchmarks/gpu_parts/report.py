"""gpu.md: goals first, then a table for each part, each row beside its roofline; and what failed or was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_parts.goals import Goal, failures, unreached
from gpu_parts.part import Column, Part, Row
from gpu_parts.runner import Result


def text(
    facts: Mapping[str, Any], found: Sequence[Goal], parts: Mapping[str, Part | str], results: Mapping[str, Result]
) -> str:
    """parts: each part, or the line that says why it could not be loaded."""
    sections = [_head(facts), _goals(found)]
    for name, part in parts.items():
        if isinstance(part, str):
            sections.append(f"## {name}\n\n**Failed to load:** {part}\n")
        else:
            sections.append(_part(part, results.get(name)))
    return "\n".join(sections)


def _head(facts: Mapping[str, Any]) -> str:
    made = facts["made_with"]
    small = "\n\n**A run with --small: tiny shapes, one repeat. Its times mean nothing.**" if made["small"] else ""
    clocks = facts["clocks"]
    lines = [
        "# Kernels on a GPU",
        "",
        f"{facts['date']}, commit {made['commit'][:12]}, sources {made['sources']}. {made['gpu']}, driver "
        f"{made['driver']}, torch {made['torch']}, CUDA {made['cuda']}, Triton {made['triton']}, transformers "
        f"{made['transformers']}, Python {made['python']}; {facts['seconds']:.0f} s altogether.",
        f"Written by `{facts['command']}`.{small}",
        "",
        f"Clocks (nvidia-smi, MHz): before {_clocks(clocks.get('before'))}; after {_clocks(clocks.get('after'))}.",
        "",
    ]
    return "\n".join(lines)


def _clocks(read: Mapping[str, str] | None) -> str:
    if not read:
        return "unknown"
    return (
        f"multiprocessors {read.get('clocks.sm', '?')}, memory {read.get('clocks.mem', '?')} "
        f"({read.get('power.draw', '?')} W, {read.get('temperature.gpu', '?')} °C)"
    )


def _goals(found: Sequence[Goal]) -> str:
    lines = ["## Goals", "", "| goal | verdict | figure |", "| :-- | :-- | :-- |"]
    lines += [f"| {_cell(goal.wanted)} | **{goal.verdict}** | {_cell(goal.figure)} |" for goal in found]
    return "\n".join([*lines, ""])


def _part(part: Part, result: Result | None) -> str:
    lines = [f"## {part.title}", "", part.note, ""]
    if result is None:
        return "\n".join([*lines, "Not run.", ""])
    lines += [f"{result.seconds:.0f} s of {part.seconds:.0f}. {_state(result)}", ""]
    rows = result.flat()
    if part.name == "check":
        lines += _wrong(result)
        rows = summary(rows)
    if rows:
        lines += [table(part.columns, rows), ""]
    lines += [f"- failed: `{_cell(item)}`: {_cell(error)}" for item, error in result.failures.items()]
    if result.left_out:
        lines.append(f"- left out, time was out: {', '.join(map(_cell, result.left_out))}")
    notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    lines += [f"- {_cell(note)}" for note in notes]
    return "\n".join([*lines, ""])


def _state(result: Result) -> str:
    if result.status == "done":
        return "All of it ran."
    return f"{len(result.failures)} items failed, {len(result.left_out)} were left out."


def _wrong(result: Result) -> list[str]:
    lines = [
        f"- **wrong**: {_cell(row['kernel'])}, {_cell(row['case'])}, {row['dtype']}, {_cell(row['configuration'])}: "
        f"error {row['error']:.3g} where {row['tolerance']:.3g} is allowed. {_cell(row.get('note') or '')}"
        for row in failures(result)
    ]
    lines += [f"- **never reached**: {_cell(name)}" for name in unreached(result)]
    return [*lines, ""] if lines else []


def summary(rows: Sequence[Row]) -> list[Row]:
    """Comparisons by kernel and dtype: their number, the largest error, and the tolerance; JSON has each of them."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "error" not in row:
            continue
        kept = found.setdefault(
            (row["kernel"], row["dtype"]),
            {**row, "comparisons": 0, "failed": 0, "error": 0.0, "note": ""},
        )
        kept["comparisons"] += 1
        kept["failed"] += not row["ok"]
        kept["error"] = max(kept["error"], row["error"])
        kept["tolerance"] = max(kept["tolerance"], row["tolerance"])
    return list(found.values())


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Columns that no row fills are left out."""
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    lines = [
        "| " + " | ".join(column.heading for column in shown) + " |",
        "| " + " | ".join("--:" if column.shown else ":--" for column in shown) + " |",
    ]
    lines += ["| " + " | ".join(_value(column, row.get(column.key)) for column in shown) + " |" for row in rows]
    return "\n".join(lines)


def _value(column: Column, value: Any) -> str:
    if value is None:
        return ""
    return format(value, column.shown) if column.shown else _cell(str(value))


def _cell(words: str) -> str:
    """In one line, and no column's border."""
    return " ".join(words.split()).replace("|", "\\|")
