"""How the GPU reads integer codes: bit planes in 32-bit words, tile by tile; as many bytes as are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evenbits.kernels.weights import IntegerWeight
from evenbits.maths.bitpack import unpack_range

TILE = 128  # columns; 8 cells of 16 codes
CELL = 16
_LOADED = 1 << 18  # codes unpacked at a time, so that loading takes some 20 MiB beside what is held


@dataclass(frozen=True)
class Planes:
    """Codes as the GPU reads them, tile by tile of 128 columns; columns beyond the last have code 0.

    words   (tiles, bits // 2, out, 8) int32: of 4 bits two words a cell of 16 codes, of 2 bits one; low bits first
    ones    (tiles, out, 8) int16 of the highest bit of odd widths; else empty
    Cell c holds columns 16 p + 2 c + h of its tile, p = 0..7, h = 0 and 1 in the low and high half of each word: a
    pair for the matrix unit lies in one register.
    """

    words: Tensor
    ones: Tensor


def repack(codes: Tensor, bits: int) -> Planes:
    """codes: (out, in) integer. A few MiB of scratch beside the result."""
    out, columns = codes.shape
    tiles = -(-columns // TILE)
    words = torch.empty(tiles, bits // 2, out, 8, dtype=torch.int32, device=codes.device)
    ones = torch.empty(tiles if bits % 2 else 0, out, 8, dtype=torch.int16, device=codes.device)
    step = max(1, (1 << 18) // max(out, 1))  # tiles at a time
    for first in range(0, tiles, step):
        part = codes[:, first * TILE : (first + step) * TILE].to(torch.int64)
        part = nn.functional.pad(part, (0, -part.shape[1] % TILE))
        cells = part.view(out, -1, 8, 8, 2).permute(1, 0, 3, 2, 4)  # tile, row, cell, pair, half
        last = first + cells.shape[0]
        at, plane, shift = torch.arange(8, device=codes.device), 0, 0
        for width in _widths(bits):
            field = (cells >> shift) & ((1 << width) - 1)
            shift += width
            if width == 1:
                # pairs 0 to 3 at the odd bits of their byte, 4 to 7 at the even ones: see `_codes` in the kernel
                place = torch.where(at < 4, 2 * at + 1, 2 * at - 8)[:, None] + torch.tensor([0, 8], device=at.device)
                ones[first:last] = (field << place).sum((-2, -1)).to(torch.int16)
                continue
            pairs = 16 // width  # of a word, one in either half
            for start in range(0, 8, pairs):
                held = at[:pairs]
                place = width * held[:, None] + torch.tensor([0, 16], device=at.device)
                words[first:last, plane] = (field[..., start : start + pairs, :] << place).sum((-2, -1)).to(torch.int32)
                plane += 1
    return Planes(words, ones)


def _widths(bits: int) -> list[int]:
    """Powers of two whose sum the width is, as they lie in a code from its lowest bit."""
    if bits == 8:
        return [4, 4]
    return [width for width in (4, 2, 1) if bits & width]


def hold_planes(weight: IntegerWeight) -> dict[str, Tensor | None]:
    """The tensors that a layer for Triton holds, by name; scales and zero points by group first.

    Columns sorted by group where that makes runs of group_size; else the index stays, and each scale is gathered.
    """
    out, columns, device = weight.out_features, weight.in_features, weight.codes.device
    group, order = weight.group, None
    if group is not None:
        sorted_groups, by_group = torch.sort(group, stable=True)
        if torch.equal(sorted_groups.long(), torch.arange(columns, device=device) // weight.group_size):
            group, order = None, by_group.to(torch.int32)
    tiles = -(-columns // TILE)
    words = torch.empty(tiles, weight.bits // 2, out, 8, dtype=torch.int32, device=device)
    ones = torch.empty(tiles if weight.bits % 2 else 0, out, 8, dtype=torch.int16, device=device)
    step = max(1, _LOADED // max(columns, 1))
    for start in range(0, out, step):
        stop = min(start + step, out)
        codes = unpack_range(weight.codes, weight.bits, start * columns, (stop - start) * columns).view(-1, columns)
        part = repack(codes if order is None else codes[:, order.long()], weight.bits)
        words[:, :, start:stop] = part.words
        if weight.bits % 2:
            ones[:, start:stop] = part.ones
    return {
        "words": words, "ones": ones, "scale": weight.scale.t().contiguous(), "group": group, "order": order,
        "zero": None if weight.zero is None else weight.zero.t().contiguous(), "levels": weight.levels,
    }  # fmt: skip
