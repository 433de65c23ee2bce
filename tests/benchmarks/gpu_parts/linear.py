"""Packed linear layers at the shapes of Llama-2-7B and Qwen3-14B, against dense ones and against decoding first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts import formats
from gpu_parts.packed import Format, stored_bytes
from gpu_parts.part import Column, Item, Part, Row, Setting
from gpu_parts.timing import Run, captured, interleaved
from gpu_parts.torch_roads import dequantize

# (out, in), those first that matter most where time is short
LLAMA = ((4096, 4096), (11008, 4096), (4096, 11008))
QWEN = ((17408, 5120), (5120, 5120), (5120, 17408), (1024, 5120))
SHAPES = (*LLAMA, *QWEN)
DECODE, PREFILL = (1, 4, 16), 2048
_MOST_COPIES = 64
_CALLS, _FEW = 32, 4  # calls a graph has at least, which hides its launch; copies that a prefill takes
_CALLS_SECONDS = 0.02  # that a version is timed for, per number of rows; a hundred thousand times what a call takes


def items(setting: Setting) -> Iterable[Item]:
    """Format by format, those first that goals are about: what time cuts off is whole formats."""
    shapes = ((24, 40),) if setting.small else SHAPES
    dense = {shape: _Dense(setting, shape) for shape in shapes}
    for kind in formats.TIMED[:5] if setting.small else formats.TIMED:
        for out, into in shapes:
            yield Item(f"{kind.name} {out}x{into}", partial(_one, setting, dense[out, into], kind))


def copies(setting: Setting, size: int, most: int = _MOST_COPIES) -> int:
    """Weights of `size` bytes that calls take in turn, three times what the L2 cache holds, to find none in it.

    A cache that evicts at random keeps 6% of them, of dense and packed ones alike.
    """
    return 1 if setting.small else max(2, min(most, math.ceil(3 * setting.l2_bytes / size)))


class _Dense:
    """The dense weights of a shape, made when first needed and shared by the formats of that shape."""

    def __init__(self, setting: Setting, shape: tuple[int, int]) -> None:
        self.setting, self.shape = setting, shape
        self.held: dict[torch.dtype, list[Tensor]] = {}

    def weights(self, dtype: torch.dtype) -> list[Tensor]:
        if dtype not in self.held:
            count = copies(self.setting, 2 * math.prod(self.shape))
            made = [self.setting.normal(*self.shape, seed=seed) * 0.02 for seed in range(count)]
            self.held[dtype] = [weight.to(dtype) for weight in made]
        return self.held[dtype]


@torch.inference_mode()
def _one(setting: Setting, dense: _Dense, kind: Format) -> list[Row]:
    """All numbers of rows of one format at one shape. Dense products are timed in turn with it each time."""
    out, into = dense.shape
    first = kind.make(setting, out, into, 0)
    size = stored_bytes(first)
    weights = [first, *(kind.make(setting, out, into, 100 * seed) for seed in range(1, copies(setting, size)))]
    modules = [kind.build(weight, setting) for weight in weights]
    found = []
    for rows in (1, 33) if setting.small else (*DECODE, PREFILL):
        inputs = setting.normal(rows, into, dtype=torch.float16, seed=rows)
        most = _FEW if rows > max(DECODE) else len(weights)  # a prefill reads its weights once for thousands of rows
        runs: dict[str, tuple[Run, int]] = {
            "packed": _turns(setting, modules[:most], inputs),
            "float16": _turns(setting, [partial(_matmul, w) for w in dense.weights(torch.float16)[:most]], inputs),
            "bfloat16": _turns(
                setting, [partial(_matmul, w) for w in dense.weights(torch.bfloat16)[:most]], inputs.bfloat16()
            ),
        }
        if kind.decoded:
            runs["decoded first"] = _turns(setting, [partial(_decoded, weight) for weight in weights[:2]], inputs, 1)
        found.append(_row(setting, kind, (out, into), rows, modules, size, _time(setting, runs)))
    return found


def _matmul(weight: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ weight.t()


def _decoded(weight: Any, inputs: Tensor) -> Tensor:
    return inputs @ dequantize(weight, inputs.dtype).t()


def _turns(
    setting: Setting, layers: Sequence[Callable[[Tensor], Tensor]], inputs: Tensor, calls: int = _CALLS
) -> tuple[Run, int]:
    """A run that calls layers in turn, each as often, and how many calls that is: `calls` at least, for prefills one
    of each."""
    rounds = 1 if setting.small or len(inputs) > max(DECODE) else math.ceil(calls / len(layers))

    def run() -> None:
        for layer in (*layers,) * rounds:
            layer(inputs)

    return run, rounds * len(layers)


def _time(setting: Setting, runs: dict[str, tuple[Run, int]]) -> dict[str, Any]:
    """Seconds a call: "NAME" as called from Python, "NAME graph" as a CUDA graph's replay; "note" on graphs."""
    found: dict[str, Any] = {"note": ""}
    if setting.cuda:
        for run, _ in runs.values():
            run()  # compiles and tunes before anything is captured
    replays = {}
    for name, (run, _) in runs.items():
        if name == "decoded first":  # its kernels are long, and launches between them no matter
            continue
        replay, note = captured(setting, run)
        if replay is not None:
            replays[name] = replay
        elif name == "packed":
            found["note"] = note
    for suffix, versions in (("", {name: run for name, (run, _) in runs.items()}), (" graph", replays)):
        timed = interleaved(setting, versions, seconds=_CALLS_SECONDS)
        found |= {name + suffix: timing.seconds / runs[name][1] for name, timing in timed.items()}
    return found


def _row(
    setting: Setting, kind: Format, shape: tuple[int, int], rows: int, modules: Sequence[nn.Module], size: int,
    timed: dict[str, Any],
) -> Row:  # fmt: skip
    out, into = shape
    # of replays on both sides or of neither: called from Python, a short kernel waits for its launch
    suffix = " graph" if {"packed graph", "float16 graph", "bfloat16 graph"} <= set(timed) else ""
    best: dict[str, float] = {name: timed[name + suffix] for name in ("packed", "float16", "bfloat16")}
    passed = 2 * rows * (out + into)  # inputs and outputs, two bytes each
    moved = size + passed
    floor, limit = setting.ceilings.floor(moved, 2.0 * rows * out * into, "float16")
    dense_floor, _ = setting.ceilings.floor(2 * out * into + passed, 2.0 * rows * out * into, "float16")
    module: Any = modules[0]
    chosen = module.choice(rows)
    seconds, decoded = best["packed"], timed.get("decoded first")
    return {
        "shape": f"{out}x{into}", "format": kind.name, "shown": kind.shown, "rows": rows,
        "kernel": chosen.kernel + (f" {chosen.config}" if chosen.config else ""), "reason": chosen.reason,
        "stored_bytes": size, "held_bytes": module.held_bytes, "bits": 8 * size / out / into,
        "copies": len(modules),
        "us": timed["packed"] * 1e6, "graph_us": timed["packed graph"] * 1e6 if "packed graph" in timed else None,
        "best_us": seconds * 1e6, "float16_us": best["float16"] * 1e6, "bfloat16_us": best["bfloat16"] * 1e6,
        "float16_plain_us": timed["float16"] * 1e6, "decoded_us": decoded * 1e6 if decoded else None,
        "rate": moved / seconds, "gb": moved / seconds / 1e9,
        "of_copy": moved / seconds / setting.ceilings.copy if setting.ceilings.copy else None,
        "tflops": 2e-12 * rows * out * into / seconds,
        "floor_us": floor * 1e6 if floor else None, "limit": limit, "fraction": floor / seconds if floor else None,
        "dense_fraction": dense_floor / best["float16"] if dense_floor else None,
        "over_float16": best["float16"] / seconds, "over_bfloat16": best["bfloat16"] / seconds,
        "over_decoded": decoded / seconds if decoded else None,
        "note": timed["note"] or _warm(setting, kind, shape, len(modules) * size),
    }  # fmt: skip


def _warm(setting: Setting, kind: Format, shape: tuple[int, int], held: int) -> str:
    if not setting.cuda or held > setting.l2_bytes:
        return ""
    return f"{kind.name}, {shape[0]}x{shape[1]}: all copies, {held >> 20} MiB, fit in the L2 cache"


PART = Part(
    "linear",
    "Linear layers",
    "Float16 inputs. Each call takes another copy of the weight, so that it comes from memory and not from the "
    "L2 cache (but where a note below says so). µs: as called from Python, and as replays of a CUDA graph of "
    "all copies in turn; dense products and ratios are of graphs where all three could be captured. The floor is "
    "the larger of the bytes that are stored, come in and go out over the measured copy, and the operations "
    "over the measured float16 matrix product. *Decoded first* is plain torch: a dense weight made in each "
    "call, then a product.",
    200,
    (
        Column("shape", "out x in"),
        Column("format", "format"),
        Column("bits", "bits", ".2f"),
        Column("rows", "rows", "d"),
        Column("us", "µs", ".4g"),
        Column("graph_us", "µs in a graph", ".4g"),
        Column("float16_us", "fp16 dense", ".4g"),
        Column("bfloat16_us", "bf16 dense", ".4g"),
        Column("decoded_us", "decoded first", ".4g"),
        Column("over_float16", "times fp16", ".3g"),
        Column("over_bfloat16", "times bf16", ".3g"),
        Column("over_decoded", "times decoded", ".3g"),
        Column("gb", "GB/s", ".4g"),
        Column("of_copy", "of copy", ".0%"),
        Column("floor_us", "floor µs", ".3g"),
        Column("limit", "limit"),
        Column("fraction", "of floor", ".0%"),
        Column("kernel", "kernel"),
    ),
    items,
)
