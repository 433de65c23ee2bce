"""Which Triton kernel multiplies an integer layer, and its launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evenbits.kernels.integer_layout import TILE
from evenbits.kernels.launch import TUNER, Config

if TYPE_CHECKING:
    from evenbits.kernels.integer import IntegerLinear

# decoded rows that a matrix product then reads from the cache, of which an H200 has 60 MB; with less, a product of
# 17,408 columns has too few rows to give every processor a tile
SLAB_BYTES = 32 << 20
GEMV_ROWS = 4  # of float32
FEW_ROWS = 16
MANY_ROWS = 128  # to here the fused kernel decodes twice at most, and nothing passes through memory


def way_for(layer: IntegerLinear, rows: int, dtype: torch.dtype) -> tuple[str, tuple[str, ...], str]:
    """Which kernel, its configurations, the one to try first in front, and why.

    The kernel follows from shape and dtype alone, never from a clock: slabs round the weight, the fused kernels do
    not, and which of the two ran must not change between runs. Configurations order the float32 sums, no more.
    """
    wide = dtype == torch.float32
    if rows <= FEW_ROWS:
        if wide and rows <= GEMV_ROWS:
            return "gemv", ("row-64-split4", "row-16"), "float32 is multiplied without the matrix unit, row by row"
        if wide:
            return "matmul", ("few-64",), "float32 is multiplied without the matrix unit, codes read once for 16 rows"
        # to share columns among programs keeps 132 processors busy where rows of W are few
        return (
            "matmul",
            ("few-128-split4", "few-64-split4", "few-64"),
            f"up to {FEW_ROWS} rows of 16 bits fill one tile of the matrix unit",
        )
    if wide or layer.run < 64 or layer.levels is not None:
        why = "float32 inputs" if wide else "a scale for less than 64 columns, or levels"
        return "slab", (), f"{why}: rows decoded {SLAB_BYTES >> 20} MiB at a time, then torch's product"
    if rows <= MANY_ROWS:
        return "matmul", ("many-64",), f"to {MANY_ROWS} rows codes are decoded inside the product, not to memory"
    return (
        "slab",
        (),
        f"above {MANY_ROWS} rows arithmetic decides: W is decoded once, {SLAB_BYTES >> 20} MiB at a time, for torch's "
        "product",
    )


def multiply(layer: IntegerLinear, rows: Tensor) -> Tensor:
    """rows (m, in), contiguous -> (m, out), with the bias."""
    out = torch.empty(rows.shape[0], layer.out_features, dtype=rows.dtype, device=rows.device)
    way, names, _ = way_for(layer, rows.shape[0], rows.dtype)
    with _on(rows.device):
        if way == "slab":
            _slab_product(layer, rows, out)
            return out
        name = _fastest(layer, rows, out, way, names)
        layer.configs[rows.shape[0], rows.dtype] = name
        product(layer, rows, out, way, name)
    return out


def _fastest(layer: IntegerLinear, rows: Tensor, out: Tensor, way: str, names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    size = 1 << (rows.shape[0] - 1).bit_length()  # 1, 2, 3 to 4, 5 to 8 and 9 to 16 rows are timed each
    key = (
        "integer", way, *_constants(layer).values(), layer.out_features, layer.in_features, layer.order is None,
        rows.dtype, layer.scale.dtype, size, rows.device,
    )  # fmt: skip
    configs = [Config(name, {}) for name in names]
    return TUNER.choose(key, configs, lambda config: product(layer, rows, out, way, config.name), rows.device).name


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _pointers(layer: IntegerLinear) -> tuple[Tensor, ...]:
    """words, ones, scale, zeros, levels, groups: in place of what there is not, something that is not read."""
    spare = layer.words
    found = (layer.ones if layer.bits % 2 else None, layer.scale, layer.zero, layer.levels, layer.group)
    return (layer.words, *(spare if tensor is None else tensor for tensor in found))


def _constants(layer: IntegerLinear) -> dict[str, Any]:
    whole = layer.group is None and layer.group_size >= layer.in_features
    return {
        "BITS": layer.bits, "GROUP": 0 if whole else layer.group_size, "RUN": layer.run,
        "ZEROS": layer.zero is not None, "LEVELS": layer.levels is not None, "INDEXED": layer.group is not None,
    }  # fmt: skip


def product(layer: IntegerLinear, rows: Tensor, out: Tensor, way: str, name: str) -> None:
    """out (m, out) = rows (m, in) W^T + bias by kernel "matmul" or "gemv" in its configuration `name`.

    On the current device, which must be the tensors'.
    """
    from evenbits.kernels.gpu import integer as gpu

    kernel = gpu.MATMUL if way == "matmul" else gpu.GEMV
    config = kernel.config(name)
    m, tiles = rows.shape[0], -(-layer.in_features // TILE)
    order = layer.order
    if order is not None and m > FEW_ROWS:  # gathered once, not by every tile
        rows, order = rows.index_select(1, order), None
    split, block = config.tiles["SPLIT"], config.tiles["BN"]
    into = out if split == 1 else torch.empty(split, m, layer.out_features, device=rows.device)
    by = -(-m // config.tiles["BM"]) if way == "matmul" else m
    spare = layer.words
    kernel.function[(-(-layer.out_features // block), by, split)](
        rows, *_pointers(layer), spare if order is None else order, spare if layer.bias is None else layer.bias, into,
        m, layer.out_features, layer.in_features, tiles, **{**_constants(layer), **config.tiles},
        PERMUTED=order is not None, EVEN=layer.in_features % TILE == 0, BIAS=layer.bias is not None and split == 1,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split > 1:
        total = gpu.SUM.configs[0]
        count = m * layer.out_features
        gpu.SUM.function[(-(-count // total.tiles["BLOCK"]),)](
            into, spare if layer.bias is None else layer.bias, out, count, layer.out_features, SPLIT=split,
            BIAS=layer.bias is not None, **total.tiles, num_warps=total.num_warps,
        )  # fmt: skip


def slabs(layer: IntegerLinear, dtype: torch.dtype, rows: int) -> Iterator[tuple[int, Tensor]]:
    """As `IntegerLinear.slabs`."""
    from evenbits.kernels.gpu import integer as gpu

    config, tiles = gpu.DECODE.configs[0], -(-layer.in_features // TILE)
    rows = min(rows, layer.out_features)
    scratch = torch.empty(rows, layer.in_features, dtype=dtype, device=layer.words.device)
    per = max(1, tiles // 16)
    for start in range(0, layer.out_features, rows):
        stop = min(start + rows, layer.out_features)
        with _on(scratch.device):
            gpu.DECODE.function[(-(-(stop - start) // config.tiles["BN"]), -(-tiles // per))](
                *_pointers(layer), scratch, start, stop, layer.out_features, layer.in_features, per, tiles,
                **_constants(layer), **config.tiles, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        yield start, scratch[: stop - start]


def _slab_product(layer: IntegerLinear, rows: Tensor, out: Tensor) -> None:
    """W is decoded a slab at a time, in columns' held order, for torch's matrix product; the scratch is SLAB_BYTES."""
    if layer.order is not None:
        rows = rows.index_select(1, layer.order)
    bias = None if layer.bias is None else layer.bias.to(rows.dtype)
    count = max(64, SLAB_BYTES // (rows.element_size() * layer.in_features) // 128 * 128)
    for start, slab in slabs(layer, rows.dtype, count):
        into = out[:, start : start + slab.shape[0]]
        if bias is None:
            torch.mm(rows, slab.t(), out=into)
        else:
            torch.addmm(bias[start : start + slab.shape[0]], rows, slab.t(), out=into)
