"""Choice of widths and groups under a budget, and the distortion that ranks them."""

from __future__ import annotations

import pytest
import torch

from evenbits.budget import BitBudget
from evenbits.compressor import Refusal
from evenbits.errors import SuiteError
from evenbits.integer import IntegerOptions, expected_distortion, fit, index_width, predict
from evenbits.maths.uniform import dequantise, fit_grid, group_of_column, quantise_weight
from evenbits.shapes import LLAMA2_7B, llama_shapes

TINY = llama_shapes(128, 352, 5, 64, 105, tied=True, dtype="float32")


@pytest.mark.parametrize(("bits", "paper"), [(2, 2.125), (3, 3.125), (4, 4.125)])
def test_paper_bits_of_llama2_7b(bits: int, paper: float) -> None:
    symmetric = predict(IntegerOptions(bits=bits, group_size=128), LLAMA2_7B)
    assert symmetric.paper_bits == paper
    assert symmetric.linear_bits(LLAMA2_7B) == paper  # 4096 and 11008 are multiples of 128: nothing is left out
    asymmetric = predict(IntegerOptions(bits=bits, group_size=128, symmetric=False), LLAMA2_7B)
    assert asymmetric.paper_bits == paper
    assert asymmetric.linear_bits(LLAMA2_7B) == pytest.approx(bits + (16 + bits) / 128)


def test_per_row_scales_nearly_vanish_on_large_layers() -> None:
    estimate = predict(IntegerOptions(bits=4, group_size=None), LLAMA2_7B)
    assert 4.0 < estimate.linear_bits(LLAMA2_7B) < 4.005


@pytest.mark.parametrize("centre", [2.05, 2.3, 3.0, 4.0, 4.25, 8.0])
@pytest.mark.parametrize("shapes", [LLAMA2_7B, TINY], ids=["llama2_7b", "tiny"])
def test_fit_lands_inside_and_leaves_nothing_better(centre: float, shapes: object) -> None:
    assert isinstance(shapes, type(TINY))
    budget = BitBudget(centre, 0.1)
    chosen = fit(IntegerOptions, budget, shapes, {})
    assert isinstance(chosen, IntegerOptions)
    assert predict(chosen, shapes).linear_bits(shapes) in budget
    for bits in range(2, 9):
        for group_size in (None, 16, 32, 64, 128):
            for symmetric in (True, False):
                other = IntegerOptions(bits=bits, group_size=group_size, symmetric=symmetric)
                if predict(other, shapes).linear_bits(shapes) in budget:
                    assert expected_distortion(chosen, shapes) <= expected_distortion(other, shapes) + 1e-12


def test_fit_keeps_what_the_suite_fixed() -> None:
    chosen = fit(IntegerOptions, BitBudget(4.2, 0.1), LLAMA2_7B, {"symmetric": True, "clip_search": True})
    assert isinstance(chosen, IntegerOptions)
    assert chosen.symmetric
    assert chosen.clip_search
    assert chosen.bits == 4


def test_fit_refuses_with_the_bits_of_what_is_fixed() -> None:
    fixed = {"bits": 4, "group_size": 128, "symmetric": True}
    refusal = fit(IntegerOptions, BitBudget(2.0, 0.05), LLAMA2_7B, fixed)
    assert isinstance(refusal, Refusal)
    assert "4.125" in refusal.reason
    below = fit(IntegerOptions, BitBudget(1.0, 0.05), LLAMA2_7B, {})
    assert isinstance(below, Refusal)


@pytest.mark.parametrize("fixed", [{"bit": 4}, {"bits": 9}, {"group_size": 0}])
def test_fit_names_a_wrong_option(fixed: dict[str, int]) -> None:
    with pytest.raises(SuiteError, match=f"option {next(iter(fixed))}"):
        fit(IntegerOptions, BitBudget(4.0, 0.1), LLAMA2_7B, fixed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, 128), (3, 64), (6, 32)])
def test_expected_distortion_is_that_of_gaussians(symmetric: bool, bits: int, group_size: int) -> None:
    weight = torch.randn(1024, 256, generator=torch.Generator().manual_seed(bits))
    grid = fit_grid(weight, bits, group_size, symmetric=symmetric)
    group = group_of_column(256, group_size)
    restored = dequantise(quantise_weight(weight, grid, group).long(), grid.scale, grid.zero, group)
    options = IntegerOptions(bits=bits, group_size=group_size, symmetric=symmetric)
    measured = float((restored - weight).square().mean())
    assert expected_distortion(options, LLAMA2_7B) == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(("groups", "width"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9)])
def test_index_width(groups: int, width: int) -> None:
    assert index_width(groups) == width
