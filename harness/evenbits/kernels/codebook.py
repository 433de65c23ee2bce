"""y = x W^T from indices and codebooks: k-means, AQLM, VPTQ and PocketLLM's tables; never the dense weight at once.

See codebook.md beside this file for formulas, tiles and what they cost.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from evenbits.kernels import codebook_launch
from evenbits.kernels.codebook_composed import compose
from evenbits.kernels.codebook_held import Held, Table, hold, share, weight_of
from evenbits.kernels.launch import Backend, Choice, triton_refusal
from evenbits.kernels.weights import CodebookWeight, Stream
from evenbits.maths.bitpack import unpack_range

TILE_BYTES = 16 << 20  # what torch may take to decode at once
_STORED = ("codes", "table", "book", "gain", "offset", "row_scale")
_COMPOSED = ("table", "book", "gain", "offset")


def decode_lines(weight: CodebookWeight, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lines first to last - 1, before row scales: (last - first, length), computed in `dtype`.

    The twin of what the kernels decode; in float64 their oracle.
    """
    total: Tensor | None = None
    for stream in weight.streams:
        place = _places(weight, stream, first, last)
        if stream.book is not None:
            place += (stream.book[first:last].long() * stream.books.shape[1])[:, None]
        found = stream.books.reshape(-1, weight.d)[place].to(dtype)
        total = found if total is None else total.add_(found)
    assert total is not None
    if weight.gain is not None:
        total *= weight.gain[first:last, None].to(dtype)
    if weight.offset is not None:
        total += weight.offset[first:last, None].to(dtype)
    return total.flatten(1)[:, : weight.length]


def restore(weight: CodebookWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight (out, in)."""
    lines = decode_lines(weight, 0, weight.lines, dtype)
    dense = lines if weight.axis == "in" else lines.t()
    return dense if weight.row_scale is None else dense * weight.row_scale.to(dtype)[:, None]


class CodebookLinear(nn.Module):
    """y = x W^T (+ bias); gradients reach the inputs alone.

    Weights are rounded to the inputs' dtype at most, as in a dense layer, and sums are in float32 (float64 for such
    inputs, which torch computes whatever the backend).
    """

    codes: Tensor
    table: Tensor
    book: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    row_scale: Tensor | None
    bias: Tensor | None
    decibels: Tensor | None  # of an int8 table
    narrow: Tensor | None  # for Triton, of a float32 table: for inputs of 16 bits

    def __init__(
        self, weight: CodebookWeight, bias: Tensor | None = None, backend: Backend = "auto", table: Table = "exact"
    ) -> None:
        """weight: its tensors, on the device to compute on, are held as they are stored. bias: (out,).
        What Triton needs beside them is made here and when the layer moves, so that no call does: a CUDA graph may
        hold it. Moving leaves dtypes alone, `half()` too: they belong to the format.

        table: "exact" as given; "int8" rounds all entries to one step, which halves what gathers move: the error it
        makes in this weight is `table_decibels`. Raises ValueError for a weight that does not fit together, or a
        backend that cannot run here.
        """
        super().__init__()
        device = weight.streams[0].codes.device if weight.streams else torch.device("cpu")
        _refuse(backend, table, device)
        self.backend, self.table_kind = backend, table
        padded = backend == "triton" or (backend == "auto" and device.type == "cuda")
        with torch.no_grad():
            held = hold(weight, padded, table)
        if bias is not None and bias.shape != (weight.out_features,):
            raise ValueError(f"the bias is ({weight.out_features},), not {tuple(bias.shape)}")
        self._layout = held.layout
        for name in _STORED:
            self.register_buffer(name, getattr(held, name))
        self.register_buffer("bias", None if bias is None else bias.detach().to(device))
        found = torch.tensor(_decibels(weight, weight_of(held)), dtype=torch.float64) if table == "int8" else None
        self.register_buffer("decibels", found)
        self._configs: dict[int, str] = {}
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """What kernels read in place of the table as given; nothing where they cannot run."""
        device = self.codes.device.type
        used = device == "cuda" if self.backend == "auto" else self.backend == "triton" and device in ("cuda", "cpu")
        held = self._held()
        composed = compose(held) if used else None
        self._composed = None if composed is None else composed.layout
        for name in _COMPOSED:
            self.register_buffer(f"composed_{name}", getattr(composed, name, None), persistent=False)
        table = held.table if composed is None else composed.table
        narrow = codebook_launch.half_table(table) if used else table
        self.register_buffer("narrow", None if narrow is table else share(narrow), persistent=False)

    @property
    def table_decibels(self) -> float:
        """How far an int8 table's error lies below the weight, in squares; inf for an exact one."""
        return math.inf if self.decibels is None else float(self.decibels)

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def weight(self) -> CodebookWeight:
        """What this layer computes with, as views of its buffers."""
        return weight_of(self._held())

    def choice(self, rows: int) -> Choice:
        """What computes a call with so many rows (batch times tokens)."""
        kind, reason = self._resolve()
        near = None
        if self.table_kind == "int8":
            reason, near = f"{reason}; table rounded to int8 on request", self.table_decibels
        if kind == "torch":
            return Choice("torch-tiles", f"{reason}; tiles of {TILE_BYTES >> 20} MiB", decibels=near)
        if kind == "numba":
            return Choice("numba-codebook", reason)
        way, why = codebook_launch.kernel_for(rows)
        if self._composed is not None and (together := self._composed.d // self._layout.d) > 1:
            why += f"; {together} codes decoded by one gather"
        return Choice(f"triton-codebook-{way}", f"{reason}; {why}", self._configs.get(rows, ""), near)

    def forward(self, inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype, or of `dtype`: that or float32.

        Raises ValueError for inputs of another width, device or kind.
        """
        layout = self._layout
        if not inputs.is_floating_point():
            raise ValueError(f"inputs are of a float dtype, not {inputs.dtype}")
        if inputs.shape[-1] != layout.in_features:
            raise ValueError(f"inputs of {inputs.shape[-1]} columns for a layer of {layout.in_features}")
        if inputs.device != self.codes.device:
            raise ValueError(f"inputs on {inputs.device}, packed weight on {self.codes.device}: move one to the other")
        rows, dtype = inputs.reshape(-1, layout.in_features), dtype or inputs.dtype
        if torch.is_grad_enabled() and inputs.requires_grad:
            out: Tensor = _Product.apply(rows, self, dtype)  # type: ignore[no-untyped-call]
        else:
            out = self._multiply(rows, dtype)
        return out.reshape(*inputs.shape[:-1], layout.out_features)

    def extra_repr(self) -> str:
        layout = self._layout
        return f"{layout.in_features} -> {layout.out_features}, d={layout.d}, streams={len(layout.parts)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        before = self.codes.device
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if self.codes.device not in (before, torch.device("meta")):
            self.table = share(self.table)
            self._prepare()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], *others: Any) -> None:
        """Into buffers of its own, since others may hold the same table."""
        for name in _STORED:
            buffer = self._buffers[name]
            self._buffers[name] = None if buffer is None else buffer.clone()
        super()._load_from_state_dict(state_dict, *others)
        self.table = share(self.table)
        self._prepare()

    def _held(self) -> Held:
        return Held(self._layout, self.codes, self.table, self.book, self.gain, self.offset, self.row_scale)

    def _launched(self) -> Held:
        """What kernels read: where there is a composed table, that."""
        if self._composed is None:
            return self._held()
        found = {name: getattr(self, f"composed_{name}") for name in _COMPOSED}
        return Held(self._composed, self.codes, row_scale=self.row_scale, **found)

    def _resolve(self) -> tuple[str, str]:
        device = self.codes.device
        if self.backend != "auto":
            return self.backend, f"backend {self.backend!r} was asked for"
        if device.type == "cpu":
            if self.table_kind == "int8":
                return "torch", "on the CPU; numba's kernels read float tables"
            return (
                ("numba", "on the CPU numba reads the stored codes")
                if _has_numba()
                else ("torch", "on the CPU, and numba cannot be imported")
            )
        refusal = triton_refusal(device)
        return ("triton", f"on {device.type} Triton reads the stored codes") if refusal is None else ("torch", refusal)

    @torch.no_grad()
    def _multiply(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        kind, _ = self._resolve()
        if not rows.shape[0]:
            return rows.new_empty(0, self._layout.out_features, dtype=dtype)
        if rows.dtype == torch.float64 or kind == "torch":
            return self._by_tiles(rows).to(dtype)
        if kind == "numba":
            from evenbits.kernels import cpu_codebook

            out = cpu_codebook.multiply(self.weight, rows.float().contiguous())
            return (out if self.bias is None else out + self.bias).to(dtype)
        held = self._launched()
        table = held.table if self.narrow is None or rows.dtype == torch.float32 else self.narrow
        out, config = codebook_launch.multiply(held, table, rows.contiguous(), self.bias, dtype)
        self._configs[rows.shape[0]] = config
        return out

    def _by_tiles(self, rows: Tensor) -> Tensor:
        """The outputs as they are summed: in float32, of float64 inputs in float64."""
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        out = torch.zeros(rows.shape[0], self._layout.out_features, dtype=wide, device=rows.device)
        inputs = rows.to(wide)
        for lines, tile in self._tiles(rows.dtype, wide):
            if self._layout.axis == "in":
                out[:, lines] = inputs @ tile.t()
            else:
                out += inputs[:, lines] @ tile
        return out if self.bias is None else out + self.bias.to(wide)

    def _tiles(self, dtype: torch.dtype, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All of the weight once: lines, and their numbers with row scales, rounded to `dtype` and held in `wide`."""
        weight = self.weight
        # codes and places of the streams, in int64, entries, and their sum, rounded, and held in `wide` again
        taken = weight.chunks * (32 * max(s.stride for s in weight.streams) + 20 * weight.d)
        step = max(1, TILE_BYTES // taken)
        for first in range(0, weight.lines, step):
            lines = slice(first, min(first + step, weight.lines))
            tile = decode_lines(weight, lines.start, lines.stop, wide)
            if weight.row_scale is not None:
                tile = tile * (weight.row_scale[lines, None] if weight.axis == "in" else weight.row_scale)
            yield lines, tile.to(dtype).to(wide)

    def _gradient(self, outer: Tensor, dtype: torch.dtype) -> Tensor:
        """(m, out) -> (m, in) of inputs' dtype: times W, rounded to that, by tiles."""
        wide = torch.float64 if outer.dtype == torch.float64 else torch.float32
        found = torch.zeros(outer.shape[0], self._layout.in_features, dtype=wide, device=outer.device)
        for lines, tile in self._tiles(dtype, wide):
            if self._layout.axis == "in":
                found += outer[:, lines].to(wide) @ tile
            else:
                found[:, lines] = outer.to(wide) @ tile.t()
        return found.to(dtype)


class _Product(torch.autograd.Function):
    """Decodes again on the way back: saved tiles would be the dense weight."""

    @staticmethod
    def forward(ctx, rows: Tensor, module: CodebookLinear, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.module, ctx.dtype = module, rows.dtype
        return module._multiply(rows, dtype)

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return ctx.module._gradient(outer, ctx.dtype), None, None


def _places(weight: CodebookWeight, stream: Stream, first: int, last: int) -> Tensor:
    """(lines, chunks) int64: the entry of its book that each sub-vector names."""
    chunks = weight.chunks
    count = (last - first) * chunks
    start = stream.offset + first * chunks * stream.stride
    run = unpack_range(stream.codes, stream.bits, start, (count - 1) * stream.stride + 1)
    codes = run[:: stream.stride].reshape(last - first, chunks)
    if stream.window is None:
        return codes
    place = codes.clone()
    for behind in range(1, -(-stream.window // stream.bits)):
        place |= codes.roll(behind, dims=1) << (behind * stream.bits)
    return place & ((1 << stream.window) - 1)


def _decibels(exact: CodebookWeight, rounded: CodebookWeight) -> float:
    """Squares of the exact weight over those of what rounding its books changed, in dB; inf where that is nothing."""
    signal = noise = 0.0
    step = max(1, TILE_BYTES // (64 * exact.length))
    scales = [1.0 if w.row_scale is None else w.row_scale.double() for w in (exact, rounded)]
    for first in range(0, exact.lines, step):
        last = min(first + step, exact.lines)
        pair = []
        for weight, scale in zip((exact, rounded), scales, strict=True):
            lines = decode_lines(weight, first, last, torch.float64)
            if isinstance(scale, Tensor):
                lines = lines * (scale[first:last, None] if weight.axis == "in" else scale)
            pair.append(lines)
        signal += float(pair[0].square().sum())
        noise += float((pair[0] - pair[1]).square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf if not noise else -math.inf


def _refuse(backend: Backend, table: Table, device: torch.device) -> None:
    if table not in ("exact", "int8"):
        raise ValueError(f'a codebook table is "exact" or "int8", not {table!r}')
    if backend not in ("auto", "triton", "numba", "torch"):
        raise ValueError(f'a codebook layer\'s backend is "auto", "triton", "numba" or "torch", not {backend!r}')
    if backend == "triton" and (why := triton_refusal(device)):
        raise ValueError(f'a codebook layer cannot run on backend "triton": {why}; take "auto" or "torch"')
    if backend == "numba":
        if device.type != "cpu" or not _has_numba():
            why = f"the weight is on {device.type}" if device.type != "cpu" else "numba cannot be imported"
            raise ValueError(f'a codebook layer cannot run on backend "numba": {why}; take "auto" or "torch"')
        if table == "int8":
            raise ValueError('a codebook layer on backend "numba" reads float tables: take table "exact", or "torch"')


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
