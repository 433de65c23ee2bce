"""Triton: packed indices through a decoder network to dense weights, the statistics of each group given.

A row of a tile is PACK neighbouring sub-vectors of one group side by side, under block-diagonal weights: a tensor core
wants 16 numbers a row, and half of them would be padding for d = 8. See kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.launch import Case, Config, Kernel


@triton.jit
def gelu(x):
    """x Phi(x) = max(x, 0) - |x| 2^r(|x|), r near log2 Phi(-|x|): within 5e-7, and float32's rounding, everywhere.

    That is absolute: near zero 2.6e-5 of the value, and beyond -4, where it is below 1.3e-4, more. Exactly x or 0 far
    out. r was fitted here by Lawson's iteration, to the least largest error of the whole expression on [0, 10];
    beyond, it falls faster than what it stands for. With the erf of libdevice a GELU takes 32 instructions, this 8.
    """
    a = tl.abs(x)
    r = tl.fma(a, -0.00047329417429864407, 0.007084462326020002)
    r = tl.fma(r, a, -0.051827169954776764)
    r = tl.fma(r, a, -0.4599926471710205)
    r = tl.fma(r, a, -1.1507878303527832)
    r = tl.fma(r, a, -1.000037670135498)
    return tl.maximum(x, 0.0) - a * tl.exp2(r)


@triton.jit
def product(x, high, low, SPLIT: tl.constexpr):
    """x (rows, k) float32 times (k, n) in two float16 parts, as float32; without SPLIT, of the high parts alone.

    The product of the two low parts, 2^-22 of the whole, is left out.
    """
    top = x.to(tl.float16)
    if SPLIT:
        rest = (x - top.to(tl.float32)).to(tl.float16)
        return tl.dot(top, high, tl.dot(rest, high, tl.dot(top, low)))
    return tl.dot(top, high)


@triton.jit
def unit(
    x,
    matrices,
    floats,
    WIDE: tl.constexpr,  # columns of x
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # hidden columns at a time
    LAST: tl.constexpr,  # columns of what comes out
    SPLIT: tl.constexpr,
):
    """Linear, GELU, Linear of a tile x (rows, WIDE) float32. matrices and floats as `kernels.prepare` lays them out."""
    i = tl.arange(0, WIDE)
    o = tl.arange(0, LAST)
    after = matrices + 2 * WIDE * HIDDEN
    first = tl.load(floats + HIDDEN + LAST)
    second = tl.load(floats + HIDDEN + LAST + 1)
    total = tl.zeros((x.shape[0], LAST), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        h = start + tl.arange(0, BLOCK)
        at = matrices + i[:, None] * HIDDEN + h[None, :]
        high = tl.load(at)
        low = high
        if SPLIT:
            low = tl.load(at + WIDE * HIDDEN)
        inner = product(x, high, low, SPLIT) * first + tl.load(floats + h)[None, :]
        at = after + h[:, None] * LAST + o[None, :]
        high = tl.load(at)
        low = high
        if SPLIT:
            low = tl.load(at + HIDDEN * LAST)
        total += product(gelu(inner), high, low, SPLIT)
    return total * second + tl.load(floats + HIDDEN + o)[None, :]


@triton.jit
def indices(words, last_word, place, BITS: tl.constexpr):
    """Codes at these places, int32 both, of a bit stream read as 32-bit words."""
    bit = place.to(tl.int64) * BITS
    word = bit >> 5
    low = tl.load(words + word).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + tl.minimum(word + 1, last_word)).to(tl.uint32, bitcast=True).to(tl.uint64)
    both = low | (high << 32)
    return ((both >> (bit & 31).to(tl.uint64)) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def normalised(
    x,
    row_statistics,  # (rows,) pointers at mean and inverse deviation of each row's group
    gain,
    bias,
    inside,  # (rows, PACK) place of each sub-vector in its group
    width,
    AT: tl.constexpr,
    LATENT: tl.constexpr,
    PACK: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    AFFINE: tl.constexpr,
):
    mean = tl.load(row_statistics + 2 * AT)
    scale = tl.load(row_statistics + 2 * AT + 1)
    found = (x - mean[:, None]) * scale[:, None]
    if AFFINE:
        i = tl.arange(0, LATENT_PAD)
        at = AT * width + inside[:, :, None] * LATENT + i[None, None, :]
        gains = tl.load(gain + at, mask=i[None, None, :] < LATENT, other=0.0)
        offsets = tl.load(bias + at, mask=i[None, None, :] < LATENT, other=0.0)
        found = found * tl.reshape(gains, (x.shape[0], PACK * LATENT_PAD)) + tl.reshape(
            offsets, (x.shape[0], PACK * LATENT_PAD)
        )
    return found


@triton.jit
def decoded(
    code,  # (rows, PACK) int32
    inside,  # (rows, PACK) int32
    group,  # (rows,) int64, that of each row: under others' statistics numbers may overflow float16
    book,
    matrices,
    floats,
    statistics,
    gain,
    bias,
    width,  # numbers of a group
    LATENT: tl.constexpr,
    UNITS: tl.constexpr,
    PACK: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    D_PAD: tl.constexpr,
    AFFINE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(rows, PACK * D_PAD) float32. Padding of latents is finite, which `refusal` sees to, and meets zero weights."""
    WIDE: tl.constexpr = PACK * LATENT_PAD
    LAST: tl.constexpr = PACK * D_PAD
    LARGER: tl.constexpr = WIDE if WIDE > LAST else LAST
    i = tl.arange(0, LATENT_PAD)
    words = tl.load(book + code[:, :, None] * LATENT + i[None, None, :], mask=i[None, None, :] < LATENT, other=0.0)
    x = tl.reshape(words, (code.shape[0], WIDE))
    row = statistics + group * (2 * UNITS)
    for u in tl.static_range(0, UNITS):
        n = normalised(x, row, gain, bias, inside, width, u, LATENT, PACK, LATENT_PAD, AFFINE)
        own = matrices + u * (4 * WIDE * HIDDEN)
        numbers = floats + u * (HIDDEN + LARGER + 2)
        if u < UNITS - 1:
            x += unit(n, own, numbers, WIDE, HIDDEN, BLOCK, WIDE, SPLIT)
        else:
            x = unit(n, own, numbers, WIDE, HIDDEN, BLOCK, LAST, SPLIT)
    return x


@triton.jit(do_not_specialize=["last_word", "first", "last", "tiles", "lines", "chunks"])
def decode(
    words,
    last_word,  # index of the last whole word
    book,
    matrices,
    floats,
    statistics,
    gain,
    bias,
    scale,  # by line, or along the line
    out,  # ORDER 0: (last - first lines, length), else all lines of chunks first to last - 1: (lines, span)
    first,  # of the lines under ORDER 0, else of the chunks
    last,
    tiles,  # of a group, or of the part of it that is asked for
    lines,  # shapes are no constants: a model has several, and each would be compiled
    chunks,
    length,
    BITS: tl.constexpr,
    D: tl.constexpr,
    LATENT: tl.constexpr,
    UNITS: tl.constexpr,
    PACK: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    D_PAD: tl.constexpr,
    AFFINE: tl.constexpr,
    RAGGED: tl.constexpr,  # the last sub-vector of a line reaches beyond it
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,  # 0: no row scales, 1: of the line, 2: along the line
    ORDER: tl.constexpr,  # 0: some lines, 1: some chunks of each line, 2: some chunks, in the released code's groups
    ROWS: tl.constexpr,
):
    """One tile: ROWS * PACK neighbouring sub-vectors of one group."""
    pid = tl.program_id(0)
    own = pid // tiles
    begin = (pid * 0).to(tl.int64) + first
    r = tl.arange(0, ROWS)
    p = tl.arange(0, PACK)
    inside = (pid % tiles) * (ROWS * PACK) + r[:, None] * PACK + p[None, :]
    if ORDER == 1:
        inside += first
    kept = inside < chunks
    # beyond a group's end its last sub-vector again: what overflowed there would reach its neighbours in a row of a
    # tile, since zeros do not stop NaN
    inside = tl.minimum(inside, chunks - 1)
    start = begin * D
    span = tl.minimum(begin * 0 + last * D, length) - start
    if ORDER == 2:
        # groups run through all lines of a chunk, then through the next: the first one is that where chunk `first` is
        group = (begin * lines // chunks).to(tl.int32) + own
        place = group * chunks + inside
        chunk = place // lines
        line = place - chunk * lines
        kept = kept & (chunk >= first) & (chunk < last)
        base = line.to(tl.int64) * span - start
    elif ORDER == 1:
        group = own
        line = own + tl.zeros_like(inside)
        chunk = inside
        kept = kept & (inside < last)
        base = line.to(tl.int64) * span - start
    else:
        group = first + own
        line = group + tl.zeros_like(inside)
        chunk = inside
        base = (line - begin) * length
    code = indices(words, last_word, line * chunks + chunk, BITS)
    groups = tl.zeros((ROWS,), tl.int64) + group
    y = decoded(
        code, inside, groups, book, matrices, floats, statistics, gain, bias,
        chunks * LATENT, LATENT, UNITS, PACK, LATENT_PAD, HIDDEN, BLOCK, D_PAD, AFFINE, SPLIT,
    )  # fmt: skip
    i = tl.arange(0, D_PAD)
    along = chunk[:, :, None] * D + i[None, None, :]
    inner = kept[:, :, None] & (i[None, None, :] < D_PAD)
    if D_PAD != D:
        inner = inner & (i[None, None, :] < D)
    if RAGGED:
        inner = inner & (along < length)
    y3 = tl.reshape(y, (ROWS, PACK, D_PAD))
    if SCALED == 1:
        y3 = y3 * tl.load(scale + line, mask=kept, other=0.0)[:, :, None]
    if SCALED == 2:
        y3 = y3 * tl.load(scale + along, mask=inner, other=0.0)
    tl.store(out + base[:, :, None] + along, y3.to(out.dtype.element_ty), mask=inner)


CONFIGS = (
    Config("long", {"ROWS": 128}, num_warps=4, num_stages=1),
    Config("short", {"ROWS": 64}, num_warps=4, num_stages=1),
    Config("scant", {"ROWS": 16}, num_warps=1, num_stages=1),
)
POINTERS = {
    "words": "*i32",
    "book": "*fp32",
    "matrices": "*fp16",
    "floats": "*fp32",
    "statistics": "*fp32",
    "gain": "*fp32",
    "bias": "*fp32",
    "scale": "*fp32",
}
SHAPE = {"last_word": "i32", "lines": "i32", "chunks": "i32", "length": "i32"}
ALIGNED = (*POINTERS, "out", "length")
_TYPES = {**POINTERS, **SHAPE, "first": "i32", "last": "i32", "tiles": "i32"}
PAPER = {  # d = 8, hidden 16, three units, K = 2^15
    "BITS": 15, "D": 8, "LATENT": 8, "UNITS": 3, "PACK": 2, "LATENT_PAD": 8, "HIDDEN": 32, "BLOCK": 32, "D_PAD": 8,
    "AFFINE": False, "RAGGED": False, "SPLIT": True, "SCALED": 0,
}  # fmt: skip
FOURS = {
    **PAPER, "D": 4, "LATENT": 4, "PACK": 4, "LATENT_PAD": 4, "HIDDEN": 64, "BLOCK": 64, "D_PAD": 4,
}  # fmt: skip
LARGEST = {
    **PAPER, "D": 64, "LATENT": 64, "PACK": 1, "LATENT_PAD": 64, "HIDDEN": 256, "BLOCK": 16,
    "D_PAD": 64,
}  # fmt: skip

KERNELS = (
    Kernel(
        "pocket-decode",
        decode,
        CONFIGS,
        (
            Case("d 8, float16", {**_TYPES, "out": "*fp16"}, {**PAPER, "ORDER": 0}, aligned=ALIGNED),
            Case(
                "d 8, float32, row scales",
                {**_TYPES, "out": "*fp32"},
                {**PAPER, "ORDER": 0, "SCALED": 1},
                aligned=ALIGNED,
            ),
            Case(
                "d 8, bfloat16, one product",
                {**_TYPES, "out": "*bf16"},
                {**PAPER, "ORDER": 1, "SPLIT": False, "SCALED": 2},
                aligned=ALIGNED,
            ),
            Case(
                "d 4, float16", {**_TYPES, "out": "*fp16"}, {**FOURS, "ORDER": 1}, ("short", "scant"), aligned=ALIGNED
            ),
            Case(
                "d 4, released code's order, affine",
                {**_TYPES, "out": "*fp16"},
                {**FOURS, "ORDER": 2, "AFFINE": True},
                ("short", "scant"),
                aligned=ALIGNED,
            ),
            Case("largest", {**_TYPES, "out": "*fp16"}, {**LARGEST, "ORDER": 0}, ("short",), aligned=ALIGNED),
        ),
    ),
)
