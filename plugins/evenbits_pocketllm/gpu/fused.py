"""Triton: decode a tile of the weight and multiply it with up to 16 rows of inputs; the weight is never in memory.

A program owns a tile of outputs and all of these rows, so that for one call each weight is decoded once. What lies
between is a sum along the inputs, which is cut into splits where outputs alone would leave the GPU idle; each split
writes its own partial sums, added up afterwards in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenbits.kernels.launch import Case, Config, Kernel
from evenbits_pocketllm.gpu.decode import ALIGNED, FOURS, LARGEST, PAPER, POINTERS, SHAPE, decoded, indices


@triton.jit
def rounded(y, WIDEN: tl.constexpr, like):
    """To the dtype of the inputs, then, in the interpreter, to what it can multiply."""
    y = y.to(like.dtype.element_ty)
    if WIDEN:
        y = y.to(tl.float32)
    return y


@triton.jit(do_not_specialize=["last_word", "rows", "steps", "chunks"])
def fused(
    words,
    last_word,  # index of the last whole word
    book,
    matrices,
    floats,
    statistics,
    gain,
    bias,
    scale,  # by line, or along the line
    inputs,  # (rows, in), contiguous
    out,  # (splits, rows, out) float32
    rows,
    steps,  # tiles along the sum that one split takes
    lines,
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
    ALONG: tl.constexpr,  # lines are rows of W, and the sum runs along them; else lines are columns
    WIDEN: tl.constexpr,
    OWN: tl.constexpr,  # lines of a tile
    PACKS: tl.constexpr,  # PACKS * PACK sub-vectors of each of them
    TAKEN: tl.constexpr,  # rows of inputs
):
    SPAN: tl.constexpr = PACKS * PACK * D_PAD
    zero = (tl.program_id(0) * 0).to(tl.int64)
    split = tl.program_id(1)
    r = tl.arange(0, OWN * PACKS)
    p = tl.arange(0, PACK)
    k = tl.arange(0, SPAN)
    row = zero + tl.program_id(2) * TAKEN + tl.arange(0, TAKEN)
    total = tl.zeros((OWN, TAKEN) if ALONG else (TAKEN, SPAN), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        if ALONG:
            line_tile, chunk_tile = tl.program_id(0), step
        else:
            line_tile, chunk_tile = step, tl.program_id(0)
        line = line_tile * OWN + r // PACKS
        chunk = chunk_tile * (PACKS * PACK) + (r % PACKS)[:, None] * PACK + p[None, :]
        # what is out of bounds decodes as the last sub-vector, or line, there is, and is met by zeros or not stored
        inside = tl.minimum(chunk, chunks - 1)
        held = tl.minimum(line, lines - 1)
        code = indices(words, last_word, held[:, None] * chunks + inside, BITS)
        y = decoded(
            code, inside, zero + held, book, matrices, floats, statistics, gain, bias,
            chunks * LATENT, LATENT, UNITS, PACK, LATENT_PAD, HIDDEN, BLOCK, D_PAD, AFFINE, SPLIT,
        )  # fmt: skip
        if SCALED == 1:
            y = y * tl.load(scale + held)[:, None]
        tile = tl.reshape(y, (OWN, SPAN))
        numbers = chunk_tile * (PACKS * PACK) + k // D_PAD
        along = numbers * D + k % D_PAD
        there = numbers < chunks
        if RAGGED:
            there = there & (along < length)
        if D_PAD != D:
            there = there & (k % D_PAD < D)
        if SCALED == 2:
            tile = tile * tl.load(scale + along, mask=there, other=0.0)[None, :]
        tile = rounded(tile, WIDEN, inputs)
        if ALONG:
            met = inputs + row[None, :] * length + along[:, None]
            x = tl.load(met, mask=there[:, None] & (row < rows)[None, :], other=0.0)
            total = tl.dot(tile, rounded(x, WIDEN, inputs), total, input_precision="ieee")
        else:
            own = zero + line_tile * OWN + tl.arange(0, OWN)
            met = inputs + row[:, None] * lines + own[None, :]
            x = tl.load(met, mask=(row < rows)[:, None] & (own < lines)[None, :], other=0.0)
            total = tl.dot(rounded(x, WIDEN, inputs), tile, total, input_precision="ieee")
    start = out + (zero + split) * rows * (lines if ALONG else length)
    if ALONG:
        own = zero + tl.program_id(0) * OWN + tl.arange(0, OWN)
        tl.store(
            start + row[None, :] * lines + own[:, None], total, mask=(own < lines)[:, None] & (row < rows)[None, :]
        )
    else:
        numbers = tl.program_id(0) * (PACKS * PACK) + k // D_PAD
        along = numbers * D + k % D_PAD
        there = (numbers < chunks) & (along < length) & (k % D_PAD < D)
        tl.store(start + row[:, None] * length + along[None, :], total, mask=(row < rows)[:, None] & there[None, :])


CONFIGS = (
    Config("broad", {"OWN": 16, "PACKS": 8, "TAKEN": 16}, num_warps=4, num_stages=1),
    Config("narrow", {"OWN": 16, "PACKS": 4, "TAKEN": 16}, num_warps=4, num_stages=1),
    Config("slim", {"OWN": 16, "PACKS": 2, "TAKEN": 16}, num_warps=4, num_stages=1),
)
_TYPES = {**POINTERS, **SHAPE, "out": "*fp32", "rows": "i32", "steps": "i32"}
_ALIGNED = (*ALIGNED, "inputs", "lines")
_IN = {**PAPER, "ALONG": True, "WIDEN": False}
_OUT = {**_IN, "ALONG": False}
_EASY = ("broad", "narrow")

KERNELS = (
    Kernel(
        "pocket-fused",
        fused,
        CONFIGS,
        (
            Case("d 8, float16", {**_TYPES, "inputs": "*fp16"}, _IN, _EASY, aligned=_ALIGNED),
            Case(
                "d 8, bfloat16, row scales",
                {**_TYPES, "inputs": "*bf16"},
                {**_IN, "SPLIT": False, "SCALED": 1},
                _EASY,
                aligned=_ALIGNED,
            ),
            Case("d 8, float32", {**_TYPES, "inputs": "*fp32"}, _IN, _EASY, aligned=_ALIGNED),
            Case(
                "d 8 along the outputs, float16",
                {**_TYPES, "inputs": "*fp16"},
                {**_OUT, "SCALED": 2},
                _EASY,
                aligned=_ALIGNED,
            ),
            Case("d 4, float16", {**_TYPES, "inputs": "*fp16"}, {**_IN, **FOURS}, ("narrow",), aligned=_ALIGNED),
            Case(
                "d 4, affine, float16",
                {**_TYPES, "inputs": "*fp16"},
                {**_IN, **FOURS, "AFFINE": True},
                ("narrow",),
                aligned=_ALIGNED,
            ),
            Case("largest, float16", {**_TYPES, "inputs": "*fp16"}, {**_IN, **LARGEST}, ("slim",), aligned=_ALIGNED),
            Case(
                "largest along the outputs",
                {**_TYPES, "inputs": "*fp16"},
                {**_OUT, **LARGEST},
                ("slim",),
                aligned=_ALIGNED,
            ),
        ),
    ),
)
