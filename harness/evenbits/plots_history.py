"""What nights came to: one figure a metric, a panel a budget, a line a method; steps marked with date and commit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from evenbits.history import Series
from evenbits.nights import Night
from evenbits.plots_look import COLOURS, INK, MARKERS, despine, file_name, legend_name, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_RANGE = 4.0  # largest over smallest from which on the axis is logarithmic
TICKS = 8  # nights named below a panel
NAMED = 4  # steps of a panel with date and commit beside them, the largest; the others are marked alone
BAND = 0.14  # of the intervals' colour, for a few lines; many lie over each other and get less

Look = Mapping[str, tuple[str, str]]


def draw_history(nights: Sequence[Night], found: Sequence[Series]) -> dict[str, bytes]:
    """File name -> PNG or SVG bytes, for every model and metric that some compressed row has.

    Raises MissingExtra where matplotlib is absent.
    """
    names = sorted({series.name for series in found if series.name != "dense"})
    looks = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    files: dict[str, bytes] = {}
    for model, metric in dict.fromkeys((series.model, series.metric) for series in found):
        own = [series for series in found if (series.model, series.metric) == (model, metric)]
        if all(series.name == "dense" for series in own):
            continue
        name = file_name(f"history-{model}-{metric}", files)
        budgets = dict.fromkeys(series.budget for series in own if series.name != "dense")
        size = (9.5, 1.0 + 2.9 * len(budgets))
        drawn = render(partial(_figure, nights=nights, found=own, budgets=list(budgets), looks=looks), size)
        files |= {f"{name}.{kind}": data for kind, data in drawn.items()}
    return files


def _figure(
    figure: Figure, nights: Sequence[Night], found: Sequence[Series], budgets: Sequence[str], looks: Look
) -> None:
    first = next(series for series in found if series.name != "dense")
    dense = next((series for series in found if series.name == "dense"), None)
    panels = figure.subplots(len(budgets), 1, sharex=True, squeeze=False)
    for axes, budget in zip(panels.flat, budgets, strict=True):
        own = [series for series in found if series.budget == budget and series.name != "dense"]
        _panel(axes, own, dense, looks)
        axes.set_title(f"{budget} bits" if budget else "without a budget", loc="left", fontsize=9.5)
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles, names, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    last = panels.flat[-1]
    every = max(1, math.ceil(len(nights) / TICKS))
    shown = range((len(nights) - 1) % every, len(nights), every)  # the latest is among them
    last.set_xticks(list(shown), [f"{nights[i].date[:10]}\n{nights[i].short_commit[:7]}" for i in shown], fontsize=7.5)
    last.set_xlim(-0.5, len(nights) - 0.5)
    unit = "over the dense model's" if first.relative else "" if first.unit in ("1", first.metric) else first.unit
    words = ", ".join(filter(None, (unit, f"{first.better} is better")))
    figure.suptitle(f"{first.model}: {first.metric} ({words})", x=0.01, ha="left", fontsize=11, fontweight="bold")


def _panel(axes: Axes, found: Sequence[Series], dense: Series | None, looks: Look) -> None:
    shown = [point.value for series in found for point in series.points]
    for series in found:
        _line(axes, series, *looks[series.name], band=BAND * min(1.0, 4 / len(found)))
    if dense is not None:
        nights = [point.night for point in dense.points]
        axes.plot(nights, [point.value for point in dense.points], color=INK, linewidth=1, label="dense")
        shown += [point.value for point in dense.points]
    elif found and found[0].relative:
        axes.axhline(1.0, color=INK, linewidth=1, label="dense")
        shown.append(1.0)
    if min(shown) > 0 and max(shown) / min(shown) >= WIDE_RANGE:
        axes.set_yscale("log")
    else:  # a wide interval of one line must not flatten all the others
        low, high = min(shown), max(shown)
        room = max(0.25 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-12)
        axes.set_ylim(low - room, high + room)
    steps = [(series, step) for series in found for step in series.steps]
    steps.sort(key=lambda pair: -abs(pair[1].step.deviations))
    for rank, (series, step) in enumerate(steps):
        colour, point = looks[series.name][0], series.points[step.point]
        where = (point.night - 0.5, (step.step.before + step.step.after) / 2)
        axes.plot(
            [where[0]] * 2, [step.step.before, step.step.after], color=colour, linewidth=1.2, linestyle=":", zorder=3
        )
        mark = "v" if step.step.change < 0 else "^"
        axes.plot(*where, mark, color="#C1121F" if step.worse else "#2A9D3F", markersize=8, zorder=5)
        if rank < NAMED:
            axes.annotate(
                f"{step.date[:10]}\n{step.commit[:7]}", where, xytext=(7, 0), textcoords="offset points", fontsize=7,
                color=INK, va="center", zorder=6, bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
            )  # fmt: skip
    despine(axes)


def _line(axes: Axes, series: Series, colour: str, marker: str, band: float) -> None:
    nights = [point.night for point in series.points]
    values = [point.value for point in series.points]
    low = [point.value if point.low is None else point.low for point in series.points]
    high = [point.value if point.high is None else point.high for point in series.points]
    starts = [0, *series.breaks, len(values)]
    for start, end in pairwise(starts):  # no line across a change of protocol
        part = slice(start, end)
        axes.plot(nights[part], values[part], color=colour, linewidth=1.1, alpha=0.9, zorder=2)
        axes.fill_between(nights[part], low[part], high[part], color=colour, alpha=band, linewidth=0, zorder=0)
    for at in series.breaks:
        axes.axvline(nights[at] - 0.5, color="#8C8C8C", linewidth=0.7, linestyle="--", zorder=0)
    for kept, fill in ((False, colour), (True, "white")):  # hollow: the same records again
        own = [i for i, point in enumerate(series.points) if point.kept is kept]
        axes.plot(
            [nights[i] for i in own], [values[i] for i in own], marker, color=colour, markersize=4,
            markerfacecolor=fill, markeredgewidth=0.8, zorder=4, label="_nolegend_",
        )  # fmt: skip
    axes.plot([], [], marker=marker, color=colour, markersize=5, linewidth=1.1, label=legend_name(series.name))
