"""Which test a comparison gets, and what several seeds and several comparisons do to it.

One seed each, right or wrong items: McNemar's exact test. One seed each, other items: the paired bootstrap. Several
seeds: a t test that counts both sources of chance, seeds and items, as neither alone says how sure a difference is.
Simulated with equal methods (150 items, seeds that scatter 2.5 times the standard error over items): at 5 % it raises
a false alarm in 5 % of cases with two or three seeds, where a paired test on the seeds' mean does in 65 %, and the same
with ranges that must not overlap in 33 % (two seeds) and 9 % (three). The range of three seeds holds the true mean in
70 % of cases, the interval here in 94 %.
Imports numpy alone; scipy inside functions.
Source: McNemar, Psychometrika 12 (1947); Welch, Biometrika 34 (1947) and Satterthwaite, Biometrics Bulletin 2 (1946)
for the degrees of freedom of a sum of variances; Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from evenbits.statistics import (
    Floats,
    PairedDifference,
    Statistic,
    check_strata,
    check_weights,
    paired_difference,
    recovery_interval,
    statistic_value,
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One metric of one method: a value for each seed, and where they are kept the items these were computed from.

    values: (seeds,). items: (seeds, items); transform: how items make a value. strata, weights: as in
    `evenbits.statistics`. fixed: no seed would change it (the dense model).
    """

    values: Floats
    items: Floats | None = None
    transform: Statistic | None = None
    strata: Sequence[int] | None = None
    weights: Floats | None = None
    fixed: bool = False

    @property
    def settled(self) -> bool:
        """Whether seeds add no chance: there is one, or the method does not depend on them."""
        return len(self.values) == 1 or (self.items is not None and bool((self.items == self.items[0]).all()))


def exact_mcnemar(a_items: ArrayLike, b_items: ArrayLike) -> tuple[int, int, float]:
    """(items only a has right, items only b has right, exact two-sided p-value) of paired 0/1 items (n,).

    Under the null hypothesis each item on which they differ is a's or b's with probability 1/2; items on which they
    agree say nothing. Raises ValueError for items that are not paired or not 0/1.
    """
    from scipy.special import bdtr  # the binomial's distribution function; scipy.stats takes 0.8 s to import

    a, b = np.asarray(a_items), np.asarray(b_items)
    if a.shape != b.shape or not (_is_binary(a) and _is_binary(b)):
        raise ValueError("McNemar's test takes paired items that are 0 or 1")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    p_value = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    return only_a, only_b, p_value


def difference(a: Sampled, b: Sampled, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> PairedDifference:
    """value(a) - value(b), the means over seeds, tested as the module says. p_value is NaN where nothing can test it.

    Both sides keep the same items with the same transform, or are compared by seeds alone.
    """
    if a.settled and b.settled and a.items is not None and b.items is not None and a.transform is not None:
        x, y = a.items[0], b.items[0]
        found = paired_difference(x, y, a.transform, level, resamples, seed, a.strata, a.weights)
        # a mean over tasks weighs its items, and is no count of right answers even where all tasks have as many
        plain = a.weights is None and a.strata is None and a.transform == "mean" and len(x) > 1
        if plain and _is_binary(x) and _is_binary(y):
            only_a, only_b, p_value = exact_mcnemar(x, y)
            return replace(found, p_value=p_value, test="exact McNemar", discordant=(only_a, only_b))
        return found
    scale, parts = _variance(a, b)
    centre = float(a.values.mean() - b.values.mean())
    items = 0 if a.items is None or b.items is None else a.items.shape[1]
    low, high, p_value = _t_limits(centre / scale, parts, level)
    test = "t test over seeds and items" if items else "t test over seeds"
    return PairedDifference(centre, scale * low, scale * high, p_value, items, test)


def interval(one: Sampled, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of the mean over several seeds (t, from the seeds' variance and the items'); None for a single seed.

    Of perplexities on the logarithmic scale: two or three seeds make it wide, and it must not reach below zero.
    """
    if len(one.values) < 2:
        return None
    scale, parts = _variance(one, None)
    centre = float(one.values.mean())
    low, high, _ = _t_limits(centre / scale, parts, level)
    if one.transform == "exp-mean":
        part = scale * (high - low) / 2 / centre
        return centre * math.exp(-part), centre * math.exp(min(part, 700.0))
    return scale * low, scale * high


def seed_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the t interval over two or more seeds alone. Raises ValueError for fewer."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError("an interval over seeds needs at least two")
    limits = interval(Sampled(found), level)
    assert limits is not None
    return float(found.mean()), *limits


def recovery(a: Sampled, dense: Sampled, level: float = 0.95) -> tuple[float, float | None, float | None]:
    """(value, low, high) of a's mean over the dense model's; low and high None where no items or seeds give them.

    One seed: the paired bootstrap. Several: the t interval of the linearised ratio. Raises ValueError when the dense
    value is 0.
    """
    base = float(dense.values.mean())
    if base == 0:
        raise ValueError("the dense model's value is 0: nothing can be a share of it")
    value = float(a.values.mean()) / base
    paired = a.items is not None and dense.items is not None and a.items.shape[1] == dense.items.shape[1]
    if not paired or a.transform is None or a.transform != dense.transform or not math.isfinite(value):
        return value, None, None
    assert a.items is not None
    assert dense.items is not None
    if a.settled and dense.settled:
        x, y = a.items[0], dense.items[0]
        _, low, high = recovery_interval(x, y, a.transform, level, strata=a.strata, weights=a.weights)
    else:
        # a / d varies as (a - value d) / d does, to first order
        scale, parts = _variance(a, dense, times_b=value)
        low, high, _ = _t_limits(value * base / scale, parts, level)
        low, high = low * scale / base, high * scale / base
    return (value, low, high) if math.isfinite(low) and math.isfinite(high) else (value, None, None)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that among all of them the chance of any false alarm stays at the level each is read at."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _is_binary(items: Floats) -> bool:
    return bool(np.isin(items, (0, 1)).all())


def _variance(a: Sampled, b: Sampled | None, times_b: float = 1.0) -> tuple[float, list[tuple[float, float]]]:
    """(scale, [(variance, degrees of freedom)]) of mean(a) - times_b mean(b), in units of scale, so that no square
    overflows.

    The seeds' part and the items' part; what is common to both (how a seed does on an item) is in each, which errs on
    the side of too wide. Where one side has a single seed it is taken to vary as the other does.
    """
    sides = [(a, 1.0)] if b is None else [(a, 1.0), (b, times_b)]
    scale = max(abs(times) * float(np.abs(side.values).max()) for side, times in sides) or 1.0
    known = [
        (float((times * side.values / scale).var(ddof=1)), len(side.values) - 1)
        for side, times in sides
        if len(side.values) > 1
    ]
    parts: list[tuple[float, float]] = [(math.nan, 1)]  # of seeds; unknown where no side has two
    if known or all(side.fixed for side, _ in sides):
        varying = [side for side, _ in sides if len(side.values) == 1 and not side.fixed]
        counts = [len(side.values) for side, _ in sides if len(side.values) > 1]
        parts = [(variance / n, df) for (variance, df), n in zip(known, counts, strict=True)]
        # one estimate used for both sides is one part
        parts = [(parts[0][0] + known[0][0], known[0][1])] if varying else parts
    if all(side.items is not None and side.transform is not None for side, _ in sides):
        pull = np.sum([times * sign * _pull(side) for (side, times), sign in zip(sides, (1, -1), strict=False)], axis=0)
        parts.append(_of_mean(pull / scale, check_strata(a.strata, len(pull))))
    return scale, parts


def _pull(side: Sampled) -> Floats:
    """How much each item moves the mean over seeds: the linearised statistic, (items,), of mean 0."""
    assert side.items is not None
    assert side.transform is not None
    weights = check_weights(side.weights, side.items.shape[1])
    share = np.ones(side.items.shape[1]) if weights is None else weights
    means = side.items.mean(axis=1, keepdims=True)
    slope = np.array([statistic_value(one, side.transform, weights) for one in side.items])[:, None]
    return np.asarray(((slope if side.transform == "exp-mean" else 1.0) * (side.items - means * share)).mean(axis=0))


def _of_mean(pull: Floats, groups: Sequence[int]) -> tuple[float, float]:
    """(variance of the mean of items drawn within their groups, its degrees of freedom); NaN for a group of one."""
    variance, start, n = 0.0, 0, len(pull)
    for size in groups:
        part = pull[start : start + size]
        variance += (size / n) ** 2 * (float(part.var(ddof=1)) / size if size > 1 else math.nan)
        start += size
    return variance, n - len(groups)


def _t_limits(centre: float, parts: Sequence[tuple[float, float]], level: float) -> tuple[float, float, float]:
    """(low, high, two-sided p of 0) for a centre with these independent parts of variance; NaN where one is unknown."""
    from scipy.special import stdtr, stdtrit

    if not 0 < level < 1:
        raise ValueError(f"level lies in (0, 1), not {level}")
    total = math.fsum(variance for variance, _ in parts)
    if math.isnan(total) or not math.isfinite(centre):
        return math.nan, math.nan, math.nan
    if total == 0:
        return centre, centre, 1.0 if centre == 0 else 0.0
    freedom = total**2 / math.fsum(variance**2 / df for variance, df in parts if variance > 0)
    error = math.sqrt(total)
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    return centre - half, centre + half, 2 * float(stdtr(freedom, -abs(centre) / error))
