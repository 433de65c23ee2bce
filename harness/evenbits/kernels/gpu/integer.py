"""Triton: products with grids of integer codes. `evenbits.kernels.integer` has the layout, the twin and the reasons.

A tile is 128 columns: 8 cells of 16 codes. One mask of a word gives two codes, one in either half: as bits of a half
float each is that number times the least subnormal, and one fused multiply-add makes both of them whole numbers less
the zero point, exactly. No conversion instruction is spent, and no magic number, whose `or` would be a second one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.launch import Case, Config, Kernel, interpreted

TILE = tl.constexpr(128)  # columns of a tile
CELLS = tl.constexpr(8)
# values come out as (code - zero) / 512 in 16 bits: what a half float can be multiplied by ends at 2^15, and the
# least subnormal is 2^-24. Scales take the factor back, in float32.
HALF_UNIT = tl.constexpr(512.0)
# the interpreter has no arithmetic of bfloat16, and a wrong tl.dot: float32 stands in, which holds the same numbers
WIDEN = tl.constexpr(interpreted())


@triton.jit
def _field(word, source: tl.constexpr, to: tl.constexpr, width: tl.constexpr):
    """Bits source.. of both halves of each word, moved to bit `to` of each half; all else zero."""
    mask: tl.constexpr = (((1 << width) - 1) << to) * 0x10001
    return (word >> (source - to) if source >= to else word << (to - source)) & mask


@triton.jit
def _codes(planes, p: tl.constexpr, to: tl.constexpr, BITS: tl.constexpr):
    """Pair p of every cell: int32 (BN, 8), a code at bit `to` of each half. planes: as `_planes` loads them."""
    four0, four1, high0, high1, two, one = planes
    low: tl.constexpr = 4 if BITS >= 4 else 2
    code = _field(four0 if p < 4 else four1, 4 * (p % 4), to, 4) if BITS >= 4 else _field(two, 2 * p, to, 2)
    if BITS == 6 or BITS == 7:
        code |= _field(two, 2 * p, to + low, 2)
    if BITS == 8:
        code |= _field(high0 if p < 4 else high1, 4 * (p % 4), to + low, 4)
    if BITS % 2 == 1:
        # bit 2 p + 1 of its byte, then bits 0, 2, 4, 6: at 3 bits, pairs 0 to 3 and 4 to 7 share a shift each
        code |= _field(one, 2 * p + 1 if p < 4 else 2 * p - 8, to + BITS - 1, 1)
    return code


@triton.jit
def _pair(planes, p: tl.constexpr, zero, levels, BITS: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
          dtype: tl.constexpr):  # fmt: skip
    """Columns 16 p + 2 c + h of the tile, c the cell, h the half: (BN, 8, 2) of dtype.

    The value is the code less the zero point, over 512 in 16 bits. ZEROS: zero in those units, of a shape that
    broadcasts; else 2^(BITS - 1). LEVELS: levels[code] instead.
    """
    unit: tl.constexpr = 1.0 if dtype == tl.float32 else HALF_UNIT
    middle: tl.constexpr = (1 << (BITS - 1)) / unit
    if LEVELS:
        code = _codes(planes, p, 0, BITS)
        value = tl.load(levels + tl.join(code & 0xFFFF, code >> 16)).to(dtype)
    elif dtype == tl.float32:
        code = _codes(planes, p, 0, BITS)
        value = tl.join(code & 0xFFFF, code >> 16).to(tl.float32) - (zero if ZEROS else middle)
    elif dtype == tl.float16:
        # where a code needs no shift, or shares one with others: ten bits of mantissa hold several codes' places
        at: tl.constexpr = 2 * (p % 4) if BITS < 4 else 4 * (p % 2) if BITS == 4 else 0
        value = _halves(_codes(planes, p, at, BITS), dtype) * (2.0 ** (15 - at)) - (zero if ZEROS else middle)
    elif BITS == 8:  # seven bits of mantissa: by halves, each sum a whole number below 2^8
        four0, four1, high0, high1, _two, _one = planes
        above = _halves(_field(high0 if p < 4 else high1, 4 * (p % 4), 3, 4), dtype) * (2.0**125)
        above -= zero if ZEROS else middle
        value = _halves(_field(four0 if p < 4 else four1, 4 * (p % 4), 0, 4), dtype) * (2.0**124) + above
    else:
        place: tl.constexpr = 2 * (p % 3) if BITS < 4 else 0
        value = _halves(_codes(planes, p, place, BITS), dtype) * (2.0 ** (124 - place)) - (zero if ZEROS else middle)
    return value


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """int32 (BN, 8) -> its low and high halves as they stand, (BN, 8, 2) of a 16-bit dtype."""
    if WIDEN and dtype == tl.bfloat16:  # the bits of a bfloat16 are the upper ones of a float32
        both = tl.join(word << 16, (word >> 16) << 16).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.uint16).to(dtype, bitcast=True)
        high = (word >> 16).to(tl.uint16).to(dtype, bitcast=True)
        both = tl.join(low, high)
    return both


@triton.jit
def _planes(words, ones, tile, n, out_features, BITS: tl.constexpr):
    """The tile's words for rows n: (four0, four1, high0, high1, two, one), int32 (BN, 8) each; unused ones repeat."""
    words_of_cell: tl.constexpr = BITS // 2
    step = tl.cast(out_features, tl.int64) * CELLS
    place = n[:, None] * CELLS + tl.arange(0, CELLS)[None, :]
    start = words + tl.cast(tile, tl.int64) * words_of_cell * step
    first = tl.load(start + place)
    second = first
    third = first
    fourth = first
    one = first
    if words_of_cell >= 2:
        second = tl.load(start + step + place)
    if words_of_cell >= 3:
        third = tl.load(start + 2 * step + place)
    if words_of_cell >= 4:
        fourth = tl.load(start + 3 * step + place)
    if BITS % 2 == 1:
        both = tl.load(ones + tl.cast(tile, tl.int64) * step + place).to(tl.int32)
        one = (both & 0xFF) | ((both << 8) & 0xFF0000)  # a byte to each half
    two = first if BITS < 4 else third
    return first, second, third, fourth, two, one


@triton.jit
def _run(planes, first: tl.constexpr, RUN: tl.constexpr, zero, levels, BITS: tl.constexpr, ZEROS: tl.constexpr,
         LEVELS: tl.constexpr, dtype: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Columns 16 first to 16 first + RUN - 1 of the tile, in order: (BN, RUN).

    The registers stay where they are: a thread holds of each row the pairs that the matrix unit's operand wants there.
    """
    if RUN == 16:
        weight = tl.reshape(_pair(planes, first, zero, levels, BITS, ZEROS, LEVELS, dtype), (BN, 16))
    elif RUN == 32:
        a = _two(planes, first, zero, levels, BITS, ZEROS, LEVELS, dtype)
        weight = tl.reshape(tl.permute(a, (0, 3, 1, 2)), (BN, 32))
    elif RUN == 64:
        b = _four(planes, first, zero, levels, BITS, ZEROS, LEVELS, dtype)
        weight = tl.reshape(tl.permute(b, (0, 4, 3, 1, 2)), (BN, 64))
    else:
        c = tl.join(
            _four(planes, 0, zero, levels, BITS, ZEROS, LEVELS, dtype),
            _four(planes, 4, zero, levels, BITS, ZEROS, LEVELS, dtype),
        )
        weight = tl.reshape(tl.permute(c, (0, 5, 4, 3, 1, 2)), (BN, 128))
    return weight


@triton.jit
def _four(planes, p: tl.constexpr, zero, levels, BITS: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
          dtype: tl.constexpr):  # fmt: skip
    return tl.join(
        _two(planes, p, zero, levels, BITS, ZEROS, LEVELS, dtype),
        _two(planes, p + 2, zero, levels, BITS, ZEROS, LEVELS, dtype),
    )


@triton.jit
def _two(planes, p: tl.constexpr, zero, levels, BITS: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
          dtype: tl.constexpr):  # fmt: skip
    return tl.join(
        _pair(planes, p, zero, levels, BITS, ZEROS, LEVELS, dtype),
        _pair(planes, p + 1, zero, levels, BITS, ZEROS, LEVELS, dtype),
    )


@triton.jit
def _group(k, in_features, GROUP: tl.constexpr):
    """Which group column k is in, that of the last for columns beyond it; GROUP 0: there is one."""
    return k * 0 if GROUP == 0 else tl.minimum(k, in_features - 1) // GROUP


@triton.jit
def _zero(zeros, group, n, out_features, dtype: tl.constexpr):
    """Zero points of rows n in the units of `_pair`: (BN, 1, 1)."""
    unit: tl.constexpr = 1.0 if dtype == tl.float32 else 1.0 / HALF_UNIT
    found = tl.load(zeros + tl.cast(group, tl.int64) * out_features + n)
    zero = found.to(tl.float32) * unit
    if not (WIDEN and dtype == tl.bfloat16):
        zero = zero.to(dtype)
    return zero[:, None, None]


@triton.jit
def _scaled(planes, p: tl.constexpr, tile, scale, zeros, levels, groups, n, out_features, in_features,
            BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
            INDEXED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Pair p as weights, each with the scale of its own column's group, rounded to dtype: (BN, 8, 2)."""
    k = tile * TILE + 16 * p + 2 * tl.arange(0, CELLS)[:, None] + tl.arange(0, 2)[None, :]
    group = tl.load(groups + k, mask=k < in_features, other=0) if INDEXED else _group(k, in_features, GROUP)
    at = tl.cast(group, tl.int64)[None, :, :] * out_features + n[:, None, None]
    step = tl.load(scale + at).to(tl.float32)
    zero = tl.load(zeros + at).to(tl.float32) if ZEROS else 0.0
    value = _pair(planes, p, zero, levels, BITS, ZEROS, LEVELS, tl.float32)
    return (value * step).to(dtype)


@triton.jit
def _inputs(x, row, k, permutation, in_features, live, PERMUTED: tl.constexpr, EVEN: tl.constexpr):
    """x at rows `row` and columns `k`, which broadcast; zero where not `live` or beyond the last column."""
    column = tl.load(permutation + k, mask=k < in_features, other=0) if PERMUTED else k
    mask = live
    if not EVEN:
        mask = live & (k < in_features)
    return tl.load(x + row + column, mask=mask, other=0.0)


@triton.jit(do_not_specialize=("rows", "tiles"))
def integer_matmul(
    x, words, ones, scale, zeros, levels, groups, permutation, bias, y, rows, out_features, in_features, tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
    INDEXED: tl.constexpr, PERMUTED: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y (rows, out) = x W^T; for SPLIT > 1 y is (SPLIT, rows, out) float32 and holds sums over shares of the tiles.

    RUN: columns that surely share a scale, 16 to 128; the sum of a run is scaled. 0: each column by its own, and
    weights are scaled and rounded; INDEXED: by groups[k], else k // GROUP. W's rows are the rows of the matrix unit's
    tile, so that a few rows of x fill it.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    part = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(n, out_features - 1)  # reads the last row again rather than mask every load
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    live = m[None, :] < rows
    row = m.to(tl.int64)[None, :] * in_features
    unit: tl.constexpr = 1.0 if (dtype == tl.float32 or LEVELS) else HALF_UNIT
    total = tl.zeros((BN, BM), tl.float32)
    share = tl.cdiv(tiles, SPLIT)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        planes = _planes(words, ones, tile, held, out_features, BITS)
        if RUN == 0:
            for p in tl.static_range(8):
                pair = _scaled(planes, p, tile, scale, zeros, levels, groups, held, out_features, in_features,
                               BITS, GROUP, ZEROS, LEVELS, INDEXED, dtype)  # fmt: skip
                k = tile * TILE + 16 * p + tl.arange(0, 16)
                inputs = _inputs(x, row, k[:, None], permutation, in_features, live, PERMUTED, EVEN)
                total = _dot(tl.reshape(pair, (BN, 16)), inputs, total)
        else:
            for r in tl.static_range(128 // RUN):
                group = _group(tile * TILE + r * RUN, in_features, GROUP)
                zero = _zero(zeros, group, held, out_features, dtype) if ZEROS else 0.0
                weight = _run(planes, r * (RUN // 16), RUN, zero, levels, BITS, ZEROS, LEVELS, dtype, BN)
                k = tile * TILE + r * RUN + tl.arange(0, RUN)
                inputs = _inputs(x, row, k[:, None], permutation, in_features, live, PERMUTED, EVEN)
                found = _dot(weight, inputs, tl.zeros((BN, BM), tl.float32))
                step = tl.load(scale + tl.cast(group, tl.int64) * out_features + held).to(tl.float32) * unit
                total += found * step[:, None]
    if BIAS:
        total += tl.load(bias + held).to(tl.float32)[:, None]
    place = (part * rows + m).to(tl.int64)[None, :] * out_features + n[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=live & (n[:, None] < out_features))


@triton.jit
def _dot(weight, inputs, total):
    if WIDEN:
        weight = weight.to(tl.float32)
        inputs = inputs.to(tl.float32)
    return tl.dot(weight, inputs, total, input_precision="ieee")


@triton.jit(do_not_specialize=("rows", "tiles"))
def integer_gemv(
    x, words, ones, scale, zeros, levels, groups, permutation, bias, y, rows, out_features, in_features, tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
    INDEXED: tl.constexpr, PERMUTED: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """`integer_matmul` for single rows of x without the matrix unit: products and sums in float32, a row a program."""
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(1)
    part = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(n, out_features - 1)
    row = m.to(tl.int64) * in_features
    unit: tl.constexpr = 1.0 if (dtype == tl.float32 or LEVELS) else HALF_UNIT
    total = tl.zeros((BN,), tl.float32)
    share = tl.cdiv(tiles, SPLIT)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        planes = _planes(words, ones, tile, held, out_features, BITS)
        if RUN == 0:
            for p in tl.static_range(8):
                pair = _scaled(planes, p, tile, scale, zeros, levels, groups, held, out_features, in_features,
                               BITS, GROUP, ZEROS, LEVELS, INDEXED, dtype)  # fmt: skip
                k = tile * TILE + 16 * p + tl.arange(0, 16)
                inputs = _inputs(x, row, k, permutation, in_features, k >= 0, PERMUTED, EVEN).to(tl.float32)
                total += tl.sum(tl.reshape(pair, (BN, 16)).to(tl.float32) * inputs[None, :], axis=1)
        else:
            for r in tl.static_range(128 // RUN):
                group = _group(tile * TILE + r * RUN, in_features, GROUP)
                zero = _zero(zeros, group, held, out_features, dtype) if ZEROS else 0.0
                weight = _run(planes, r * (RUN // 16), RUN, zero, levels, BITS, ZEROS, LEVELS, dtype, BN)
                k = tile * TILE + r * RUN + tl.arange(0, RUN)
                inputs = _inputs(x, row, k, permutation, in_features, k >= 0, PERMUTED, EVEN).to(tl.float32)
                found = tl.sum(weight.to(tl.float32) * inputs[None, :], axis=1)
                total += found * (tl.load(scale + tl.cast(group, tl.int64) * out_features + held).to(tl.float32) * unit)
    if BIAS:
        total += tl.load(bias + held).to(tl.float32)
    place = (part * rows + m).to(tl.int64) * out_features + n
    tl.store(y + place, total.to(y.dtype.element_ty), mask=n < out_features)


@triton.jit(do_not_specialize=("start", "stop", "tiles_of_program", "tiles"))
def integer_decode(
    words, ones, scale, zeros, levels, groups, weight, start, stop, out_features, in_features, tiles_of_program, tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
    INDEXED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows start to stop - 1 of W into weight (stop - start, in), rounded once, columns in the order they are held."""
    dtype: tl.constexpr = weight.dtype.element_ty
    exact: tl.constexpr = tl.float32 if LEVELS else dtype  # whole numbers are exact in any dtype, levels are not
    unit: tl.constexpr = 1.0 if exact == tl.float32 else HALF_UNIT
    n = start + tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(n, out_features - 1)
    line = (n - start).to(tl.int64)[:, None] * in_features
    first = tl.program_id(1) * tiles_of_program
    for tile in range(first, tl.minimum(first + tiles_of_program, tiles)):
        planes = _planes(words, ones, tile, held, out_features, BITS)
        if RUN == 0:
            for p in tl.static_range(8):
                pair = _scaled(planes, p, tile, scale, zeros, levels, groups, held, out_features, in_features,
                               BITS, GROUP, ZEROS, LEVELS, INDEXED, dtype)  # fmt: skip
                k = tile * TILE + 16 * p + tl.arange(0, 16)[None, :]
                mask = (n[:, None] < stop) & (k < in_features)
                tl.store(weight + line + k, tl.reshape(pair, (BN, 16)), mask=mask)
        else:
            for r in tl.static_range(128 // RUN):
                group = _group(tile * TILE + r * RUN, in_features, GROUP)
                zero = _zero(zeros, group, held, out_features, exact) if ZEROS else 0.0
                value = _run(planes, r * (RUN // 16), RUN, zero, levels, BITS, ZEROS, LEVELS, exact, BN).to(tl.float32)
                step = tl.load(scale + tl.cast(group, tl.int64) * out_features + held).to(tl.float32) * unit
                k = tile * TILE + r * RUN + tl.arange(0, RUN)[None, :]
                mask = (n[:, None] < stop) & (k < in_features)
                tl.store(weight + line + k, (value * step[:, None]).to(dtype), mask=mask)


@triton.jit(do_not_specialize=("count", "out_features"))
def integer_sum(parts, bias, y, count, out_features, SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y (count,) = the SPLIT rows of parts (SPLIT, count) added in order, and the bias: the same sum every time."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * tl.cast(count, tl.int64) + i, mask=i < count, other=0.0)
    if BIAS:
        total += tl.load(bias + i % out_features, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < count)


_POINTERS = {
    "words": "*i32", "ones": "*i16", "scale": "*fp16", "zeros": "*u8", "levels": "*fp32", "groups": "*i32",
    "permutation": "*i32", "bias": "*fp32",
}  # fmt: skip
_SIZES = dict.fromkeys(("rows", "out_features", "in_features", "tiles"), "i32")
_PLAIN = {
    "BITS": 4, "GROUP": 128, "RUN": 128, "ZEROS": False, "LEVELS": False, "INDEXED": False, "PERMUTED": False,
    "EVEN": True, "BIAS": False,
}  # fmt: skip


def _case(name: str, dtype: str, configs: tuple[str, ...], *, y: str = "", **changed: object) -> Case:
    constants = _PLAIN | changed
    pointers = _POINTERS | ({"scale": "*fp32"} if constants["LEVELS"] else {})
    even = ("out_features", "in_features") if constants["EVEN"] else ()
    return Case(name, {"x": f"*{dtype}", **pointers, "y": f"*{y or dtype}", **_SIZES}, constants, configs,
                ("x", *_POINTERS, "y", *even))  # fmt: skip


# Every path by which a code becomes a number is a case once: 4, 2, 1 and the upper 4 bits; float16, bfloat16 and
# float32; zero points, levels, runs, an index. What differs in sums and stores is one case of each configuration.
MATMUL = Kernel(
    "integer-matmul",
    integer_matmul,
    (
        # up to 16 rows: enough programs for all processors, or shares of the columns that are summed afterwards
        Config("few-64", {"BN": 64, "BM": 16, "SPLIT": 1}, 4, 5),
        Config("few-64-split4", {"BN": 64, "BM": 16, "SPLIT": 4}, 4, 5),
        Config("few-128-split4", {"BN": 128, "BM": 16, "SPLIT": 4}, 4, 4),
        Config("many-64", {"BN": 128, "BM": 64, "SPLIT": 1}, 8, 3),
    ),
    (
        _case("4bit-fp16", "fp16", ("few-64", "many-64")),
        _case("4bit-fp16-parts", "fp16", ("few-64-split4", "few-128-split4"), y="fp32"),
        _case("3bit-bf16-zeros", "bf16", ("few-64", "many-64"), BITS=3, ZEROS=True),
        _case("2bit-bf16-parts", "bf16", ("few-128-split4",), y="fp32", BITS=2),
        _case("8bit-bf16-zeros", "bf16", ("few-64", "many-64"), BITS=8, ZEROS=True),
        _case("7bit-fp16-run16-permuted", "fp16", ("few-64",), BITS=7, ZEROS=True, GROUP=16, RUN=16, PERMUTED=True),
        _case("4bit-fp16-levels-run64", "fp16", ("few-64",), LEVELS=True, GROUP=64, RUN=64),
        _case("3bit-bf16-indexed", "bf16", ("few-64",), BITS=3, GROUP=8, RUN=0, INDEXED=True, EVEN=False, ZEROS=True,
              BIAS=True),
        _case("4bit-fp32", "fp32", ("few-64",), EVEN=False, ZEROS=True),
    ),
)  # fmt: skip

GEMV = Kernel(
    "integer-gemv",
    integer_gemv,
    (Config("row-16", {"BN": 16, "SPLIT": 1}, 4, 4), Config("row-64-split4", {"BN": 64, "SPLIT": 4}, 4, 4)),
    (
        _case("4bit-fp32", "fp32", ("row-16", "row-64-split4")),
        _case("3bit-fp32-permuted", "fp32", ("row-64-split4",), BITS=3, EVEN=False, ZEROS=True, PERMUTED=True, GROUP=32,
              RUN=32),
        _case("8bit-fp32-indexed", "fp32", ("row-16",), BITS=8, GROUP=8, RUN=0, INDEXED=True, EVEN=False),
    ),
)  # fmt: skip

_DECODE_SIZES = dict.fromkeys(("start", "stop", "out_features", "in_features", "tiles_of_program", "tiles"), "i32")
_DECODE_POINTERS = {name: kind for name, kind in _POINTERS.items() if name not in ("permutation", "bias")}
DECODE = Kernel(
    "integer-decode",
    integer_decode,
    (Config("tile", {"BN": 64}, 4, 2),),
    tuple(
        Case(f"{bits}bit-{dtype}", {**_DECODE_POINTERS, "weight": f"*{dtype}", **_DECODE_SIZES},
             {"BITS": bits, "GROUP": run, "RUN": run, "ZEROS": zeros, "LEVELS": levels, "INDEXED": False}, (),
             (*_DECODE_POINTERS, "weight", "out_features", "in_features"))
        for bits, run, dtype, zeros, levels in (
            (4, 128, "fp16", False, False), (3, 64, "bf16", True, False), (4, 64, "fp32", False, True),
        )
    ),
)  # fmt: skip

SUM = Kernel(
    "integer-sum",
    integer_sum,
    (Config("block", {"BLOCK": 256}, 4, 1),),
    (
        Case("4-fp16", {"parts": "*fp32", "bias": "*fp32", "y": "*fp16", "count": "i32", "out_features": "i32"},
             {"SPLIT": 4, "BIAS": True}),
    ),
)  # fmt: skip

KERNELS = (MATMUL, GEMV, DECODE, SUM)
