"""Triton: nearest centre of each vector without the (vectors, centres) matrix. The formulas are in ../nearest.md.

The table of centres is `kernels.nearest.Codebook`'s: (tiles, width + 1, 16) float32, in each tile a line of |c|^2
(infinite for centres that only fill the tile), then a line for each of `width` factors of the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from evenbits.kernels.launch import Case, Config, Kernel

TILE = tl.constexpr(16)  # centres a tile of the table
FAR = tl.constexpr(float("inf"))


@triton.jit
def _halves(pair):
    """The two float32 that a 64-bit load brought: half as many loads as one number each, and no instruction more."""
    low = (pair & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    high = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _factors(
    vectors, weights, rows, inside, v_row, v_column, w_row, w_column, LENGTH: tl.constexpr, WEIGHTED: tl.constexpr
):
    """What a row's centres are multiplied with, a tensor a factor: v, or w and then w v."""
    found = ()
    if WEIGHTED:
        at = weights + rows * w_row
        for _ in tl.static_range(LENGTH):
            found = found + (tl.load(at, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005  (Triton has no unpacking)
            at += w_column  # not i * w_column, which may pass 2^31 where a column is far from the next
    at = vectors + rows * v_row
    for i in tl.static_range(LENGTH):
        factor = tl.load(at, mask=inside, other=0.0)
        if WEIGHTED:
            factor = factor * found[i]
        found = found + (factor,)  # type: ignore[assignment]  # noqa: RUF005
        at += v_column
    return found


@triton.jit(do_not_specialize=["n", "tiles", "span"])
def scan_fma(
    vectors,
    weights,
    table,
    least,
    where,
    n,
    tiles,
    span,
    v_row,
    v_column,
    w_row,
    w_column,
    LENGTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Least score and the first tile that holds it, of each row over the tiles [part * span, part * span + span).

    least (parts, n) float32; where (parts, n) int32. A thread has ROWS / 128 rows of its own and reads each centre as
    a number, the same for all: sums and minima need no other lane.
    """
    WIDTH: tl.constexpr = 2 * LENGTH if WEIGHTED else LENGTH
    # pairs of centres written out one after the other: all eight take a minute to compile at 128 factors
    WRITTEN: tl.constexpr = TILE // 2 if WIDTH <= 16 else 2
    part = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    factors = _factors(vectors, weights, rows, inside, v_row, v_column, w_row, w_column, LENGTH, WEIGHTED)
    best = tl.full((ROWS,), FAR, tl.float32)
    found = tl.zeros((ROWS,), tl.int32)
    pairs = table.to(tl.pointer_type(tl.uint64))
    for tile in range(part * span, tl.minimum(part * span + span, tiles)):
        low = tl.full((ROWS,), FAR, tl.float32)
        for some in range(0, TILE // 2, WRITTEN):
            at = pairs + tile * ((WIDTH + 1) * (TILE // 2)) + some
            for pair in tl.static_range(WRITTEN):
                first, second = _halves(tl.load(at + pair))
                for i in tl.static_range(WIDTH):
                    c_first, c_second = _halves(tl.load(at + (i + 1) * (TILE // 2) + pair))
                    first = tl.fma(factors[i], c_first, first)
                    second = tl.fma(factors[i], c_second, second)
                low = tl.minimum(low, first)
                low = tl.minimum(low, second)
        better = low < best  # not in a tie: the lowest tile stays
        best = tl.where(better, low, best)
        found = tl.where(better, tile, found)
    tl.store(least + part.to(tl.int64) * n + rows, best, mask=inside)
    tl.store(where + part.to(tl.int64) * n + rows, found, mask=inside)


@triton.jit(do_not_specialize=["n", "tiles", "span"])
def scan_tensor(
    vectors,
    weights,
    table,
    least,
    where,
    n,
    tiles,
    span,
    v_row,
    v_column,
    w_row,
    w_column,
    LENGTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
):
    """As `scan_fma`, the products by the matrix unit in three tf32 parts. A tile is here CENTRES centres; `tiles` and
    `span` count those. PADDED: the width, brought to 16, 32 or 64 with zeros."""
    WIDTH: tl.constexpr = 2 * LENGTH if WEIGHTED else LENGTH
    part = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    factor = tl.arange(0, PADDED)
    number = (factor % LENGTH).to(tl.int64)
    there = inside[:, None] & (factor < WIDTH)[None, :]
    if WEIGHTED:
        left = tl.load(weights + rows[:, None] * w_row + number[None, :] * w_column, mask=there, other=0.0)
        late = there & (factor >= LENGTH)[None, :]
        left *= tl.load(vectors + rows[:, None] * v_row + number[None, :] * v_column, mask=late, other=1.0)
    else:
        left = tl.load(vectors + rows[:, None] * v_row + number[None, :] * v_column, mask=there, other=0.0)
    best = tl.full((ROWS,), FAR, tl.float32)
    found = tl.zeros((ROWS,), tl.int32)
    centre = tl.arange(0, CENTRES)
    place = (centre // TILE) * ((WIDTH + 1) * TILE) + centre % TILE
    for tile in range(part * span, tl.minimum(part * span + span, tiles)):
        at = table + tile * (CENTRES * (WIDTH + 1)) + place
        right = tl.load(at[None, :] + (factor[:, None] + 1) * TILE, mask=(factor < WIDTH)[:, None], other=0.0)
        scores = tl.dot(left, right, input_precision="tf32x3") + tl.load(at)[None, :]
        low = tl.min(scores, 1)
        better = low < best
        best = tl.where(better, low, best)
        found = tl.where(better, tile, found)
    tl.store(least + part.to(tl.int64) * n + rows, best, mask=inside)
    tl.store(where + part.to(tl.int64) * n + rows, found, mask=inside)


@triton.jit(do_not_specialize=["n", "parts"])
def pick(
    vectors,
    weights,
    table,
    least,
    where,
    out,
    n,
    parts,
    v_row,
    v_column,
    w_row,
    w_column,
    LENGTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CENTRES: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The index: of all parts the first with the least score, in its tile the first centre of the least score.

    The tile's scores are computed again, by the sums of `scan_fma` in their order, hence to the bit.
    """
    WIDTH: tl.constexpr = 2 * LENGTH if WEIGHTED else LENGTH
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    best = tl.full((ROWS,), FAR, tl.float32)
    chosen = tl.zeros((ROWS,), tl.int64)
    part = tl.arange(0, PARTS)
    for start in range(0, parts, PARTS):  # many at once: one after the other, each would wait for the memory
        there = inside[:, None] & (start + part < parts)[None, :]
        values = tl.load(least + rows[:, None] + (start + part).to(tl.int64)[None, :] * n, mask=there, other=FAR)
        low = tl.min(values, 1)
        first = tl.min(tl.where(values == low[:, None], start + part[None, :], parts), 1)
        better = low < best
        best = tl.where(better, low, best)
        chosen = tl.where(better, first, chosen)
    tile = tl.load(where + chosen * n + rows, mask=inside, other=0)
    centre = tl.arange(0, CENTRES)
    place = (centre // TILE) * ((WIDTH + 1) * TILE) + centre % TILE
    line = table + tile[:, None] * (CENTRES * (WIDTH + 1)) + place[None, :]
    scores = tl.load(line)
    v_at, w_at = vectors + rows * v_row, weights + rows * w_row
    if WEIGHTED:
        for _ in range(LENGTH):
            weight = tl.load(w_at, mask=inside, other=0.0)
            w_at += w_column
            line += TILE
            scores = tl.fma(tl.broadcast_to(weight[:, None], (ROWS, CENTRES)), tl.load(line), scores)
        w_at = weights + rows * w_row
    for _ in range(LENGTH):
        factor = tl.load(v_at, mask=inside, other=0.0)
        v_at += v_column
        if WEIGHTED:
            factor *= tl.load(w_at, mask=inside, other=0.0)
            w_at += w_column
        line += TILE
        scores = tl.fma(tl.broadcast_to(factor[:, None], (ROWS, CENTRES)), tl.load(line), scores)
    scores = tl.where(scores == scores, scores, FAR)
    first = tl.min(tl.where(scores == tl.min(scores, 1)[:, None], centre[None, :], CENTRES), 1)
    tl.store(out + rows, (tile * CENTRES + first).to(tl.int64), mask=inside)


# rows of vectors a thread has (of 128 in a program), each with `width` factors in registers: more make less of the
# loads of centres, which take half the time of the sums at 8 rows and as long as they at 4
FMA = tuple(Config(f"{rows}-rows", {"ROWS": 128 * rows}, num_warps=4, num_stages=1) for rows in (8, 4, 2, 1))
MOST_HELD = 176  # of numbers, 12 a row beside its factors: past it 8 rows spill on sm_80

CENTRES = 64  # a tile of the matrix unit's scan, the same in all its configurations: the answer hangs on it
TENSOR = (
    Config("128-rows", {"ROWS": 128}, num_warps=4, num_stages=3),
    Config("128-rows-8-warps", {"ROWS": 128}, num_warps=8, num_stages=3),
    Config("64-rows", {"ROWS": 64}, num_warps=4, num_stages=3),
)
PICK = (Config("32-rows", {"ROWS": 32, "PARTS": 16}, num_warps=4, num_stages=1),)


def fma_configs(width: int) -> tuple[Config, ...]:
    """Those whose factors fit the registers, those with most rows first."""
    return tuple(c for c in FMA if c.tiles["ROWS"] // 128 * (width + 12) <= MOST_HELD)


def tensor_configs(width: int) -> tuple[Config, ...]:
    """Those that spill no register: 128 rows in 4 warps do past 32 factors (on sm_80), every one past 64."""
    return TENSOR if width <= 32 else TENSOR[1:] if width <= 64 else ()


def padded(width: int) -> int:
    """Factors that the matrix unit multiplies: 16, 32 or 64."""
    return max(16, int(triton.next_power_of_2(width)))


SCAN_TYPES = {
    **dict.fromkeys(("vectors", "weights", "table", "least"), "*fp32"),
    "where": "*i32",
    **dict.fromkeys(("n", "tiles", "span", "v_row", "w_row"), "i32"),
}
PICK_TYPES = {k: v for k, v in SCAN_TYPES.items() if k not in ("tiles", "span")} | {"out": "*i64", "parts": "i32"}


def _cases(
    types: dict[str, str], plain: tuple[int, ...], weighted: tuple[int, ...], **more: Any
) -> Iterator[tuple[int, Case]]:
    """Width and case for each length, without weights and with them, rows and columns as they lie by default."""
    for length, with_weights in [(length, False) for length in plain] + [(length, True) for length in weighted]:
        constants = {"LENGTH": length, "WEIGHTED": with_weights, "v_column": 1, "w_column": 1, **more}
        yield length * (1 + with_weights), Case(f"d{length}{'-weighted' * with_weights}", types, constants)


def _names(configs: tuple[Config, ...]) -> tuple[str, ...]:
    return tuple(config.name for config in configs)


SCAN_FMA = Kernel(
    "nearest-fma",
    scan_fma,
    FMA,
    tuple(
        replace(case, configs=_names(fma_configs(width))) for width, case in _cases(SCAN_TYPES, (8, 10, 32), (8, 40))
    ),
)
SCAN_TENSOR = Kernel(
    "nearest-tensor",
    scan_tensor,
    TENSOR,
    tuple(
        replace(case, configs=_names(tensor_configs(width)), constants={**case.constants, "PADDED": padded(width)})
        for width, case in _cases(SCAN_TYPES, (32, 64), (13,), CENTRES=CENTRES)
    ),
)
PICK_LEAST = Kernel(
    "nearest-pick",
    pick,
    PICK,
    tuple(
        replace(case, name=f"{case.name}-of-{centres}")
        for centres, plain, weighted in ((16, (8,), ()), (CENTRES, (), (8,)))
        for _, case in _cases(PICK_TYPES, plain, weighted, CENTRES=centres)
    ),
)
KERNELS: tuple[Kernel, ...] = (SCAN_FMA, SCAN_TENSOR, PICK_LEAST)
