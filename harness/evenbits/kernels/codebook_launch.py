"""Launches of the codebook kernels: which of three ways, how sums are split, which tables for which inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evenbits.kernels.codebook_held import Held, Layout
from evenbits.kernels.launch import TUNER, Config, Kernel, interpreted

GEMV_ROWS = 4  # above, one sum for each row and output no longer fits the registers
GEMM_ROWS = 64  # above, tiles would be decoded again for each 64 rows
SLAB_BYTES = 16 << 20  # of decoded weight at a time: a quarter of the L2 of an H200, where torch's matmul finds it
_WARPS = 16  # on each multiprocessor, for the gathers under way to hide their latency
_BLOCKS = 2  # of the matrix kernel on each multiprocessor


def kernel_for(rows: int) -> tuple[str, str]:
    """Which of the ways, and why."""
    if rows <= GEMV_ROWS:
        return "gemv", f"{rows} row{'s'[: rows > 1]}: sums in registers, each codeword gathered once for all rows"
    if rows <= GEMM_ROWS:
        return "gemm", f"{rows} rows: tiles decoded, each for up to 64 rows, and multiplied where they are"
    return "slab", f"{rows} rows: {SLAB_BYTES >> 20} MiB of the weight decoded at a time for torch's matmul"


def half_table(table: Tensor) -> Tensor:
    """float16 in place of float32, for inputs of 16 bits: rounds as a dense weight of their dtype would be rounded.

    The table itself where float16 would lose more than that, because numbers are too large or too small for it.
    """
    if table.dtype != torch.float32:
        return table
    half = table.half()
    largest = table.abs().max()
    lost = (half.float() - table).abs().max()
    return half if bool(lost <= largest * 2.0**-11) and bool(torch.isfinite(half).all()) else table


def multiply(
    held: Held, table: Tensor, rows: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, str]:
    """rows (m, in) float16, bfloat16 or float32, contiguous -> (m, out); and the configuration taken.

    table: held.table, or `half_table` of it. dtype: of the outputs, float32 or that of the rows, which None means.
    Slabs round to the rows' dtype first.
    """
    dtype = dtype or rows.dtype
    way, _ = kernel_for(rows.shape[0])
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        if way == "slab":
            out, config = _slabs(held, table, rows, bias)
            return out.to(dtype), config
        return _products(held, table, rows, bias, way, dtype)


def _constants(held: Held, table: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    layout = held.layout
    parts = layout.parts
    padded = 1 << (layout.d - 1).bit_length()
    widest = 4 if torch.float32 in (dtype, table.dtype) else 8
    return {
        "STREAMS": len(parts),
        "BITS": tuple(part.bits for part in parts),
        "STRIDE": tuple(part.stride for part in parts),
        "OFFSET": tuple(part.offset for part in parts),
        "WORD": tuple(part.byte // 4 for part in parts),
        "ENTRY": tuple(part.entry for part in parts),
        "WINDOW": tuple(part.window for part in parts),
        "READ": tuple(part.read for part in parts),
        "D": layout.d,
        "DP": padded,
        "ROW": layout.stride,
        "E": min(padded, widest),
        "ALIGNED": all(_chunks(layout) * part.stride * part.bits % 32 == 0 for part in parts),
        "GAIN": _how(held.gain, layout.d),
        "SHIFT": _how(held.offset, layout.d),
    }


def _how(factor: Tensor | None, d: int) -> int:
    return 0 if factor is None else 2 if d > 1 and factor.shape[1] == d else 1


def _lines(layout: Layout) -> tuple[int, int]:
    """Lines, and their length."""
    sides = layout.out_features, layout.in_features
    return sides if layout.axis == "in" else sides[::-1]


def _chunks(layout: Layout) -> int:
    return -(-_lines(layout)[1] // layout.d)


def _affine(held: Held) -> tuple[Tensor | None, Tensor | None]:
    """Gain and offset as kernels read them: by number, each line's stand in a power of two of numbers."""
    d = held.layout.d
    missing = (1 << (d - 1).bit_length()) - d
    found = [
        part if part is None or not missing or part.shape[1] != d else torch.nn.functional.pad(part, (0, missing))
        for part in (held.gain, held.offset)
    ]
    return found[0], found[1]


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter: so that sums are split there too
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernels() -> Mapping[str, Kernel]:
    from evenbits.kernels.gpu.codebook import KERNELS

    return {kernel.name: kernel for kernel in KERNELS}


def _products(
    held: Held, table: Tensor, rows: Tensor, bias: Tensor | None, way: str, dtype: torch.dtype
) -> tuple[Tensor, str]:
    layout, count = held.layout, rows.shape[0]
    lines, length = _lines(layout)
    chunks = _chunks(layout)
    constants = _constants(held, table, rows.dtype)
    pieces = chunks * (constants["DP"] // constants["E"])
    axis_in = layout.axis == "in"
    kernel = _kernels()["codebook-gemm" if way == "gemm" else f"codebook-gemv-{layout.axis}"]
    gain, offset = _affine(held)
    out = torch.empty(count, layout.out_features, dtype=dtype, device=rows.device)
    common = {"x": rows, "words": held.codes.view(torch.int32), "table": table, "book": held.book, "gain": gain,
              "offset": offset, "row_scale": held.row_scale, "bias": bias, "lines": lines, "chunks": chunks,
              "length": length, **constants}  # fmt: skip
    if way == "gemm":
        common |= {"AXIS_IN": axis_in, "rows": count, "WIDEN": interpreted() and rows.dtype == torch.bfloat16}
    else:
        common |= {"ROWS": count}
        if axis_in:
            common["EVEN"] = length % layout.d == 0 and constants["DP"] == layout.d

    def launch(config: Config) -> None:
        tiles = config.tiles
        if way == "gemm":
            walked = chunks * constants["DP"] if axis_in else lines
            blocks = _up(layout.out_features if axis_in else chunks * constants["DP"], tiles["BN"])
            blocks *= _up(count, tiles["BM"])
            steps, wanted = _up(walked, tiles["BK"]), _BLOCKS * _multiprocessors(rows.device)
        else:
            blocks = _up(lines, tiles["BL"]) if axis_in else _up(pieces, tiles["BP"])
            steps = _up(pieces, tiles["BP"]) if axis_in else _up(lines, tiles["BL"])
            wanted = _WARPS * _multiprocessors(rows.device) // config.num_warps
        splits = min(steps, max(1, round(wanted / blocks)))
        each = _up(steps, splits)
        splits = _up(steps, each)
        grid: tuple[int, ...] = (blocks, splits)
        if way == "gemm":
            across = _up(count, tiles["BM"])
            grid = (blocks // across, across, splits)
        into = out if splits == 1 else torch.empty(splits, *out.shape, device=rows.device)
        kernel.function[grid](
            out=into, steps=each, DIRECT=splits == 1, num_warps=config.num_warps, num_stages=config.num_stages,
            **common, **tiles,
        )  # fmt: skip
        if splits > 1:
            _finish(into, held.row_scale, bias, out)

    alike = count if way == "gemv" else 1 << (count - 1).bit_length()  # rows that take the same configuration
    how = constants["GAIN"], constants["SHIFT"]  # which decide, too, which configurations there are
    key = (kernel.name, layout, table.dtype, rows.dtype, alike, how)
    config = TUNER.choose(key, _configs(kernel, rows, constants["GAIN"]), launch, rows.device)
    launch(config)
    return out, config.name


def _configs(kernel: Kernel, rows: Tensor, gain: int) -> list[Config]:
    if kernel.name == "codebook-gemm":
        if rows.dtype == torch.float32:
            return [kernel.config("float")]
        names = (
            ("few", "few-direct")
            if rows.shape[0] <= 16
            else ("some", "few")
            if rows.shape[0] <= 32
            else ("many", "some")
        )
        return [kernel.config(name) for name in names]
    if kernel.name == "codebook-gemv-in" and gain == 2:  # gains of eight lines would not fit the registers
        return [config for config in kernel.configs if config.tiles["BL"] <= 4]
    return list(kernel.configs)


def _finish(parts: Tensor, row_scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    kernel = _kernels()["codebook-finish"]
    config = kernel.configs[0]
    splits, rows, out_features = parts.shape
    kernel.function[(_up(out_features, config.tiles["BLOCK"]), rows)](
        parts, row_scale, bias, out, rows, out_features, splits, num_warps=config.num_warps, **config.tiles
    )


def _slabs(held: Held, table: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[Tensor, str]:
    """Outputs of a slab of the weight at a time, so that each is summed in one matmul whatever the axis."""
    layout = held.layout
    chunk = 1 if layout.axis == "in" else layout.d  # outputs that are decoded together
    width = max(1, SLAB_BYTES // (rows.element_size() * layout.in_features * chunk)) * chunk
    out = torch.empty(rows.shape[0], layout.out_features, dtype=rows.dtype, device=rows.device)
    scratch = torch.empty(min(width, layout.out_features) * layout.in_features, dtype=rows.dtype, device=rows.device)
    name = ""
    for start in range(0, layout.out_features, width):
        stop = min(start + width, layout.out_features)
        part = scratch[: (stop - start) * layout.in_features]
        if layout.axis == "in":
            tile = part.view(stop - start, layout.in_features)
            name = decode(held, table, tile, (start, stop), 0)
            turned = tile.t()
        else:
            turned = part.view(layout.in_features, stop - start)
            name = decode(held, table, turned, (0, layout.in_features), start // layout.d)
        if bias is None:
            torch.mm(rows, turned, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(rows.dtype), rows, turned, out=out[:, start:stop])
    return out, name


def decode(held: Held, table: Tensor, out: Tensor, lines: tuple[int, int], chunk: int) -> str:
    """Into out (lines, width): numbers of the weight from this chunk of the lines on, row scales included.

    Returns the configuration taken.
    """
    layout = held.layout
    kernel = _kernels()["codebook-decode"]
    constants = _constants(held, table, out.dtype)
    gain, offset = _affine(held)
    pieces = _up(out.shape[1], layout.d) * (constants["DP"] // constants["E"])
    first, last = lines
    total, length = _lines(layout)

    def launch(config: Config) -> None:
        grid = (_up(last - first, config.tiles["BL"]), _up(pieces, config.tiles["BP"]))
        kernel.function[grid](
            words=held.codes.view(torch.int32), table=table, book=held.book, gain=gain, offset=offset,
            row_scale=held.row_scale, out=out, lines=total, chunks=_chunks(layout), length=length, line_from=first,
            line_to=last, chunk_from=chunk, width=out.shape[1], AXIS_IN=layout.axis == "in",
            num_warps=config.num_warps, num_stages=config.num_stages, **constants, **config.tiles,
        )  # fmt: skip

    key = (kernel.name, layout, table.dtype, out.dtype, constants["GAIN"], constants["SHIFT"])
    config = TUNER.choose(key, kernel.configs, launch, out.device)
    launch(config)
    return config.name


def _up(count: int, size: int) -> int:
    return -(-count // size)
