"""The same work in plain torch, for comparison: a weight decoded to a dense one, and the nearest codeword by chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evenbits.kernels.weights import CodebookWeight, IntegerWeight
from gpu_parts.packed import Weight


def codes_of(stored: Tensor, width: int, count: int) -> Tensor:
    """int32 (count,): all codes of a bit stream at once, whatever memory that takes. Eight codes are `width` bytes."""
    rows = -(-count // 8)
    padded = torch.nn.functional.pad(stored, (0, rows * width - stored.numel()))
    octets = padded.view(rows, width)
    if width == 8:
        return octets.reshape(-1)[:count].int()
    out = torch.empty(rows, 8, dtype=torch.int32, device=stored.device)
    for code in range(8):
        byte, shift = divmod(code * width, 8)
        found = octets[:, byte].int()
        for more in range(1, (shift + width + 7) // 8):
            found = found | octets[:, byte + more].int() << 8 * more
        out[:, code] = (found >> shift) & ((1 << width) - 1)
    return out.view(-1)[:count]


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """(out, in). Windows are not decoded here: none of the formats that are timed has one."""
    return _integer(weight, dtype) if isinstance(weight, IntegerWeight) else _codebook(weight, dtype)


def _integer(weight: IntegerWeight, dtype: torch.dtype) -> Tensor:
    out, into, size = weight.out_features, weight.in_features, weight.group_size
    if weight.group is not None or weight.levels is not None or into % size:
        raise ValueError("only whole groups of neighbours on an even grid are timed")
    codes = codes_of(weight.codes, weight.bits, out * into).view(out, -1, size)
    zero = 1 << (weight.bits - 1) if weight.zero is None else weight.zero[..., None].int()
    return ((codes - zero).to(dtype) * weight.scale.to(dtype)[..., None]).view(out, into)


def _codebook(weight: CodebookWeight, dtype: torch.dtype) -> Tensor:
    total: Tensor | None = None
    count = weight.lines * weight.chunks
    for stream in weight.streams:
        if stream.window is not None or stream.book is not None:
            raise ValueError("only single books read by plain indices are timed")
        held = count * stream.stride
        codes = codes_of(stream.codes, stream.bits, held)[stream.offset :: stream.stride]
        part = stream.books[0].to(dtype)[codes]
        total = part if total is None else total + part
    assert total is not None
    total = total.view(weight.lines, weight.chunks, weight.d)
    if weight.gain is not None:
        total = total * weight.gain.to(dtype)[:, None]
    if weight.offset is not None:
        total = total + weight.offset.to(dtype)[:, None]
    found = total.flatten(1)[:, : weight.length]
    found = found if weight.axis == "in" else found.t()
    return found if weight.row_scale is None else found * weight.row_scale.to(dtype)[:, None]


Nearest = Callable[[Tensor, Tensor, int], Tensor]


def by_cdist(vectors: Tensor, centres: Tensor, chunk: int) -> Tensor:
    """int64 (n,): the distances of `chunk` vectors at a time to all centres, and their argmin."""
    return torch.cat([torch.cdist(part, centres).argmin(1) for part in torch.split(vectors, chunk)])


def by_addmm(vectors: Tensor, centres: Tensor, chunk: int) -> Tensor:
    """As `by_cdist`, by |c|^2 - 2 v c^T: one product, nothing squared for each pair."""
    squares, turned = centres.square().sum(1), centres.t()
    return torch.cat([torch.addmm(squares, part, turned, alpha=-2).argmin(1) for part in torch.split(vectors, chunk)])
