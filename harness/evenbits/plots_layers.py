"""Heat maps of the layers: methods down, blocks across, one panel a kind of layer; error, calibrated error, bits.

Dark is bad. viridis rises evenly in lightness, so the maps can be read in grey and with a colour-vision deficiency.
Layers left dense are hatched, for an error of 0 would make them the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from evenbits.layers import (
    LayerCell,
    LayerRow,
    Place,
    by_budget,
    compressed_only,
    layer_rows,
    pages_of,
    places,
    short_kinds,
)
from evenbits.plots_look import INK, file_name, render
from evenbits.report_format import format_budget, name_among
from evenbits.report_layers import bits_range
from evenbits.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Bools = np.ndarray[Any, np.dtype[np.bool_]]

ROWS = 60  # of one picture; more go on further pictures
COLUMNS = 128  # blocks beside each other over all panels; more panels go below
LINE = 0.185  # inches
WORST = 2.0  # where the colours end: a layer of zeros has 1
DECADES = 5  # of the colour scale: what is smaller still has the lightest colour
MIXED = 1.25  # most over least bits of a row's layers from which on the bits get a map
UNKNOWN = "#E4E4E4"
NAME_LENGTH = 34


@dataclass(frozen=True)
class Quantity:
    """What a map shows."""

    file: str
    title: str
    scale: str
    of: Callable[[LayerCell], float | None]
    logarithmic: bool = True


ERROR = Quantity("error", "error of the weights", "relative squared error,\ndark is bad", lambda cell: cell.error)
CALIBRATED = Quantity(
    "calibrated-error", "error on the calibration text", "relative squared error\nof the outputs, dark is bad",
    lambda cell: cell.calibrated,
)  # fmt: skip
BITS = Quantity("bits", "bits", "bits per weight,\nby the layer's own bytes", lambda cell: cell.bits, False)


def draw_layers(table: Table) -> dict[str, bytes]:
    """File name -> PNG or SVG bytes: for every model its errors, and its bits where layers of a row differ in them.

    Raises MissingExtra where matplotlib is absent.
    """
    files: dict[str, bytes] = {}
    for model in table.models:
        rows = compressed_only(layer_rows(model))
        order = places(rows)
        for quantity in (ERROR, CALIBRATED, BITS):
            values = [v for row in rows for cell in row.cells if (v := _value(cell, quantity)) is not None]
            if not values or (quantity is BITS and not any(map(_mixed, rows))):
                continue
            norm = _norm(values, quantity)
            pages = list(pages_of(rows, ROWS))
            for number, page in enumerate(pages, 1):
                words = f"layers-{model.model.name}-{quantity.file}" + (f"-{number}" if len(pages) > 1 else "")
                title = f"{model.model.name}: {quantity.title} by layer"
                title += f" ({number} of {len(pages)})" if len(pages) > 1 else ""
                name = file_name(words, files)
                grid = _Grid(page, order)
                drawn = render(partial(grid.draw, title=title, quantity=quantity, norm=norm), grid.size)
                files |= {f"{name}.{kind}": data for kind, data in drawn.items()}
    return files


class _Grid:
    """Where panels and lines stand. A line is a row, or a budget as the heading of the rows below it."""

    def __init__(self, rows: Sequence[LayerRow], order: Sequence[Place]) -> None:
        self.rows = rows
        self.lines = list(_lines(rows))
        self.kinds = {kind: [p for p in order if p.kind == kind] for kind in dict.fromkeys(p.kind for p in order)}
        self.short = short_kinds(list(self.kinds))
        blocks = [len(found) for found in self.kinds.values()]
        self.across = max(1, min(len(blocks), COLUMNS // max(blocks)))
        self.down = math.ceil(len(blocks) / self.across)
        self.widths = [max(blocks[i :: self.across]) for i in range(self.across)]
        self.cell = min(0.3, max(0.075, 9.0 / sum(self.widths)))  # inches
        names = 0.062 * max((len(text) for text, _ in self._texts()), default=0)
        width = self.cell * sum(self.widths) + 0.12 * self.across + names + 1.9
        self.size = (max(6.0, width), max(2.4, self.down * (LINE * len(self.lines) + 0.5) + 0.6))

    def draw(self, figure: Figure, title: str, quantity: Quantity, norm: Normalize) -> None:
        panels = figure.subplots(self.down, self.across, squeeze=False, gridspec_kw={"width_ratios": self.widths})
        drawn: QuadMesh | None = None
        hatched, blank = False, False
        for number, axes in enumerate(panels.flat):
            if number >= len(self.kinds):
                axes.set_visible(False)
                continue
            kind, order = list(self.kinds.items())[number]
            values, dense = self._values(order, quantity)
            unknown = np.isnan(values) & ~dense & np.array([[not isinstance(line, str)] for line in self.lines])
            drawn = axes.pcolormesh(
                np.ma.masked_invalid(values), cmap="viridis_r", norm=norm, rasterized=True, edgecolors="none"
            )
            _patches(axes, dense, hatched=True)
            _patches(axes, unknown, hatched=False)
            hatched, blank = hatched or bool(dense.any()), blank or bool(unknown.any())
            self._frame(axes, order, self.short[kind], number)
        assert drawn is not None
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        self._bar(figure, panels, drawn, quantity)
        handles = [_patch((0, 0), 1, hatched=True, label="left dense")] if hatched else []
        handles += [_patch((0, 0), 1, hatched=False, label="not known")] if blank else []
        if handles:
            figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8)

    def _values(self, order: Sequence[Place], quantity: Quantity) -> tuple[Floats, Bools]:
        """(lines, blocks) each: the numbers, NaN where there is none; whether left dense."""
        values = np.full((len(self.lines), len(order)), np.nan)
        dense = np.zeros(values.shape, dtype=bool)
        for y, line in enumerate(self.lines):
            if isinstance(line, str):
                continue
            cells = {cell.place.name: cell for cell in line.cells}
            for x, place in enumerate(order):
                if (cell := cells.get(place.name)) is not None:
                    dense[y, x] = cell.left_dense
                    value = _value(cell, quantity)
                    values[y, x] = np.nan if value is None else value
        return values, dense

    def _frame(self, axes: Axes, order: Sequence[Place], title: str, number: int) -> None:
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, len(order))
        axes.set_ylim(len(self.lines), 0)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=7, labelcolor=INK, pad=2)
        step = next(step for step in (1, 2, 4, 8, 16, 32, 64, len(order)) if self.cell * step >= 0.17)
        numbered = range(0, len(order), step)
        axes.set_xticks(
            [i + 0.5 for i in numbered], ["" if order[i].block is None else str(order[i].block) for i in numbered]
        )
        axes.set_yticks([])
        if number % self.across == 0:
            texts = self._texts()
            axes.set_yticks([y + 0.5 for y in range(len(texts))], [text for text, _ in texts], fontsize=7.5)
            for label, (_, heading) in zip(axes.get_yticklabels(), texts, strict=True):
                label.set_fontweight("bold" if heading else "normal")
            if self.down == 1 or number // self.across == self.down - 1:
                axes.set_xlabel("block", fontsize=7.5, loc="left")
        if number % self.across == self.across - 1 or number == len(self.kinds) - 1:
            for y, line in enumerate(self.lines):
                text = "bits" if isinstance(line, str) else bits_range(line.cells).replace(" to ", "\u2013")
                axes.text(
                    1, y + 0.5, " " + text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5, color=INK,
                    fontweight="bold" if isinstance(line, str) else "normal",
                    in_layout=number < self.across,  # below, the last panel of a short line may stand further left
                )  # fmt: skip

    def _texts(self) -> list[tuple[str, bool]]:
        """What stands before each line, and whether it is a heading."""
        return [(line, True) if isinstance(line, str) else (_name(line, self.rows), False) for line in self.lines]

    def _bar(self, figure: Figure, panels: Any, drawn: QuadMesh, quantity: Quantity) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        low, high = (float(end) for end in drawn.get_clim())
        values = [v for row in self.rows for cell in row.cells if (v := _value(cell, quantity)) is not None]
        beyond = (min(values) < low) + 2 * (max(values) > high)
        bar = figure.colorbar(
            drawn, ax=panels, label=quantity.scale, pad=0.012, aspect=6 * self.size[1], fraction=0.02,
            extend=("neither", "min", "max", "both")[beyond],
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7.5)
        if quantity.logarithmic:
            few = math.log10(high / low) < 2.2
            bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if few else (1,)))
            bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _value(cell: LayerCell, quantity: Quantity) -> float | None:
    value = quantity.of(cell)
    return None if cell.left_dense or value is None or math.isnan(value) else value


def _mixed(row: LayerRow) -> bool:
    bits = [cell.bits for cell in row.cells if not cell.left_dense]
    return max(bits) > MIXED * min(bits)


def _norm(values: Sequence[float], quantity: Quantity) -> Normalize:
    """The scale of all pictures of a model: logarithmic up to WORST and DECADES down, or linear."""
    from matplotlib.colors import LogNorm, Normalize

    if not quantity.logarithmic:
        return Normalize(min(values), max(values))
    high = min(max(values), WORST) or 1.0
    low = max(min((v for v in values if v > 0), default=high), high / 10**DECADES)
    return LogNorm(low, high) if low < high else LogNorm(high / 2, high * 2)


def _lines(rows: Sequence[LayerRow]) -> Iterator[LayerRow | str]:
    for group in by_budget(rows):
        budget = group[0].budget
        yield "no budget" if budget is None else f"{format_budget(budget)} bits"
        yield from group


def _name(row: LayerRow, rows: Sequence[LayerRow]) -> str:
    name = name_among(row.row, [other.row for other in rows])
    if len(name) > NAME_LENGTH:
        name = name[: NAME_LENGTH - 1] + "…"
    return name if row.row.within else f"{name}, off window"


def _patches(axes: Axes, where: Bools, *, hatched: bool) -> None:
    """One patch for neighbours of a line: a model left half dense would else be drawn in thousands."""
    for y, line in enumerate(where):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]])))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            axes.add_patch(_patch((int(start), y), int(stop - start), hatched=hatched))


def _patch(corner: tuple[float, float], width: float, *, hatched: bool, label: str = "") -> Rectangle:
    from matplotlib.patches import Rectangle

    patch = Rectangle(corner, width, 1, facecolor="white" if hatched else UNKNOWN, linewidth=0, label=label)
    if hatched:
        patch.set(hatch="/////", edgecolor="#9A9A9A")
    return patch
