"""Codewords times inputs on the CPU, from the stored indices: what is decoded at once is a small tile of the weight."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from evenbits.kernels.cpu_prepared import Prepared, prepare
from evenbits.kernels.cpu_products import (
    Bytes,
    Floats,
    Integers,
    Whole,
    add_lines,
    add_products,
    bits_at,
    code_at,
    compiled,
    emit_entries,
    even_stretch,
    pointer,
    require_rows,
    share,
    word_at,
)
from evenbits.kernels.weights import CodebookWeight

__all__ = ["Prepared", "multiply", "prepare"]

# a tile of the weight: so many lines of so many numbers at most, as for integers
TILE_ROWS = 8
STRETCH = 4096
VECTORS = 64  # outputs that threads' shares are multiples of: then only a line's very end is not whole vectors
PATTERN = 256  # numbers that a line's gains are repeated to, so that they go in vectors


def _emitter(lanes: int, count: int, add: bool) -> Any:
    """out[at + i * lanes + j] = or += table[base + place i * lanes + j], i < count, j < lanes: one store of all."""

    def emit_stored(context: Any, word: Any, step: Any, mask: Any, table: Any, base: Any, out: Any, at: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word, step, mask, table, base, out, at = arguments
            value = emit_entries(context, builder, signature.args[3], table, word, step, mask, base, lanes, count)
            target = pointer(context, builder, signature.args[5], out, at, value.type)
            if add:
                before = builder.load(target)
                before.align = 4
                value = builder.fadd(before, value)
            builder.store(value, target).align = 4
            return context.get_dummy_value()

        signature = types.void(types.uint64, types.uint64, types.uint64, table, types.intp, out, types.intp)
        return signature, emit

    return cast(Any, intrinsic(emit_stored))


_copy1, _copy4, _copy8, _copy16 = (_emitter(lanes, 1, False) for lanes in (1, 4, 8, 16))
_add1, _add4, _add8, _add16 = (_emitter(lanes, 1, True) for lanes in (1, 4, 8, 16))
_copy_eight1, _copy_four4, _copy_two8 = (_emitter(lanes, count, False) for lanes, count in ((1, 8), (4, 4), (8, 2)))
_add_eight1, _add_four4, _add_two8 = (_emitter(lanes, count, True) for lanes, count in ((1, 8), (4, 4), (8, 2)))


def multiply(weight: CodebookWeight | Prepared, rows: Tensor) -> Tensor:
    """rows (m, in) float32 on the CPU -> rows @ W^T (m, out) float32.

    W is what `CodebookWeight` says, in float32, as the sums. torch.get_num_threads() threads, which change no bit.
    Scratch a thread: TILE_ROWS * STRETCH numbers (128 KiB); for a weight that is not prepared, what `prepare` makes.
    Raises ValueError for tensors that are not what the weight's sizes say.
    """
    prepared = weight if isinstance(weight, Prepared) else prepare(weight)
    weight = prepared.weight
    require_rows(rows, weight.in_features)
    out = torch.zeros(rows.shape[0], weight.out_features, dtype=torch.float32, device="cpu")
    along = weight.axis == "in"
    cut = 1 if along else VECTORS // math.gcd(VECTORS, weight.d)
    stretch = even_stretch(weight.chunks, STRETCH // weight.d, cut)
    arguments = *prepared.arguments, rows.detach().contiguous().numpy(), stretch, out.numpy()
    if along:
        share(_by_rows, weight.out_features, TILE_ROWS, *arguments)
    else:
        share(_by_columns, weight.chunks, cut, *arguments)
    return out if weight.row_scale is None else out.mul_(weight.row_scale.detach().float().view(-1))


@compiled
def _put(table: Floats, place: Whole, out: Floats, at: int, d: int, add: bool) -> None:
    """out[at : at + d] = or += table[place : place + d], in as few vectors as there are."""
    none = np.uint64(0)
    done = 0
    while done < d:
        left = d - done
        if left >= 16:
            if add:
                _add16(none, none, none, table, place + done, out, at + done)
            else:
                _copy16(none, none, none, table, place + done, out, at + done)
            done += 16
        elif left >= 8:
            if add:
                _add8(none, none, none, table, place + done, out, at + done)
            else:
                _copy8(none, none, none, table, place + done, out, at + done)
            done += 8
        elif left >= 4:
            if add:
                _add4(none, none, none, table, place + done, out, at + done)
            else:
                _copy4(none, none, none, table, place + done, out, at + done)
            done += 4
        else:
            if add:
                _add1(none, none, none, table, place + done, out, at + done)
            else:
                _copy1(none, none, none, table, place + done, out, at + done)
            done += 1


@compiled
def _put_together(
    codes: Bytes, bit: int, step: int, mask: Whole, table: Floats, base: Whole, turns: int, out: Floats, at: int,
    d: int, add: bool,
) -> None:  # fmt: skip
    """As `_put_all`, so many places a turn as one word holds and one vector takes: 8 of d = 1, 4 of 4, 2 of 8."""
    by = np.uint64(step)
    if d == 1 and add:
        for _ in range(turns):
            _add_eight1(word_at(codes, bit >> 3) >> np.uint64(bit & 7), by, mask, table, base, out, at)
            bit += 8 * step
            at += 8
    elif d == 1:
        for _ in range(turns):
            _copy_eight1(word_at(codes, bit >> 3) >> np.uint64(bit & 7), by, mask, table, base, out, at)
            bit += 8 * step
            at += 8
    elif d == 4 and add:
        for _ in range(turns):
            _add_four4(word_at(codes, bit >> 3) >> np.uint64(bit & 7), by, mask, table, base, out, at)
            bit += 4 * step
            at += 16
    elif d == 4:
        for _ in range(turns):
            _copy_four4(word_at(codes, bit >> 3) >> np.uint64(bit & 7), by, mask, table, base, out, at)
            bit += 4 * step
            at += 16
    elif add:
        for _ in range(turns):
            _add_two8(word_at(codes, bit >> 3) >> np.uint64(bit & 7), by, mask, table, base, out, at)
            bit += 2 * step
            at += 16
    else:
        for _ in range(turns):
            _copy_two8(word_at(codes, bit >> 3) >> np.uint64(bit & 7), by, mask, table, base, out, at)
            bit += 2 * step
            at += 16


@compiled
def _put_all(
    codes: Bytes, bit: int, step: int, wide: int, table: Floats, base: Whole, count: int, out: Floats, at: int, d: int,
    add: bool,
) -> None:  # fmt: skip
    """Entries of `count` places, each `step` bits after the one before; eight bytes from each on are there."""
    mask = np.uint64((1 << wide) - 1)
    two_to = 3 if d == 1 else 2 if d == 4 else 1 if d == 8 else 0
    if two_to and ((1 << two_to) - 1) * step + wide <= 57:  # a word begins up to 7 bits before its first code
        turns = count >> two_to
        _put_together(codes, bit, step, mask, table, base, turns, out, at, d, add)
        done = turns << two_to
        bit += done * step
        at += done * d
        count -= done
    for _ in range(count):
        place = np.int64((word_at(codes, bit >> 3) >> np.uint64(bit & 7)) & mask)
        _put(table, base + place * d, out, at, d, add)
        bit += step
        at += d


@compiled
def _decode(
    codes: Bytes, bits: int, stride: int, offset: int, wide: int, behind: int, table: Floats, size: int,
    book: Integers, has_book: bool, line: int, lines: int, first: int, last: int, chunks: int, d: int, width: int,
    out: Floats, add: bool,
) -> None:  # fmt: skip
    """Entries of chunks first to last of `lines` lines into `out`, `width` numbers a line."""
    mask = (1 << wide) - 1
    step = bits * stride
    end = (codes.shape[0] - 7) << 3  # whole words can be read before it
    symbols = -(-wide // bits)
    for i in range(lines):
        start, at, c = (line + i) * chunks, i * width, first
        base = np.int64(book[line + i]) * size if has_book else 0
        # of a window the codes may lie before the line's first, which is behind its last
        ring = last if behind < 0 else min(last, behind)
        if c < ring:
            state, before = 0, (c - symbols) % chunks
            for _ in range(symbols):
                code = code_at(codes, offset + (start + before) * stride, bits)
                before = before + 1 if before + 1 < chunks else 0
                state = (state >> bits) | (code << (wide - bits)) if behind > 0 else ((state << bits) | code) & mask
            while c < ring:
                code = code_at(codes, offset + (start + c) * stride, bits)
                state = (state >> bits) | (code << (wide - bits)) if behind > 0 else ((state << bits) | code) & mask
                _put(table, base + state * d, out, at, d, add)
                at += d
                c += 1
        if c >= last:
            continue
        bit = (offset + (start + c) * stride - behind) * bits
        whole = last - c
        if bit + (whole - 1) * step >= end:  # the last line's: seldom, for divisions are slow
            whole = max(0, (end - bit + step - 1) // step)
        _put_all(codes, bit, step, wide, table, base, whole, out, at, d, add)
        bit += whole * step
        at += whole * d
        for _ in range(last - c - whole):
            _put(table, base + bits_at(codes, bit, wide) * d, out, at, d, add)
            bit += step
            at += d


@compiled
def _repeat(of: Floats, line: int, numbers: int, default: float, out: Floats) -> None:
    """A line's one number or d numbers over and over; a whole number of times."""
    if numbers <= 1:
        out[:] = of[line] if numbers else np.float32(default)
        return
    for start in range(0, out.shape[0], numbers):
        for j in range(numbers):
            out[start + j] = of[line * numbers + j]


@compiled
def _rescale(out: Floats, at: int, count: int, gain: Floats, offset: Floats) -> None:
    """out = out * gain + offset, from `at` on, these repeated."""
    width = gain.shape[0]
    for start in range(0, count, width):
        first = np.uintp(at + start)
        for i in range(min(width, count - start)):
            place = first + np.uintp(i)
            out[place] = out[place] * gain[i] + offset[i]


@compiled
def _lines(
    streams: Any, line: int, lines: int, first: int, last: int, chunks: int, d: int, gain: Floats, gains: int,
    offset: Floats, offsets: int, by: Floats, width: int, tile: Floats,
) -> None:  # fmt: skip
    add = False
    for stream in streams:
        codes, bits, stride, number, wide, behind, table, size, book, has_book = stream
        _decode(
            codes, bits, stride, number, wide, behind, table, size, book, has_book, line, lines, first, last, chunks,
            d, width, tile, add,
        )  # fmt: skip
        add = True
    if gains or offsets:
        for i in range(lines):
            _repeat(gain, line + i, gains, 1.0, by[0])
            _repeat(offset, line + i, offsets, 0.0, by[1])
            _rescale(tile, i * width, (last - first) * d, by[0], by[1])


@compiled
def _by_rows(
    first: int, last: int, streams: Any, lines: int, length: int, chunks: int, d: int, gain: Floats, gains: int,
    offset: Floats, offsets: int, rows: Floats, stretch: int, out: Floats,
) -> None:  # fmt: skip
    width = stretch * d
    square = np.zeros((TILE_ROWS, width), np.float32)
    tile, sums = square.reshape(-1), np.empty(16, np.float32)
    by = np.empty((2, -(-PATTERN // d) * d), np.float32)
    for n in range(first, last, TILE_ROWS):
        count = min(TILE_ROWS, last - n)
        for start in range(0, chunks, stretch):
            stop = min(start + stretch, chunks)
            _lines(streams, n, count, start, stop, chunks, d, gain, gains, offset, offsets, by, width, tile)
            add_products(square, rows, start * d, min(stop * d, length), out, n, count, sums)


@compiled
def _by_columns(
    first: int, last: int, streams: Any, lines: int, length: int, chunks: int, d: int, gain: Floats, gains: int,
    offset: Floats, offsets: int, rows: Floats, stretch: int, out: Floats,
) -> None:  # fmt: skip
    width = stretch * d
    square = np.zeros((TILE_ROWS, width), np.float32)
    tile = square.reshape(-1)
    by = np.empty((2, -(-PATTERN // d) * d), np.float32)
    for start in range(first, last, stretch):
        stop = min(start + stretch, last)
        for line in range(0, lines, TILE_ROWS):
            count = min(TILE_ROWS, lines - line)
            _lines(streams, line, count, start, stop, chunks, d, gain, gains, offset, offsets, by, width, tile)
            for i in range(count, -(-count // 4) * 4):
                square[i] = 0  # its factor is zero, but zero times what is not finite is not
            add_lines(square, count, rows, line, out, start * d, min(stop * d, length))
