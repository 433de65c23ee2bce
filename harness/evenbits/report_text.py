"""A gathered table as text: sheets of strings, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from evenbits.markdown import plain, table_lines
from evenbits.report_csv import as_csv
from evenbits.report_format import format_budget, format_bytes, format_number
from evenbits.report_protocols import notes_of, protocols_markdown
from evenbits.report_sheets import sheets
from evenbits.rows import why
from evenbits.tables import ModelTable, Table

__all__ = ["as_csv", "as_markdown", "as_terminal", "format_budget", "format_bytes", "format_number"]

NAME_WIDTH = 16  # a longer name of a method may take several lines

LEGEND = (
    "* best of its budget and recovery stage; ~ not distinguishable from it (paired test on the same items, p > 0.05 "
    "after Holm's adjustment for the number of rows); "
    "- another is better at no more bits and with the same calibration tokens; "
    "no mark: behind only methods with more bits or other calibration tokens, alone in its stage, or not testable.",
    "[low, high] is a 95 % interval: over items, and over seeds too where several differ; of a cost with several seeds "
    "the smallest and the largest. vs dense is the value over the uncompressed model's, with its 95 % interval where "
    "both were measured on the same items: these are drawn again for both together, and seeds that differ count too.",
    "linear bits: bytes on disk that stand for the linear layers of the blocks, per weight; model bits: all bytes of "
    "the model per parameter; paper bits: by the method's own formula; index bits: codes alone.",
)


def as_terminal(table: Table, console: Console) -> None:
    """Print readable tables; 120 columns are enough, and are taken where the output is not a terminal."""
    if not console.is_terminal and console.width < 120:
        console.width = 120
    for model in table.models:
        for sheet in sheets(model, shorten=True):
            shown = RichTable(title=escape(sheet.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            shown.padding, shown.pad_edge = (0, 1, 0, 0), False
            long = any(len(texts[1]) > NAME_WIDTH for group in sheet.groups for texts in group)
            for number, name in enumerate(sheet.header):
                left = number < sheet.left
                fixed = number >= min(sheet.left, 3) or number == 0 or (number == 1 and not long)
                shown.add_column(escape(name), justify="left" if left else "right", overflow="fold", no_wrap=fixed)
            for group in sheet.groups:
                for texts in group:
                    shown.add_row(*(_settings(text) if i == 2 else escape(text) for i, text in enumerate(texts)))
                shown.add_section()
            console.print(shown)
            for line in sheet.below:
                console.print(escape(line), style="dim", highlight=False)
        for line in _setbacks(model):
            console.print(escape(line), highlight=False)
    for line in (*_numbered(_notes(table)), *(LEGEND if table.models else ())):
        console.print(escape(line), style="dim", highlight=False)


def as_markdown(table: Table, more: Sequence[str] = ()) -> str:
    """Tables, notes, then `more` (paragraphs of Markdown, e.g. pictures), and what the protocols of the columns are."""
    parts: list[str] = ["# Report"]
    for model in table.models:
        facts = model.model
        parts.append(f"## {plain(facts.name)}")
        parts.append(
            f"revision `{facts.revision}`, evaluated in {facts.dtype}: {facts.parameters:,} parameters, "
            f"{facts.linear_weights:,} of them in linear layers, {facts.stored_bits} bits each as stored"
        )
        for sheet in sheets(model, shorten=False):
            parts.append(f"### {plain(sheet.title)}")
            parts.append(table_lines([sheet.header, *(line for group in sheet.groups for line in group)], sheet.left))
            parts += [plain(line) for line in sheet.below]
        setbacks = [f"- {plain(line)}" for line in _setbacks(model)]
        if setbacks:
            parts.append("\n".join(setbacks))
    parts += [plain(line) for line in (*_numbered(_notes(table)), *LEGEND)]
    parts += [*more, *protocols_markdown(table)]
    return "\n\n".join(parts) + "\n"


def _settings(text: str) -> Text:
    """One line, cut where a narrow terminal ends it: what tells rows of one name apart stands first."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _notes(table: Table) -> tuple[str, ...]:
    return (*table.notes, *(note for model in table.models for note in notes_of(model)))


def _setbacks(model: ModelTable) -> Iterator[str]:
    for record in (*model.failed, *model.skipped):
        budget = f" at {format_budget(record.budget)} bits" if record.budget is not None else ""
        stages = "".join(f" + {stage}" for stage in record.recovery)
        name = record.label or record.method
        yield f"{record.status}: {model.model.name}: {name}{stages}{budget}, seed {record.seed}: {why(record)}"


def _numbered(notes: Iterable[str]) -> Iterator[str]:
    yield from (f"Note: {note}." for note in notes)
