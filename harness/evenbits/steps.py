"""Where a noisy series changes its level for good: piecewise constant, each step paid for, single outliers ignored.

The cost of a point is its squared distance from its level over its variance, and never more than that of `CAPPED`
deviations: a point far off therefore belongs nowhere in particular and makes no step. Of all ways to cut the series
the cheapest is found, each cut costing `PENALTY`; that is exact up to a grid of levels a fraction of the noise wide.
A staircase that a straight line explains as well is reported as drift. numpy alone.

Source: the bounded loss is that of Fearnhead and Rigaill, Changepoint detection in the presence of outliers, Journal of
the American Statistical Association 114 (2019); penalised steps over a project's history are airspeed velocity's idea.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
NoiseFrom = Literal["seeds", "series", "floor"]

PENALTY = 14.0
"""Of a step, in squared deviations: less than one series of pure noise in a hundred shows one (the tests count)."""
CAPPED = 4.0  # deviations from which on a point costs no more
LEAST = 2  # observations that a level lasts
KNOWS_ITSELF = 8  # observations from which a series tells its own noise
GRID, REACH = 0.15, 14  # levels tried: so many steps of so many deviations to each side of each point


@dataclass(frozen=True)
class Step:
    """A change of level that lasted.

    index: the first observation at the new level. before, after: the two levels. deviations: the change over its
    standard error, huge where nothing else ever varied. p_value: of so large a change at any of the series' places, by
    noise alone, taken as normal.
    """

    index: int
    before: float
    after: float
    deviations: float
    p_value: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def relative(self) -> float:
        """The change over the level before; NaN where that is 0."""
        return self.change / abs(self.before) if self.before else math.nan


@dataclass(frozen=True)
class Levels:
    """What a series was taken apart into.

    levels: fitted, one an observation. drift: change per observation where a line explains the series as well as
    `steps` would; there are no steps then. noise: the median standard deviation of an observation, and where that is
    from.
    """

    levels: tuple[float, ...]
    steps: tuple[Step, ...]
    drift: float | None
    noise: float
    noise_from: NoiseFrom


def find_levels(
    values: Sequence[float],
    scales: Sequence[float] | None = None,
    repeats: Sequence[int] | None = None,
    *,
    floor: float = 0.0,
    least: int = LEAST,
) -> Levels:
    """Take a series apart into levels.

    values: finite. scales: standard deviation of each, where seeds tell it; the series' own night-to-night noise
    counts too where it is larger. repeats: how often each stood unchanged in a row because nothing was computed anew:
    that makes a level last, but no surer. floor: standard deviation below which no noise is believed.
    Raises ValueError for a value or a scale that is not finite, for lengths that differ, and for a floor below 0.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    lasting = np.ones(n, dtype=np.int64) if repeats is None else np.asarray(repeats, dtype=np.int64)
    given = None if scales is None else np.asarray(scales, dtype=np.float64)
    if x.ndim != 1 or lasting.shape != x.shape or (given is not None and given.shape != x.shape):
        raise ValueError("values, scales and repeats are one each an observation")
    if not np.isfinite(x).all() or (given is not None and not (np.isfinite(given).all() and (given >= 0).all())):
        raise ValueError("values and scales must be finite, and no scale below 0")
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(f"a floor is a finite number of at least 0, not {floor}")
    if n == 0:
        return Levels((), (), None, floor, "floor")
    spread, source = _noise(x, given, floor)
    if n < 2 or (lasting.sum() < 2 * least):
        return Levels((_level(x, spread),) * n, (), None, float(np.median(spread)), source)
    cuts = _cuts(x, spread, lasting, least)
    bounds = [0, *cuts, n]
    fitted = np.concatenate([np.full(b - a, _level(x[a:b], spread[a:b])) for a, b in pairwise(bounds)])
    noise = float(np.median(spread))
    if cuts and n >= KNOWS_ITSELF:  # through a few points a line always goes
        line, slope = _line(x, spread)
        paid = _cost(x - fitted, spread) + PENALTY * len(cuts)
        if _cost(x - line, spread) + PENALTY <= paid:
            return Levels(tuple(line.tolist()), (), slope, noise, source)
    steps = [_step(x, spread, bounds[i - 1], bounds[i], bounds[i + 1]) for i in range(1, len(bounds) - 1)]
    return Levels(tuple(fitted.tolist()), tuple(steps), None, noise, source)


def own_noise(values: Floats) -> float | None:
    """Standard deviation by the median absolute difference of neighbours, which steps hardly touch; None of too few.

    Of few it is taken larger, for it is itself uncertain.
    """
    if len(values) < KNOWS_ITSELF:
        return None
    apart = np.abs(np.diff(values))
    return float(np.median(apart) / (0.6745 * math.sqrt(2)) * (1 + 8 / len(values)))


def _noise(x: Floats, given: Floats | None, floor: float) -> tuple[Floats, NoiseFrom]:
    """Standard deviation of each observation, never 0."""
    own = own_noise(x) or 0.0
    # where nothing ever varied, only rounding is noise
    rounding = 1e-9 * float(np.abs(x).max(initial=0.0)) or 1e-100
    least = max(floor, rounding)
    if given is not None and own <= float(np.median(given)) and float(np.median(given)) >= least:
        return np.maximum(given, least), "seeds"
    spread = np.maximum(np.zeros_like(x) if given is None else given, max(own, least))
    return spread, "series" if own >= least else "floor"


def _cost(residuals: Floats, spread: Floats) -> float:
    return float(np.minimum((residuals / spread) ** 2, CAPPED**2).sum())


def _cuts(x: Floats, spread: Floats, lasting: np.ndarray[Any, np.dtype[np.int64]], least: int) -> list[int]:
    """First indices of the second and later segments of the cheapest cut; each segment lasts `least`."""
    around = np.arange(-REACH, REACH + 1) * GRID
    grid = np.unique(((x / (GRID * spread)).round() * GRID * spread)[:, None] + around * spread[:, None])
    n = len(x)
    cost = np.minimum(((x[:, None] - grid) / spread[:, None]) ** 2, CAPPED**2)
    begun = np.zeros((n, len(grid)), dtype=np.int32)  # where the last segment began, by its level
    best = np.full(n + 1, math.inf)  # of all before an index
    best[0] = -PENALTY  # the first segment is free
    ends = np.zeros(n, dtype=np.int64)  # the level of the cheapest last segment
    running = np.full(len(grid), math.inf)
    for t in range(n):
        running = running + cost[t]
        if t:
            begun[t] = begun[t - 1]
        total = np.zeros(len(grid))
        for s in range(t, -1, -1):
            total = total + cost[s]
            before = int(lasting[s:t].sum())
            if before >= least:
                break
            if before + lasting[t] >= least:  # it lasts from here on, and did not one observation ago
                candidate = best[s] + PENALTY + total
                begun[t] = np.where(candidate < running, s, begun[t])
                running = np.minimum(candidate, running)
        ends[t] = int(running.argmin())
        best[t + 1] = running[ends[t]]
    cuts: list[int] = []
    t = n - 1
    while t >= 0:
        start = int(begun[t, ends[t]])
        if start > 0:
            cuts.append(start)
        t = start - 1
    return cuts[::-1]


def _level(x: Floats, spread: Floats) -> float:
    """The capped cost's minimum: the weighted mean of those within reach, from the best of the points themselves."""
    centre = float(min(x, key=lambda c: _cost(x - c, spread)))
    for _ in range(20):
        near = np.abs(x - centre) < CAPPED * spread
        weights = near / spread**2
        found = float((weights * x).sum() / weights.sum())
        if found == centre:
            break
        centre = found
    return centre


def _line(x: Floats, spread: Floats) -> tuple[Floats, float]:
    """A robust straight line: the median slope between pairs, then least squares on what is within reach."""
    t = np.arange(len(x), dtype=np.float64)
    i, j = np.triu_indices(len(x), 1)
    slope = float(np.median((x[j] - x[i]) / (t[j] - t[i])))
    base = float(np.median(x - slope * t))
    for _ in range(10):
        near = np.abs(x - base - slope * t) < CAPPED * spread
        if near.sum() < 3:
            break
        slope, base = (float(c) for c in np.polyfit(t[near], x[near], 1, w=1 / spread[near]))
    return base + slope * t, slope


def _step(x: Floats, spread: Floats, start: int, cut: int, end: int) -> Step:
    before, after = _level(x[start:cut], spread[start:cut]), _level(x[cut:end], spread[cut:end])
    variance = 0.0
    for a, b, level in ((start, cut, before), (cut, end, after)):
        near = np.abs(x[a:b] - level) < CAPPED * spread[a:b]
        variance += 1 / float((near / spread[a:b] ** 2).sum())
    deviations = abs(after - before) / math.sqrt(variance)
    return Step(cut, before, after, deviations, min(1.0, len(x) * math.erfc(deviations / math.sqrt(2))))
