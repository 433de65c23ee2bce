"""Pareto plots: linear bits against quality, one figure a model and metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from evenbits.plots_look import INK, despine, file_name, legend_name, method_looks, method_name, render
from evenbits.rows import Column, Row
from evenbits.tables import ModelTable, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_RANGE = 4.0  # largest over smallest from which on the quality axis is logarithmic
BEYOND = 20.0  # times the dense model's value: what is worse is named at the edge, lest it flatten all the rest


def draw_pareto(table: Table) -> dict[str, bytes]:
    """File name -> PNG or SVG bytes, for every quality metric that some compressed row has.

    Raises MissingExtra where matplotlib is absent.
    """
    files: dict[str, bytes] = {}
    for model in table.models:
        for column in model.columns:
            rows = [row for row in compressed(model) if _drawable(row, column)]
            if not column.quality or not rows:
                continue
            words = f"pareto-{model.model.name}-{column.name}" + (f"-{column.letter}" if column.letter else "")
            name = file_name(words, files)
            drawn = render(partial(_figure, model=model, column=column, rows=rows), (8, 4.8))
            files |= {f"{name}.{kind}": data for kind, data in drawn.items()}
    return files


def pareto_front(points: Sequence[tuple[float, float]], better: str) -> list[int]:
    """Indices, by rising bits, of the points that no other beats or equals in both bits and quality.

    points: (bits, value). Of equal points the first stands.
    """
    sign = 1.0 if better == "lower" else -1.0
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i)):
        if sign * points[index][1] < best:
            best = sign * points[index][1]
            front.append(index)
    return front


def _figure(figure: Figure, model: ModelTable, column: Column, rows: Sequence[Row]) -> None:
    _draw(figure.add_subplot(), model, column, rows)


def _draw(axes: Axes, model: ModelTable, column: Column, rows: Sequence[Row]) -> None:
    dense = next((r for r in model.dense if not r.recovery and _drawable(r, column)), None)
    budgets = [s.budget for s in model.sections if s.budget is not None and s.budget.on == "linear"]
    shaded = sorted({(b.centre - b.window, b.centre + b.window) for b in budgets})
    for low, high in shaded:
        axes.axvspan(low, high, color="#8C8C8C", alpha=0.13, linewidth=0, zorder=0)
    everything, rows = rows, [row for row in rows if not _beyond(row, rows, dense, column)]
    for name, (colour, marker) in method_looks(list(compressed(model))).items():
        own = sorted((row for row in everything if method_name(row) == name), key=lambda row: row.bits.linear)
        if inside := [row for row in own if row in rows]:
            _draw_method(axes, column, inside, name, colour, marker)
        if outside := [row for row in own if row not in rows]:
            _draw_at_the_edge(axes, column, outside, name, colour, marker)
    points = [(row.bits.linear, row.cells[column.key].value) for row in rows]
    front = [points[i] for i in pareto_front(points, column.better)]
    axes.plot(
        *zip(*front, strict=True), color="#BDBDBD", linewidth=5, alpha=0.7, zorder=1, drawstyle="steps-post",
        solid_joinstyle="round", label="Pareto front" + (", any recovery" if any(row.recovery for row in rows) else ""),
    )  # fmt: skip
    values = [value for _, value in points]
    if dense is not None:
        value = dense.cells[column.key].value
        values.append(value)
        axes.axhline(value, color=INK, linewidth=1, zorder=1, label=f"dense ({value:.4g})")
    if min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        _logarithmic(axes)
    bits = [b for b, _ in points] + [edge for window in shaded for edge in window]
    pad = 0.06 * max(max(bits) - min(bits), 0.5)
    axes.set_xlim(min(bits) - pad, max(bits) + pad)
    unit = "" if column.unit in ("", "1") or column.unit == column.name else f" ({column.unit})"
    axes.set_xlabel("linear bits per weight, from bytes on disk")
    axes.set_ylabel(f"{column.title}{unit}, {column.better} is better")
    title = f"{model.model.name}: {column.title} at even bits"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    despine(axes)
    legend = axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    if shaded:
        legend.set_title("grey: budget windows")
        legend.get_title().set_fontsize(8.5)


def _draw_method(axes: Axes, column: Column, rows: Sequence[Row], name: str, colour: str, marker: str) -> None:
    line = ":" if rows[0].recovery else "-"
    bits = [row.bits.linear for row in rows]
    cells = [row.cells[column.key] for row in rows]
    spans: list[list[float]] = [[], []]
    for cell in cells:
        spans[0].append(max(0.0, cell.value - cell.low) if cell.low is not None and math.isfinite(cell.low) else 0.0)
        spans[1].append(max(0.0, cell.high - cell.value) if cell.high is not None and math.isfinite(cell.high) else 0.0)
    axes.errorbar(
        bits, [cell.value for cell in cells], yerr=spans if any(map(any, spans)) else None, color=colour, linewidth=1,
        linestyle=line, alpha=0.9, elinewidth=1, capsize=2.5, zorder=2,
    )  # fmt: skip
    for within, fill in ((True, colour), (False, "white")):  # hollow: outside its window
        if own := [i for i, row in enumerate(rows) if row.within is within]:
            axes.plot(
                [bits[i] for i in own], [cells[i].value for i in own], marker, color=colour, markersize=6.5, zorder=3,
                markerfacecolor=fill, markeredgewidth=1.4,
            )  # fmt: skip
    axes.plot([], [], marker=marker, color=colour, linewidth=1, linestyle=line, markersize=6.5, label=legend_name(name))
    if not all(row.within for row in rows):
        axes.plot(
            [],
            [],
            marker,
            color=colour,
            markersize=6.5,
            markerfacecolor="white",
            label=legend_name(f"{name}, off window"),
        )


def _beyond(row: Row, rows: Sequence[Row], dense: Row | None, column: Column) -> bool:
    """Whether a row is so much worse than the dense model, or else the best, that it would flatten all others."""
    if column.better != "lower":
        return False
    values = [other.cells[column.key].value for other in rows]
    base = min(values) if dense is None else dense.cells[column.key].value
    return base > 0 and min(values) <= BEYOND * base < row.cells[column.key].value


def _draw_at_the_edge(axes: Axes, column: Column, rows: Sequence[Row], name: str, colour: str, marker: str) -> None:
    values = ", ".join(f"{row.cells[column.key].value:.3g}" for row in rows)
    axes.plot(
        [row.bits.linear for row in rows], [1.0] * len(rows), marker, color=colour, markersize=6.5, clip_on=False,
        zorder=3, transform=axes.get_xaxis_transform(), label=legend_name(f"{name}, off the scale:\n{values}"),
    )  # fmt: skip


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = math.log10(high / low) < 2.2
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def compressed(model: ModelTable) -> Iterator[Row]:
    for section in model.sections:
        yield from (*section.rows, *section.outside)


def _drawable(row: Row, column: Column) -> bool:
    cell = row.cells.get(column.key)
    return cell is not None and math.isfinite(cell.value)
