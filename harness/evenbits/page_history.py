"""Nights on the page: a small picture for each series, its steps marked, and every step in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from evenbits.history import Night, Series, series_of
from evenbits.page_html import MINUS, Child, Html, join, table, tag
from evenbits.page_plot import Scale, nice_ticks
from evenbits.report_format import format_number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 120, 46, 8, 10, 20


def history_html(nights: Sequence[Night]) -> list[Html]:
    """Each model's first quality metric for every row, and whatever else has a step."""
    found = series_of(nights)
    if not found:
        return [tag("p", "No night has a number.", class_="quiet")]
    first = {one.model: one.metric for one in reversed(found) if one.quality}
    shown = [one for one in found if one.metric == first.get(one.model) or one.steps]
    last = nights[-1]
    said = f"{len(nights)} nights, {nights[0].date[:10]} to {last.date[:10]}, the latest at {last.short_commit}."
    if len(shown) < len(found):
        said += f" {len(found) - len(shown)} more series have no step and are not drawn."
    about = "Grey: the level that the nights before and after a step agree on; dashed: a step."
    parts = [tag("p", said), tag("p", about, class_="quiet")]
    steps = _steps(found)
    if steps:
        header = ("date", "row", "metric", "before", "after", "change", "", "commits", "what else changed")
        parts.append(table("Steps, the latest first", header, steps, words=(1, 2, 6, 7, 8)))
    else:
        parts.append(tag("p", "No series has a step."))
    parts.append(tag("div", *(_figure(one, len(nights)) for one in shown), class_="nights"))
    return parts


def _steps(found: Sequence[Series]) -> list[list[Child]]:
    pairs = [(series, step) for series in found for step in series.steps]
    lines: list[list[Child]] = []
    for series, one in sorted(pairs, key=lambda pair: (pair[1].date, pair[1].step.deviations), reverse=True):
        before, after = one.step.before, one.step.after
        change = f"{100 * (after - before) / abs(before):+.2g} %" if before else ""
        lines.append([
            one.date[:10], join([series.name, f" @ {series.budget}" if series.budget else ""]),
            series.metric + (" over dense" if series.relative else ""), format_number(before), format_number(after),
            change.replace("-", MINUS), "worse" if one.worse else "better",
            tag("code", f"{one.commit_before}..{one.commit}"), "; ".join(one.changed),
        ])  # fmt: skip
    return lines


def _figure(series: Series, nights: int) -> Html:
    values = [v for p in series.points for v in (p.value, p.low, p.high) if v is not None and math.isfinite(v)]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    x = Scale(-0.5, max(nights - 0.5, 0.5), LEFT, WIDTH - RIGHT)
    y = Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)
    parts: list[Html] = []
    for value in nice_ticks(y.low, y.high, 3):
        parts.append(tag("path", class_="grid", d=f"M{LEFT} {y(value)}H{WIDTH - RIGHT}"))
        parts.append(tag("text", f"{value:g}", class_="tick end", x=LEFT - 6, y=y(value) + 4))
    ends = [0, *series.breaks, len(series.points)]
    for start, end in pairwise(ends):
        stretch = series.points[start:end]
        levels = series.levels[start:end]
        across = [(x(p.night - 0.5), x(p.night + 0.5), y(level)) for p, level in zip(stretch, levels, strict=True)]
        parts.append(tag("path", class_="level", d="".join(f"M{a} {at}H{b}" for a, b, at in across)))
        path = "".join(f"{'L' if i else 'M'}{x(p.night)} {y(p.value)}" for i, p in enumerate(stretch))
        parts.append(tag("path", class_="line", d=path))
        for p in stretch:
            note = tag("title", f"{p.date[:10]} {p.commit}: {format_number(p.value)}" + (", kept" if p.kept else ""))
            kind = "point k0 hollow" if p.kept else "point k0"
            parts.append(tag("circle", note, class_=kind, cx=x(p.night), cy=y(p.value), r=2.5))
    for one in series.steps:
        at = x(series.points[one.point].night - 0.5)
        parts.append(tag("path", class_="step", d=f"M{at} {TOP}V{HEIGHT - BOTTOM}"))
        high_after = y(one.step.after) < (TOP + HEIGHT - BOTTOM) / 2  # the label stands where the line is not
        label = f"{one.date[5:10]} {'worse' if one.worse else 'better'}"
        side = "tick end" if at > WIDTH - 90 else "tick"
        parts.append(
            tag(
                "text",
                label,
                class_=side,
                x=at + (-4 if side != "tick" else 4),
                y=HEIGHT - BOTTOM - 5 if high_after else TOP + 9,
            )
        )
    parts.append(tag("text", series.points[0].date[:10], class_="tick", x=LEFT, y=HEIGHT - 4))
    parts.append(tag("text", series.latest.date[:10], class_="tick end", x=WIDTH - RIGHT, y=HEIGHT - 4))
    unit = " over dense" if series.relative else ""
    said = f"{series.title}{unit}: {format_number(series.latest.value)} at last, {len(series.steps)} steps"
    picture = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="plot", role="img", aria_label=said)
    words = tag("figcaption", tag("strong", series.title), f"{unit}, latest {format_number(series.latest.value)}")
    return tag("figure", words, picture)
