"""A trial's errors by block, one line a kind of layer, as SVG.

Written by hand: matplotlib takes longer for one such figure than all else that is mirrored of a trial, and may be
absent. The heat maps of the report compare methods; this shows one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from evenbits.layers import place_of, short_kinds
from evenbits.plots_look import COLOURS, INK
from evenbits.record import Record

WIDTH, HEIGHT = 860, 250  # of a panel; more where its legend is longer
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 34, 40
LINE = 16  # of the legend
DASHES = ("", "6 3", "2 2")  # kinds beyond the number of colours
SMALLEST = 1e-12  # what is drawn for 0, which a logarithm has no place for

Points = Sequence[tuple[int, float]]


def draw_layers(record: Record) -> str | None:
    """The SVG, or None where no error is known. Layers left dense or outside the blocks are not drawn."""
    dense = set() if record.ledger is None else set(record.ledger.left_dense)
    kinds = short_kinds(list(dict.fromkeys(place_of(layer.name).kind for layer in record.layers)))
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for layer in record.layers:
        place = place_of(layer.name)
        for title, value in (
            ("error of the weights", layer.error), ("error on the calibration text", layer.calibrated_error)
        ):  # fmt: skip
            known = value is not None and math.isfinite(value) and layer.name not in dense
            if known and value is not None and place.block is not None:
                lines = panels.setdefault(title, {})
                lines.setdefault(kinds[place.kind], []).append((place.block, max(value, SMALLEST)))
    if not panels:
        return None
    order = list(dict.fromkeys(kinds.values()))
    name = f"{record.label or record.method} on {record.model.name}"
    each = max(HEIGHT, TOP + LINE * len(order) + BOTTOM)
    drawn = "".join(
        _panel(f"{name}: {title}", lines, order, each * i, each) for i, (title, lines) in enumerate(panels.items())
    )
    height = each * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{drawn}</svg>\n'
    )


def _panel(title: str, lines: Mapping[str, Points], order: Sequence[str], top: int, height: int) -> str:
    values = [value for points in lines.values() for _, value in points]
    blocks = [block for points in lines.values() for block, _ in points]
    low, high = _range(min(values), max(values))
    first, last = min(blocks), max(max(blocks), min(blocks) + 1)

    def x(block: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (block - first) / (last - first)

    def y(value: float) -> float:
        share = (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return top + height - BOTTOM - (height - TOP - BOTTOM) * share

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="bold">{escape(title)}</text>']
    for tick in _ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#DDDDDD"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    step = max(1, math.ceil((last - first + 1) / 16))
    for block in range(first, max(blocks) + 1, step):
        parts.append(f'<text x="{x(block):.1f}" y="{top + height - BOTTOM + 18}" text-anchor="middle">{block}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{top + height - 6}" text-anchor="middle">block</text>')
    for number, kind in enumerate(order):
        if kind not in lines:
            continue
        look = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"'
        if dash := DASHES[number // len(COLOURS) % len(DASHES)]:
            look += f' stroke-dasharray="{dash}"'
        path = "M" + "L".join(f"{x(block):.1f} {y(value):.1f}" for block, value in lines[kind])
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<path d="{path}" fill="none" {look}/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for b, v in lines[kind]]
        line = top + TOP + LINE * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 16} {line}h22" {look}/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 44}" y="{line + 4}">{escape(kind)}</text>')
    return "".join(parts)


def _range(low: float, high: float) -> tuple[float, float]:
    """A little more than the values, at least a third of a decade."""
    if high < 2 * low:
        low, high = low / 1.5, high * 1.5
    return low / 1.1, high * 1.1


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    subs = (1, 2, 5) if high / low < 200 else (1,)
    step = max(1, math.ceil(len(decades) / 8))
    found = [float(f"{sub}e{decade}") for decade in decades[::step] for sub in subs]
    return [tick for tick in found if low <= tick <= high]
