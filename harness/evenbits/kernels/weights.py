"""Packed weights as kernels are given them: the stored bit streams beside what is small enough to hold plainly.

A bit stream is `evenbits.maths.bitpack`'s: least significant bit first, bit k of code i is bit i * width + k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Axis = Literal["in", "out"]


@dataclass(frozen=True)
class IntegerWeight:
    """W[n, k] = scale[n, g] * (code[n, k] - zero[n, g]), g the group of column k; or scale[n, g] * levels[code[n, k]].

    codes   uint8, bit stream of out * in codes, row by row
    scale   (out, groups) float16 or float32
    zero    (out, groups) uint8; None: 2^(bits - 1) everywhere
    group   (in,) int32, which group each column belongs to; None: runs of group_size neighbours, the last may be short
    levels  (2^bits,) float32; None: the codes themselves
    """

    codes: Tensor
    scale: Tensor
    bits: int  # 2 to 8
    out_features: int
    in_features: int
    group_size: int  # in_features for one group a row
    zero: Tensor | None = None
    group: Tensor | None = None
    levels: Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """Indices of sub-vectors and what they point into; code of sub-vector i is number `offset` + i * `stride`.

    codes   uint8, bit stream
    books   (B, 2^window_bits, d) float16 or float32
    book    (lines,) int32, which of the B books each line reads; None: the only one
    bits    of a code, 1 to 16
    window  None: a code is the entry's place. Else the place is made of the last `window` bits of the line's codes up
            to and with this one, ring-wise: as `evenbits.maths.trellis.states` does
    """

    codes: Tensor
    books: Tensor
    bits: int
    stride: int = 1
    offset: int = 0
    book: Tensor | None = None
    window: int | None = None


@dataclass(frozen=True)
class CodebookWeight:
    """A matrix of sub-vectors: line l, chunk c holds sum over streams of their entries, times gain[l] plus offset[l].

    Sub-vector i is l * chunks + c, chunks = ceil(length / d); what lies beyond a line's length is padding, and dropped.
    axis        "in": a line is a row of W (out, in), of length in; "out": a column, of length out
    gain        (lines, 1) or (lines, d) float32, None: ones. offset: likewise, None: zeros
    row_scale   (out,) float32 factor of W's rows, after all that; None: ones
    """

    streams: tuple[Stream, ...]
    out_features: int
    in_features: int
    d: int
    axis: Axis = "in"
    gain: Tensor | None = None
    offset: Tensor | None = None
    row_scale: Tensor | None = None

    @property
    def lines(self) -> int:
        return self.out_features if self.axis == "in" else self.in_features

    @property
    def length(self) -> int:
        return self.in_features if self.axis == "in" else self.out_features

    @property
    def chunks(self) -> int:
        return -(-self.length // self.d)
