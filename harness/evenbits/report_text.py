"""A gathered table as text: sheets of strings, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from evenbits.markdown import plain, table_lines
from evenbits.report_csv import as_csv
from evenbits.report_format import format_budget, format_bytes, format_number
from evenbits.report_protocols import notes_of, protocols_markdown
from evenbits.report_sheets import RATIO, Sheet, sheets
from evenbits.rows import why
from evenbits.tables import ModelTable, Table

__all__ = ["as_csv", "as_markdown", "as_terminal", "format_budget", "format_bytes", "format_number"]

NAME_WIDTH = 16  # of a method or a recovery stage: a longer one takes several lines
SETTINGS_LEAST = 15
GAP = 2  # between columns, and one at each end of a line

LEGEND = (
    "* best of its budget and recovery stage; ~ not distinguishable from it (paired test on the same items, p > 0.05 "
    "adjusted for the best being picked among all rows); "
    "- another is better at no more bits and with the same calibration tokens; "
    "no mark: behind only methods with more bits or other calibration tokens, alone in its stage, or not testable.",
    "[low, high] is a 95 % interval: over items, and over seeds too where several differ; of a cost with several seeds "
    "the smallest and the largest. vs dense is the value over the uncompressed model's, with its 95 % interval where "
    "both were measured on the same items: these are drawn again for both together, and seeds that differ count too.",
    "linear bits: bytes on disk that stand for the linear layers of the blocks, per weight; model bits: all bytes of "
    "the model per parameter; paper bits: by the method's own formula, or what a published "
    "checkpoint claims; index bits: codes alone.",
)


def as_terminal(table: Table, console: Console) -> None:
    """Print readable tables; 120 columns are enough, and are taken where the output is not a terminal."""
    if not console.is_terminal and console.width < 120:
        console.width = 120
    for model in table.models:
        for sheet in sheets(model, shorten=True):
            for part in fit(sheet, console.width):
                console.print(_table(part))
            for line in sheet.below:
                console.print(Text(line), style="dim")
        for line in _setbacks(model):
            console.print(Text(line))
    for line in (*_numbered(_notes(table)), *(LEGEND if table.models else ())):
        console.print(Text(line), style="dim")


def fit(sheet: Sheet, width: int) -> list[Sheet]:
    """The sheet in parts of at most `width` columns, the words of each row in every part; settings are cut first.

    rich would cut what does not fit, and a cut number is another number. A width that words and a single number take
    more than is not kept to: then a number goes over two lines.
    """
    table = [sheet.header, *(texts for group in sheet.groups for texts in group)]
    wide = [max(cell_len(line) for texts in table for line in texts[i].split("\n")) for i in range(len(sheet.header))]
    for i, name in enumerate(sheet.header[: sheet.left]):
        wide[i] = wide[i] if name in ("settings", "budget") else min(wide[i], NAME_WIDTH)
    if "settings" in sheet.header and (over := sum(wide) + GAP * len(wide) - width) > 0:
        settings = sheet.header.index("settings")
        least = min(wide[settings], SETTINGS_LEAST)
        pairs = [w + (GAP + wide[i + 1] if RATIO in sheet.header[i + 1 : i + 2] else 0) for i, w in enumerate(wide)]
        spare = width - sum(wide[: sheet.left]) + wide[settings] - GAP * (sheet.left + 1) - max(pairs[sheet.left :])
        wide[settings] = max(min(least, spare), wide[settings] - over, 1)
        cut = partial(_cut, place=settings, width=wide[settings])
        sheet = replace(sheet, header=cut(sheet.header), groups=tuple(tuple(map(cut, g)) for g in sheet.groups))
    parts: list[list[int]] = []
    room = 0
    for i in range(sheet.left, len(wide)):
        together = 2 if i + 1 < len(wide) and sheet.header[i + 1] == RATIO else 1
        needed = sum(wide[i : i + together]) + GAP * together
        if not parts or (needed > room and sheet.header[i] != RATIO):
            parts.append([])
            room = width - sum(wide[: sheet.left]) - GAP * sheet.left
        parts[-1].append(i)
        room -= wide[i] + GAP
    if len(parts) < 2:
        return [sheet]
    return [_part(sheet, [*range(sheet.left), *numbers]) for numbers in parts]


def _cut(texts: Sequence[str], place: int, width: int) -> tuple[str, ...]:
    text = texts[place]
    short = text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"
    return (*texts[:place], short, *texts[place + 1 :])


def _part(sheet: Sheet, columns: Sequence[int]) -> Sheet:
    def pick(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(texts[i] for i in columns)

    return replace(sheet, header=pick(sheet.header), groups=tuple(tuple(map(pick, group)) for group in sheet.groups))


def _table(sheet: Sheet) -> RichTable:
    shown = RichTable(title=Text(sheet.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    shown.padding, shown.pad_edge = (0, 1, 0, 0), False
    for number, name in enumerate(sheet.header):
        word = number < sheet.left
        widest = NAME_WIDTH if word and name not in ("settings", "budget") else None
        shown.add_column(Text(name), justify="left" if word else "right", overflow="fold", max_width=widest)
    for group in sheet.groups:
        for texts in group:
            shown.add_row(*map(Text, texts))
        shown.add_section()
    return shown


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
