"""Steps in noisy series: found where they are, not found where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evenbits.steps import PENALTY, Floats, find_levels


def noise(count: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=count)


@pytest.mark.parametrize("known", [False, True], ids=["noise from the series", "noise from seeds"])
def test_noise_alone_has_steps_in_less_than_one_series_of_a_hundred(known: bool) -> None:
    scales, count = ([1.0] * 60, 300) if known else (None, 1000)
    found = [find_levels(noise(60, seed), scales) for seed in range(count)]
    assert sum(bool(levels.steps) or levels.drift is not None for levels in found) < 0.01 * count
    assert 0.9 < np.median([levels.noise for levels in found]) < 1.3


@pytest.mark.parametrize("count", [8, 12, 25])
def test_short_series_raise_no_alarm_either(count: int) -> None:
    found = [find_levels(noise(count, seed)) for seed in range(300)]
    assert sum(bool(levels.steps) for levels in found) <= 9


@pytest.mark.parametrize(("after", "least"), [(5, 0.85), (30, 0.95)])
def test_a_step_of_three_deviations_is_found_where_it_is(after: int, least: float) -> None:
    hits, sizes = 0, []
    for seed in range(100):
        values = noise(60, seed)
        values[-after:] += 3
        steps = find_levels(values).steps
        hits += len(steps) == 1 and abs(steps[0].index - (60 - after)) <= 2
        sizes += [step.change for step in steps]
    assert hits / 100 >= least
    assert abs(np.mean(sizes) - 3) < 0.3


def test_how_large_and_how_sure() -> None:
    values = [10.0, 10.1, 9.9, 10.0, 10.1, 9.9, 12.0, 12.1, 11.9, 12.0]
    (step,) = find_levels(values).steps
    assert (step.index, step.before, step.after) == (6, pytest.approx(10), pytest.approx(12))
    assert step.relative == pytest.approx(0.2)
    assert step.deviations > 10
    assert step.p_value < 1e-9
    (less,) = find_levels(values, [0.5] * 10).steps  # the same change in more noise
    assert less.deviations < step.deviations
    assert less.p_value > step.p_value


@pytest.mark.parametrize("size", [5.0, 30.0, 1e6])
@pytest.mark.parametrize("at", [0, 20, 39])
def test_a_single_outlier_is_no_step(size: float, at: int) -> None:
    for seed in range(20):
        values = noise(40, seed)
        values[at] += size
        assert not find_levels(values).steps


def test_a_step_is_found_beside_an_outlier() -> None:
    values = noise(40, 1)
    values[25:] += 6
    values[10] -= 50
    values[30] += 50
    (step,) = find_levels(values).steps
    assert step.index == 25
    assert step.change == pytest.approx(6, abs=0.8)


def test_a_level_lasts_two_nights() -> None:
    quiet = [0.0, 0.1, -0.1, 0.05, 0.0, -0.05, 0.1, -0.1, 0.0]
    assert not find_levels([*quiet, 5.0]).steps
    assert [step.index for step in find_levels([*quiet, 5.0, 5.1]).steps] == [9]
    # one value that stood for nights because nothing was computed anew has lasted too
    assert [step.index for step in find_levels([*quiet, 5.0], repeats=[*[1] * 9, 2]).steps] == [9]


def test_what_was_kept_lasts_and_is_no_surer() -> None:
    once = find_levels([1.0, 2.0], [0.1, 0.1], [2, 2]).steps[0]
    often = find_levels([1.0, 2.0], [0.1, 0.1], [50, 50]).steps[0]
    assert once.deviations == often.deviations == pytest.approx(1 / math.hypot(0.1, 0.1))
    assert not find_levels([1.0, 1.3], [0.1, 0.1], [50, 50]).steps  # 2.1 deviations of one draw each


def test_unequal_noise_counts() -> None:
    values, scales = [0.0] * 10 + [3.0] * 3, [0.3] * 10 + [0.3] * 3
    assert find_levels(values, scales).steps
    assert not find_levels(values, [0.3] * 10 + [4.0] * 3).steps


def test_a_floor_keeps_small_changes_quiet() -> None:
    values = [1.0] * 5 + [1.001] * 5
    assert len(find_levels(values).steps) == 1
    found = find_levels(values, floor=0.01)
    assert (found.steps, found.noise_from) == ((), "floor")


def test_a_slow_drift_is_one_and_no_staircase() -> None:
    for seed in range(10):
        found = find_levels(np.linspace(0, 12, 60) + noise(60, seed), [1.0] * 60)
        assert found.steps == ()
        assert found.drift == pytest.approx(12 / 59, rel=0.25)
    stepped = np.repeat([0.0, 6.0], 30) + noise(60, 3)
    assert find_levels(stepped, [1.0] * 60).drift is None


def test_two_steps_and_the_levels_between() -> None:
    values = np.repeat([5.0, 9.0, 5.5], 12) + 0.3 * noise(36, 5)
    found = find_levels(values)
    assert [step.index for step in found.steps] == [12, 24]
    assert found.levels[0] == pytest.approx(5, abs=0.3)
    assert found.levels[15] == pytest.approx(9, abs=0.3)


def test_units_do_not_matter() -> None:
    values = noise(30, 2)
    values[18:] += 4
    found = [find_levels(factor * values + shift).steps for factor, shift in ((1, 0), (1e-6, 0), (1e7, -1e9))]
    assert [[step.index for step in steps] for steps in found] == [[18]] * 3


def test_short_and_constant_series() -> None:
    assert find_levels([]).levels == ()
    assert find_levels([3.0]).levels == (pytest.approx(3),)
    assert find_levels([0.0] * 20).steps == ()
    assert find_levels([7.0] * 20).noise < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, math.nan],), "finite"),
        (([1.0], [1.0, 2.0]), "one each"),
        (([1.0, 2.0], [1.0, -1.0]), "finite"),
        (([1.0, 2.0], None, [1]), "one each"),
    ],
)
def test_what_is_no_series_is_refused(arguments: tuple[list[float], ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_levels(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor"):
        find_levels([1.0], floor=-1)


def test_the_penalty_is_worth_a_pair_of_points() -> None:
    """Two points on the new level can pay for a step: else a lasting change would be seen only later."""
    assert PENALTY < 2 * 3.0**2
