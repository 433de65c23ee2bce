"""Row scales: root mean squares of rows, in float16 or on a logarithmic grid of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from evenbits.maths.bitpack import pack, unpack

if TYPE_CHECKING:
    from evenbits.compressor import Role

_OCTAVES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 24.0)  # below the largest scale, that a grid may reach

Stored: TypeAlias = "tuple[dict[str, Tensor], dict[str, Role]]"


def row_scale(weight: Tensor) -> Tensor:
    """(out,) float32: the root mean square of each row."""
    return weight.double().square().mean(1).sqrt().float()


def store(scale: Tensor, bits: int, frame: Tensor | None = None) -> Stored:
    """Tensors and roles of a layer's row scales (out,), which must not be negative.

    16 bits: "row_scale" float16 (out,). Fewer: "row_scale" packed exponents on a logarithmic grid, and "scale_frame"
    (2,) float16, its largest value and how many octaves below it the grid reaches. A row below the grid gets its lowest
    value. frame: one in place of that, so that refitted scales stay on the grid of the first ones.
    """
    from evenbits.compressor import Role
    from evenbits.maths.stored import LARGEST, SMALLEST

    if bits == 16:
        return {"row_scale": scale.clamp(0, LARGEST).half()}, {"row_scale": Role.SCALE}
    wide = scale.double()
    if frame is None:
        top = wide.max().clamp(SMALLEST, LARGEST)
        frame = min(
            (torch.stack([top, top.new_tensor(o)]).half() for o in _OCTAVES), key=lambda f: _loss(wide, f, bits)
        )
    return (
        {"row_scale": pack(_exponents(wide, frame, bits), bits), "scale_frame": frame},
        {"row_scale": Role.SCALE, "scale_frame": Role.SCALE},
    )


def _exponents(scale: Tensor, frame: Tensor, bits: int) -> Tensor:
    top, octaves = frame.double().unbind()
    steps = torch.log2(top / scale.clamp_min(2.0**-60)) * ((1 << bits) - 1) / octaves
    return steps.round().clamp(0, (1 << bits) - 1).long()


def _loss(scale: Tensor, frame: Tensor, bits: int) -> float:
    """Energy of rows times how much their error grows, about as the square of what a scale is off by."""
    top, octaves = frame.double().unbind()
    found = top * torch.exp2(-octaves * _exponents(scale, frame, bits) / ((1 << bits) - 1))
    off = torch.log2(found / scale.clamp_min(2.0**-60)).abs().clamp_max(30.0)
    return float((scale.square() * torch.exp2(2 * off)).sum())


def read(tensors: Mapping[str, Tensor], bits: int, rows: int) -> Tensor:
    """(out,) float32 from what `store` made; differentiable in a float "row_scale" and in "scale_frame"."""
    if bits == 16:
        return tensors["row_scale"].float()
    codes = unpack(tensors["row_scale"], bits, rows)
    top, octaves = tensors["scale_frame"].float().unbind()
    return top * torch.exp2(-octaves * codes / ((1 << bits) - 1))
