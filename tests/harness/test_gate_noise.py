"""The noise that the gate allows for: scatter pooled over rows, tests and their adjustment."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evenbits.gate_noise import MOST_FREEDOM, holm, judge_change, pool_scatter


def test_rows_that_scatter_alike_know_their_scatter_better_together() -> None:
    draw = np.random.default_rng(0)
    found = pool_scatter(draw.normal(0, 0.01, (20, 5)).tolist())
    own = draw.normal(0, 0.01, (20, 5)).std(axis=1, ddof=1)
    pooled = np.array([one.deviation for one in found if one is not None])
    assert pooled.std() < 0.5 * own.std()
    assert np.exp(np.log(pooled).mean()) == pytest.approx(0.01, rel=0.15)
    assert {one.freedom for one in found if one is not None} == {4 + MOST_FREEDOM}


def test_rows_that_scatter_otherwise_keep_their_own() -> None:
    draw = np.random.default_rng(1)
    scales = np.repeat([1e-4, 1.0], 10)
    found = pool_scatter((draw.normal(0, 1, (20, 5)) * scales[:, None]).tolist())
    assert all(one is not None and one.freedom < 4 + 1 for one in found)
    assert all(one is not None and 0.2 < one.deviation / scale < 5 for one, scale in zip(found, scales, strict=True))


def test_what_loses_more_scatters_more() -> None:
    """In proportion to the loss: the common scatter follows, and says of a row with one seed what to expect."""
    draw = np.random.default_rng(2)
    losses = np.geomspace(0.01, 0.5, 16)
    groups = (0.05 * losses[:, None] * draw.normal(0, 1, (16, 5))).tolist()
    blind, seen = pool_scatter(groups), pool_scatter(groups, losses.tolist())
    assert blind[0] is not None
    assert seen[0] is not None
    assert blind[0].freedom < 6 < seen[0].freedom
    alone = pool_scatter([*groups, [1.0]], [*losses, 0.1])[-1]
    assert alone is not None
    assert alone.deviation == pytest.approx(0.005, rel=0.3)
    assert alone.freedom < seen[0].freedom


def test_equal_numbers_are_no_proof_of_no_scatter() -> None:
    found = pool_scatter([[1.0, 1.01], [1.0, 1.02], [1.0, 0.99], [1.0, 1.015], [1.0, 1.0]])
    assert found[-1] is not None
    assert 0 < found[-1].deviation < 0.02
    assert pool_scatter([[1.0], [2.0]]) == [None, None]
    assert pool_scatter([[1.0, 1.0], [2.0, 2.0]]) == [None, None]


def test_a_change_against_the_scatter() -> None:
    found = judge_change(2.1, 1.0, 1e9, 0.95)
    assert (found.low, found.high) == pytest.approx((2.1 - 1.96, 2.1 + 1.96), abs=1e-3)
    assert found.p_worse == pytest.approx(0.01786, rel=1e-3)
    assert found.p_better == pytest.approx(1 - 0.01786, rel=1e-3)
    assert judge_change(1.0, 1.0, 1.0, 0.95).p_worse == pytest.approx(0.25)  # t with one degree of freedom
    exact = judge_change(-1e-9, 0.0, math.inf, 0.95)
    assert (exact.p_worse, exact.p_better) == (1.0, 0.0)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
