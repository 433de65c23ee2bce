"""Nights put together: a series for each row and metric, with the steps that it took and what changed there.

Times and memory are given over the dense model's of the same night and the same kind of processor: a slower machine is
no regression. Where the processors differ there is no point, and of the dense model itself no such series. Numbers of
different protocols are not compared: where the protocol changes, levels start anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evenbits.nights import Night, NightFailure, NightMetric, NightRow, add_night, make_night, read_history, read_night
from evenbits.rows import COST_UNITS
from evenbits.steps import Levels, NoiseFrom, Step, find_levels, own_noise

__all__ = [
    "Night", "NightFailure", "NightMetric", "NightRow", "Point", "Series", "SeriesStep", "Step", "add_night", "as_json",
    "make_night", "read_history", "read_night", "series_of",
]  # fmt: skip

OF_ITEMS = 0.5
"""Of an interval over items, the standard deviation that a quality is given where neither seeds nor nights tell it:
what another seed changes on the reference model is 0.02 to 0.7 of it in perplexity and 0.15 to 2 in accuracy."""
OF_TIMES = 0.1
"""The least for a time or a memory peak over the dense model's. The dense model's own draw is shared by many nights and
rows, so that what the nights show is too little; seeds of one setting differ by 0.02 to 0.19 on two cores."""


@dataclass(frozen=True)
class Point:
    """A number of one night. night: index into the history. kept: nothing was computed anew since the point before.

    value, low, high: over the dense model's where the series is `relative`. seeds: as the night has them.
    """

    night: int
    date: str
    commit: str
    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]
    protocol: str
    measured: str
    kept: bool


@dataclass(frozen=True)
class SeriesStep:
    """A step with its night, the one before, and what else changed between the two: versions, settings, commits.

    point: index into the series' points.
    """

    point: int
    step: Step
    date: str
    commit: str
    commit_before: str
    changed: tuple[str, ...]
    worse: bool


@dataclass(frozen=True)
class Series:
    """One metric of one row over the nights.

    levels: fitted to each point. breaks: points before which the protocol changed. drift: change per observation in the
    latest stretch, where it drifts instead of stepping. noise: standard deviation of an observation there.
    """

    model: str
    name: str
    budget: str
    metric: str
    unit: str
    better: Literal["lower", "higher"]
    quality: bool
    relative: bool
    points: tuple[Point, ...]
    steps: tuple[SeriesStep, ...]
    levels: tuple[float, ...]
    breaks: tuple[int, ...]
    drift: float | None
    noise: float
    noise_from: NoiseFrom

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.name, f"@ {self.budget.split()[0]}" if self.budget else "", self.metric)))

    @property
    def latest(self) -> Point:
        return self.points[-1]


def series_of(nights: Sequence[Night]) -> list[Series]:
    """A series for each row and metric that any night has a finite number of, as the latest nights list them."""
    keys: dict[tuple[str, str, str], dict[str, NightMetric]] = {}
    for night in reversed(nights):
        for row in night.rows:
            found = keys.setdefault(row.key, {})
            for metric in row.readings:
                found.setdefault(metric, night.metrics[metric])
    ordered = sorted(keys, key=lambda key: (key[0], key[1] != "dense", key[2]))
    all_series = (_series(nights, key, name, facts) for key in ordered for name, facts in keys[key].items())
    return [series for series in all_series if series is not None]


def as_json(nights: Sequence[Night], found: Sequence[Series]) -> dict[str, Any]:
    """Nights by date and commit, and every series: for pages and programs."""
    return {
        "suite": nights[-1].suite if nights else None,
        "nights": [
            {"date": n.date, "commit": n.commit, "dirty": n.dirty, "versions": n.versions, "rows": len(n.rows),
             "failures": [f.model_dump(mode="json") for f in n.failures], "missing": n.missing}
            for n in nights
        ],
        "series": [_json(series) for series in found],
    }  # fmt: skip


def _json(series: Series) -> dict[str, Any]:
    return {
        "model": series.model, "method": series.name, "budget": series.budget, "metric": series.metric,
        "unit": series.unit, "better": series.better, "relative_to_dense": series.relative,
        "noise": series.noise, "noise_from": series.noise_from, "drift": series.drift,
        "points": [
            {"night": p.night, "value": p.value, "low": p.low, "high": p.high, "kept": p.kept, "protocol": p.protocol}
            for p in series.points
        ],
        "steps": [
            {"point": s.point, "date": s.date, "commit": s.commit, "commit_before": s.commit_before,
             "before": s.step.before, "after": s.step.after, "deviations": s.step.deviations,
             "p_value": s.step.p_value, "worse": s.worse, "changed": list(s.changed)}
            for s in series.steps
        ],
    }  # fmt: skip


def _series(nights: Sequence[Night], key: tuple[str, str, str], metric: str, latest: NightMetric) -> Series | None:
    relative = latest.volatile
    if relative and key[1] == "dense":
        return None  # what all others are given over
    points: list[Point] = []
    for index, night in enumerate(nights):
        row = next((row for row in night.rows if row.key == key), None)
        point = None if row is None else _point(night, index, row, metric, relative, points)
        if point is not None:
            points.append(point)
    if not points:
        return None
    breaks = [i for i in range(1, len(points)) if points[i].protocol != points[i - 1].protocol]
    steps: list[SeriesStep] = []
    levels: list[float] = []
    found: Levels | None = None
    for start, end in zip([0, *breaks], [*breaks, len(points)], strict=True):
        found, firsts = _levels(points[start:end], latest)
        draws = [*firsts, end - start]
        for level, first, after in zip(found.levels, draws, draws[1:], strict=False):
            levels += [level] * (after - first)
        for step in found.steps:
            steps.append(_series_step(nights, key, points, start + firsts[step.index], step, latest.better))
    assert found is not None
    return Series(
        *key, metric, "x dense" if relative else latest.unit, latest.better, latest.quality, relative,
        tuple(points), tuple(steps), tuple(levels), tuple(breaks), found.drift, found.noise, found.noise_from,
    )  # fmt: skip


def _point(
    night: Night, index: int, row: NightRow, metric: str, relative: bool, before: Sequence[Point]
) -> Point | None:
    reading = row.readings.get(metric)
    if reading is None or reading.value is None:
        return None
    over, measured = 1.0, row.measured
    if relative:
        dense = next((r for r in night.rows if r.model == row.model and r.name == "dense"), None)
        base = None if dense is None else dense.readings.get(metric)
        if dense is None or base is None or not base.value or dense.processor != row.processor:
            return None
        over, measured = base.value, f"{row.measured} {dense.measured}"
    protocol = night.metrics[metric].protocol
    last = before[-1] if before else None
    return Point(
        night=index,
        date=night.date,
        commit=night.short_commit,
        value=reading.value / over,
        low=None if reading.low is None else reading.low / over,
        high=None if reading.high is None else reading.high / over,
        seeds=tuple(value / over for value in reading.by_seed if value is not None),
        protocol=protocol,
        measured=measured,
        kept=last is not None and (last.measured, last.protocol) == (measured, protocol),
    )


def _levels(points: Sequence[Point], metric: NightMetric) -> tuple[Levels, list[int]]:
    """Levels of what was computed anew, and which points those are: what was kept is the same number again.

    A quality that stays because it is kept has settled: nothing draws it anew. A time that is kept is one draw, as
    likely to be off as another, so that a second one has to bear it out.
    """
    firsts = [i for i, point in enumerate(points) if not point.kept]
    drawn = [points[i] for i in firsts]
    values = [point.value for point in drawn]
    repeats = [b - a for a, b in zip(firsts, [*firsts[1:], len(points)], strict=True)]
    scales, floor = _seed_noise(drawn), 0.0
    if metric.volatile:
        repeats = [1] * len(drawn)
        floor = OF_TIMES * float(np.median(np.abs(values)))
    elif metric.unit not in COST_UNITS and scales is None:
        of_items = [(p.high - p.low) / 3.92 for p in drawn if p.low is not None and p.high is not None]
        own = own_noise(np.asarray(values))
        if of_items:
            # a share of right answers moves in whole items: the nights may repeat one and know of no noise
            floor = (0.1 if own else OF_ITEMS) * float(np.median(of_items))
    return find_levels(values, scales, repeats, floor=floor), firsts


def _seed_noise(points: Sequence[Point]) -> list[float] | None:
    """Standard deviation of each night's mean over seeds, that of seeds pooled over all nights; None of single ones."""
    several = [np.asarray(point.seeds) for point in points if len(point.seeds) > 1]
    if not several:
        return None
    freedom = sum(len(seeds) - 1 for seeds in several)
    pooled = math.sqrt(sum(float(((s - s.mean()) ** 2).sum()) for s in several) / freedom)
    return [pooled / math.sqrt(max(1, len(point.seeds))) for point in points]


def _series_step(
    nights: Sequence[Night], key: tuple[str, str, str], points: Sequence[Point], at: int, step: Step, better: str
) -> SeriesStep:
    before, after = nights[points[at - 1].night], nights[points[at].night]
    return SeriesStep(
        point=at,
        step=step,
        date=points[at].date,
        commit=points[at].commit,
        commit_before=points[at - 1].commit,
        changed=tuple(_changes(before, after, key)),
        worse=(step.change > 0) == (better == "lower"),
    )


def _changes(before: Night, after: Night, key: tuple[str, str, str]) -> Iterator[str]:
    """What differs between two nights that a row's number may hang on, as words."""
    for name in sorted(before.versions.keys() | after.versions.keys()):
        old, new = before.versions.get(name, "none"), after.versions.get(name, "none")
        if old != new:
            yield f"{name} {old} -> {new}"
    if before.python != after.python:
        yield f"python {before.python} -> {after.python}"
    rows = [next((row for row in night.rows if row.key == key), None) for night in (before, after)]
    if rows[0] is None or rows[1] is None:
        return
    if rows[0].settings != rows[1].settings:
        yield f"settings {rows[0].settings} -> {rows[1].settings}"
    if rows[0].processor != rows[1].processor:
        yield f"processor {rows[0].processor} -> {rows[1].processor}"
    if rows[0].artifacts == rows[1].artifacts and rows[0].trials != rows[1].trials:
        yield "the same artifact, measured by other code"
