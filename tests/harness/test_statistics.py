"""Intervals and paired tests against cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from evenbits import statistics
from evenbits.statistics import (
    bootstrap_interval,
    indistinguishable,
    paired_difference,
    recovery_interval,
    statistic_of,
)


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
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)  # no resample lies on the other side
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


@pytest.mark.parametrize("count", [2, 5, 12, 20])
def test_few_items_raise_no_more_false_alarms_and_their_intervals_are_as_sure(count: int) -> None:
    """Plain percentiles: 49, 15, 10 and 8 % false alarms, and as much less coverage."""
    rng = np.random.default_rng(count)
    alarms = hits = of_pair = 0
    for seed in range(300):
        a, b = rng.normal(2.0, 0.5, (2, count))
        found = paired_difference(a, b, "exp-mean", resamples=500, seed=seed)
        alarms += found.p_value <= 0.05
        of_pair += found.low <= 0 <= found.high
        low, high = bootstrap_interval(a, "exp-mean", resamples=500, seed=seed)
        hits += low <= math.exp(2.0) <= high
    assert alarms <= 27  # 15 expected, standard deviation 3.8
    assert min(hits, of_pair) >= 265  # 285 expected; two items alone give a little less


def test_few_items_get_scipys_paired_t_test() -> None:
    a, b = np.random.default_rng(20).normal(2.0, 0.5, (2, 12))
    found = paired_difference(a, b)
    assert found.test == "paired t test"
    assert found.p_value == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert paired_difference(np.tile(a, 9), np.tile(b, 9)).test == "paired bootstrap"
    assert paired_difference(a + 1, a).p_value == pytest.approx(2 * 0.5**12)  # all differ alike: the sign test


def test_a_high_level_takes_more_resamples() -> None:
    """The 0.1 % at the ends of 2000 resamples would be the extremes of these."""
    items = np.random.default_rng(21).normal(size=1000)
    low, high = bootstrap_interval(items, level=0.999)
    half = scipy.stats.norm.ppf(0.9995) * items.std() / math.sqrt(len(items))
    assert (low, high) == pytest.approx((items.mean() - half, items.mean() + half), abs=0.08 * half)


def test_groups_of_one_item_tell_nothing() -> None:
    assert all(map(math.isnan, bootstrap_interval([0.0, 2.0, 5.0], strata=[1, 1, 1])))
    found = paired_difference([0.0, 2.0, 5.0], [1.0, 3.0, 7.0], strata=[1, 1, 1])
    assert found.difference == pytest.approx(-4 / 3)
    assert all(map(math.isnan, (found.low, found.high, found.p_value)))


@pytest.mark.parametrize(("right", "n"), [(0, 20), (3, 20), (460, 460), (437, 440)])
def test_a_share_of_right_answers_has_wilsons_interval(right: int, n: int) -> None:
    """All right is no proof that all would be: resampled, they have no interval at all."""
    items = np.repeat([1.0, 0.0], [right, n - right])
    expected = scipy.stats.binomtest(right, n).proportion_ci(0.9, method="wilson")
    assert bootstrap_interval(items, level=0.9) == pytest.approx((expected.low, expected.high))
    assert bootstrap_interval(items)[0] < 1


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


# -- strata, weights, recovery ----------------------------------------------------------------------------------


def half_width(limits: tuple[float, float]) -> float:
    return (limits[1] - limits[0]) / 2


def test_strata_give_the_variance_of_a_stratified_mean() -> None:
    """Cochran (1977), section 5.6: the sum of W_h^2 S_h^2 / n_h, without what lies between the strata."""
    rng = np.random.default_rng(8)
    sizes = (300, 100, 600)
    groups = [rng.normal(mean, 1.0, size) for mean, size in zip((0.0, 8.0, -5.0), sizes, strict=True)]
    items = np.concatenate(groups)
    variance = sum((len(g) / len(items)) ** 2 * g.var() / len(g) for g in groups)
    within = half_width(bootstrap_interval(items, resamples=8000, strata=sizes))
    assert within == pytest.approx(1.96 * math.sqrt(variance), rel=0.04)
    pooled = half_width(bootstrap_interval(items, resamples=8000))
    assert pooled == pytest.approx(1.96 * math.sqrt(items.var() / len(items)), rel=0.04)
    assert pooled > 4 * within


def test_strata_of_a_mean_over_tasks() -> None:
    """Two tasks of unlike size, weighted to count alike: the mean of two accuracies and its binomial variance."""
    rng = np.random.default_rng(9)
    right = [(rng.random(size) < share).astype(float) for size, share in ((100, 0.5), (1900, 0.95))]
    n = sum(map(len, right))
    items = np.concatenate([task * n / (2 * len(task)) for task in right])
    assert items.mean() == pytest.approx(np.mean([task.mean() for task in right]))
    variance = sum(task.var() / len(task) for task in right) / 4
    limits = bootstrap_interval(items, resamples=8000, strata=(100, 1900))
    assert half_width(limits) == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)


def test_stratified_pairs_differ_from_pooled_ones() -> None:
    """What differs between tasks and not between methods is no chance."""
    rng = np.random.default_rng(10)
    gap = np.concatenate([np.full(50, 1.0), np.full(50, -0.9)]) + rng.normal(0.0, 0.05, 100)
    base = rng.normal(size=100)
    assert paired_difference(base + gap, base).p_value > 0.5
    assert paired_difference(base + gap, base, strata=(50, 50)).p_value < 0.01


def test_weights_give_the_variance_of_a_ratio() -> None:
    """Delta method (Cochran 1977, section 6.4): documents of unlike length whose loss per token is alike."""
    rng = np.random.default_rng(11)
    counts = rng.integers(5, 400, 500).astype(float)
    sums = counts * rng.normal(2.0, 0.1, 500)
    loss = sums.sum() / counts.sum()
    items = sums * len(sums) / counts.sum()
    variance = np.mean((sums - loss * counts) ** 2) / len(sums) / counts.mean() ** 2
    limits = bootstrap_interval(items, "exp-mean", resamples=8000, weights=counts)
    expected = 1.96 * math.sqrt(variance) * math.exp(loss)
    assert half_width(limits) == pytest.approx(expected, rel=0.05)
    assert half_width(bootstrap_interval(items, "exp-mean")) > 5 * expected  # as if lengths were losses


def test_weights_on_any_scale_and_alike_change_nothing() -> None:
    items = np.random.default_rng(12).normal(size=40)
    assert bootstrap_interval(items, weights=np.full(40, 7.0)) == pytest.approx(bootstrap_interval(items))
    counts = np.arange(1.0, 41.0)
    assert bootstrap_interval(items, weights=counts) == pytest.approx(bootstrap_interval(items, weights=3 * counts))


def test_few_kinds_of_items_are_drawn_like_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of right and wrong are the same bootstrap as drawing items one by one."""
    rng = np.random.default_rng(13)
    a, b = (rng.random(400) < 0.7).astype(float), (rng.random(400) < 0.6).astype(float)
    quick = paired_difference(a, b, resamples=20_000)
    monkeypatch.setattr(statistics, "_FEW", 0)
    slow = paired_difference(a, b, resamples=20_000)
    assert quick.difference == slow.difference
    assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=0.004)
    assert quick.p_value == pytest.approx(slow.p_value, rel=0.3)


def test_sides_may_change_places() -> None:
    rng = np.random.default_rng(14)
    for items in (rng.random((2, 300)) < 0.6, rng.normal(size=(2, 60))):
        a, b = items.astype(float)
        there, back = paired_difference(a, b, seed=3), paired_difference(b, a, seed=3)
        assert there.p_value == back.p_value
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_recovery_of_accuracy_agrees_with_the_delta_method() -> None:
    rng = np.random.default_rng(15)
    dense = (rng.random(4000) < 0.8).astype(float)
    items = np.where(rng.random(4000) < 0.1, 0.0, dense)
    value, low, high = recovery_interval(items, dense, "mean", resamples=8000)
    assert value == items.mean() / dense.mean()
    variance = np.mean((items - value * dense) ** 2) / len(items) / dense.mean() ** 2
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)


def test_recovery_of_perplexity_is_a_ratio_of_perplexities() -> None:
    rng = np.random.default_rng(16)
    dense = rng.normal(2.0, 0.5, 300)
    items = dense + rng.normal(0.1, 0.02, 300)
    value, low, high = recovery_interval(items, dense, "exp-mean", resamples=8000)
    assert value == pytest.approx(math.exp(items.mean()) / math.exp(dense.mean()))
    half = 1.96 * (items - dense).std() / math.sqrt(300)
    assert (math.log(low), math.log(high)) == pytest.approx(
        (math.log(value) - half, math.log(value) + half), abs=0.05 * half
    )
    broken = recovery_interval(items + 1000, dense + 1000, "exp-mean")  # both perplexities overflow, their ratio not
    assert broken[0] == pytest.approx(value)


def test_recovery_of_the_dense_model_itself_is_one() -> None:
    dense = np.random.default_rng(17).normal(2.0, 0.5, 30)
    assert recovery_interval(dense, dense, "exp-mean") == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="value is 0"):
        recovery_interval([1.0, 0.0], [0.0, 0.0])


def test_strata_respected_by_recovery() -> None:
    rng = np.random.default_rng(18)
    dense = np.concatenate([rng.normal(10, 0.1, 50), rng.normal(1, 0.1, 50)])
    items = dense * np.repeat([0.9, 0.5], 50)
    wide, narrow = (recovery_interval(items, dense, strata=strata) for strata in (None, (50, 50)))
    assert wide[0] == narrow[0]
    assert narrow[2] - narrow[1] < 0.2 * (wide[2] - wide[1])


@pytest.mark.parametrize("strata", [(2, 1), (0, 4), (4.0,), ("4",), (5,)])
def test_groups_that_do_not_fit_the_items_are_refused(strata: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sum to the 4 items"):
        bootstrap_interval(np.arange(4.0), strata=strata)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 0.0, 1.0], [1.0, math.nan, 1.0]])
def test_weights_that_do_not_fit_the_items_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="each of the 3 items"):
        bootstrap_interval(np.arange(3.0), weights=weights)
