"""Descriptions that MLflow's page shows above a run: what it is, what came out, how to have it again. Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from evenbits.ledger import dense_ledger
from evenbits.markdown import plain, table_lines
from evenbits.record import Ledger, Record
from evenbits.report_format import format_bytes, format_number
from evenbits.rows import COST_UNITS, Row, why
from evenbits.tables import Table

BEST = 5  # rows of a budget in a run's description; the report has all

LAYERS_ARE = (
    "The step of the layer metrics is the layer's index in the model's order; layers.csv has the names, layers.svg a "
    "plot. The page's lists show the last layer's number for these."
)


def ledger_of(record: Record) -> Ledger | None:
    """Of a trial that is done; the uncompressed model's as it is evaluated."""
    if record.ledger is None and record.method == "dense" and record.status == "done":
        return dense_ledger(record.model)
    return record.ledger


def run_command(suite: str) -> str:
    """A record knows its suite's name; the file may have another."""
    return f"evenbits run {suite}.toml"


def trial_note(record: Record) -> str:
    where = "" if record.budget is None else f" at {record.budget.centre:g} bits"
    stages = "".join(f" + {stage}" for stage in record.recovery)
    title = f"**{plain(record.label or record.method)}{stages}**{where} on {plain(record.model.name)}, "
    lines = [f"{title}seed {record.seed}."]
    if record.status != "done":
        lines.append(f"{record.status.capitalize()}: {plain(why(record))}")
    if (ledger := ledger_of(record)) is not None:
        outside = ", outside its budget" if record.within_budget is False else ""
        lines.append(
            f"{ledger.bits.linear:.4f} bits a linear weight{outside}, {ledger.bits.model:.4f} a parameter, "
            f"{format_bytes(ledger.model_bytes)} on disk; what they are spent on: ledger.md."
        )
    lines += [f"- {text}" for text in _qualities(record)]
    if record.layers:
        lines.append(f"\n{LAYERS_ARE}")
    return "\n".join(lines)


def run_note(suite: str, description: str, records: Sequence[Record], table: Table) -> str:
    """What the suite compares, the best of each budget, and how to have it again."""
    counts = Counter(record.status for record in records)
    how_many = ", ".join(f"{counts[status]} {status}" for status in ("done", "failed", "skipped") if counts[status])
    parts = [f"**Suite {plain(suite)}**" + (f": {plain(description)}" if description else ""), f"Trials: {how_many}."]
    for model in table.models:
        column = next((c for c in model.columns if c.quality), None)
        if column is None:
            continue
        dense = next((row.cells[column.key].value for row in model.dense if column.key in row.cells), None)
        said = "" if dense is None else f" (dense {format_number(dense)})"
        lines = [["budget", "method", "recovery", "linear bits", f"{column.title}{said}", "mark"]]
        for section in model.sections:
            if section.budget is None:
                continue
            for index, row in enumerate(section.rows[:BEST]):
                mark = section.marks.get((index, column.key), "")
                value = _cell(row, column.key)
                lines.append([f"{section.budget.centre:g}", row.name, row.stage, f"{row.bits.linear:.4f}", value, mark])
        if len(lines) > 1:
            parts.append(f"On {plain(model.model.name)}, the first {BEST} rows of each budget:")
            parts.append(table_lines(lines, left=3))
            parts.append("\\* best, ~ not told apart from it, - another is better; bits are measured on disk.")
    commits = sorted({str((record.environment.get("git") or {}).get("commit", ""))[:12] for record in records} - {""})
    at = f" at commit {', '.join(commits)}" if commits else ""
    parts.append(f"To have it again: `{run_command(suite)}`{at}. All tables and plots: artifacts, report/page.html.")
    parts.append(
        "To compare: tick trials in the experiment's list, Compare; in the parallel coordinates or the scatter plot "
        "take bits.linear and a quality. " + LAYERS_ARE
    )
    return "\n\n".join(parts)


def _qualities(record: Record) -> Iterator[str]:
    for metric in record.metrics:
        if metric.unit in COST_UNITS or metric.volatile:
            continue
        span = ""
        if metric.low is not None and metric.high is not None:
            span = f" ({format_number(metric.low)} to {format_number(metric.high)})"
        yield f"{plain(metric.name)} {format_number(metric.value)}{span}"


def _cell(row: Row, key: tuple[str, str]) -> str:
    cell = row.cells.get(key)
    return "" if cell is None else format_number(cell.value)
