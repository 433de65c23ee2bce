"""Recovery over bits: how much of the dense model's quality is left, one panel a metric, one figure a model.

Every metric is turned so that 1 is the dense model and more is better: accuracy over dense accuracy, dense perplexity
over perplexity. So all of a model's metrics can be seen beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from evenbits.plots import compressed, pareto_front
from evenbits.plots_look import INK, despine, file_name, legend_name, method_looks, method_name, render
from evenbits.rows import Column, Row
from evenbits.tables import ModelTable, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 3  # panels beside each other
PANEL = (3.3, 2.5)  # inches
GAP = 0.5  # of a panel's span: what lies so far below all else stands at the edge, lest it flatten the rest
FAR = 0.1  # of the dense model's quality: a smaller gap is no outlier, however close together the rest are


@dataclass(frozen=True)
class Point:
    """A row's recovery in one metric, higher is better; low and high None where no interval is known."""

    row: Row
    value: float
    low: float | None
    high: float | None

    @property
    def bits(self) -> float:
        return self.row.bits.linear


def recovery_points(model: ModelTable, column: Column) -> list[Point]:
    """Of every compressed row that the dense model can be set beside: same protocol, finite numbers above 0."""
    found: list[Point] = []
    for row in compressed(model):
        ratio = model.recovery(row, column)
        if ratio is None or not math.isfinite(ratio.value) or ratio.value < 0:
            continue
        low, high = ratio.low, ratio.high
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            low = high = None
        if column.better == "higher":
            found.append(Point(row, ratio.value, low, high))
        elif ratio.value > 0:
            turned = None if low is None or high is None or low <= 0 else (1 / high, 1 / low)
            found.append(Point(row, 1 / ratio.value, *(turned or (None, None))))
    return found


def draw_recovery(table: Table) -> dict[str, bytes]:
    """File name -> PNG or SVG bytes, for every model whose dense self was measured. Raises MissingExtra."""
    files: dict[str, bytes] = {}
    for model in table.models:
        points = {column: recovery_points(model, column) for column in model.columns if column.quality}
        points = {column: found for column, found in points.items() if found}
        if not points:
            continue
        across = min(ACROSS, len(points))
        down = math.ceil(len(points) / across)
        name = file_name(f"recovery-{model.model.name}", files)
        names = {method_name(point.row) for own in points.values() for point in own}
        columns = max(2, round(PANEL[0] * across / 1.6))  # of the legend
        width = max(5.6, PANEL[0] * across)
        size = (width, PANEL[1] * down + 0.5 + 0.2 * math.ceil((len(names) + 4) / columns))
        drawn = render(partial(_draw, model=model, points=points, across=across, columns=columns), size)
        files |= {f"{name}.{kind}": data for kind, data in drawn.items()}
    return files


def split_far(values: Sequence[float]) -> float:
    """Below which value points stand at the edge: those under the widest gap, if that is over half of the span down
    from the dense model, a tenth of its quality at least, and few lie under it. -inf: nowhere."""
    if not values:
        return -math.inf
    found = sorted(values)
    gap, index = max(((b - a, i) for i, (a, b) in enumerate(pairwise(found), 1)), default=(0.0, 0))
    span = max(1.0, found[-1]) - found[0]
    return found[index] if gap > max(FAR, GAP * span) and 4 * index <= len(found) else -math.inf


def _draw(
    figure: Figure, model: ModelTable, points: Mapping[Column, Sequence[Point]], across: int, columns: int
) -> None:
    down = math.ceil(len(points) / across)
    panels = figure.subplots(down, across, squeeze=False)
    looks = method_looks(list(compressed(model)))
    everything = [point for found in points.values() for point in found]
    bits = [point.bits for point in everything]
    pad = 0.06 * max(max(bits) - min(bits), 0.5)
    for axes in panels.flat[len(points) :]:
        axes.set_visible(False)
    for number, (axes, (column, found)) in enumerate(zip(panels.flat, points.items(), strict=False)):
        _panel(axes, column, found, looks)
        axes.set_xlim(min(bits) - pad, max(bits) + pad)
        if number + across >= len(points):
            axes.set_xlabel("linear bits per weight, from bytes on disk", fontsize=8)
    title = f"{model.model.name}: recovery (1 is the dense model, higher is better)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11 if across > 1 else 9.5, fontweight="bold")
    _legend(figure, everything, looks, columns)


def _legend(figure: Figure, points: Sequence[Point], looks: Mapping[str, tuple[str, str]], columns: int) -> None:
    from matplotlib.lines import Line2D

    recovered = {method_name(point.row): bool(point.row.recovery) for point in points}
    handles = [
        Line2D([], [], marker=marker, color=colour, linewidth=1, markersize=5.5, label=legend_name(name),
               linestyle=":" if recovered[name] else "-")
        for name, (colour, marker) in looks.items() if name in recovered
    ]  # fmt: skip
    if not all(point.row.within for point in points):
        hollow = Line2D([], [], marker="o", color=INK, linestyle="", markerfacecolor="white", label="off window")
        handles.append(hollow)
    handles.append(Line2D([], [], color="#BDBDBD", linewidth=4, alpha=0.7, label="Pareto front"))
    handles.append(Line2D([], [], color=INK, linewidth=1, label="dense"))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _panel(axes: Axes, column: Column, points: Sequence[Point], looks: Mapping[str, tuple[str, str]]) -> None:
    axes.axhline(1.0, color=INK, linewidth=1, zorder=1)
    edge = split_far([point.value for point in points])
    plain = [(point.bits, point.value) for point in points if point.value >= edge]
    front = [plain[i] for i in pareto_front(plain, "higher")]
    axes.plot(
        *zip(*front, strict=True), color="#BDBDBD", linewidth=4, alpha=0.7, zorder=1, drawstyle="steps-post",
        solid_joinstyle="round",
    )  # fmt: skip
    for name, look in looks.items():
        own = sorted((p for p in points if method_name(p.row) == name), key=lambda p: p.bits)
        if inside := [point for point in own if point.value >= edge]:
            _draw_method(axes, inside, *look)
        for point in own:
            if point.value < edge:
                _draw_at_the_edge(axes, point, *look)
    if edge > -math.inf:  # room for their values
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.13 * (high - low), high)
    ratio = "dense / value" if column.better == "lower" else "value / dense"
    axes.set_title(column.title, fontsize=9, loc="left")
    axes.set_ylabel(f"recovery ({ratio})", fontsize=8)
    axes.tick_params(labelsize=8)
    despine(axes)


def _draw_method(axes: Axes, points: Sequence[Point], colour: str, marker: str) -> None:
    spans = [
        [max(0.0, p.value - (p.value if p.low is None else p.low)) for p in points],
        [max(0.0, (p.value if p.high is None else p.high) - p.value) for p in points],
    ]
    axes.errorbar(
        [p.bits for p in points], [p.value for p in points], yerr=spans if any(map(any, spans)) else None,
        color=colour, linewidth=1, linestyle=":" if points[0].row.recovery else "-", alpha=0.9, elinewidth=1,
        capsize=2, zorder=2,
    )  # fmt: skip
    for within, fill in ((True, colour), (False, "white")):  # hollow: outside its window
        if own := [point for point in points if point.row.within is within]:
            axes.plot(
                [p.bits for p in own], [p.value for p in own], marker, color=colour, markersize=5.5, zorder=3,
                markeredgewidth=1.2, markerfacecolor=fill,
            )  # fmt: skip


def _draw_at_the_edge(axes: Axes, point: Point, colour: str, marker: str) -> None:
    axes.plot(
        point.bits, 0.0, marker, color=colour, markersize=5.5, zorder=3, clip_on=False,
        transform=axes.get_xaxis_transform(), markerfacecolor=colour if point.row.within else "white",
    )  # fmt: skip
    text = "<0.01 ↓" if point.value < 0.01 else f"{point.value:.2g} ↓"
    axes.annotate(
        text, (point.bits, 0.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 5), textcoords="offset points",
        ha="center", fontsize=7, color=colour,
    )  # fmt: skip
