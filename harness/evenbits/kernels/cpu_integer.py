"""Integer codes times inputs on the CPU, from the stored bits: what is decoded at once is a few rows of the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from numba.extending import intrinsic
from torch import Tensor

from evenbits.kernels.cpu_products import (
    Bytes,
    Floats,
    Integers,
    add_products,
    array_of,
    code_at,
    compiled,
    copied_bytes,
    emit_scaled_entries,
    even_stretch,
    half_at,
    require_codes,
    require_rows,
    require_sizes,
    share,
    store_eight,
    word_at,
)
from evenbits.kernels.weights import IntegerWeight
from evenbits.maths.bitpack import pack, packed_bytes, unpack_range

Halves = npt.NDArray[np.int16]  # float16 as it is stored: numba has none on a CPU

# Measured on 4096 x 4096: shorter stretches break the stored rows into pieces too short to be fetched ahead
TILE_ROWS = 8
STRETCH = 4096
PAIRED_BITS = 4  # levels of so many bits are looked up two at a time: a table of 2 KiB
_LOADED = 1 << 20  # codes unpacked at a time, to put them in another order

_look_up_pairs, _look_up_singles = (
    cast(Any, intrinsic(emit_scaled_entries(lanes, count))) for lanes, count in ((2, 4), (1, 8))
)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An IntegerWeight as the kernel reads it, checked once. Its tensors must stay as they are: they are shared.

    extra_bytes  held beside them
    """

    weight: IntegerWeight
    arguments: tuple[Any, ...]
    extra_bytes: int

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare, (self.weight,)  # copied or pickled, arrays would no longer share the tensors' memory


def prepare(weight: IntegerWeight) -> Prepared:
    """Raises ValueError for tensors that are not what the weight's sizes say, or not on the CPU."""
    _check(weight)
    half = weight.scale.dtype == torch.float16
    scale = weight.scale.detach().contiguous().view(-1)
    none = np.zeros(1, np.float32)
    halves = scale.view(torch.int16).numpy() if half else np.zeros(1, np.int16)
    wide = none if half else scale.numpy()
    codes, zero = array_of(weight.codes, torch.uint8), array_of(weight.zero, torch.uint8)
    group = array_of(weight.group, torch.int32)
    together, table = 0, none
    if weight.levels is not None:
        levels = weight.levels.detach().float()
        together = 2 if weight.bits <= PAIRED_BITS else 1
        if together == 2:  # the lower code's level first
            levels = torch.stack((levels.repeat(len(levels)), levels.repeat_interleave(len(levels))), 1)
        table = array_of(levels, torch.float32)
    copies = ((codes, weight.codes), (halves if half else wide, weight.scale), (zero, weight.zero),
              (group, weight.group), (table, weight.levels))  # fmt: skip
    arguments = (
        codes, weight.bits, halves, wide, half, weight.scale.shape[1], zero, weight.zero is not None,
        weight.group_size, group, weight.group is not None, table, together,
    )  # fmt: skip
    return Prepared(weight, arguments, sum(copied_bytes(array, tensor) for array, tensor in copies))


def multiply(weight: IntegerWeight | Prepared, rows: Tensor) -> Tensor:
    """rows (m, in) float32 on the CPU -> rows @ W^T (m, out) float32.

    W is what `IntegerWeight` says, with float16 or float32 scales; sums are float32. torch.get_num_threads() threads,
    which change no bit. Scratch: TILE_ROWS * STRETCH numbers a thread (128 KiB), and as many rows' scales and zeros.
    Raises ValueError for tensors that are not what the weight's sizes say.
    """
    prepared = weight if isinstance(weight, Prepared) else prepare(weight)
    weight = prepared.weight
    require_rows(rows, weight.in_features)
    out = torch.zeros(rows.shape[0], weight.out_features, dtype=torch.float32, device="cpu")
    stretch = even_stretch(weight.in_features, STRETCH, 8)
    inputs = rows.detach().contiguous().numpy()
    share(_multiply, weight.out_features, TILE_ROWS, *prepared.arguments, inputs, TILE_ROWS, stretch, out.numpy())
    return out


def in_runs(weight: IntegerWeight) -> tuple[IntegerWeight, Tensor] | None:
    """The same weight with its columns sorted by group, and that order: x W^T = x[:, order] V^T.

    V has codes of its own, as many bytes, and no `group`: its scales lie in runs, which costs a quarter of looking
    each one up. order: (in,) int64. None where there is no `group`, or sorting makes no runs of group_size.
    """
    if weight.group is None:
        return None
    _check(weight)
    columns, out, bits = weight.in_features, weight.out_features, weight.bits
    found, order = torch.sort(weight.group.long(), stable=True)
    if not torch.equal(found, torch.arange(columns, device="cpu") // max(weight.group_size, 1)):
        return None
    codes = torch.empty(packed_bytes(out * columns, bits), dtype=torch.uint8, device="cpu")
    step = max(1, _LOADED // columns // 8) * 8  # eight rows end on a byte's border
    for start in range(0, out, step):
        count = min(step, out - start)
        part = unpack_range(weight.codes, bits, start * columns, count * columns).view(count, columns)
        packed = pack(part[:, order], bits)
        first = packed_bytes(start * columns, bits)
        codes[first : first + packed.numel()] = packed
    return replace(weight, codes=codes, group=None), order


def _check(weight: IntegerWeight) -> None:
    out, columns, shape = weight.out_features, weight.in_features, tuple(weight.scale.shape)
    if not 2 <= weight.bits <= 8:
        raise ValueError(f"integer codes have 2 to 8 bits, not {weight.bits}")
    parts = [("codes", weight.codes), ("scales", weight.scale), ("zeros", weight.zero), ("groups", weight.group)]
    require_sizes(out, columns, [*parts, ("levels", weight.levels)])
    require_codes(weight.codes, out * columns, weight.bits)
    groups = shape[1] if len(shape) == 2 else 0
    fits = weight.group is not None or (weight.group_size > 0 and -(-columns // weight.group_size) <= groups)
    narrow = weight.scale.dtype in (torch.float16, torch.float32)
    if len(shape) != 2 or shape[0] != out or not narrow or not fits:
        raise ValueError(
            f"scales of {out} rows in groups of {weight.group_size} of {columns} columns are float16 or float32 "
            f"(out, groups), not {weight.scale.dtype} of shape {shape}"
        )
    if weight.zero is not None and (tuple(weight.zero.shape) != shape or weight.zero.dtype != torch.uint8):
        raise ValueError(f"zeros are uint8 {shape}, not {weight.zero.dtype} of shape {tuple(weight.zero.shape)}")
    if weight.levels is not None and (
        weight.levels.numel() != 1 << weight.bits or not weight.levels.is_floating_point()
    ):
        raise ValueError(
            f"{weight.bits} bits have {1 << weight.bits} levels, floats, not {weight.levels.numel()} of "
            f"{weight.levels.dtype}"
        )
    if weight.group is not None and (
        weight.group.numel() != columns or int(weight.group.min()) < 0 or int(weight.group.max()) >= groups
    ):
        raise ValueError(f"groups of {columns} columns lie in [0, {groups}), one a column")


@compiled
def _decode(
    codes: Bytes, line: int, start: int, stop: int, bits: int, size: int, scales: Floats, shifts: Floats, base: int,
    tile: Floats, at: int,
) -> None:  # fmt: skip
    """tile[at + k - start] = code `line` + k, times scales[base + k // size], less the shift there; start <= k < stop.

    Eight codes fill whole bytes, so they go together. One function without slices: to hand an array on costs as much as
    decoding a hundred codes.
    """
    group = start // size
    k = start
    while k < stop:
        end = min(stop, (group + 1) * size)
        scale, shift = scales[base + group], shifts[base + group]
        while k < end and (line + k) & 7:
            tile[at + k - start] = np.float32(code_at(codes, line + k, bits)) * scale - shift
            k += 1
        byte = ((line + k) >> 3) * bits
        target = at + k - start
        last = codes.shape[0] - 8
        whole = k + ((end - k) & ~7)
        while k < whole and byte <= last:
            store_eight(word_at(codes, byte), bits, scale, shift, tile, target)
            byte += bits
            target += 8
            k += 8
        while k < end:
            tile[at + k - start] = np.float32(code_at(codes, line + k, bits)) * scale - shift
            k += 1
        group += 1


@compiled
def _look_up(
    codes: Bytes, line: int, start: int, stop: int, bits: int, size: int, scales: Floats, base: int, table: Floats,
    together: int, tile: Floats, at: int,
) -> None:  # fmt: skip
    """As `_decode`: scales times levels. `together` codes name an entry. With both in one function, both are slower."""
    group = start // size
    step = np.uint64(bits * together)
    mask = (np.uint64(1) << step) - np.uint64(1)
    k = start
    while k < stop:
        end = min(stop, (group + 1) * size)
        scale = scales[base + group]
        while k < end and (line + k) & 7:
            tile[at + k - start] = table[code_at(codes, line + k, bits) * together] * scale
            k += 1
        byte = ((line + k) >> 3) * bits
        target = at + k - start
        last = codes.shape[0] - 8
        whole = k + ((end - k) & ~7)
        while k < whole and byte <= last:
            if together == 2:
                _look_up_pairs(word_at(codes, byte), step, mask, table, scale, tile, target)
            else:
                _look_up_singles(word_at(codes, byte), step, mask, table, scale, tile, target)
            byte += bits
            target += 8
            k += 8
        while k < end:
            tile[at + k - start] = table[code_at(codes, line + k, bits) * together] * scale
            k += 1
        group += 1


@compiled
def _by_group(tile: Floats, at: int, start: int, stop: int, size: int, scales: Floats, base: int) -> None:
    group = start // size
    k = start
    while k < stop:
        end = min(stop, (group + 1) * size)
        scale = scales[base + group]
        first = np.uintp(at + k - start)
        for i in range(end - k):
            tile[first + np.uintp(i)] *= scale
        k = end
        group += 1


@compiled
def _by_column(
    tile: Floats, at: int, start: int, stop: int, group: Integers, scales: Floats, zeros: Floats, base: int
) -> None:
    first, offset, ahead = np.uintp(at), np.uintp(base), np.uintp(start)
    for k in range(stop - start):
        g = offset + np.uintp(group[ahead + np.uintp(k)])
        place = first + np.uintp(k)
        tile[place] = (tile[place] - zeros[g]) * scales[g]


@compiled
def _multiply(
    first: int, last: int, codes: Bytes, bits: int, halves: Halves, wide: Floats, half: bool, groups: int, zero: Bytes,
    has_zero: bool, size: int, group: Integers, has_group: bool, table: Floats, together: int,
    rows: Floats, tile_rows: int, stretch: int, out: Floats,
) -> None:  # fmt: skip
    columns = rows.shape[1]
    square = np.zeros((tile_rows, stretch), np.float32)
    tile = square.reshape(-1)
    scales, zeros = np.empty(tile_rows * groups, np.float32), np.zeros(tile_rows * groups, np.float32)
    sums, ones, none = np.empty(16, np.float32), np.ones(tile_rows * groups, np.float32), np.zeros(1, np.float32)
    middle = np.float32(1 << (bits - 1))
    fused = half and not has_group and together == 0  # scale * zero is exact: 11 digits by 8
    factors = scales if fused or together else ones
    for n in range(first, last, tile_rows):
        count = min(tile_rows, last - n)
        for g in range(count * groups):
            scales[g] = half_at(halves, n * groups + g) if half else wide[n * groups + g]
            if together == 0:
                zeros[g] = np.float32(zero[n * groups + g]) if has_zero else middle
            if fused:
                zeros[g] *= scales[g]
        for start in range(0, columns, stretch):
            stop = min(start + stretch, columns)
            for i in range(count):
                line, at, base = (n + i) * columns, i * stretch, i * groups
                # a column's own scale and zero, or a zero that a float32 scale would round, come after the code
                width, by, shifts, origin = (columns, ones, none, 0) if has_group else (size, factors, zeros, base)
                if together:
                    _look_up(codes, line, start, stop, bits, width, by, origin, table, together, tile, at)
                else:
                    _decode(codes, line, start, stop, bits, width, by, shifts, origin, tile, at)
                if has_group:
                    _by_column(tile, at, start, stop, group, scales, zeros, base)
                elif not fused and not together:
                    _by_group(tile, at, start, stop, size, scales, base)
            add_products(square, rows, start, stop, out, n, count, sums)
