"""Intervals and paired tests against cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evenbits import statistics
from evenbits.statistics import bootstrap_interval, indistinguishable, paired_difference, statistic_of


def test_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    items = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    low, high = bootstrap_interval(items, "mean", resamples=4000)
    half = 1.96 * items.std() / math.sqrt(len(items))
    assert low == pytest.approx(items.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(items.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0.0, 1.0, 60), level=0.9, resamples=400, seed=trial)
        hits += low <= 0.0 <= high
    assert 165 <= hits <= 195  # 180 expected, standard deviation 4.2; a little below for n = 60


def test_perplexity_interval_is_the_exponential_of_the_mean_one() -> None:
    items = np.random.default_rng(3).normal(2.0, 0.3, 300)
    low, high = bootstrap_interval(items, "mean")
    assert bootstrap_interval(items, "exp-mean") == pytest.approx((math.exp(low), math.exp(high)), rel=1e-4)


def test_same_seed_same_interval_and_memory_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    items = np.random.default_rng(4).normal(size=50)
    first = bootstrap_interval(items, seed=7)
    assert bootstrap_interval(items, seed=7) == first
    assert bootstrap_interval(items, seed=8) != first
    monkeypatch.setattr(statistics, "_ENTRIES_AT_ONCE", 50 * 10)
    assert bootstrap_interval(items, seed=7) == first


def test_pairing_finds_what_separate_intervals_hide() -> None:
    rng = np.random.default_rng(5)
    hard = rng.normal(2.0, 0.5, 200)  # how hard each window is, common to both
    a = hard + rng.normal(0.0, 0.01, 200)
    b = hard + 0.01 + rng.normal(0.0, 0.01, 200)
    assert bootstrap_interval(a)[1] > bootstrap_interval(b)[0]  # the intervals overlap
    found = paired_difference(a, b, "exp-mean")
    assert found.low < found.difference < found.high < 0
    assert found.p_value == pytest.approx(2 / 2001)
    assert not indistinguishable(a, b, "exp-mean")
    assert paired_difference(b, a, "exp-mean").difference == -found.difference


def test_equal_items_cannot_be_told_apart() -> None:
    items = np.arange(20.0)
    found = paired_difference(items, items, "mean")
    assert (found.difference, found.low, found.high, found.p_value, found.items) == (0.0, 0.0, 0.0, 1.0, 20)
    assert indistinguishable(items, items)


def test_false_alarms_come_at_the_level_asked_for() -> None:
    rng = np.random.default_rng(6)
    alarms = sum(
        not indistinguishable(rng.normal(size=80), rng.normal(size=80), "mean", 0.95, 400, seed) for seed in range(300)
    )
    assert 5 <= alarms <= 32  # 15 expected, standard deviation 3.8; the bootstrap errs a little upwards


def test_one_pair_decides_nothing() -> None:
    found = paired_difference([1.0], [5.0], "mean")
    assert found.difference == -4.0
    assert math.isnan(found.p_value)
    assert indistinguishable([1.0], [5.0])


def test_infinite_perplexities_are_still_ordered() -> None:
    found = paired_difference(np.full(10, 2.0), np.full(10, 2000.0), "exp-mean")
    assert found.difference == -math.inf
    assert found.high == -math.inf
    assert found.p_value < 0.01
    broken = paired_difference(np.linspace(1500, 1600, 10), np.linspace(2500, 2600, 10), "exp-mean")
    assert broken.p_value < 0.01


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "must be the same"),
        ([], [], "one value each"),
        ([1.0, math.nan], [1.0, 2.0], "finite"),
        ([[1.0]], [[1.0]], "one value each"),
    ],
)
def test_what_cannot_be_paired_is_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)


def test_too_few_items_or_a_wrong_level_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        bootstrap_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="median"):
        bootstrap_interval([1.0, 2.0], "median")  # type: ignore[arg-type]


def test_the_statistic_is_recognised_from_its_value() -> None:
    items = np.random.default_rng(7).normal(2.0, 0.1, 30)
    assert statistic_of(items, float(items.mean())) == "mean"
    assert statistic_of(items, math.exp(items.mean())) == "exp-mean"
    assert statistic_of(items, 42.0) is None
