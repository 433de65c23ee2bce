"""Which test a comparison gets, and what several seeds and several comparisons do to it.

One seed each, right or wrong items: McNemar's exact test. One seed each, other items: the paired bootstrap. Several
seeds: a t test that counts both sources of chance, seeds and items, as neither alone says how sure a difference is.
Simulated with equal methods (tests/benchmarks/significance.py: 150 items, seeds that scatter 2.5 times the standard
error over items): at 5 % it raises a false alarm in 2 to 3 % of pairs with two to five seeds a side, where ranges that
must not overlap do in 28 % (two seeds) and 11 % (three). The range of three seeds holds the true mean in 70 % of
cases, the interval here in 96 %.
Imports numpy alone; scipy inside functions.
Source: McNemar, Psychometrika 12 (1947); Welch, Biometrika 34 (1947) and Satterthwaite, Biometrics Bulletin 2 (1946)
for the degrees of freedom of a sum of variances; Cochran, Biometrics 20 (1964), for seeds and items together.
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
    variance_of_mean,
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
        found = paired_difference(a.items[0], b.items[0], a.transform, level, resamples, seed, a.strata, a.weights)
        counted = _mcnemar(a, b)
        if counted is None:
            return found
        only_a, only_b, p_value = counted
        return replace(found, p_value=p_value, test="exact McNemar", discordant=(only_a, only_b))
    scale, parts = _variance(a, b)
    centre = float(a.values.mean() - b.values.mean())
    items = 0 if a.items is None or b.items is None else a.items.shape[1]
    low, high, p_value = _t_limits(centre / scale, parts, level)
    if items and a.transform == b.transform == "exp-mean":
        p_value = _p_value_of_logarithms(a, b)
    test = "t test over seeds and items" if items else "t test over seeds"
    return PairedDifference(centre, scale * low, scale * high, p_value, items, test)


def _p_value_of_logarithms(a: Sampled, b: Sampled) -> float:
    """Of perplexities: they are equal where their logarithms, the mean losses, are, and there seeds of a bad model
    scatter no more than those of a good one. A model that diverged to 5e4 or 2e5 is not told from a sound one by the
    numbers themselves."""
    loss_a, loss_b = (replace(side, values=np.log(side.values), transform="mean") for side in (a, b))
    scale, parts = _variance(loss_a, loss_b)
    return _t_limits(float(loss_a.values.mean() - loss_b.values.mean()) / scale, parts, 0.95)[2]


def p_value_of(a: Sampled, b: Sampled) -> float:
    """That of `difference`, without the resampling that its interval needs where the test needs none."""
    counted = _mcnemar(a, b) if a.settled and b.settled else None
    return difference(a, b).p_value if counted is None else counted[2]


def _mcnemar(a: Sampled, b: Sampled) -> tuple[int, int, float] | None:
    """`exact_mcnemar` of a single seed's items; None where these are no right and wrong answers to count."""
    if a.items is None or b.items is None or a.items.shape[1] < 2:
        return None
    # a mean over tasks weighs its items, and is no count of right answers even where all tasks have as many
    plain = a.weights is None and a.strata is None and a.transform == "mean"
    return (
        exact_mcnemar(a.items[0], b.items[0]) if plain and _is_binary(a.items[0]) and _is_binary(b.items[0]) else None
    )


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
        return _on_log_scale(centre, scale * (high - low) / 2)
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
        if a.transform == "exp-mean":  # a ratio of perplexities is above zero
            low, high = _on_log_scale(value, (high - low) / 2)
    return (value, low, high) if math.isfinite(low) and math.isfinite(high) else (value, None, None)


def against_best(p_values: Sequence[float]) -> list[float]:
    """p-values of the best of k methods against each other one, best first, adjusted so that the chance of any false
    alarm among them stays at the level that each is read at. NaN (not tested) stays, and counts for none.

    The best was picked by its number, so that it against the r-th is the widest of r (r - 1) / 2 differences: in a
    stretch of r methods each is held to its share r / k of the level, and none is told apart within a stretch that is
    not. Adjusting for k - 1 comparisons (Holm) is not enough: simulated with equal methods
    (tests/benchmarks/significance.py), a false alarm in 11 % of sections of ten and 26 % of twenty.
    Source: Ryan, Psychological Bulletin 57 (1960), with Einot's and Gabriel's condition on stretches, Biometrika 62
    (1975).
    """
    adjusted = [math.nan] * len(p_values)
    tested = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    largest, k = 0.0, len(tested) + 1
    for rank in range(k, 1, -1):  # the widest stretch first
        index = tested[rank - 2]
        largest = max(largest, min(1.0, p_values[index] * k * (rank - 1) / 2))
        adjusted[index] = largest
    return adjusted


def _on_log_scale(centre: float, half: float) -> tuple[float, float]:
    """Limits of a positive number whose logarithm is known within half / centre."""
    part = half / centre
    return centre * math.exp(-part), centre * math.exp(min(part, 700.0))


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
        parts = [_satterthwaite(parts)] if parts else []
    if all(side.items is not None and side.transform is not None for side, _ in sides):
        pull = np.sum([times * sign * _pull(side) for (side, times), sign in zip(sides, (1, -1), strict=False)], axis=0)
        parts.append(variance_of_mean(pull / scale, check_strata(a.strata, len(pull))))
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


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The sum of variances as one, with its degrees of freedom."""
    total = math.fsum(variance for variance, _ in parts)
    below = math.fsum(variance**2 / df for variance, df in parts)
    return total, total**2 / below if below > 0 else parts[0][1]


def _t_limits(centre: float, parts: Sequence[tuple[float, float]], level: float) -> tuple[float, float, float]:
    """(low, high, two-sided p of 0) for a centre with these independent parts of variance; NaN where one is unknown.

    Tails are those of each part's t, weighed by variance, as Cochran weighs critical values. One t with Satterthwaite's
    degrees of freedom, known from two or three seeds, is too narrow: simulated false alarms of 8 to 13 % at 5 %.
    """
    from scipy.special import stdtr, stdtrit

    if not 0 < level < 1:
        raise ValueError(f"level lies in (0, 1), not {level}")
    total = math.fsum(variance for variance, _ in parts)
    if math.isnan(total) or not math.isfinite(centre):
        return math.nan, math.nan, math.nan
    if total == 0:
        return centre, centre, 1.0 if centre == 0 else 0.0
    known = [(variance / total, df) for variance, df in parts if variance > 0]

    def tails(t: float) -> float:
        return 2 * math.fsum(share * float(stdtr(df, -t)) for share, df in known)

    limits = [float(stdtrit(df, (1 + level) / 2)) for _, df in known]
    low, high = min(limits), max(limits)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if tails(middle) > 1 - level else (low, middle)
    error = math.sqrt(total)
    return centre - high * error, centre + high * error, tails(abs(centre) / error)
