"""Evenly spaced levels, per row and group of columns: round-to-nearest and its grids.

A weight is stored as a code c in 0..2^b-1 and restored as (c - zero) * scale. Codes are always chosen against the
scale as it is stored (float16), so that an underflow or overflow of the scale costs accuracy but never correctness.
Source: arXiv:2210.17323 (GPTQ), the quantiser of section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
SHRINK_STEPS = 80  # clip search tries the factors 1 - i / 100 for i in 0..79
ERROR_POWER = 2.4
_WORKING_SET = 1 << 18  # elements at a time in the clip search, so that it stays in cache
_RESTORED = 1 << 20  # elements restored at a time: what is needed on the way is several times the result


@dataclass(frozen=True, slots=True)
class Grid:
    """scale: (out, groups) float16; zero: (out, groups) int32 in 0..2^bits-1."""

    scale: Tensor
    zero: Tensor
    bits: int


@dataclass(frozen=True, slots=True)
class OnGrid:
    """A whole weight as codes on grids: (codes - zero) * scale, for formats of other libraries to hold unchanged.

    codes: (out, in) uint8; group: (in,) int64, the group of each column; group_size: columns of each group but the
    last; neighbours: whether groups are runs of neighbouring columns.
    """

    codes: Tensor
    grid: Grid
    group: Tensor
    group_size: int
    neighbours: bool

    def decode(self) -> Tensor:
        """(out, in) float32."""
        return dequantise(self.codes, self.grid.scale, self.grid.zero, self.group)


def group_slices(columns: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """(start, stop) of each group of columns; the last may be short."""
    size = columns if group_size is None else min(group_size, columns)
    for start in range(0, columns, size):
        yield start, min(start + size, columns)


def group_of_column(columns: int, group_size: int | None, device: torch.device | str = "cpu") -> Tensor:
    """int64 (columns,): which group each column lies in when groups are runs of neighbours."""
    size = columns if group_size is None else min(group_size, columns)
    return torch.arange(columns, device=device) // size


def fit_group(weight: Tensor, bits: int, *, symmetric: bool, clip_search: bool = False) -> tuple[Tensor, Tensor]:
    """One grid per row of a group: weight (rows, columns) float32 -> scale (rows,) float16, zero (rows,) int32.

    Asymmetric: from min(0, min w) to max(0, max w), so that 0 is always a level.
    Symmetric: zero is 2^(b-1) and scale is 2 max|w| / (2^b - 1), so 0 is a level, -max|w| and +max|w| both lie half a
    step from their nearest level, and there is one level more below zero than above (absmax / 7.5 at 4 bits).
    clip_search: shrink both ends by 1 - i/100, i = 0..79, and keep for each row what has the least sum of |error|^2.4.
    """
    if symmetric:
        high = weight.abs().amax(dim=1)
        low = -high
    else:
        low = weight.amin(dim=1).clamp(max=0)
        high = weight.amax(dim=1).clamp(min=0)
    if not clip_search:
        return _grid(low, high, bits, symmetric)
    rows = max(1, _WORKING_SET // weight.shape[1])
    found = [
        _search(weight[i : i + rows], low[i : i + rows], high[i : i + rows], bits, symmetric)
        for i in range(0, weight.shape[0], rows)
    ]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def fit_grid(weight: Tensor, bits: int, group_size: int | None, *, symmetric: bool, clip_search: bool = False) -> Grid:
    """The grids of all groups: weight (out, in) float32; group_size None is one group a row."""
    # Group by group rather than reshaped at once: the sums of the clip search then run over the same layout as in
    # GPTQ, which fits one group at a time, and both give the same bits.
    fitted = [
        fit_group(weight[:, start:stop].contiguous(), bits, symmetric=symmetric, clip_search=clip_search)
        for start, stop in group_slices(weight.shape[1], group_size)
    ]
    scales, zeros = zip(*fitted, strict=True)
    return Grid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1), bits)


def divisor_of(scale: Tensor) -> Tensor:
    """float32 of the stored scale, infinite where it is 0: a group whose scale vanished gets the code of zero."""
    wide = scale.float()
    return torch.where(wide == 0, torch.inf, wide)


def quantise(weight: Tensor, divisor: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes as float32 whole numbers: round(w / scale) + zero, clamped to 0..2^bits-1; arguments broadcast."""
    return (weight / divisor).round_().add_(zero).clamp_(0, 2**bits - 1)


def quantise_weight(weight: Tensor, grid: Grid, group: Tensor) -> Tensor:
    """Codes uint8 (out, in) of a whole weight; group: (in,) which group each column belongs to."""
    divisor = divisor_of(grid.scale)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, (1 << 22) // weight.shape[1])  # bounds the memory of the spread scales
    for i in range(0, weight.shape[0], rows):
        part = slice(i, i + rows)
        codes[part] = quantise(weight[part], divisor[part][:, group], grid.zero[part][:, group], grid.bits)
    return codes


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor) -> Tensor:
    """(out, in) float32 from codes (out, in), scale and zero (out, groups), group (in,).

    Differentiable in scale, and in zero where that is a float.
    """
    if torch.is_grad_enabled() and (scale.requires_grad or zero.requires_grad):
        return (codes - zero[:, group]).float() * scale.float()[:, group]
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    rows = max(1, _RESTORED // codes.shape[1])
    for i in range(0, codes.shape[0], rows):
        part = slice(i, i + rows)
        weight[part] = (codes[part] - zero[part][:, group]).float().mul_(scale[part].float()[:, group])
    return weight


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale as stored and its zero for ranges of any one shape."""
    steps = 2**bits - 1
    exact = ((high - low) / steps).clamp(max=torch.finfo(SCALE_DTYPE).max)
    if symmetric:
        scale = _narrow_down(exact)
        return scale, torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.int32, device=scale.device)
    scale = exact.to(SCALE_DTYPE)
    zero = (-low / divisor_of(scale)).round().clamp(0, steps)
    return scale, zero.to(torch.int32)


def _narrow_down(scale: Tensor) -> Tensor:
    """The float16 at or next below each scale; the nearest one where that is subnormal, as there the gaps are wide.

    -max|w| lies on the border of the two lowest levels. A scale rounded up sends it to the inner one, as max|w| is
    always sent, so that extremes of both signs shrink: on a small Llama at 2 bits in groups of 32 perplexity rose
    from 13.8 to 15.4. Rounded down, the lowest level is always reached, and the two signs' errors cancel.
    """
    narrow = scale.to(SCALE_DTYPE)
    raised = (narrow.float() > scale) & (narrow > torch.finfo(SCALE_DTYPE).tiny)
    return (narrow.view(torch.int16) - raised.to(torch.int16)).view(SCALE_DTYPE)  # positive floats sort as integers


def _search(weight: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    factors = 1 - torch.arange(SHRINK_STEPS, device=weight.device, dtype=torch.float32) / 100
    scale, zero = _grid(factors[:, None] * low, factors[:, None] * high, bits, symmetric)  # (factors, rows)
    error = torch.empty(scale.shape, device=weight.device)
    batch = max(1, _WORKING_SET // weight.numel())
    for i in range(0, SHRINK_STEPS, batch):
        part = slice(i, i + batch)
        codes = quantise(weight, divisor_of(scale[part])[..., None], zero[part][..., None], bits)
        restored = codes.sub_(zero[part][..., None]).mul_(scale[part].float()[..., None])
        error[part] = restored.sub_(weight).abs_().pow_(ERROR_POWER).sum(dim=-1)
    best = error.argmin(dim=0, keepdim=True)
    return scale.gather(0, best)[0], zero.gather(0, best)[0]
