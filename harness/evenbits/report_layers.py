"""The per-layer figures as Markdown (layers.md) and CSV (layers.csv)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from evenbits.layers import LayerCell, LayerRow, by_budget, compressed_only, layer_rows, places, short_kinds
from evenbits.markdown import plain, table_lines
from evenbits.report_format import format_budget, format_number, name_among
from evenbits.tables import Table

ABOUT = (
    "Error: relative squared error of a layer's weights, |W - W'|^2 / |W|^2, 0 where nothing is lost. "
    "Calibrated error: the same weighted by the layer's inputs X on the calibration text, "
    "|(W - W')X|^2 / |WX|^2: it is what the layer's output loses. Means over seeds. "
    "Bits: by the layer's own bytes, without what layers share. "
    "A layer left dense has no error to compare and is written dense; - is not known.",
)  # fmt: skip


def has_layers(table: Table) -> bool:
    return any(layer_rows(model) for model in table.models)


def layers_markdown(table: Table, images: Sequence[str] = ()) -> str:
    """By model and budget: means of each kind of layer and the worst layer, then every layer. images: file names."""
    parts = ["# Layers", *ABOUT, "Every number unrounded, with what the methods noted: [layers.csv](layers.csv)."]
    parts += [f"![{plain(name.rsplit('.', 1)[0])}]({name})" for name in images]
    for model in table.models:
        rows = compressed_only(layer_rows(model))
        if not rows:
            continue
        parts.append(f"## {plain(model.model.name)}")
        for group in by_budget(rows):
            parts += _budget(model.model.name, group)
    return "\n\n".join(parts) + "\n"


def layers_csv(table: Table) -> str:
    """One line per row and layer. "left dense" is 1 or 0; "noted": notes as JSON, by seed if they differ."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        ["model", "revision", "dtype", "method", "label", "settings", "budget", "window", "on", "recovery", "seeds",
         "layer", "block", "kind", "bits", "error", "calibrated error", "left dense", "noted"]
    )  # fmt: skip
    for model in table.models:
        for found in layer_rows(model):
            row, budget = found.row, found.budget
            where: list[object] = ["", "", ""] if budget is None else [budget.centre, budget.window, budget.on]
            facts: list[object] = [row.model.name, row.model.revision, row.model.dtype, row.method]
            facts += [row.records[0].label, row.settings, *where, row.stage, " ".join(str(r.seed) for r in row.records)]
            noted = _noted(found)
            for cell in found.cells:
                place = cell.place
                writer.writerow(
                    [*facts, place.name, "" if place.block is None else place.block, place.kind, cell.bits]
                    + ["" if value is None else value for value in (cell.error, cell.calibrated)]
                    + [int(cell.left_dense), noted.get(place.name, "")]
                )
    return target.getvalue()


def _budget(model: str, rows: Sequence[LayerRow]) -> Iterator[str]:
    budget = rows[0].budget
    where = f"{model} at {format_budget(budget)} bits" if budget is not None else f"{model}, no budget"
    order = places(rows)
    kinds = list(dict.fromkeys(place.kind for place in order))
    short = short_kinds(kinds)
    names = [
        name_among(row.row, [other.row for other in rows]) + ("" if row.row.within else ", off window") for row in rows
    ]
    for title, calibrated in (("error", False), ("calibrated error", True)):
        if not any(_value(cell, calibrated) is not None for row in rows for cell in row.cells):
            continue
        yield f"### {plain(where)}: {title}, mean by kind of layer"
        lines: list[list[str]] = [
            ["method", *(short[kind] for kind in kinds), "all", "worst layer", "its error", "bits"]
        ]
        for name, row in zip(names, rows, strict=True):
            lines.append([name, *_summary(row.cells, kinds, calibrated)])
        yield table_lines(lines, left=1)
    yield f"### {plain(where)}: error of every layer (bits)"
    cells = [{cell.place.name: cell for cell in row.cells} for row in rows]
    lines = [["block", "kind", *names]]
    for place in order:
        block = "-" if place.block is None else str(place.block)
        lines.append([block, short[place.kind], *(_one(own.get(place.name)) for own in cells)])
    yield table_lines(lines, left=2)


def _summary(cells: Sequence[LayerCell], kinds: Sequence[str], calibrated: bool) -> list[str]:
    def mean(own: Sequence[LayerCell]) -> str:
        known = [v for cell in own if (v := _value(cell, calibrated)) is not None]
        if known:
            return format_number(sum(known) / len(known))
        return "dense" if own and all(cell.left_dense for cell in own) else "-"

    known = [(value, cell) for cell in cells if (value := _value(cell, calibrated)) is not None]
    worst = max(known, key=lambda pair: pair[0]) if known else None
    return [
        *(mean([cell for cell in cells if cell.place.kind == kind]) for kind in kinds),
        mean(cells),
        "-" if worst is None else worst[1].place.name,
        "-" if worst is None else format_number(worst[0]),
        bits_range(cells),
    ]


def bits_range(cells: Sequence[LayerCell]) -> str:
    """Bits of the compressed layers: one number, or least to most where they differ."""
    bits = [cell.bits for cell in cells if not cell.left_dense]
    if not bits:
        return "dense"
    low, high = f"{min(bits):.2f}", f"{max(bits):.2f}"
    return low if low == high else f"{low} to {high}"


def _value(cell: LayerCell, calibrated: bool) -> float | None:
    return None if cell.left_dense else cell.calibrated if calibrated else cell.error


def _one(cell: LayerCell | None) -> str:
    if cell is None:
        return ""
    if cell.left_dense:
        return f"dense ({cell.bits:.2f})"
    return f"{'-' if cell.error is None else format_number(cell.error)} ({cell.bits:.2f})"


def _noted(found: LayerRow) -> dict[str, str]:
    """Layer -> what the method noted of it, for layers of which it did."""
    notes: dict[str, dict[str, dict[str, Any]]] = {}
    for record in found.row.records:
        for layer in record.layers:
            if layer.meta:
                notes.setdefault(layer.name, {})[str(record.seed)] = layer.meta
    texts: dict[str, str] = {}
    for name, by_seed in notes.items():
        first, *others = by_seed.values()
        texts[name] = json.dumps(by_seed if any(other != first for other in others) else first, sort_keys=True)
    return texts
