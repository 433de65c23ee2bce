"""The Pareto plot as an SVG that stands without scripts. The page's script draws the same, to be filtered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evenbits.page_entries import Entry, Shown, look_of, number_text
from evenbits.page_html import Html, join, tag
from evenbits.plots import BEYOND, WIDE_RANGE, pareto_front
from evenbits.plots_look import method_name
from evenbits.plots_recovery import split_far
from evenbits.rows import Column

SHAPES = (
    "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    "M-4.5-4.5H4.5V4.5H-4.5Z",
    "M0-5.8L5.4 4H-5.4Z",
    "M0-6.2L6.2 0L0 6.2L-6.2 0Z",
    "M0 5.8L5.4-4H-5.4Z",
    "M-2-5.6H2V-2H5.6V2H2V5.6H-2V2H-5.6V-2H-2Z",
    "M-5.2-2.5L-2.5-5.2L0-2.7L2.5-5.2L5.2-2.5L2.7 0L5.2 2.5L2.5 5.2L0 2.7L-2.5 5.2L-5.2 2.5L-2.7 0Z",
    "M-5.8 0L4-5.4V5.4Z",
    "M5.8 0L-4-5.4V5.4Z",
    "M0-6.6L1.7-2.3L6.3-2L2.8 1L3.9 5.4L0 3L-3.9 5.4L-2.8 1L-6.3-2L-1.7-2.3Z",
    "M0-5.8L5-2.9V2.9L0 5.8L-5 2.9V-2.9Z",
)
"""Marker shapes about 5 px around the origin, in the order of `plots_look.MARKERS`."""

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 26, 46
OFF, ROOM = 15, 70  # from one marker at the edge down to the next, where both would stand within so many px


@dataclass(frozen=True)
class Scale:
    """Numbers to pixels along one axis. `far` lies at its other end: smaller than `near` where it points up."""

    low: float
    high: float
    near: float
    far: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.near + (v - a) / (b - a) * (self.far - self.near), 1)

    def ticks(self, count: int = 6) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in low..high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten where there are few, else the powers alone."""
    steps = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for p in powers for s in steps if low <= (v := float(f"{s * 10.0**p:.6g}")) <= high]


def plot(shown: Shown, column: Column) -> Html:
    """Bits (`Shown.over`) against one metric: every compressed row with a number, the dense model as a line."""
    entries = [e for e in shown.entries if e.group != "dense" and _value(e, column) is not None]
    dense = _dense(shown, column)
    if not entries:
        return tag("p", f"No compressed model has a finite {column.title}.", class_="nothing")
    values = [v for e in entries if (v := _value(e, column)) is not None]
    floor, limit = _limits(values, dense, column)
    inside = [e for e in entries if floor <= _of(e, column) <= limit]
    x, y = _scales(shown, inside or entries, dense, column)
    looks = look_of(shown)
    bits_name = "model bits per parameter" if shown.over == "model" else "linear bits per weight"
    parts: list[Html] = [_windows(shown, x), _axes(x, y, column, bits_name)]
    if dense is not None:
        parts.append(tag("path", class_="dense", d=f"M{LEFT} {y(dense)}H{WIDTH - RIGHT}"))
    points = [(_bits(shown, e), _of(e, column)) for e in inside]
    front = [points[i] for i in pareto_front(points, column.better)]
    steps = "".join(f"{'M' if i == 0 else 'H'}{x(b)}{' ' if i == 0 else 'V'}{y(v)}" for i, (b, v) in enumerate(front))
    if front:
        parts.append(tag("path", class_="front", d=steps))
    edge: list[float] = []  # where markers at the edge stand: those close together go below each other
    for entry in entries:
        colour, shape = looks[method_name(entry.row)]
        off = entry not in inside
        value = _of(entry, column)
        at = x(_bits(shown, entry)), 0.0 if off else y(value)
        if off:
            below = OFF * sum(abs(other - at[0]) < ROOM for other in edge)
            at = at[0], TOP + below if value > limit else HEIGHT - BOTTOM - 8 - below
            edge.append(at[0])
        cell = entry.row.cells[column.key]
        if not off and _finite(cell.low) is not None and _finite(cell.high) is not None:
            low, high = (min(max(v, y.low), y.high) for v in (cell.low, cell.high) if v is not None)
            parts.append(tag("path", class_=f"bar k{colour}", d=f"M{at[0]} {y(low)}V{y(high)}"))
        if off:
            parts.append(
                tag(
                    "text",
                    f"{number_text(value, column)} {'↑' if value > limit else '↓'}",
                    class_="off",
                    x=at[0] + 9,
                    y=at[1] + 4,
                )
            )
        hollow = " hollow" if entry.group == "outside" else ""
        parts.append(
            tag("path", tag("title", f"{method_name(entry.row)}: {number_text(value, column)}"),
                class_=f"point k{colour}{hollow}", d=SHAPES[shape], transform=f"translate({at[0]} {at[1]})")
        )  # fmt: skip
    label = f"{column.title} over {bits_name}; every number stands in the leaderboard below"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="plot")


def legend(shown: Shown, column: Column) -> Html:
    """Marker and colour of each method with its recovery, and what else the plot draws."""
    items = []
    for name, (colour, shape) in look_of(shown).items():
        mark = tag("path", class_=f"point k{colour}", d=SHAPES[shape])
        items.append(tag("li", _sample(mark), tag("span", name), data_method=name))
    staged = any(entry.row.recovery for entry in shown.entries if entry.group != "dense")
    front = "Pareto front" + (", any recovery" if staged else "")
    other = [("line", front), ("dense", f"dense model {_dense_text(shown, column)}")]
    for kind, words in other:
        items.append(
            tag("li", _sample(tag("path", class_=kind, d="M-7 0H7")), tag("span", words, class_=f"{kind}name"))
        )
    windows = "grey: budget windows; " if shown.budgets else ""
    items.append(tag("li", tag("span", f"{windows}a number beside a marker at the edge: off the scale")))
    return tag("ul", *items, class_="legend")


def _sample(mark: Html) -> Html:
    return tag("svg", mark, viewBox="-7 -7 14 14", aria_hidden="true")


def _dense(shown: Shown, column: Column) -> float | None:
    found = (_value(e, column) for e in shown.entries if e.group == "dense" and not e.row.recovery)
    return next((value for value in found if value is not None), None)


def _dense_text(shown: Shown, column: Column) -> str:
    value = _dense(shown, column)
    return "(not measured)" if value is None else number_text(value, column)


def _value(entry: Entry, column: Column) -> float | None:
    cell = entry.row.cells.get(column.key)
    return None if cell is None else _finite(cell.value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _bits(shown: Shown, entry: Entry) -> float:
    return entry.row.bits.model if shown.over == "model" else entry.row.bits.linear


def _of(entry: Entry, column: Column) -> float:
    return entry.row.cells[column.key].value


def _limits(values: Sequence[float], dense: float | None, column: Column) -> tuple[float, float]:
    """What lies outside stands at the edge with its value, lest it flatten all the rest."""
    base = min(values) if dense is None else dense
    if column.better == "higher":
        far = split_far([value / base for value in values]) if dense is not None and base > 0 else -math.inf
        return far * base - 1e-9 if far > 0 else -math.inf, math.inf
    spoils = base > 0 and min(values) <= BEYOND * base
    return -math.inf, BEYOND * base if spoils else math.inf


def _scales(shown: Shown, entries: Sequence[Entry], dense: float | None, column: Column) -> tuple[Scale, Scale]:
    bits = [_bits(shown, e) for e in entries]
    bits += [b.centre + s * b.window for b in shown.budgets.values() if b.on == shown.over for s in (-1, 1)]
    pad = 0.06 * max(max(bits) - min(bits), 0.5)
    values = [_of(e, column) for e in entries] + ([] if dense is None else [dense])
    log = min(values) > 0 and max(values) / min(values) >= WIDE_RANGE
    ends = values + [
        limit
        for e in entries
        for limit in (e.row.cells[column.key].low, e.row.cells[column.key].high)
        if limit is not None and math.isfinite(limit) and (limit > 0 or not log)
    ]
    low, high = min(ends), max(ends)
    room = 1.08 if log else 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    edges = (low / room, high * room) if log else (low - room, high + room)
    return (
        Scale(min(bits) - pad, max(bits) + pad, LEFT, WIDTH - RIGHT),
        Scale(*edges, HEIGHT - BOTTOM, TOP, log),
    )


def _windows(shown: Shown, x: Scale) -> Html:
    spans = sorted({(b.centre - b.window, b.centre + b.window) for b in shown.budgets.values() if b.on == shown.over})
    height = HEIGHT - BOTTOM - TOP
    return join(
        tag("rect", class_="window", x=x(low), y=TOP, width=round(x(high) - x(low), 1), height=height)
        for low, high in spans
    )


def _axes(x: Scale, y: Scale, column: Column, bits_name: str) -> Html:
    base = HEIGHT - BOTTOM
    parts = [tag("path", class_="axis", d=f"M{LEFT} {base}H{WIDTH - RIGHT}")]
    for value in x.ticks(8):
        parts.append(tag("path", class_="axis", d=f"M{x(value)} {base}v5"))
        parts.append(tag("text", f"{value:g}", class_="tick mid", x=x(value), y=base + 19))
    for value in y.ticks():
        parts.append(tag("path", class_="grid", d=f"M{LEFT} {y(value)}H{WIDTH - RIGHT}"))
        parts.append(tag("text", f"{value:g}", class_="tick end", x=LEFT - 8, y=y(value) + 4))
    parts.append(tag("text", bits_name, class_="name mid", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6))
    words = f"{column.title}, {column.better} is better"
    parts.append(tag("text", words, class_="name", x=LEFT - 8, y=14))
    return join(parts)
