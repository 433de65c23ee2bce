"""A gathered table as text: sheets of strings, for a terminal or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from evenbits.record import BudgetFacts
from evenbits.report_csv import as_csv
from evenbits.rows import Cell, Column, Row, why
from evenbits.tables import ModelTable, Section, Table

__all__ = ["as_csv", "as_markdown", "as_terminal", "format_budget", "format_bytes", "format_number"]

SETTINGS_WIDTH = 26  # of a terminal's 120 columns

LEGEND = (
    "* best of its budget and recovery stage; ~ not distinguishable from it (paired bootstrap on the same items, "
    "p > 0.05); "
    "- another is better at no more bits and with the same calibration tokens; "
    "no mark: behind only methods with more bits or other calibration tokens, alone in its stage, or not testable.",
    "[low, high] is the range over seeds where several differ, else the 95 % interval over items. "
    "vs dense is the value over the uncompressed model's.",
    "linear bits: bytes on disk that stand for the linear layers of the blocks, per weight; model bits: all bytes of "
    "the model per parameter; paper bits: by the method's own formula; index bits: codes alone.",
)


@dataclass(frozen=True)
class Sheet:
    """One table to show: groups of lines with a rule between them; every line has as many texts as the header."""

    title: str
    header: tuple[str, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    left: int  # how many of the first columns are words, aligned left


def as_terminal(table: Table, console: Console) -> None:
    """Print readable tables; 120 columns are enough, and are taken where the output is not a terminal."""
    if not console.is_terminal and console.width < 120:
        console.width = 120
    for model in table.models:
        for sheet in _sheets(model, shorten=True):
            shown = RichTable(title=escape(sheet.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            shown.padding, shown.pad_edge = (0, 1, 0, 0), False
            for number, name in enumerate(sheet.header):
                left = number < sheet.left
                shown.add_column(
                    escape(name), justify="left" if left else "right", overflow="fold", no_wrap=number not in (1, 2)
                )
            for group in sheet.groups:
                for texts in group:
                    shown.add_row(*(escape(text) for text in texts))
                shown.add_section()
            console.print(shown)
        for line in _setbacks(model):
            console.print(escape(line), highlight=False)
    for line in (*_numbered(table.notes), *(LEGEND if table.models else ())):
        console.print(escape(line), style="dim", highlight=False)


def as_markdown(table: Table) -> str:
    parts: list[str] = ["# Report"]
    for model in table.models:
        facts = model.model
        parts.append(f"## {_cell_text(facts.name)}")
        parts.append(
            f"revision `{facts.revision}`, evaluated in {facts.dtype}: {facts.parameters:,} parameters, "
            f"{facts.linear_weights:,} of them in linear layers, {facts.stored_bits} bits each as stored"
        )
        for sheet in _sheets(model, shorten=False):
            parts.append(f"### {_cell_text(sheet.title)}")
            rule = [":--" if i < sheet.left else "--:" for i in range(len(sheet.header))]
            lines = [sheet.header, tuple(rule), *(line for group in sheet.groups for line in group)]
            parts.append("\n".join("| " + " | ".join(_cell_text(t) for t in line) + " |" for line in lines))
        setbacks = [f"- {_cell_text(line)}" for line in _setbacks(model)]
        if setbacks:
            parts.append("\n".join(setbacks))
    notes = [_cell_text(line) for line in (*_numbered(table.notes), *LEGEND)]
    return "\n\n".join([*parts, *notes]) + "\n"


def format_number(value: float) -> str:
    """Four significant digits, in full up to a million."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3e}"


def format_bytes(count: float) -> str:
    """Decimal units, as disks and papers count."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 100 else f"{count:.0f} GB"


def format_budget(budget: BudgetFacts | None) -> str:
    if budget is None:
        return "none"
    return f"{budget.centre:g} ±{budget.window:g}" + (" model" if budget.on == "model" else "")


def _sheets(model: ModelTable, *, shorten: bool) -> Iterator[Sheet]:
    """Quality first, then bits and bytes, then what running costs, then the rows outside their window."""
    quality = [c for c in model.columns if c.quality]
    costs = [c for c in model.columns if c.volatile]  # sizes stand in the sheet of bytes
    first, more = (1, 2) if shorten else (2, 4)  # metrics a sheet
    name = model.model.name
    if model.dense or any(s.rows for s in model.sections):
        yield _sheet(model, f"{name}: quality at even bits", quality[:first], shorten, sizes=True)
        for start in range(first, len(quality), more):
            yield _sheet(model, f"{name}: more quality", quality[start : start + more], shorten)
        yield _bytes_sheet(model, f"{name}: bits and bytes", shorten)
        for start in range(0, len(costs), 5):
            yield _sheet(model, f"{name}: cost of running", costs[start : start + 5], shorten)
    outside = tuple(
        tuple(
            (
                *_who(row, section.budget, shorten),
                f"{row.budget_bits:.3f}",
                *(_number(row.cells.get(c.key), c, "", brief=shorten) for c in quality[:first]),
            )
            for row in section.outside
        )
        for section in model.sections
        if section.outside
    )
    if outside:
        header = (*_WHO, "bits", *(_heading(c) for c in quality[:first]))
        yield Sheet(f"{name}: outside the window, not ranked", header, outside, len(_WHO))


_WHO = ("budget", "method", "settings", "recovery", "seeds")


def _who(row: Row, budget: BudgetFacts | None, shorten: bool, width: int = SETTINGS_WIDTH) -> tuple[str, ...]:
    settings = row.settings
    if shorten and len(settings) > width:
        settings = settings[: width - 1] + "…"
    return (
        "" if row.method == "dense" else format_budget(budget),
        row.name,
        settings,
        row.stage,
        str(len(row.records)),
    )


def _sheet(model: ModelTable, title: str, columns: Sequence[Column], shorten: bool, *, sizes: bool = False) -> Sheet:
    base = any(model.against_dense(row, c) is not None for row in _all_rows(model) for c in columns if c.quality)
    show_ratio = [c for c in columns if c.quality and base]
    header = [*_WHO, *(("linear", "model", "size") if sizes and not shorten else ("linear", "size") if sizes else ())]
    for column in columns:
        heading = _heading(column)
        if shorten and column.volatile:
            heading = heading.replace("_", "\n").replace(".", "\n").replace(" (", "\n(")
        header += [heading, *(["vs\ndense" if shorten else "vs dense"] if column in show_ratio else [])]

    def line(row: Row, section: Section | None, index: int) -> tuple[str, ...]:
        texts = list(_who(row, section.budget if section is not None else None, shorten))
        if sizes:
            model_bits = [] if shorten else [f"{row.bits.model:.3f}"]  # a terminal shows them with the bytes
            texts += [f"{row.bits.linear:.3f}", *model_bits, format_bytes(row.model_bytes)]
        for column in columns:
            mark = section.marks.get((index, column.key), "") if section is not None else ""
            texts.append(_number(row.cells.get(column.key), column, mark, brief=shorten))
            if column in show_ratio:
                ratio = model.against_dense(row, column)
                texts.append("" if ratio is None else f"{ratio:.3f}")
        return tuple(texts)

    groups = [tuple(line(row, None, 0) for row in model.dense)]
    groups += [tuple(line(row, section, i) for i, row in enumerate(section.rows)) for section in model.sections]
    return Sheet(title, tuple(header), tuple(g for g in groups if g), len(_WHO))


def _bytes_sheet(model: ModelTable, title: str, shorten: bool) -> Sheet:
    words = ("budget", "method", "settings", "index", "paper", "linear", "model")
    header: tuple[str, ...]
    if shorten:
        header = (*words, "linear\nsize", "model\nsize", "linear vs\nfp32 / stored", "model vs\nfp32 / stored")
    else:
        header = (*words, "linear size", "model size", "linear vs fp32", "vs stored", "model vs fp32", "vs stored")

    def line(row: Row, budget: BudgetFacts | None) -> tuple[str, ...]:
        bits, times = row.bits, [f"{ratio:.3g}x" for ratio in row.ratios.values()]
        if shorten:
            times = [" / ".join(times[:2]), " / ".join(times[2:])]
        return (
            *_who(row, budget, shorten, 16)[:3],
            *(f"{b:.3f}" for b in (bits.index, bits.paper, bits.linear, bits.model)),
            *(format_bytes(row.linear_bytes), format_bytes(row.model_bytes)),
            *times,
        )

    groups = [tuple(line(row, None) for row in model.dense)]
    groups += [tuple(line(row, section.budget) for row in section.rows) for section in model.sections]
    return Sheet(title, header, tuple(g for g in groups if g), 3)


def _heading(column: Column) -> str:
    known = column.unit in ("", "1", "bytes", "B", column.name) or column.name.endswith(
        "_" + column.unit.replace("/", "_per_")
    )
    return f"{column.title}{'' if known else f' ({column.unit})'} {'↓' if column.better == 'lower' else '↑'}"


def _number(cell: Cell | None, column: Column, mark: str, *, brief: bool) -> str:
    """brief: costs without their interval, and room for a mark on every line so that numbers stand in line."""
    if cell is None:
        return "-"
    written = format_bytes if column.unit in ("bytes", "B") else format_number
    hidden = cell.low is None or cell.high is None or (brief and column.volatile)
    interval = "" if hidden else f" [{written(cell.low or 0.0)}, {written(cell.high or 0.0)}]"
    room = 1 if brief and column.quality else 0
    return (written(cell.value) + interval + f" {mark:{room}}") if mark or room else written(cell.value) + interval


def _setbacks(model: ModelTable) -> Iterator[str]:
    for record in (*model.failed, *model.skipped):
        budget = f" at {format_budget(record.budget)} bits" if record.budget is not None else ""
        stages = "".join(f" + {stage}" for stage in record.recovery)
        name = record.label or record.method
        yield f"{record.status}: {model.model.name}: {name}{stages}{budget}, seed {record.seed}: {why(record)}"


def _numbered(notes: Iterable[str]) -> Iterator[str]:
    yield from (f"Note: {note}." for note in notes)


def _cell_text(text: str) -> str:
    """Safe inside a Markdown table: a bar or line break would end the cell, a star would set emphasis."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("~", "\\~").replace("\n", " ")


def _all_rows(model: ModelTable) -> Iterator[Row]:
    yield from model.dense
    for section in model.sections:
        yield from section.rows
