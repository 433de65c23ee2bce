"""How much a number moves where nothing has changed, and when so many tests together may raise an alarm.

The items are the same every night, so that by themselves they add no chance to "did this number change": what moves it
is the seed (which calibration text is drawn, where k-means starts). A baseline of five seeds knows each row's scatter
to 4 degrees of freedom, and a test at a level fit for a hundred of them would then ask for a change of 13 deviations.
Rows of one metric scatter alike, though not equally: their variances are drawn towards a common one, and each is known
to as many degrees of freedom more as the rows agree by.
Source: Smyth, Statistical Applications in Genetics and Molecular Biology 3 (2004), sections 4 and 6.2; Holm,
Scandinavian Journal of Statistics 6 (1979). Imports numpy alone; scipy inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenbits.statistics import Floats

FEW = 4  # rows with scatter from which on it is told how much they are alike
ENOUGH = 8  # rows from which on their scatter may follow what they lose
MOST_FREEDOM = 10.0
"""Of the common variance: some twenty rows do not show more surely how alike they are."""


@dataclass(frozen=True)
class Scatter:
    """Of one seed: a standard deviation, and the degrees of freedom that it is known to."""

    deviation: float
    freedom: float


SETTLED = Scatter(0.0, math.inf)
"""Of what no seed changes."""


def pool_scatter(groups: Sequence[Sequence[float]], losses: Sequence[float] | None = None) -> list[Scatter | None]:
    """Each group's scatter drawn towards that common to all; None for all where no group has two different values.

    groups: of each row its values, one a seed, on a scale on which rows scatter alike (logarithms of perplexities).
    losses: how much each row has lost against the dense model, above 0: what loses more scatters more, and the common
    scatter follows that. A group of one value gets the common scatter, and one without any scatter has part of it:
    five equal accuracies are no proof that a sixth will be equal.
    """
    own = [(float(np.var(one, ddof=1)) if len(one) > 1 else 0.0, len(one) - 1) for one in groups]
    known = [i for i, (variance, df) in enumerate(own) if df and variance > 0]
    if not known:
        return [None] * len(groups)
    size = np.log(np.maximum(losses, 1e-6)) if losses is not None else np.zeros(len(groups))
    if len(known) < FEW:
        total = sum(df for _, df in own)
        common = np.full(len(groups), sum(variance * df for variance, df in own) / total)
        freedom = float(min(total, len(groups)))
    else:
        common, freedom = _common([own[i] for i in known], size[known], size)
    return [
        Scatter(math.sqrt((freedom * prior + df * variance) / (freedom + df)), freedom + df)
        for (variance, df), prior in zip(own, common.tolist(), strict=True)
    ]


def _common(own: Sequence[tuple[float, int]], size: Floats, wanted: Floats) -> tuple[Floats, float]:
    """(common variance at each of the wanted sizes, its degrees of freedom) by the moments of the variances'
    logarithms about a straight line in size."""
    from scipy.special import polygamma

    logs = np.array([math.log(v) - float(polygamma(0, df / 2)) + math.log(df / 2) for v, df in own])
    slope, spread = 0.0, float(((size - size.mean()) ** 2).sum())
    if spread > 0 and len(own) >= ENOUGH:
        slope = float(np.clip(((size - size.mean()) * (logs - logs.mean())).sum() / spread, 0.0, 2.0))
    residuals = logs - logs.mean() - slope * (size - size.mean())
    excess = float((residuals**2).sum()) / (len(own) - 1 - (slope > 0))
    excess -= float(np.mean([polygamma(1, df / 2) for _, df in own]))
    # how alike rows are is known no better than by so many: four rows were too sure of it, and alarms were 1.2 %
    most = min(MOST_FREEDOM, float(len(own) - 1 - (slope > 0)))
    freedom = most if excess <= 0 else min(2 * _inverse_trigamma(excess), most)
    centre = logs.mean() + slope * (wanted - size.mean())
    return np.asarray(np.exp(centre + float(polygamma(0, freedom / 2)) - math.log(freedom / 2))), freedom


def _inverse_trigamma(value: float) -> float:
    """x > 0 with trigamma(x) = value > 0, by bisection: it falls from infinity to 0."""
    from scipy.special import polygamma

    low, high = 1e-3, 1e6
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if float(polygamma(1, middle)) > value else (low, middle)
    return low


@dataclass(frozen=True)
class SeedTest:
    """change, with its interval; p_worse, p_better: one-sided. error: the standard error of the change."""

    change: float
    low: float
    high: float
    p_worse: float
    p_better: float
    error: float
    freedom: float


def judge_change(change: float, error: float, freedom: float, level: float) -> SeedTest:
    """Whether a change (above 0 is worse) is more than seeds make; an error of 0 is that of what no seed changes."""
    from scipy.special import stdtr, stdtrit

    if error == 0:
        return SeedTest(change, change, change, 0.0 if change > 0 else 1.0, 0.0 if change < 0 else 1.0, 0.0, freedom)
    finite = min(freedom, 1e6)
    half = float(stdtrit(finite, (1 + level) / 2)) * error
    worse = float(stdtr(finite, -change / error))
    return SeedTest(change, change - half, change + half, worse, float(stdtr(finite, change / error)), error, freedom)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: what of them lies below a level keeps the chance of any false alarm there, however the tests
    depend on each other."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted
