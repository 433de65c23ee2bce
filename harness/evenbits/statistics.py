"""Intervals, paired differences and recovery over per-item values, by the bootstrap. The same on every run.

An item is what was scored separately: a window of text, a question. `exp-mean` of per-token negative
log-likelihoods (nats) is perplexity; `mean` of 0/1 scores is accuracy. Imports numpy alone; scipy
inside functions.

strata: sizes of consecutive groups of items (the tasks of a mean over tasks). What was not drawn at random, how many
items each task has, stays fixed: items are resampled within their group.
weights: how much of the text each item stands for, on any scale, where items differ in that (documents of unlike
length): the statistic is that of sum(items) / sum(weights), a ratio whose lower half varies too.

Percentiles of a few items are too narrow (of two items half of all resamples repeat one). Below `FEW_ITEMS` intervals
are therefore widened as t is wider than the normal, and tests are t tests.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 (structured data), 13 (percentile
interval) and 16 (tests); Cochran, Sampling Techniques (1977), chapters 5 (strata) and 6 (ratios); Hesterberg, The
American Statistician 69 (2015), on how narrow the percentiles of small samples are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Literal["mean", "exp-mean"]
Floats = NDArray[np.float64]

_ENTRIES_AT_ONCE = 4_000_000  # of the resampling matrix: 32 MB of indices, whatever the number of items
_FEW = 64  # distinct items in a group: how often each is drawn is then cheaper than which are drawn

_OUTSIDE = 20  # resamples outside an interval at the least, whatever its level: a percentile is no extreme

FEW_ITEMS = 100
"""Below so many, the bootstrap is corrected for small samples."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """statistic(a) - statistic(b) over the same items, with its interval and two-sided p-value.

    items: how many pairs. low, high, p_value are NaN where no group has two pairs. test: where p_value comes
    from. discordant: for McNemar's test, how many items only a has right, and only b.
    """

    difference: float
    low: float
    high: float
    p_value: float
    items: int
    test: str = "paired bootstrap"
    discordant: tuple[int, int] | None = None


def bootstrap_interval(
    items: ArrayLike,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    strata: Sequence[int] | None = None,
    weights: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile interval of `statistic` over items, resampled with replacement; NaN where no group has two.

    Of right and wrong answers it is Wilson's interval of a share: resampling items that are all right knows of no
    chance at all. items: (n,) finite. Raises ValueError when they are fewer than two, not finite, or the level is not
    in (0, 1); when strata do not sum to n, or weights are not (n,) and positive.
    """
    values = _checked(items)
    if len(values) < 2:
        raise ValueError("an interval needs at least two items")
    groups, shares = check_strata(strata, len(values)), check_weights(weights, len(values))
    if statistic == "mean" and shares is None and len(groups) == 1 and np.isin(values, (0, 1)).all():
        return _share_limits(values, level)
    (means,) = _resampled_means([values], shares, groups, resamples, seed, level)
    return _percentiles(_apply(statistic, means), level)


def paired_difference(
    a_items: ArrayLike,
    b_items: ArrayLike,
    transform: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    strata: Sequence[int] | None = None,
    weights: ArrayLike | None = None,
) -> PairedDifference:
    """How much a's statistic exceeds b's when both are resampled by the same items.

    a_items, b_items: (n,) finite, item i of both is the same window or question. Raises ValueError otherwise.
    The p-value is the share of resamples on the other side of zero, doubled. Where none lies there, and below
    `FEW_ITEMS`, it is that of the t test on the items' differences.
    """
    a, b = _checked_pair(a_items, b_items)
    groups, shares = check_strata(strata, len(a)), check_weights(weights, len(a))
    difference = float(_minus(statistic_value(a, transform, shares), statistic_value(b, transform, shares)))
    test = "paired bootstrap" if len(a) >= FEW_ITEMS else "paired t test"
    if len(a) == len(groups):
        return PairedDifference(difference, np.nan, np.nan, np.nan, len(a), test)
    means_a, means_b, apart = _resampled_means([a, b, a - b], shares, groups, resamples, seed, level)
    low, high = _percentiles(_minus(_apply(transform, means_a), _apply(transform, means_b)), level)
    # exp is monotone, so the sign is read before it: no overflow can hide it. What rounding leaves of a tie is one
    tie = 1e-12 * max(np.abs(a).max(), np.abs(b).max())
    sign = np.where(np.abs(apart) <= tie, 0.0, np.sign(apart))
    tail = min(int((sign <= 0).sum()), int((sign >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(sign) + 1))
    if tail == 0 or len(a) < FEW_ITEMS:
        of_t = _paired_t(a - b, shares, groups, tie)
        p_value = of_t if len(a) < FEW_ITEMS or math.isnan(of_t) else min(p_value, of_t)
    return PairedDifference(difference, low, high, p_value, len(a), test)


def recovery_interval(
    items: ArrayLike,
    dense_items: ArrayLike,
    transform: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    strata: Sequence[int] | None = None,
    weights: ArrayLike | None = None,
) -> tuple[float, float, float]:
    """(value, low, high) of the compressed model's statistic over the dense model's, both resampled by the same items.

    items, dense_items: (n,) finite, paired. Raises ValueError otherwise, and when the dense statistic is 0. Resamples
    in which the dense one is not on its side of 0 have no ratio and are left out. With one item low and high are NaN.
    """
    a, b = _checked_pair(items, dense_items)
    groups, shares = check_strata(strata, len(a)), check_weights(weights, len(a))
    mean_a, mean_b = _mean(a, shares), _mean(b, shares)
    if transform == "mean" and mean_b == 0:
        raise ValueError("the dense model's value is 0: nothing can be a share of it")
    value = float(_over(mean_a, mean_b, transform))
    if len(a) == len(groups):
        return value, np.nan, np.nan
    means_a, means_b = _resampled_means([a, b], shares, groups, resamples, seed, level)
    some = means_b * mean_b > 0 if transform == "mean" else np.ones(len(means_b), dtype=bool)
    low, high = _percentiles(_over(means_a[some], means_b[some], transform), level)
    return value, low, high


def indistinguishable(
    a_items: ArrayLike,
    b_items: ArrayLike,
    transform: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> bool:
    """Whether the paired test at `level` leaves open which of the two is larger; always so below two items."""
    p_value = paired_difference(a_items, b_items, transform, level, resamples, seed).p_value
    return not p_value <= 1 - level


def statistic_of(items: ArrayLike, value: float, rtol: float = 1e-4) -> Statistic | None:
    """Which statistic of the items gives `value`, or None: how a record's metric was computed from its items."""
    values = _checked(items)
    mean = values.mean()
    if np.isclose(mean, value, rtol=rtol, atol=1e-12):
        return "mean"
    return "exp-mean" if np.isclose(_apply("exp-mean", mean), value, rtol=rtol, atol=0) else None


def variance_of_mean(items: Floats, groups: Sequence[int]) -> tuple[float, int]:
    """(variance of the mean of items drawn within their groups, its degrees of freedom); NaN for a group of one.

    items: (n,), of consecutive groups of these sizes. Source: Cochran (1977), section 5.6.
    """
    variance, start, n = 0.0, 0, len(items)
    for size in groups:
        part = items[start : start + size]
        variance += (size / n) ** 2 * (float(part.var(ddof=1)) / size if size > 1 else math.nan)
        start += size
    return variance, n - len(groups)


def statistic_value(items: Floats, statistic: Statistic, weights: Floats | None = None) -> float:
    """`statistic` of checked items: (n,), weights as `check_weights` gives them."""
    return float(_apply(statistic, _mean(items, weights)))


def check_strata(strata: Sequence[int] | None, items: int) -> tuple[int, ...]:
    """Group sizes that sum to `items`, one group where there are none. Raises ValueError otherwise."""
    if strata is None:
        return (items,)
    if not all(isinstance(size, int | np.integer) and size > 0 for size in strata) or sum(strata) != items:
        raise ValueError(f"strata are sizes of consecutive groups that sum to the {items} items, not {list(strata)}")
    return tuple(int(size) for size in strata)


def check_weights(weights: ArrayLike | None, items: int) -> Floats | None:
    """Weights (items,) scaled to a mean of 1. Raises ValueError for a wrong shape and for one that is not above 0."""
    if weights is None:
        return None
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (items,) or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"weights are one finite number above 0 for each of the {items} items")
    return np.asarray(values / values.mean())


def _checked(items: ArrayLike) -> Floats:
    values = np.asarray(items, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"items are one value each, shape (n,), not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("items must be finite")
    return values


def _checked_pair(a_items: ArrayLike, b_items: ArrayLike) -> tuple[Floats, Floats]:
    a, b = _checked(a_items), _checked(b_items)
    if a.shape != b.shape:
        raise ValueError(f"paired items must be the same: {len(a)} against {len(b)}")
    return a, b


def _resampled_means(
    columns: Sequence[Floats], weights: Floats | None, strata: Sequence[int], resamples: int, seed: int, level: float
) -> list[Floats]:
    """For each of the paired columns (n,): the (resamples,) means of items drawn with replacement, the same for all.

    Of few items they are spread about the columns' own means until percentiles at `level` are wide enough.
    """
    _check_level(level)
    resamples = max(resamples, math.ceil(_OUTSIDE / (1 - level)))
    rng = np.random.default_rng(seed)
    joined = np.stack([*columns, *([] if weights is None else [weights])], axis=1)
    sums = np.zeros((resamples, joined.shape[1]))
    start = 0
    for size in strata:
        for begin, part in _group_sums(joined[start : start + size], resamples, rng):
            sums[begin : begin + len(part)] += part
        start += size
    below = sums[:, -1:] if weights is not None else len(joined)
    means = list((sums[:, : len(columns)] / below).T)
    if len(joined) >= FEW_ITEMS:
        return means
    own = [_mean(column, weights) for column in columns]
    wider = _widening(len(joined), len(strata), level)
    return [centre + wider * (drawn - centre) for centre, drawn in zip(own, means, strict=True)]


def _share_limits(values: Floats, level: float) -> tuple[float, float]:
    """Wilson's score interval of the share of ones, Journal of the American Statistical Association 22 (1927)."""
    from scipy.special import ndtri

    _check_level(level)
    n, share, z = len(values), float(values.mean()), float(ndtri((1 + level) / 2))
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def _widening(items: int, groups: int, level: float) -> float:
    """Student's t over the normal, and the standard deviation of a sample over the population's."""
    from scipy.special import ndtri, stdtrit

    freedom, tail = items - groups, (1 + level) / 2
    if freedom == 0:
        return math.nan
    return math.sqrt(items / freedom) * float(stdtrit(freedom, tail) / ndtri(tail))


def _paired_t(apart: Floats, weights: Floats | None, strata: Sequence[int], tie: float) -> float:
    """Two-sided p-value of the t test that the mean of (n,) differences is 0; NaN where a group holds a single one."""
    from scipy.special import stdtr

    centre = float(apart.mean())
    pull = apart - centre * (1.0 if weights is None else weights)
    variance, freedom = variance_of_mean(pull, strata)
    if abs(centre) <= tie:
        return 1.0
    if variance <= tie**2:  # all differ alike: the sign test says how much so many can tell
        return 2.0 ** (1 - len(apart))
    return 2 * float(stdtr(freedom, -abs(centre) / math.sqrt(variance)))


def _group_sums(block: Floats, resamples: int, rng: np.random.Generator) -> Iterator[tuple[int, Floats]]:
    """(first resample, sums (some, columns)) of one group's items (size, columns), drawn with replacement."""
    size = len(block)
    kinds = _kinds(block)
    if kinds is not None:
        first, counts = kinds
        yield 0, np.asarray(rng.multinomial(size, counts / size, size=resamples) @ block[first])
        return
    rows = max(1, _ENTRIES_AT_ONCE // size)
    for begin in range(0, resamples, rows):
        drawn = rng.integers(0, size, size=(min(rows, resamples - begin), size))
        yield begin, np.stack([column[drawn].sum(axis=1) for column in block.T], axis=1)


def _kinds(block: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """(where each kind of item first stands, how many there are); None where these are many.

    Questions are right or wrong: few kinds. In the order they come in, which does not change when the two sides of a
    pair change places.
    """
    limit = min(_FEW, len(block) // 4 + 1)
    code, known = np.zeros(len(block), dtype=np.int64), 1
    for column in block.T:
        values = np.unique(column)
        known *= len(values)
        if len(values) > limit or known > _FEW**2:
            return None
        code = code * len(values) + np.searchsorted(values, column)
    counts = np.bincount(code, minlength=known)
    first = np.full(known, len(block))
    np.minimum.at(first, code, np.arange(len(block)))
    order = np.argsort(first, kind="stable")[: int((counts > 0).sum())]
    return (first[order], counts[order]) if len(order) <= limit else None


def _mean(values: Floats, weights: Floats | None) -> Floats:
    return np.asarray(values.mean() if weights is None else values.mean() / weights.mean())


def _apply(statistic: Statistic, means: ArrayLike) -> Floats:
    if statistic not in ("mean", "exp-mean"):
        raise ValueError(f'statistic is "mean" or "exp-mean", not {statistic!r}')
    values = np.asarray(means, dtype=np.float64)
    if statistic == "mean":
        return values
    with np.errstate(over="ignore"):  # a broken model's perplexity is inf
        return np.exp(values)


def _over(a: Floats, b: Floats, statistic: Statistic) -> Floats:
    """statistic(a) / statistic(b) of means; a ratio of perplexities is known even where both would overflow."""
    return _apply("exp-mean", a - b) if statistic == "exp-mean" else np.asarray(_apply(statistic, a) / b)


def _minus(a: ArrayLike, b: ArrayLike) -> Floats:
    with np.errstate(invalid="ignore"):  # inf - inf
        return np.asarray(np.asarray(a) - np.asarray(b))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level lies in (0, 1), not {level}")


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    _check_level(level)
    if not np.isfinite(values).all():
        values = np.sort(values)  # no interpolation between infinities
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    else:
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
