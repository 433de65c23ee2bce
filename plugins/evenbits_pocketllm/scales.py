"""Row scales: root mean squares of rows, in float16 or on a logarithmic grid of few bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evenbits.compressor import Role
from evenbits.maths.bitpack import pack, unpack

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST = 2.0**-24  # of float16 above zero
# octaves below the largest scale that a grid of so many bits spans; a step is span / (2^bits - 1)
_OCTAVES = {4: 5.0, 5: 6.0, 6: 8.0, 8: 16.0}

Stored = tuple[dict[str, Tensor], dict[str, Role]]


def row_scale(weight: Tensor) -> Tensor:
    """(out,) float32: the root mean square of each row."""
    return weight.double().square().mean(1).sqrt().float()


def store(scale: Tensor, bits: int, top: Tensor | None = None) -> Stored:
    """Tensors and roles of a layer's row scales (out,), which must not be negative.

    top: (1,) float16 in place of the largest scale, so that refitted scales stay on the grid of the first ones.

    16 bits: "row_scale" float16 (out,). Fewer: "row_scale" packed exponents, and "scale_top" float16 (1,), the largest.
    A zero scale is kept by 16 bits only; a grid's lowest value stands for it.
    """
    if bits == 16:
        return {"row_scale": scale.clamp(0, _LARGEST).half()}, {"row_scale": Role.SCALE}
    top = scale.max().clamp(0, _LARGEST).half().reshape(1) if top is None else top
    octaves = torch.log2(scale.double() / top.double().clamp_min(_SMALLEST)).clamp_min(-_OCTAVES[bits])
    levels = (1 << bits) - 1
    codes = (-octaves.clamp_max(0.0) / _OCTAVES[bits] * levels).round().long()
    return (
        {"row_scale": pack(codes, bits), "scale_top": top},
        {"row_scale": Role.SCALE, "scale_top": Role.SCALE},
    )


def read(tensors: Mapping[str, Tensor], bits: int, rows: int) -> Tensor:
    """(out,) float32 from what `store` made; differentiable in a float "row_scale" and in "scale_top"."""
    if bits == 16:
        return tensors["row_scale"].float()
    codes = unpack(tensors["row_scale"], bits, rows)
    return tensors["scale_top"].float() * torch.exp2(-_OCTAVES[bits] * codes / ((1 << bits) - 1))
