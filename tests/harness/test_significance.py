"""Tests of differences against closed forms, scipy, and simulation."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from evenbits.significance import (
    Sampled,
    against_best,
    difference,
    exact_mcnemar,
    interval,
    p_value_of,
    recovery,
    seed_interval,
)
from evenbits.statistics import Floats, Statistic


def pair(only_a: int, only_b: int, both: int = 20, neither: int = 7) -> tuple[Floats, Floats]:
    a = np.repeat([1.0, 0.0, 1.0, 0.0], [only_a, only_b, both, neither])
    b = np.repeat([0.0, 1.0, 1.0, 0.0], [only_a, only_b, both, neither])
    return a, b


def seeds(items: Floats, transform: Statistic = "mean", **more: object) -> Sampled:
    values = items.mean(axis=1)
    return Sampled(np.exp(values) if transform == "exp-mean" else values, items, transform, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("only_a", "only_b"), [(10, 2), (2, 10), (1, 0), (5, 5), (40, 21), (0, 6)])
def test_mcnemar_is_the_binomial_of_discordant_items(only_a: int, only_b: int) -> None:
    n, k = only_a + only_b, min(only_a, only_b)
    by_hand = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    found = exact_mcnemar(*pair(only_a, only_b))
    assert found[:2] == (only_a, only_b)
    assert found[2] == pytest.approx(by_hand, rel=1e-12)
    assert found[2] == pytest.approx(scipy.stats.binomtest(only_a, n, 0.5).pvalue, rel=1e-9)


def test_mcnemar_takes_right_and_wrong_only() -> None:
    assert exact_mcnemar(*pair(0, 0)) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="0 or 1"):
        exact_mcnemar([0.5, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="paired"):
        exact_mcnemar([1.0], [1.0, 1.0])


def test_one_seed_of_right_and_wrong_gets_mcnemar_and_all_else_the_bootstrap() -> None:
    a, b = pair(10, 2)
    found = difference(seeds(a[None]), seeds(b[None]))
    assert (found.test, found.discordant, found.items) == ("exact McNemar", (10, 2), len(a))
    assert found.p_value == exact_mcnemar(a, b)[2]
    assert found.difference == pytest.approx(8 / len(a))
    assert found.low < found.difference < found.high
    of_tasks = difference(seeds(a[None], strata=(20, 19)), seeds(b[None], strata=(20, 19)))
    assert (of_tasks.test, of_tasks.discordant) == ("paired t test", None)
    changes: list[tuple[float, Statistic]] = [(2.0, "mean"), (1.0, "exp-mean")]
    for times, transform in changes:
        x, y = (seeds(np.tile(times * side, 4)[None], transform) for side in (a, b))
        assert difference(x, y).test == "paired bootstrap"
        assert p_value_of(x, y) == difference(x, y).p_value
    assert p_value_of(seeds(a[None]), seeds(b[None])) == found.p_value


@pytest.mark.parametrize("transform", ["mean", "exp-mean"])
def test_identical_items_do_not_differ(transform: Statistic) -> None:
    items = np.random.default_rng(0).normal(size=(1, 30))
    for side in (seeds(items, transform), seeds(np.repeat(items, 3, axis=0), transform)):
        found = difference(side, side)
        assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_seeds_alone_are_welchs_test() -> None:
    a, b = np.array([5.1, 5.3, 5.2, 5.6]), np.array([5.7, 5.5, 5.9])
    found = difference(Sampled(a), Sampled(b))
    welch = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert found.p_value == pytest.approx(welch.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(welch.confidence_interval(0.95)))
    assert found.test == "t test over seeds"
    assert math.isnan(difference(Sampled(a[:1]), Sampled(b[:1])).p_value)


def test_a_single_seed_is_taken_to_vary_as_the_others_do() -> None:
    """Then it is the pooled test with one value on one side; the dense model does not vary at all."""
    a, b = np.array([5.1, 5.3, 5.2, 5.6]), np.array([5.9])
    pooled = scipy.stats.ttest_ind(a, b, equal_var=True)
    assert difference(Sampled(a), Sampled(b)).p_value == pytest.approx(pooled.pvalue)
    one_sample = scipy.stats.ttest_1samp(a, 5.9)
    assert difference(Sampled(a), Sampled(b, fixed=True)).p_value == pytest.approx(one_sample.pvalue)


def test_interval_over_seeds_is_scipys() -> None:
    values = [5.1, 5.3, 5.6]
    mean, low, high = seed_interval(values)
    assert mean == pytest.approx(np.mean(values))
    expected = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least two"):
        seed_interval([1.0])
    assert interval(Sampled(np.array([1.0]))) is None


def draw(rng: np.random.Generator, seeds_: int, common: Floats, shift: float = 0.0) -> Floats:
    """(seeds, items): how hard an item is, how lucky a seed is, and what one does on the other."""
    return shift + common + rng.normal(0, 0.1, (seeds_, 1)) + rng.normal(0, 0.3, (seeds_, len(common)))


def test_a_variance_known_from_two_seeds_is_not_trusted_too_far() -> None:
    """One t with Satterthwaite's degrees of freedom: 10 % of intervals of two seeds miss, 7 % of three against one."""
    rng = np.random.default_rng(9)
    missed = alarms = 0
    for _ in range(600):
        luck = rng.normal(0.0, 0.3, (2, 1)) + rng.normal(2.0, 1.3, 60)
        found = interval(seeds(luck))
        assert found is not None
        missed += not found[0] <= 2.0 <= found[1]
        many = rng.normal(0.0, 0.3, (4, 1)) + rng.normal(2.0, 1.0, (4, 60))
        alarms += difference(seeds(many[:3]), seeds(many[3:])).p_value <= 0.05
    assert missed <= 46  # 30 expected, standard deviation 5.3
    assert alarms <= 46


@pytest.mark.parametrize("count", [2, 3, 5])
def test_false_alarms_over_seeds_stay_at_the_level(count: int) -> None:
    """The no-overlap rule gives one in three at two seeds and one in ten at three."""
    rng = np.random.default_rng(count)
    alarms = 0
    for _ in range(400):
        common = rng.normal(2.0, 0.5, 150)
        a, b = (seeds(draw(rng, count, common), "exp-mean") for _ in range(2))
        found = difference(a, b)
        alarms += found.p_value <= 0.05
    assert alarms <= 34  # 20 expected, standard deviation 4.4; items counted twice make it fewer


def test_intervals_over_seeds_and_items_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = width = 0.0
    for _ in range(400):
        found = interval(seeds(draw(rng, 3, rng.normal(2.0, 0.5, 60))))
        assert found is not None
        hits += found[0] <= 2.0 <= found[1]
        width += found[1] - found[0]
    assert 370 <= hits <= 398  # 380 expected, standard deviation 4.4; what is counted twice errs upwards
    assert width / 400 < 0.8  # 4.3 standard errors of seeds alone would be about 0.5


def test_a_clear_difference_is_found_with_three_seeds() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(2.0, 0.5, 200)
    found = difference(seeds(draw(rng, 3, common, 0.8), "exp-mean"), seeds(draw(rng, 3, common), "exp-mean"))
    assert found.p_value < 0.01
    assert 0 < found.low < found.difference < found.high
    assert found.test == "t test over seeds and items"


def test_perplexities_of_two_seeds_do_not_reach_below_zero() -> None:
    one = seeds(np.random.default_rng(3).normal([[2.0], [2.6]], 0.1, (2, 50)), "exp-mean")
    found = interval(one)
    assert found is not None
    assert 0 < found[0] < one.values.min()
    assert found[1] > one.values.max()


def test_seeds_that_change_nothing_are_one_seed() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(2.0, 0.5, (2, 50))
    once = difference(seeds(a[None], "exp-mean"), seeds(b[None], "exp-mean"))
    thrice = difference(seeds(np.tile(a, (3, 1)), "exp-mean"), seeds(b[None], "exp-mean"))
    assert (once.p_value, once.low, once.high) == (thrice.p_value, thrice.low, thrice.high)


def test_enormous_perplexities_do_not_overflow() -> None:
    a, b = (np.random.default_rng(5).normal(700.0, 0.1, (3, 20)) for _ in range(2))
    found = difference(seeds(a, "exp-mean"), seeds(b - 300, "exp-mean"))
    assert 0 <= found.p_value <= 1


def test_a_model_that_diverged_by_very_different_amounts_is_told_from_a_sound_one() -> None:
    """By the perplexities themselves, [5e4, 1e5, 2e5] against 1.7, it would not be: p 0.1."""
    rng = np.random.default_rng(0)
    sound = np.log(1.7) + 0.3 * rng.standard_normal((1, 200)) + 0.001 * rng.standard_normal((3, 1))
    lost = np.log([[5e4], [1e5], [2e5]]) + rng.standard_normal((1, 200))
    assert difference(seeds(sound, "exp-mean"), seeds(lost, "exp-mean")).p_value < 0.002


def test_perplexities_and_their_losses_differ_with_the_same_certainty() -> None:
    rng = np.random.default_rng(1)
    a, b = (0.5 + shift + 0.1 * rng.standard_normal((3, 100)) for shift in (0, 0.05))
    assert difference(seeds(a, "exp-mean"), seeds(b, "exp-mean")).p_value == pytest.approx(
        difference(seeds(a), seeds(b)).p_value, rel=1e-12
    )


def test_weights_and_groups_count_over_seeds_too() -> None:
    rng = np.random.default_rng(6)
    counts = rng.integers(5, 400, 300).astype(float)
    share = counts / counts.mean()
    a, b = (share * rng.normal(2.0, 0.05, (3, 300)) for _ in range(2))
    weighted, plain = (interval(seeds(a, weights=weights)) for weights in (counts, None))
    assert weighted is not None
    assert plain is not None
    assert weighted[1] - weighted[0] < 0.3 * (plain[1] - plain[0])
    level = np.repeat([0.0, 5.0], 150)
    grouped = difference(seeds(a + level, strata=(150, 150)), seeds(b, strata=(150, 150)))
    pooled = difference(seeds(a + level), seeds(b))
    assert grouped.high - grouped.low < 0.8 * (pooled.high - pooled.low)


def test_recovery_over_seeds_agrees_with_one_seed_where_seeds_agree() -> None:
    rng = np.random.default_rng(7)
    dense = rng.normal(2.0, 0.5, 300)
    items = dense + rng.normal(0.1, 0.05, 300)
    base = Sampled(np.array([np.exp(dense.mean())]), dense[None], "exp-mean", fixed=True)
    one = recovery(seeds(items[None], "exp-mean"), base)
    nearly = np.stack([items, items + 1e-9, items - 1e-9])
    three = recovery(seeds(nearly, "exp-mean"), base)
    assert one == pytest.approx(three, rel=1e-3)
    assert one[0] == pytest.approx(math.exp(items.mean() - dense.mean()))
    scattered = recovery(seeds(nearly + np.array([[0.1], [0.0], [-0.1]]), "exp-mean"), base)
    assert scattered[2] is not None
    assert one[2] is not None
    assert scattered[2] > one[2]
    two = recovery(seeds(np.stack([items, items + 0.8]), "exp-mean"), base)
    assert two[1] is not None
    assert 0 < two[1] < two[0]  # a ratio of perplexities
    assert recovery(Sampled(np.array([4.0])), Sampled(np.array([2.0]))) == (2.0, None, None)
    with pytest.raises(ValueError, match="value is 0"):
        recovery(Sampled(np.array([4.0])), Sampled(np.array([0.0])))


def test_against_the_best_by_hand() -> None:
    """Ryan's shares: of four, the worst counts for 6 pairs, the next for 4 * 2 / 2, the second best for 4 / 2."""
    assert against_best([0.01, 0.002, 0.001]) == pytest.approx([0.02, 0.008, 0.006])
    assert against_best([0.001, 0.01, 0.03]) == pytest.approx([0.18, 0.18, 0.18])  # none within what is not told apart
    assert against_best([0.04]) == [0.04]
    assert against_best([0.3, 0.9]) == [1.0, 1.0]
    found = against_best([0.01, math.nan, 0.01])
    assert found[::2] == pytest.approx([0.03, 0.03])
    assert math.isnan(found[1])
    assert against_best([]) == []


@pytest.mark.parametrize("clusters", [(10,), (20,), (5, 5), (3, 12, 1)])
def test_false_alarms_of_a_section_stay_at_the_level(clusters: tuple[int, ...]) -> None:
    """Methods equal within clusters, the best picked by its number: Holm's k - 1 give 18 % for ten, 24 % for twenty."""
    rng = np.random.default_rng(8)
    truth = np.repeat(np.arange(len(clusters)) * 6.0, clusters)
    alarms = 0
    for _ in range(1000):
        seen = truth + rng.normal(size=len(truth))
        order = np.argsort(seen)
        p_values = 2 * scipy.stats.norm.sf((seen[order[1:]] - seen[order[0]]) / math.sqrt(2))
        equal = truth[order[1:]] == truth[order[0]]
        alarms += bool((np.array(against_best(list(p_values)))[equal] <= 0.05).any())
    assert alarms <= 70  # at most 50 expected, standard deviation 7


def test_importing_statistics_stays_cheap() -> None:
    code = "import evenbits.significance, evenbits.statistics, sys; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
