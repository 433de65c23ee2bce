"""Gathered codewords times inputs, on the GPU; formulas, tiles and roofline stand in kernels/codebook.md.

A codeword of d numbers is stored in DP, d rounded up to a power of two, and gathered in pieces of E: at most 8
numbers, 4 where inputs or table are float32, so that a piece is one load of 16 bytes. A tile is (lines, pieces, E) with
lanes and warps along the pieces: codes, inputs and sums of a tile lie in the same threads, and a loop step exchanges
nothing between them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from evenbits.kernels.launch import Case, Config, Kernel

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"


@triton.jit
def _bits(words, bit, ok, WIDTH: tl.constexpr, STRADDLES: tl.constexpr, FRESH: tl.constexpr):
    """WIDTH <= 31 bits of a stream from bit `bit` on. FRESH: past L1, which is the table's; else first out of it."""
    at = words + (bit >> 5)
    shift = (bit & 31).to(tl.uint32)
    if FRESH:
        low = tl.load(at, mask=ok, other=0, cache_modifier=".cg").to(tl.uint32)
    else:
        low = tl.load(at, mask=ok, other=0, eviction_policy="evict_first").to(tl.uint32)
    found = low >> shift
    if STRADDLES:
        if FRESH:
            high = tl.load(at + 1, mask=ok, other=0, cache_modifier=".cg").to(tl.uint32)
        else:
            high = tl.load(at + 1, mask=ok, other=0, eviction_policy="evict_first").to(tl.uint32)
        found = found | ((high << 1) << (31 - shift))  # in two steps: a shift by 32 is not defined
    return (found & ((1 << WIDTH) - 1)).to(tl.int32)


@triton.jit
def _places(
    words, line, chunk, ok, first, chunks,
    BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, WORD: tl.constexpr, WINDOW: tl.constexpr,
    READ: tl.constexpr, ALIGNED: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """(lines, pieces) int32: the entry that each sub-vector of one stream names. first: the least of `chunk`."""
    STRADDLES: tl.constexpr = 32 % BITS != 0
    start = (line.to(tl.int64) * chunks * STRIDE + OFFSET) * BITS
    words = (words + (WORD + (start >> 5)))[:, None]
    # where lines begin at whole words, the position in the line is the same for all of them
    rest = (OFFSET * BITS) % 32 if ALIGNED else (start & 31).to(tl.int32)[:, None]
    if WINDOW == 0:
        place = _bits(words, rest + chunk[None, :] * (STRIDE * BITS), ok, BITS, STRADDLES, FRESH)
    else:
        MEMORY: tl.constexpr = (WINDOW + BITS - 1) // BITS
        place = tl.zeros((line.shape[0], chunk.shape[0]), tl.int32)
        if READ and first >= MEMORY - 1:
            # the table is in the order of the stream: a place is the WINDOW bits that end with the code
            place = _bits(words, rest + (chunk[None, :] + 1) * BITS - WINDOW, ok, WINDOW, True, FRESH)
        else:
            for m in tl.static_range(MEMORY):
                back = (chunk + (MEMORY * chunks - m)) % chunks  # the first chunks look back at the line's last
                code = _bits(words, rest + back[None, :] * (STRIDE * BITS), ok, BITS, STRADDLES, False)
                if READ and (m + 1) * BITS > WINDOW:
                    place = place | (code >> ((m + 1) * BITS - WINDOW))
                elif READ:
                    place = place | (code << (WINDOW - (m + 1) * BITS))
                else:
                    place = place | (code << (m * BITS))
        place = place & ((1 << WINDOW) - 1)
    return place


@triton.jit
def _vectors(
    words, table, book, line, line_ok, piece, first, lines, chunks,
    STREAMS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, WORD: tl.constexpr,
    ENTRY: tl.constexpr, WINDOW: tl.constexpr, READ: tl.constexpr, DP: tl.constexpr, ROW: tl.constexpr, E: tl.constexpr,
    ALIGNED: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """(lines, pieces, E) float32: the sum over streams of what `piece` of each line decodes to. first: least piece."""
    PIECES: tl.constexpr = DP // E
    chunk = piece // PIECES
    part = piece % PIECES
    ok = line_ok[:, None] & (chunk < chunks)[None, :]  # others read entry 0, and meet zeros
    e = tl.arange(0, E)[None, None, :]
    total = tl.zeros((line.shape[0], piece.shape[0], E), tl.float32)
    for s in tl.static_range(STREAMS):
        place = _places(
            words,
            line,
            chunk,
            ok,
            first // PIECES,
            chunks,
            BITS[s],
            STRIDE[s],
            OFFSET[s],
            WORD[s],
            WINDOW[s],
            READ[s],
            ALIGNED,
            FRESH,
        )
        if book is not None:
            place = place + tl.load(book + s * lines + line, mask=line_ok, other=0)[:, None]
        at = (place + ENTRY[s]) * ROW
        if PIECES > 1:
            at = at + (part * E)[None, :]
        if ROW == DP:
            found = tl.load(table + (at[:, :, None] + e), eviction_policy="evict_last")
        else:
            inside = (part * E)[None, :, None] + e < ROW
            found = tl.load(table + (at[:, :, None] + e), mask=inside, other=0.0, eviction_policy="evict_last")
        if s == 0:
            total = found.to(tl.float32)
        else:
            total += found.to(tl.float32)
    return total


@triton.jit
def _of_lines(pointer, line, line_ok, part, HOW: tl.constexpr, DP: tl.constexpr, E: tl.constexpr):
    """Gains or offsets of lines: (lines, 1, 1) for HOW = 1, by number (lines, 1 or pieces, E) for 2."""
    e = tl.arange(0, E)
    if HOW == 1:
        found = tl.load(pointer + line, mask=line_ok, other=0.0)[:, None, None]
    elif DP == E:
        found = tl.load(pointer + line[:, None] * DP + e[None, :], mask=line_ok[:, None], other=0.0)[:, None, :]
    else:
        at = line[:, None, None] * DP + (part * E)[None, :, None] + e[None, None, :]
        found = tl.load(pointer + at, mask=line_ok[:, None, None], other=0.0)
    return found


@triton.jit
def _store(out, sums, row, number, inside, split, rows, out_features, row_scale, bias, DIRECT: tl.constexpr):
    """Outputs of one row or many, scaled and with their bias; or, undone, one part of split sums (split, rows, out)."""
    if DIRECT:
        if row_scale is not None:
            sums = sums * tl.load(row_scale + number, mask=inside, other=0.0)
        if bias is not None:
            sums = sums + tl.load(bias + number, mask=inside, other=0.0).to(tl.float32)
        at = row * out_features + number
    else:
        at = (split * rows + row) * out_features + number
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gemv_in(
    x, words, table, book, gain, offset, row_scale, bias, out, lines, chunks, length, steps,
    ROWS: tl.constexpr, STREAMS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    WORD: tl.constexpr, ENTRY: tl.constexpr, WINDOW: tl.constexpr,
    READ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROW: tl.constexpr,
    E: tl.constexpr, ALIGNED: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr,
    DIRECT: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """1 to 4 rows x (ROWS, length); a line is an output. Grid (lines / BL, splits); a split is `steps` tiles of BP
    pieces. EVEN: sub-vectors fill the line, so that no number but only whole chunks must be masked."""
    PIECES: tl.constexpr = DP // E
    line = tl.program_id(0) * BL + tl.arange(0, BL)
    line_ok = line < lines
    begin = tl.program_id(1) * steps * BP
    sum0 = tl.zeros((BL, BP), tl.float32)
    sum1 = tl.zeros((BL, BP), tl.float32)
    sum2 = tl.zeros((BL, BP), tl.float32)
    sum3 = tl.zeros((BL, BP), tl.float32)
    if (GAIN > 0) & ((PIECES == 1) | (GAIN == 1)):  # the same in all steps
        held_gain = _of_lines(gain, line, line_ok, line, GAIN, DP, E)
    if (SHIFT > 0) & ((PIECES == 1) | (SHIFT == 1)):
        held_shift = _of_lines(offset, line, line_ok, line, SHIFT, DP, E)
    for step in range(steps):
        first = begin + step * BP
        piece = first + tl.arange(0, BP)
        w = _vectors(
            words, table, book, line, line_ok, piece, first, lines, chunks,
            STREAMS, BITS, STRIDE, OFFSET, WORD, ENTRY, WINDOW, READ, DP, ROW, E, ALIGNED, FRESH,
        )  # fmt: skip
        if GAIN > 0:
            if (PIECES == 1) | (GAIN == 1):
                w = w * held_gain
            else:
                w = w * _of_lines(gain, line, line_ok, piece % PIECES, GAIN, DP, E)
        if SHIFT > 0:
            if (PIECES == 1) | (SHIFT == 1):
                w = w + held_shift
            else:
                w = w + _of_lines(offset, line, line_ok, piece % PIECES, SHIFT, DP, E)
        within = (piece % PIECES * E)[:, None] + tl.arange(0, E)[None, :]
        k = (piece // PIECES * D)[:, None] + within
        if EVEN:
            ok = (piece // PIECES < chunks)[:, None]
        else:
            ok = (piece // PIECES < chunks)[:, None] & (within < D) & (k < length)
        sum0 += tl.sum(w * tl.load(x + k, mask=ok, other=0.0).to(tl.float32)[None, :, :], axis=2)
        if ROWS > 1:
            sum1 += tl.sum(w * tl.load(x + length + k, mask=ok, other=0.0).to(tl.float32)[None, :, :], axis=2)
        if ROWS > 2:
            sum2 += tl.sum(w * tl.load(x + 2 * length + k, mask=ok, other=0.0).to(tl.float32)[None, :, :], axis=2)
        if ROWS > 3:
            sum3 += tl.sum(w * tl.load(x + 3 * length + k, mask=ok, other=0.0).to(tl.float32)[None, :, :], axis=2)
    split = tl.program_id(1)
    _store(out, tl.sum(sum0, axis=1), 0, line, line_ok, split, ROWS, lines, row_scale, bias, DIRECT)
    if ROWS > 1:
        _store(out, tl.sum(sum1, axis=1), 1, line, line_ok, split, ROWS, lines, row_scale, bias, DIRECT)
    if ROWS > 2:
        _store(out, tl.sum(sum2, axis=1), 2, line, line_ok, split, ROWS, lines, row_scale, bias, DIRECT)
    if ROWS > 3:
        _store(out, tl.sum(sum3, axis=1), 3, line, line_ok, split, ROWS, lines, row_scale, bias, DIRECT)


@triton.jit
def gemv_out(
    x, words, table, book, gain, offset, row_scale, bias, out, lines, chunks, length, steps,
    ROWS: tl.constexpr, STREAMS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    WORD: tl.constexpr, ENTRY: tl.constexpr, WINDOW: tl.constexpr,
    READ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROW: tl.constexpr,
    E: tl.constexpr, ALIGNED: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, DIRECT: tl.constexpr,
    BL: tl.constexpr, BP: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """1 to 4 rows x (ROWS, lines); a line is an input. Grid (pieces / BP, splits): a program owns BP pieces of the
    outputs and walks steps * BL lines, BL of them unrolled so that as many gathers are under way at once."""
    PIECES: tl.constexpr = DP // E
    first = tl.program_id(0) * BP
    piece = first + tl.arange(0, BP)
    split = tl.program_id(1)
    begin = split * steps * BL
    sum0 = tl.zeros((1, BP, E), tl.float32)
    sum1 = tl.zeros((1, BP, E), tl.float32)
    sum2 = tl.zeros((1, BP, E), tl.float32)
    sum3 = tl.zeros((1, BP, E), tl.float32)
    for step in range(steps):
        for b in tl.static_range(BL):
            at = begin + step * BL + b
            line = at + tl.arange(0, 1)
            line_ok = line < lines
            w = _vectors(
                words, table, book, line, line_ok, piece, first, lines, chunks,
                STREAMS, BITS, STRIDE, OFFSET, WORD, ENTRY, WINDOW, READ, DP, ROW, E, ALIGNED, FRESH,
            )  # fmt: skip
            if GAIN > 0:
                w = w * _of_lines(gain, line, line_ok, piece % PIECES, GAIN, DP, E)
            if SHIFT > 0:
                w = w + _of_lines(offset, line, line_ok, piece % PIECES, SHIFT, DP, E)
            sum0 += w * tl.load(x + at, mask=at < lines, other=0.0).to(tl.float32)
            if ROWS > 1:
                sum1 += w * tl.load(x + lines + at, mask=at < lines, other=0.0).to(tl.float32)
            if ROWS > 2:
                sum2 += w * tl.load(x + 2 * lines + at, mask=at < lines, other=0.0).to(tl.float32)
            if ROWS > 3:
                sum3 += w * tl.load(x + 3 * lines + at, mask=at < lines, other=0.0).to(tl.float32)
    within = (piece % PIECES * E)[None, :, None] + tl.arange(0, E)[None, None, :]
    number = (piece // PIECES * D)[None, :, None] + within
    inside = (within < D) & (number < length)
    _store(out, sum0, 0, number, inside, split, ROWS, length, row_scale, bias, DIRECT)
    if ROWS > 1:
        _store(out, sum1, 1, number, inside, split, ROWS, length, row_scale, bias, DIRECT)
    if ROWS > 2:
        _store(out, sum2, 2, number, inside, split, ROWS, length, row_scale, bias, DIRECT)
    if ROWS > 3:
        _store(out, sum3, 3, number, inside, split, ROWS, length, row_scale, bias, DIRECT)


@triton.jit
def gemm(
    x, words, table, book, gain, offset, row_scale, bias, out, rows, lines, chunks, length, steps,
    STREAMS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    WORD: tl.constexpr, ENTRY: tl.constexpr, WINDOW: tl.constexpr,
    READ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROW: tl.constexpr,
    E: tl.constexpr, ALIGNED: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, DIRECT: tl.constexpr,
    AXIS_IN: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """A decoded tile (BN outputs, BK inputs) times inputs (BK, BM), the weight first: the matrix unit wants 64 rows of
    its first operand, which there are of outputs but not of inputs. Grid (outputs / BN, rows / BM, splits).

    Sub-vectors that do not fill DP numbers leave holes, of zeros, in what is summed (axis in) or stored (axis out).
    """
    PIECES: tl.constexpr = DP // E
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    begin = tl.program_id(2) * steps * BK
    sums = tl.zeros((BN, BM), tl.float32)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_features = length if AXIS_IN else lines
    for step in range(steps):
        virtual = begin + step * BK + tl.arange(0, BK)
        if AXIS_IN:
            line = n
            first = (begin + step * BK) // E
            piece = first + tl.arange(0, BK // E)
            k = virtual // DP * D + virtual % DP
            k_ok = (virtual % DP < D) & (k < length)
        else:
            line = virtual
            first = tl.program_id(0) * (BN // E)
            piece = first + tl.arange(0, BN // E)
            k = virtual
            k_ok = k < lines
        line_ok = line < lines
        w = _vectors(
            words, table, book, line, line_ok, piece, first, lines, chunks,
            STREAMS, BITS, STRIDE, OFFSET, WORD, ENTRY, WINDOW, READ, DP, ROW, E, ALIGNED, FRESH,
        )  # fmt: skip
        if GAIN > 0:
            w = w * _of_lines(gain, line, line_ok, piece % PIECES, GAIN, DP, E)
        if SHIFT > 0:
            w = w + _of_lines(offset, line, line_ok, piece % PIECES, SHIFT, DP, E)
        w = w.to(x.dtype.element_ty)
        w = tl.reshape(w, (BN, BK)) if AXIS_IN else tl.trans(tl.reshape(w, (BK, BN)))
        inputs = tl.load(
            x + m[None, :].to(tl.int64) * in_features + k[:, None], mask=k_ok[:, None] & (m < rows)[None, :], other=0.0
        )
        if WIDEN:  # the interpreter's dot reads bfloat16 as something else
            sums += tl.dot(w.to(tl.float32), inputs.to(tl.float32), input_precision="ieee")
        else:
            sums = tl.dot(w, inputs, sums, input_precision="ieee")
    if AXIS_IN:
        number = n
        inside = number < lines
        out_features = lines
    else:
        number = n // DP * D + n % DP
        inside = (n % DP < D) & (number < length)
        out_features = length
    keep = inside[:, None] & (m < rows)[None, :]
    row = m[None, :].to(tl.int64)
    _store(out, sums, row, number[:, None], keep, tl.program_id(2), rows, out_features, row_scale, bias, DIRECT)


@triton.jit
def decode(
    words, table, book, gain, offset, row_scale, out, lines, chunks, length, line_from, line_to, chunk_from, width,
    STREAMS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    WORD: tl.constexpr, ENTRY: tl.constexpr, WINDOW: tl.constexpr,
    READ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROW: tl.constexpr,
    E: tl.constexpr, ALIGNED: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, AXIS_IN: tl.constexpr,
    BL: tl.constexpr, BP: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Numbers of lines line_from to line_to - 1, `width` of each from chunk_from on: out (lines, width), row by row."""
    PIECES: tl.constexpr = DP // E
    line = line_from + tl.program_id(0) * BL + tl.arange(0, BL)
    line_ok = line < line_to
    first = chunk_from * PIECES + tl.program_id(1) * BP
    piece = first + tl.arange(0, BP)
    w = _vectors(
        words, table, book, line, line_ok, piece, first, lines, chunks,
        STREAMS, BITS, STRIDE, OFFSET, WORD, ENTRY, WINDOW, READ, DP, ROW, E, ALIGNED, FRESH,
    )  # fmt: skip
    if GAIN > 0:
        w = w * _of_lines(gain, line, line_ok, piece % PIECES, GAIN, DP, E)
    if SHIFT > 0:
        w = w + _of_lines(offset, line, line_ok, piece % PIECES, SHIFT, DP, E)
    within = (piece % PIECES * E)[:, None] + tl.arange(0, E)[None, :]
    along = (piece // PIECES - chunk_from)[:, None] * D + within
    inside = (within < D) & (along < width)
    if row_scale is not None:
        if AXIS_IN:
            w = w * tl.load(row_scale + line, mask=line_ok, other=0.0)[:, None, None]
        else:
            w = w * tl.load(row_scale + chunk_from * D + along, mask=inside, other=0.0)[None, :, :]
    at = (line - line_from).to(tl.int64)[:, None, None] * width + along[None, :, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=line_ok[:, None, None] & inside[None, :, :])


@triton.jit
def finish(parts, row_scale, bias, out, rows, out_features, splits, BLOCK: tl.constexpr):
    """Sums the splits in their order, so that results are the same each time. Grid (outputs / BLOCK, rows)."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < out_features
    row = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        sums += tl.load(parts + (split * rows + row) * out_features + number, mask=inside, other=0.0)
    _store(out, sums, row, number, inside, 0, rows, out_features, row_scale, bias, True)


def _case(function: Any, name: str, x: str, table: str, configs: tuple[str, ...], **changes: Any) -> Case:
    """A specialisation as the module launches it. changes: from 2^15 codewords of 8 numbers, sums stored at once."""
    constants: dict[str, Any] = {
        "STREAMS": 1, "BITS": (15,), "STRIDE": (1,), "OFFSET": (0,), "WORD": (0,), "ENTRY": (0,), "WINDOW": (0,),
        "READ": (False,),
        "D": 8, "DP": 8, "ROW": 8, "E": 8, "ALIGNED": True, "GAIN": 0, "SHIFT": 0, "DIRECT": True,
        "book": None, "gain": None, "offset": None, "bias": None,
    }  # fmt: skip
    constants |= changes
    constants["E"] = min(constants["DP"], 4 if "fp32" in (x, table) else 8)
    types = {"x": f"*{x}", "words": "*i32", "table": f"*{table}", "row_scale": "*fp32", "out": f"*{x}"}
    types |= dict.fromkeys(("rows", "lines", "chunks", "length", "steps"), "i32")
    types |= dict.fromkeys(("line_from", "line_to", "chunk_from", "width"), "i32")
    for given, kind in (("book", "*i32"), ("gain", "*fp32"), ("offset", "*fp32")):
        if changes.get(given):
            types[given] = kind
            constants.pop(given)
    if "DIRECT" in constants and not constants["DIRECT"]:
        types["out"] = "*fp32"
    types = {arg: kind for arg, kind in types.items() if arg in function.arg_names}
    aligned = tuple(arg for arg, kind in types.items() if kind.startswith("*"))
    aligned += tuple(arg for arg in ("lines", "length", "chunks", "width") if arg in types)
    return Case(name, types, constants, configs, aligned)


_TWO_BOOKS = {
    "STREAMS": 2, "BITS": (12, 8), "STRIDE": (1, 1), "OFFSET": (0, 0), "WORD": (0, 6144), "ENTRY": (0, 16384),
    "WINDOW": (0, 0), "READ": (False, False), "book": True,
}  # fmt: skip
_INTERLEAVED = {
    "STREAMS": 2, "BITS": (8, 8), "STRIDE": (2, 2), "OFFSET": (0, 1), "WORD": (0, 0), "ENTRY": (0, 256),
    "WINDOW": (0, 0), "READ": (False, False),
}  # fmt: skip
_BY_NUMBER = {"GAIN": 2, "SHIFT": 2, "gain": True, "offset": True}
_TRELLIS = {"BITS": (4,), "WINDOW": (14,), "READ": (True,), "D": 2, "DP": 2, "ROW": 2}  # two codes at once

_LONG = (  # lanes and warps along the pieces: BP = 32 * warps
    Config("long", {"BL": 8, "BP": 128, "FRESH": 1}, num_warps=4),
    Config("cached", {"BL": 8, "BP": 128, "FRESH": 0}, num_warps=4),
    Config("short", {"BL": 4, "BP": 128, "FRESH": 1}, num_warps=4),
    Config("wide", {"BL": 4, "BP": 256, "FRESH": 1}, num_warps=8),
    Config("warp", {"BL": 8, "BP": 32, "FRESH": 1}, num_warps=1),
)
_OUT = (  # BL: lines unrolled
    Config("long", {"BL": 8, "BP": 128, "FRESH": 1}, num_warps=4),
    Config("cached", {"BL": 8, "BP": 128, "FRESH": 0}, num_warps=4),
    Config("thin", {"BL": 8, "BP": 64, "FRESH": 1}, num_warps=2),
    Config("warp", {"BL": 8, "BP": 32, "FRESH": 1}, num_warps=1),
)
_DOT = (
    Config("few", {"BM": 16, "BN": 64, "BK": 64, "FRESH": 1}, num_warps=4),
    Config("few-direct", {"BM": 16, "BN": 64, "BK": 64, "FRESH": 1}, num_warps=4, num_stages=1),
    Config("some", {"BM": 32, "BN": 64, "BK": 64, "FRESH": 1}, num_warps=4),
    Config("many", {"BM": 64, "BN": 128, "BK": 64, "FRESH": 1}, num_warps=8),
    Config("float", {"BM": 16, "BN": 32, "BK": 32, "FRESH": 1}, num_warps=4),
)
_HALF = ("few", "few-direct", "some", "many")

_ONE = ("long",)
KERNELS: tuple[Kernel, ...] = (
    Kernel("codebook-gemv-in", gemv_in, _LONG, tuple(
        _case(gemv_in, name, x, table, configs, ROWS=rows, **{"EVEN": True, **changes})
        for name, x, table, rows, configs, changes in (
            ("folded", "fp16", "fp16", 1, (), {}),
            ("folded-4", "bf16", "fp16", 4, (), {}),
            ("split", "fp16", "fp16", 1, _ONE, {"DIRECT": False}),
            ("int8", "fp16", "i8", 1, (), {}),
            ("float", "fp32", "fp32", 1, (), {}),
            ("by-number", "fp16", "fp16", 1, ("short", "wide"), _BY_NUMBER),
            ("interleaved", "fp16", "fp16", 1, (), _INTERLEAVED),
            ("trellis", "fp16", "fp16", 1, _ONE, _TRELLIS),
            ("sixteen", "fp16", "fp16", 1, _ONE, {"D": 16, "DP": 16, "ROW": 16}),
            ("five", "fp16", "fp16", 1, _ONE, {"D": 5, "EVEN": False, "ALIGNED": False}),
        )
    )),
    Kernel("codebook-gemv-out", gemv_out, _OUT, tuple(
        _case(gemv_out, name, x, table, configs, ROWS=rows, DIRECT=False, **changes)
        for name, x, table, rows, configs, changes in (
            ("folded", "fp16", "fp16", 1, (), {}),
            ("residual", "fp16", "fp16", 1, (), _TWO_BOOKS),
            ("residual-4", "bf16", "fp16", 4, (), _TWO_BOOKS),
            ("by-number", "fp16", "fp16", 1, _ONE, _BY_NUMBER),
            ("float", "fp32", "fp32", 1, _ONE, {}),
            ("trellis", "fp16", "fp16", 1, _ONE, _TRELLIS),
        )
    )),
    Kernel("codebook-gemm", gemm, _DOT, tuple(
        _case(gemm, name, x, table, configs, AXIS_IN=axis, WIDEN=False, **changes)
        for name, x, table, axis, configs, changes in (
            ("folded", "fp16", "fp16", True, _HALF, {}),
            ("split", "bf16", "fp16", True, _HALF, {"DIRECT": False}),
            ("by-number", "fp16", "fp16", True, _HALF, _BY_NUMBER),
            ("residual", "fp16", "fp16", False, _HALF, _TWO_BOOKS),
            ("int8", "fp16", "i8", True, _HALF, {}),
            ("float", "fp32", "fp32", True, ("float",), {}),
            ("float-out", "fp32", "fp32", False, ("float",), {}),
        )
    )),
    Kernel("codebook-decode", decode, (_LONG[2], _LONG[4]), tuple(
        _case(decode, name, x, table, (), AXIS_IN=axis, **changes)
        for name, x, table, axis, changes in (
            ("folded", "fp16", "fp16", True, {}),
            ("by-number", "bf16", "fp16", True, _BY_NUMBER),
            ("residual", "fp16", "fp16", False, _TWO_BOOKS),
            ("float", "fp32", "fp32", True, {}),
        )
    )),
    Kernel("codebook-finish", finish, (Config("plain", {"BLOCK": 256}, num_warps=4),), (
        Case(
            "half",
            {"parts": "*fp32", "row_scale": "*fp32", "out": "*fp16"}
            | dict.fromkeys(("rows", "out_features", "splits"), "i32"),
            {"bias": None},
        ),
    )),
)  # fmt: skip
