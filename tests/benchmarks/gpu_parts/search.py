"""Codeword search: vectors a second, against torch and against what the arithmetic units can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from gpu_parts import torch_roads
from gpu_parts.forced import variants
from gpu_parts.part import Column, Item, Part, Row, Setting
from gpu_parts.timing import Timing, alone, interleaved

SIZES = ((8, 15), (4, 12), (4, 15), (16, 15))  # numbers a vector, bits of an index
GOAL, AUTO = "d=8 K=2^15", "evenbits auto"  # the item and the road that the goal is about
_VECTORS = 1 << 20  # a matrix of 8 million weights in eights
_CHUNKS = (1 << 12, 1 << 14, 1 << 16)  # of vectors in torch: the largest take 8.6 GB of distances


def items(setting: Setting) -> Iterable[Item]:
    sizes = ((8, 5),) if setting.small else SIZES
    for d, bits in sizes:
        yield Item(f"d={d} K=2^{bits}", partial(_size, setting, d, bits))


def _size(setting: Setting, d: int, bits: int) -> list[Row]:
    from evenbits.kernels.nearest import Codebook, choose, search

    count = 64 if setting.small else _VECTORS
    vectors = setting.normal(count, d, seed=d)
    centres = setting.normal(1 << bits, d, seed=d + 1)
    fewer = vectors[: count // 4]  # torch's own roads take long; vectors a second is what is compared
    runs: dict[str, tuple[Callable[[], Any], int, str]] = {}
    precisions: tuple[tuple[Any, str], ...] = (("fma", "float32"), ("tf32x3", "tf32"))
    for precision, unit in precisions:
        for name, run in variants(partial(search, vectors, centres, precision=precision, backend="triton")):
            runs[f"evenbits {precision}, {name}"] = run, count, unit
    chosen = choose(Codebook(centres), vectors.device, backend=setting.backend).kernel
    kind = "tf32" if chosen.endswith("tf32x3") else "float32"
    runs[AUTO] = partial(search, vectors, centres, backend=setting.backend), count, kind
    for name, road in (("torch cdist + argmin", torch_roads.by_cdist), ("torch addmm + argmin", torch_roads.by_addmm)):
        chunk = _best_chunk(setting, road, fewer, centres)
        runs[f"{name}, {chunk:,} vectors at a time"] = partial(road, fewer, centres, chunk), len(fewer), "float32"
    timed = interleaved(setting, {name: run for name, (run, _, _) in runs.items()}, seconds=0.5)
    base = max(len(fewer) / timed[name].seconds for name in runs if "cdist" in name)
    addmm = max(len(fewer) / timed[name].seconds for name in runs if "addmm" in name)
    reference = search(vectors, centres, precision="fma", backend="triton")
    return [
        _row(setting, (d, bits), name, timed[name], many, kind, base, addmm, run(), reference)
        for name, (run, many, kind) in runs.items()
    ]


def _best_chunk(setting: Setting, road: torch_roads.Nearest, vectors: Tensor, centres: Tensor) -> int:
    if setting.small:
        return 64
    times = {chunk: alone(setting, partial(road, vectors, centres, chunk), seconds=0.05) for chunk in _CHUNKS}
    return min(times, key=lambda chunk: times[chunk].seconds)


def _row(
    setting: Setting, size: tuple[int, int], name: str, timing: Timing, count: int, kind: str, base: float,
    addmm: float, found: Tensor, reference: Tensor,
) -> Row:  # fmt: skip
    d, bits = size
    rate = count / timing.seconds
    # a multiplication and an addition for each number of each pair; three times those where float32 is made of tf32
    operations = 2.0 * d * (1 << bits) * (3 if kind == "tf32" else 1)
    peak = getattr(setting.ceilings, kind) if kind else None
    limit = peak / operations if peak else None
    return {
        "size": f"d={d} K=2^{bits}", "road": name, "vectors": count, "ms": timing.seconds * 1e3,
        "spread": (timing.high - timing.low) / timing.seconds, "rate": rate, "shown": rate / 1e6,
        "limit": limit / 1e6 if limit else None, "unit": kind, "fraction": rate / limit if limit else None,
        "over_cdist": rate / base, "over_addmm": rate / addmm,
        "same": float((found == reference[: len(found)]).double().mean()),
    }  # fmt: skip


PART = Part(
    "search",
    "Codeword search",
    f"The nearest of K centres for {_VECTORS:,} random vectors of d numbers (torch's roads: a quarter of them, "
    "in the chunks that were fastest), float32. The limit is the machine's measured matrix product rate over 2 "
    "d K operations a vector (6 d K of tf32 for tf32x3); comparing is not counted. *Same* is the share of "
    "vectors that get the same centre as by fma: ties and roundings differ.",
    40,
    (
        Column("size", "size"),
        Column("road", "road"),
        Column("ms", "ms", ".4g"),
        Column("spread", "spread", ".1%"),
        Column("shown", "million vectors/s", ",.4g"),
        Column("limit", "limit, million/s", ",.4g"),
        Column("unit", "limited by"),
        Column("fraction", "of limit", ".0%"),
        Column("over_cdist", "times cdist", ".3g"),
        Column("over_addmm", "times addmm", ".3g"),
        Column("same", "same", ".4%"),
    ),
    items,
)
