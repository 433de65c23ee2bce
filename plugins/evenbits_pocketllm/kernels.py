"""PocketLLM's exact decoding by kernels: to slabs of the dense weight, or fused with its product. See kernels.md.

The oracle is `network.decode_with`, which `weight` applies in any dtype. Needs torch alone; Triton comes in where a
kernel is launched.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from evenbits.kernels.launch import TUNER, Choice, Config, interpreted
from evenbits.maths.bitpack import unpack_at
from evenbits_pocketllm.network import decode_with
from evenbits_pocketllm.prepared import Layout, PocketWeight, Prepared, padded, prepare, refusal

__all__ = [
    "PocketWeight", "Prepared", "choose", "decode_matmul", "decode_slab", "matmul", "padded", "prepare", "refusal",
    "slab_matmul", "weight",
]  # fmt: skip

FUSED, SLABS = "triton-pocket-fused", "triton-pocket-slabs"
SLAB_BYTES = 1 << 25  # of the dense weight at a time: 4096 lines of 4096 in float16, which keep a dense product busy
FUSED_ROWS = 16  # of the inputs; beyond, decoding again for each 16 rows costs more than writing the weight once
_PROGRAMS = 1056  # eight for each of 132 multiprocessors: fewer leave some of them idle


def weight(pocket: PocketWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """(out, in): the twin of all kernels here, the whole matrix at once."""
    lines, chunks = pocket.lines, pocket.chunks
    place = torch.arange(lines * chunks, device=pocket.codes.device).view(lines, chunks)
    at = place % lines * chunks + place // lines if pocket.code_order else place
    words = pocket.codebook.to(dtype)[unpack_at(pocket.codes, pocket.bits, at)]
    vectors = decode_with(words, pocket.statistics.to(dtype), pocket.decoder.to(dtype), pocket.network)
    flat = torch.empty_like(vectors.flatten(0, 1))
    flat[at.flatten()] = vectors.flatten(0, 1)
    found = flat.view(lines, -1)[:, : pocket.length]
    found = found if pocket.axis == "in" else found.t()
    return found if pocket.row_scale is None else found * pocket.row_scale.to(dtype)[:, None]


def is_split(dtype: torch.dtype) -> bool:
    """Whether products inside the decoder keep both float16 parts: not for bfloat16, which rounds away what is lost."""
    return dtype != torch.bfloat16


def decode_slab(prepared: Prepared, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """(last - first, length) of `dtype`: these lines of the weight, row scales included; where `by_chunks`, all lines
    of chunks first to last - 1: (lines, numbers of these chunks)."""
    from evenbits_pocketllm.gpu.decode import decode

    pocket = prepared.pocket
    device, d, groups, taken, order = pocket.codes.device, pocket.network.outputs, last - first, pocket.chunks, 0
    if pocket.by_chunks:
        order, groups, taken = 1, pocket.lines, last - first
    if pocket.code_order:
        order, taken = 2, pocket.chunks
        groups = -(-last * pocket.lines // taken) - first * pocket.lines // taken
    shape = (pocket.lines, min(last * d, pocket.length) - first * d) if pocket.by_chunks else (groups, pocket.length)
    out = torch.empty(shape, dtype=dtype, device=device)
    constants = prepared.constants(is_split(dtype))

    def run(config: Config) -> None:
        tiles = -(-taken // (config.tiles["ROWS"] * prepared.layout.pack))
        decode[(groups * tiles,)](
            **prepared.arguments(), out=out, first=first, last=last, tiles=tiles, ORDER=order, **constants,
            **config.tiles, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    key = ("pocket-decode", dtype, order, pocket.lines, pocket.chunks, *constants.values())
    with _on(device):
        config = TUNER.choose(key, _decode_configs(prepared, taken), run, device)
        run(config)
    prepared.ran[SLABS] = config.name
    return out


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _decode_configs(prepared: Prepared, taken: int) -> tuple[Config, ...]:
    """Those whose tiles a group fills and whose numbers the registers hold."""
    from evenbits_pocketllm.gpu.decode import CONFIGS

    layout = prepared.layout
    names = ["short"]
    if not _is_heavy(prepared) and taken > 64 * layout.pack:
        names.insert(0, "long")
    if layout.wide <= 16 and taken <= 32 * layout.pack:
        names = ["scant"]
    return tuple(config for config in CONFIGS if config.name in names)


def _is_heavy(prepared: Prepared) -> bool:
    """Whether a tile of 128 rows would spill registers."""
    return prepared.pocket.network.affine or prepared.layout.hidden > 32 or _is_broad(prepared.layout)


def _is_broad(layout: Layout) -> bool:
    return layout.wide > 16 or layout.last > 16


def decode_matmul(prepared: Prepared, inputs: Tensor) -> Tensor:
    """inputs (rows, in) times the weight's transpose: (rows, out) float32, the weight rounded to the inputs' dtype.

    For 16 rows and fewer each weight is decoded once; for more, once for each 16 of them. Not under the code's order,
    whose groups run across lines: ValueError.
    """
    pocket = prepared.pocket
    if pocket.code_order:
        raise ValueError("groups of the released code run across lines: decode_slab and a dense product instead")
    from evenbits_pocketllm.gpu.fused import CONFIGS, fused

    inputs, rows, along = inputs.contiguous(), inputs.shape[0], pocket.axis == "in"
    if not rows:
        return torch.zeros(0, pocket.out_features, device=inputs.device)
    constants = prepared.constants(is_split(inputs.dtype))
    names = ("slim",) if _is_broad(prepared.layout) else ("narrow",) if _is_heavy(prepared) else ("broad", "narrow")
    configs = tuple(config for config in CONFIGS if config.name in names)

    def run(config: Config) -> Tensor:
        tiles = config.tiles
        owned, chunked = -(-pocket.lines // tiles["OWN"]), -(-pocket.chunks // (tiles["PACKS"] * prepared.layout.pack))
        outputs, summed = (owned, chunked) if along else (chunked, owned)
        blocks = -(-rows // tiles["TAKEN"])
        steps = -(-summed // min(summed, -(-_PROGRAMS // (outputs * blocks))))
        splits = -(-summed // steps)
        out = torch.empty(splits, rows, pocket.out_features, device=inputs.device)
        fused[(outputs, splits, blocks)](
            **prepared.arguments(), inputs=inputs, out=out, rows=rows, steps=steps, ALONG=along, WIDEN=interpreted(),
            **constants, **tiles, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return out.sum(0) if splits > 1 else out[0]

    # not by rows: to FUSED_ROWS of them a tile holds as many places, whatever is in them
    key = ("pocket-fused", inputs.dtype, along, pocket.lines, pocket.chunks, *constants.values())
    with _on(inputs.device):
        config = TUNER.choose(key, configs, run, inputs.device)
        prepared.ran[FUSED] = config.name
        return run(config)


def slab_matmul(prepared: Prepared, inputs: Tensor, slab_bytes: int = SLAB_BYTES) -> Tensor:
    """As `decode_matmul`, by decoding `slab_bytes` of the weight at a time and a dense product of each: for many rows,
    and any order of groups."""
    pocket = prepared.pocket
    d, along = pocket.network.outputs, pocket.axis == "in"
    out = torch.zeros(inputs.shape[0], pocket.out_features, device=inputs.device)
    if not inputs.shape[0]:
        return out
    count, each = (pocket.chunks, pocket.lines * d) if pocket.by_chunks else (pocket.lines, pocket.length)
    step = max(1, slab_bytes // (each * inputs.element_size()))
    for first in range(0, count, step):
        last = min(first + step, count)
        slab = decode_slab(prepared, first, last, inputs.dtype)
        numbers = slice(first * d, min(last * d, pocket.length))
        if not along:
            out[:, numbers] = inputs @ slab
        elif pocket.code_order:  # all outputs of some inputs: sums are rounded to the inputs' dtype once a slab
            out += inputs[:, numbers] @ slab.t()
        else:
            out[:, first:last] = inputs @ slab.t()
    return out


def choose(prepared: Prepared, rows: int) -> Choice:
    """Which of both, and why."""
    size = f"slabs of {SLAB_BYTES >> 20} MiB, then multiplied densely"
    slabs = prepared.ran.get(SLABS, "")
    if prepared.pocket.code_order:
        return Choice(SLABS, f"groups of the released code run across all lines: decoded in {size}", slabs)
    if rows > FUSED_ROWS:
        return Choice(
            SLABS,
            f"{rows} rows: decoding again for each {FUSED_ROWS} of them would cost more than the product; each weight "
            f"is decoded once, in {size}",
            slabs,
        )
    counted = f"{rows} row{'s' if rows != 1 else ''}"
    reason = f"{counted}: each weight decoded once and multiplied where it is, never in memory"
    return Choice(FUSED, reason, prepared.ran.get(FUSED, ""))


def matmul(prepared: Prepared, inputs: Tensor) -> Tensor:
    """inputs (rows, in) -> (rows, out) float32, as `choose` says."""
    if choose(prepared, inputs.shape[0]).kernel == FUSED:
        return decode_matmul(prepared, inputs)
    return slab_matmul(prepared, inputs)
