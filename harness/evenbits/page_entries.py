"""What stands on the page: every row once, with an id that stays the same when the page is made again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evenbits.layers import LayerRow, layer_rows, places, short_kinds
from evenbits.page_html import Html, hidden, join, tag, text
from evenbits.plots_look import COLOURS, MARKERS, method_looks, method_name
from evenbits.record import BudgetFacts
from evenbits.report_format import format_budget, format_bytes, format_number
from evenbits.rows import Column, Row
from evenbits.tables import ModelTable, Section, Table

Group = Literal["dense", "ranked", "outside", "free"]
MARK_WORDS = {
    "*": "best of its budget and recovery stage",
    "~": "not told apart from the best",
    "-": "another is better at no more bits",
}


@dataclass(frozen=True)
class Entry:
    """A row. group: "free" has no budget and is never ranked. index: its place in the section, where it is ranked."""

    id: str
    row: Row
    budget: BudgetFacts | None
    group: Group
    section: Section | None = None
    index: int = 0

    def mark(self, column: Column) -> str:
        if self.section is None or self.group != "ranked":
            return ""
        return self.section.marks.get((self.index, column.key), "")


@dataclass(frozen=True)
class Shown:
    """A model on the page. key: "m0", "m1" ...; budgets by the name that they are filtered by; layers by entry's id."""

    key: str
    table: ModelTable
    entries: tuple[Entry, ...]
    budgets: Mapping[str, BudgetFacts]
    layers: Mapping[str, LayerRow]

    @property
    def name(self) -> str:
        return self.table.model.name

    @property
    def columns(self) -> list[Column]:
        """Quality first; sizes are left out, they stand beside every row anyway. Titles are a model's own keys."""
        return [c for c in self.table.columns if c.quality or c.volatile]

    @property
    def quality(self) -> list[Column]:
        return [column for column in self.columns if column.quality]

    @property
    def over(self) -> Literal["linear", "model"]:
        """The bits that the plot starts with: the model's where all budgets are of these."""
        return "model" if self.budgets and all(b.on == "model" for b in self.budgets.values()) else "linear"

    def budget_key(self, entry: Entry) -> str:
        if entry.budget is not None:
            return format_budget(entry.budget)
        return "dense" if entry.group == "dense" else "free"


def show_models(table: Table) -> list[Shown]:
    taken: set[str] = set()
    return [_show(f"m{number}", model, taken) for number, model in enumerate(table.models)]


def _show(key: str, model: ModelTable, taken: set[str]) -> Shown:
    def entry(row: Row, budget: BudgetFacts | None, group: Group, section: Section | None = None, at: int = 0) -> Entry:
        return Entry(unique(row.records[0].trial, taken), row, budget, group, section, at)

    entries = [entry(row, None, "dense") for row in model.dense]
    for section in model.sections:
        ranked: Group = "free" if section.budget is None else "ranked"
        entries += [entry(row, section.budget, ranked, section, at) for at, row in enumerate(section.rows)]
        entries += [entry(row, section.budget, "outside") for row in section.outside]
    layers = {id(found.row): found for found in layer_rows(model)}
    return Shown(
        key,
        model,
        tuple(entries),
        {format_budget(section.budget): section.budget for section in model.sections if section.budget is not None},
        {one.id: layers[id(one.row)] for one in entries if id(one.row) in layers},
    )


def unique(wanted: str, taken: set[str]) -> str:
    """An id for HTML, none of the `taken`, to which it is added."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", wanted) or "x"
    found, number = name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    taken.add(found)
    return found


def look_of(shown: Shown) -> dict[str, tuple[int, int]]:
    """Method with its recovery -> number of its colour and of its marker, as the report's pictures have them; no dense
    ones."""
    rows = [entry.row for entry in shown.entries if entry.group != "dense"]
    return {name: (COLOURS.index(c), MARKERS.index(m)) for name, (c, m) in method_looks(rows).items()}


def number_text(value: float, column: Column) -> str:
    written = format_bytes if column.unit in ("bytes", "B") else format_number
    return written(value) if math.isfinite(value) else f"{value:g}"


def interval_text(low: float | None, high: float | None, column: Column) -> str:
    return "" if low is None or high is None else f"[{number_text(low, column)}, {number_text(high, column)}]"


def share_text(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else format_number(value)


def mark_html(mark: str) -> Html | None:
    """The sign of the table's legend, and what it means for those who hear it."""
    if not mark:
        return None
    return tag("span", tag("span", mark, aria_hidden="true"), hidden(f" ({MARK_WORDS[mark]})"), class_="mark")


def budget_words(budget: BudgetFacts | None) -> str:
    if budget is None:
        return "no budget"
    what = "model bits per parameter" if budget.on == "model" else "linear bits per weight"
    return f"{format_budget(budget).removesuffix(' model')} {what}"


def heading(column: Column) -> Html:
    """A column's title, its unit where the name does not say it, and which way is better."""
    known = column.unit in ("", "1", "bytes", "B", column.name)
    known |= column.name.endswith("_" + column.unit.replace("/", "_per_"))
    known |= column.unit == "accuracy" and "acc" in column.name.split("_")
    down = column.better == "lower"
    title = join(column.title.split("_"), "_") if "_" not in column.title else _breakable(column.title)
    return join(
        [
            title,
            None if known else f" ({column.unit})",
            tag("span", " ↓" if down else " ↑", aria_hidden="true"),
            hidden(f" ({column.better} is better)"),
        ]
    )


def _breakable(name: str) -> Html:
    """A long name may go over two lines after an underscore."""
    return Html("_<wbr>".join(text(part) for part in name.split("_")))


def script_data(shown: Sequence[Shown], shapes: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws: points and layers. Numbers to eight digits, so that four of them are the report's;
    one that JSON has no form for is null."""
    return {"shapes": list(shapes), "models": [_model_data(one) for one in shown]}


def _model_data(shown: Shown) -> dict[str, Any]:
    looks = look_of(shown)
    order = places(list(shown.layers.values()))
    kinds = list(dict.fromkeys(place.kind for place in order))
    short = short_kinds(kinds)
    return {
        "key": shown.key,
        "name": shown.name,
        "over": shown.over,
        "columns": [
            {"title": c.title, "name": c.name, "lower": c.better == "lower", "quality": c.quality}
            for c in shown.columns
        ],
        "budgets": [
            {"name": name, "on": b.on, "low": _number(b.centre - b.window), "high": _number(b.centre + b.window)}
            for name, b in shown.budgets.items()
        ],
        "kinds": [short[kind] for kind in kinds],
        "places": [[place.name, place.block, kinds.index(place.kind)] for place in order],
        "rows": [_row_data(shown, entry, looks, [place.name for place in order]) for entry in shown.entries],
    }


def _row_data(shown: Shown, entry: Entry, looks: Mapping[str, tuple[int, int]], names: Sequence[str]) -> dict[str, Any]:
    row = entry.row
    cells: dict[str, Any] = {}
    for column in shown.quality:
        cell = row.cells.get(column.key)
        if cell is not None:
            cells[column.title] = [_number(cell.value), _number(cell.low), _number(cell.high)]
    found: dict[str, Any] = {
        "id": entry.id, "group": entry.group, "budget": shown.budget_key(entry), "name": row.name,
        "method": method_name(row), "settings": row.settings, "stage": row.stage, "seeds": len(row.records),
        "look": looks.get(method_name(row)), "bits": [_number(row.bits.linear), _number(row.bits.model)],
        "said": [f"{row.bits.linear:.3f}", f"{row.bits.model:.3f}"], "cells": cells,
    }  # fmt: skip
    layers = shown.layers.get(entry.id)
    if layers is not None:
        own = {cell.place.name: cell for cell in layers.cells}
        lines = [own.get(name) for name in names]
        found["layers"] = [
            [None if one is None else _number(one.bits) for one in lines],
            [None if one is None or one.left_dense else _number(one.error) for one in lines],
            [None if one is None or one.left_dense else _number(one.calibrated) for one in lines],
            [i for i, one in enumerate(lines) if one is not None and one.left_dense],
        ]
    return found


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")
