"""Uniform grids: the levels themselves, clip search, and scales that leave float16's range."""

from __future__ import annotations

import pytest
import torch

from evenbits.maths import uniform
from evenbits.maths.uniform import (
    dequantise,
    fit_grid,
    fit_group,
    group_of_column,
    group_slices,
    quantise_weight,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(
    weight: torch.Tensor, bits: int, group_size: int | None, *, symmetric: bool, clip_search: bool = False
) -> torch.Tensor:
    grid = fit_grid(weight, bits, group_size, symmetric=symmetric, clip_search=clip_search)
    group = group_of_column(weight.shape[1], group_size)
    return dequantise(quantise_weight(weight, grid, group).long(), grid.scale, grid.zero, group)


def below(scale: torch.Tensor) -> torch.Tensor:
    """The float16 at or next below."""
    near = scale.half()
    return torch.where(near.float() > scale, torch.nextafter(near, torch.zeros_like(near)), near)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("at_once", [1, 300, 10_000])
def test_restored_in_parts_it_is_what_one_formula_gives(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (7, 100), generator=generator).to(dtype)
    scale = torch.rand(7, 4, generator=generator).half()
    zero = torch.randint(16, (7, 4), generator=generator)
    group = group_of_column(100, 32)
    expected = (codes.double() - zero.double()[:, group]).float() * scale.float()[:, group]
    monkeypatch.setattr(uniform, "_RESTORED", at_once)
    for zeros in (zero, zero.int(), zero.float()):
        assert torch.equal(dequantise(codes, scale, zeros, group), expected)
    for tuned in ("scale", "zero"):
        leaves = {"scale": scale.float(), "zero": zero.float()}
        leaves[tuned].requires_grad_()
        weight = dequantise(codes, leaves["scale"], leaves["zero"], group)
        assert torch.equal(weight, expected)
        weight.sum().backward()  # type: ignore[no-untyped-call]
        assert leaves[tuned].grad is not None
        with torch.no_grad():
            assert torch.equal(dequantise(codes, leaves["scale"], leaves["zero"], group), expected)


def test_groups_cover_the_columns_and_the_last_is_short() -> None:
    slices = list(group_slices(172, 32))
    assert slices[:2] == [(0, 32), (32, 64)]
    assert slices[-1] == (160, 172)
    assert list(group_slices(10, None)) == list(group_slices(10, 64)) == [(0, 10)]
    by_column = group_of_column(172, 32)
    assert all(set(by_column[start:stop].tolist()) == {g} for g, (start, stop) in enumerate(slices))


def test_asymmetric_levels_by_hand() -> None:
    # range -0.5..1.0 over three steps of 0.5: zero is level 1
    scale, zero = fit_group(torch.tensor([[-0.5, 0.2, 1.0]]), 2, symmetric=False)
    assert scale.item() == 0.5
    assert zero.item() == 1
    restored = round_trip(torch.tensor([[-0.5, 0.2, 1.0, 0.3]]), 2, None, symmetric=False)
    assert restored.tolist() == [[-0.5, 0.0, 1.0, 0.5]]


def test_asymmetric_range_holds_zero() -> None:
    """Weights far from zero on one side: zero stays a level, as a dead or masked weight needs it."""
    weight = torch.tensor([[3.0, 3.5, 4.0], [-3.0, -3.5, -4.0]])
    scale, zero = fit_group(weight, 4, symmetric=False)
    assert zero.tolist() == [0, 15]
    assert torch.allclose(scale.float(), torch.tensor([4 / 15, 4 / 15]), rtol=1e-3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_is_further_than_half_a_step(bits: int, symmetric: bool) -> None:
    weight = gaussian(8, 172, seed=bits)
    grid = fit_grid(weight, bits, 32, symmetric=symmetric)
    group = group_of_column(172, 32)
    codes = quantise_weight(weight, grid, group).long()
    assert codes.max() < 2**bits
    step = grid.scale.float()[:, group]
    error = (weight - dequantise(codes, grid.scale, grid.zero, group)).abs()
    # the stored scale may be 2^-11 short of the range, which adds up to that share of half the range; the rounding of
    # an asymmetric zero point may leave an end another half step away
    reach = (0.5 if symmetric else 1.0) + 2 ** (bits - 11)
    assert (error <= step * reach).all()
    if symmetric:
        assert (grid.zero == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_extremes_reach_the_outermost_levels(bits: int) -> None:
    """However float16 rounds the scale: else the extremes of both signs would shrink."""
    weight = gaussian(500, 1, seed=bits)
    weight += 0.05 * weight.sign()  # no subnormal scales
    grid = fit_grid(weight, bits, None, symmetric=True)
    codes = quantise_weight(weight, grid, group_of_column(1, None)).flatten()
    assert torch.equal(codes == 0, weight.flatten() < 0)
    assert torch.equal(codes == 2**bits - 1, weight.flatten() > 0)
    assert torch.equal(grid.scale, below(2 * weight.abs() / (2**bits - 1)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 64])
def test_clip_search_against_a_slow_twin(symmetric: bool, size: int) -> None:
    weight = gaussian(6, size, seed=3)
    weight[0, 0] = 9.0  # an outlier that is worth clipping
    scale, zero = fit_group(weight, 3, symmetric=symmetric, clip_search=True)
    for row in range(weight.shape[0]):
        low, high = weight[row].min().clamp(max=0), weight[row].max().clamp(min=0)
        if symmetric:
            high = weight[row].abs().max()
            low = -high
        best = float("inf")
        for i in range(80):
            exact = (high - low) * (1 - i / 100) / 7
            step = (below(exact) if symmetric else exact.half()).float()
            offset = 4.0 if symmetric else torch.round(-low * (1 - i / 100) / step)
            restored = ((weight[row] / step).round() + offset).clamp(0, 7).sub(offset) * step
            best = min(best, float((restored - weight[row]).abs().pow(2.4).sum()))
        found = ((weight[row] / scale[row].float()).round() + zero[row]).clamp(0, 7).sub(zero[row]) * scale[row].float()
        assert float((found - weight[row]).abs().pow(2.4).sum()) == pytest.approx(best, rel=1e-3)


def test_clip_search_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(40, 64)
    whole = fit_group(weight, 3, symmetric=False, clip_search=True)
    monkeypatch.setattr("evenbits.maths.uniform._WORKING_SET", 64 * 7)
    pieces = fit_group(weight, 3, symmetric=False, clip_search=True)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip_search", [True, False])
def test_zero_rows_stay_zero(symmetric: bool, clip_search: bool) -> None:
    weight = gaussian(3, 40)
    weight[1] = 0
    restored = round_trip(weight, 2, 16, symmetric=symmetric, clip_search=clip_search)
    assert torch.isfinite(restored).all()
    assert (restored[1] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("size", "largest_error"), [(1e-30, 1.01), (1e-9, 1.01), (3e-6, 0.15), (1.0, 0.15), (1e4, 0.15)]
)
def test_scales_beyond_float16(symmetric: bool, size: float, largest_error: float) -> None:
    """Below float16's normal range scales are coarse, then vanish: finite, and no worse than zero."""
    weight = gaussian(8, 64) * size
    restored = round_trip(weight, 4, 32, symmetric=symmetric)
    assert torch.isfinite(restored).all()
    error = (restored.double() - weight.double()).norm() / weight.double().norm()
    assert float(error) <= largest_error


def test_a_scale_too_large_is_clipped_not_infinite() -> None:
    restored = round_trip(torch.full((1, 4), 1e9), 4, None, symmetric=True)
    assert restored.tolist() == [[7 * 65504.0] * 4]
