"""Intervals and paired tests over per-item values, by the bootstrap. Vectorised, and the same on every run.

An item is what was scored separately: a window of text, a question. `exp-mean` of per-token negative
log-likelihoods (nats) is perplexity; `mean` of 0/1 scores is accuracy. Imports numpy alone.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 (percentile interval) and 16 (tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Literal["mean", "exp-mean"]
Floats = NDArray[np.float64]

_ENTRIES_AT_ONCE = 4_000_000  # of the resampling matrix: 32 MB of indices, whatever the number of items


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """statistic(a) - statistic(b) over the same items, with its interval and two-sided p-value.

    items: how many pairs. low, high, p_value are NaN where fewer than two pairs are at hand.
    """

    difference: float
    low: float
    high: float
    p_value: float
    items: int


def bootstrap_interval(
    items: ArrayLike,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic` over items, resampled with replacement.

    items: (n,) finite. Raises ValueError when they are fewer than two, not finite, or the level is not in (0, 1).
    """
    values = _checked(items)
    if len(values) < 2:
        raise ValueError("an interval needs at least two items")
    return _percentiles(_apply(statistic, _resampled_means(values, resamples, seed)), level)


def paired_difference(
    a_items: ArrayLike,
    b_items: ArrayLike,
    transform: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """How much a's statistic exceeds b's when both are resampled by the same items.

    a_items, b_items: (n,) finite, item i of both is the same window or question. Raises ValueError otherwise.
    The p-value is the share of resamples on the other side of zero, doubled, counted with one extra on
    each side so that it is never 0; its least value is therefore 2 / (resamples + 1).
    """
    a, b = _checked(a_items), _checked(b_items)
    if a.shape != b.shape:
        raise ValueError(f"paired items must be the same: {len(a)} against {len(b)}")
    difference = float(_minus(_apply(transform, a.mean()), _apply(transform, b.mean())))
    if len(a) < 2:
        return PairedDifference(difference, np.nan, np.nan, np.nan, len(a))
    means_a = _resampled_means(a, resamples, seed)
    means_b = _resampled_means(b, resamples, seed)  # same seed and length: the same items are drawn
    low, high = _percentiles(_minus(_apply(transform, means_a), _apply(transform, means_b)), level)
    # exp is monotone, so the sign is read before it: no overflow can hide it
    sign = np.sign(means_a - means_b)
    tail = min(int((sign <= 0).sum()), int((sign >= 0).sum()))
    return PairedDifference(difference, low, high, min(1.0, 2 * (tail + 1) / (resamples + 1)), len(a))


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


def _checked(items: ArrayLike) -> Floats:
    values = np.asarray(items, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"items are one value each, shape (n,), not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("items must be finite")
    return values


def _resampled_means(values: Floats, resamples: int, seed: int) -> Floats:
    """(resamples,) means of items drawn with replacement."""
    rng = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, _ENTRIES_AT_ONCE // n)
    parts = [
        values[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def _apply(statistic: Statistic, means: ArrayLike) -> Floats:
    if statistic not in ("mean", "exp-mean"):
        raise ValueError(f'statistic is "mean" or "exp-mean", not {statistic!r}')
    values = np.asarray(means, dtype=np.float64)
    if statistic == "mean":
        return values
    with np.errstate(over="ignore"):  # a broken model's perplexity is inf
        return np.exp(values)


def _minus(a: Floats, b: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # inf - inf
        return np.asarray(a - b)


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level lies in (0, 1), not {level}")
    if not np.isfinite(values).all():
        values = np.sort(values)  # no interpolation between infinities
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    else:
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
