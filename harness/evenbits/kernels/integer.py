"""y = x W^T from grids of integer codes: round-to-nearest, GPTQ, AWQ, levels; never the dense weight at once.

The layer and the torch twin. integer.md beside this file has formulas, tiles and what they cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from evenbits.kernels import integer_launch
from evenbits.kernels.integer_layout import CELL, TILE, hold_planes
from evenbits.kernels.launch import Backend, Choice, triton_refusal
from evenbits.kernels.weights import IntegerWeight
from evenbits.maths.bitpack import packed_bytes, unpack_range

TILE_BYTES = 16 << 20  # what torch may take to decode at once
_INPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def decode_rows(weight: IntegerWeight, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows start to stop - 1 of W, (stop - start, in), computed in `dtype`: the twin, in float64 the oracle."""
    columns = weight.in_features
    codes = unpack_range(weight.codes, weight.bits, start * columns, (stop - start) * columns).view(-1, columns)
    group = group_of(weight)
    scale = weight.scale[start:stop].to(dtype)[:, group]
    if weight.levels is not None:
        return weight.levels.to(dtype)[codes] * scale
    zero = 1 << (weight.bits - 1) if weight.zero is None else weight.zero[start:stop].to(dtype)[:, group]
    return (codes.to(dtype) - zero) * scale


def group_of(weight: IntegerWeight) -> Tensor:
    """int64 (in,): the group of each column."""
    if weight.group is not None:
        return weight.group.long()
    return torch.arange(weight.in_features, device=weight.codes.device) // weight.group_size


class IntegerLinear(nn.Module):
    """y = x W^T (+ bias); gradients reach the inputs alone.

    Held are, for Triton, `Planes`, with scales and zero points by group first; for numba and torch the tensors as they
    are stored. Where sorting the columns makes runs of the groups, Triton and numba hold codes in that order, and the
    order. float64 inputs are torch's whatever the backend. A change of the module's dtype changes nothing here.
    """

    words: Tensor
    ones: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: Tensor | None
    levels: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: IntegerWeight, bias: Tensor | None = None, backend: Backend = "auto") -> None:
        """weight: its tensors lie on the device to compute on. bias: (out,).

        Raises ValueError for a weight whose tensors are not what its sizes say, or a backend that cannot run here.
        """
        super().__init__()
        _require(weight, bias)
        self.kind, self.reason = _resolve(weight.codes.device, backend)
        self.bits, self.group_size = weight.bits, weight.group_size
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.configs: dict[tuple[int, torch.dtype], str] = {}  # Triton's, by rows and dtype, once called so
        with torch.no_grad():
            held = hold_planes(weight) if self.kind == "triton" else _hold_stored(weight, self.kind)
        for name in ("words", "ones", "codes", "scale", "zero", "group", "levels", "order"):
            tensor = held.get(name)
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())
        own = None if bias is None else bias.detach().to(weight.codes.device).contiguous()
        self.register_buffer("bias", own)

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def run(self) -> int:
        """Neighbouring columns, as they are held, that surely share a scale: 16 to 128; 0 for fewer."""
        if self.group is not None:
            return 0
        if self.group_size >= self.in_features:
            return TILE
        power = self.group_size & -self.group_size
        return min(power, TILE) if power >= CELL else 0

    def choice(self, rows: int) -> Choice:
        """What computes a call of 16-bit inputs with so many rows (batch times tokens)."""
        if self.kind == "torch":
            return Choice("torch-tiles", f"{self.reason}; rows decoded {TILE_BYTES >> 20} MiB at a time")
        if self.kind == "numba":
            return Choice("numba-integer", self.reason)
        way, names, why = integer_launch.way_for(self, rows, torch.float16)
        timed = "; configurations, timed once, order float32 sums and change nothing else" if len(names) > 1 else ""
        taken = [self.configs.get((rows, dtype), "") for dtype in (torch.float16, torch.bfloat16)]
        return Choice(f"triton-integer-{way}", f"{self.reason}; {why}{timed}", taken[0] or taken[1])

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype."""
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs of {inputs.shape[-1]} columns for a layer of {self.in_features}")
        if inputs.device != self.scale.device:
            raise ValueError(f"inputs on {inputs.device}, packed weight on {self.scale.device}: move the inputs")
        if inputs.dtype not in _INPUTS:
            raise ValueError(f"inputs of {inputs.dtype}: they must be {', '.join(map(str, _INPUTS))}")
        rows = inputs.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and inputs.requires_grad:
            out: Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        else:
            out = self.multiply(rows)
        return out.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        group = "indexed" if self.group is not None else self.group_size
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, group {group}, {self.kind}"

    @torch.no_grad()
    def multiply(self, rows: Tensor) -> Tensor:
        """rows (m, in) -> (m, out), with the bias."""
        if not rows.shape[0]:
            return rows.new_empty(0, self.out_features)
        if self.kind == "triton" and rows.dtype != torch.float64:
            return integer_launch.multiply(self, rows.contiguous())
        if self.kind == "numba" and rows.dtype != torch.float64:
            from evenbits.kernels.cpu_integer import multiply

            rows_held = rows if self.order is None else rows.index_select(1, self.order)
            out = multiply(self._stored(), rows_held.float().contiguous())  # weights in full: no rounding of theirs
        else:
            out = rows.new_empty(rows.shape[0], self.out_features, dtype=_sum_dtype(rows.dtype))
            for start, tile in self._tiles(rows.dtype):
                out[:, start : start + tile.shape[0]] = rows @ tile.t()
        return (out if self.bias is None else out.add_(self.bias)).to(rows.dtype)

    def slabs(self, dtype: torch.dtype, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of W in `dtype`, in the order of columns that is held), so many rows at a time.

        All in one scratch that the next slab writes over.
        """
        if self.kind != "triton":
            raise ValueError(f"slabs are Triton's; this layer computes with {self.kind}")
        yield from integer_launch.slabs(self, dtype, rows)

    def _stored(self) -> IntegerWeight:
        return IntegerWeight(
            self.codes, self.scale, self.bits, self.out_features, self.in_features, self.group_size, self.zero,
            self.group, self.levels,
        )  # fmt: skip

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows of W in the inputs' dtype, in the original order of columns), in bounded scratch."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        count = max(1, TILE_BYTES // (32 * self.in_features))  # int64 codes, and three floats of up to 8 bytes
        back = None if self.order is None else torch.argsort(self.order)
        if self.kind == "triton":
            held = integer_launch.slabs(self, torch.float32, count)
        else:
            starts = range(0, self.out_features, count)
            held = ((n, decode_rows(self._stored(), n, min(n + count, self.out_features), wide)) for n in starts)
        for start, tile in held:
            yield start, (tile if back is None else tile[:, back]).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.half()` or `.to(bfloat16)` of a model must round neither scales nor levels, and what was laid out for one
        kind of device is of no use on another. Raises ValueError for that."""
        device = fn(self.scale.new_empty(0)).device
        if self.kind != "torch" and device.type != self.scale.device.type:
            raise ValueError(
                f"{self.kind} holds codes as it reads them on {self.scale.device.type}: make this layer on {device} "
                "instead of moving it there"
            )

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class _Product(torch.autograd.Function):
    """x W^T, whose backward pass decodes the weight again tile by tile."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: IntegerLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        found = gradient.new_zeros(gradient.shape[0], layer.in_features, dtype=_sum_dtype(gradient.dtype))
        for start, tile in layer._tiles(gradient.dtype):
            found += gradient[:, start : start + tile.shape[0]] @ tile
        return found.to(gradient.dtype), None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _resolve(device: torch.device, backend: Backend) -> tuple[str, str]:
    """What computes, and why. Raises ValueError for a backend that was asked for and cannot."""
    refusals = {"triton": triton_refusal(device), "numba": _numba_refusal(device), "torch": None}
    if backend != "auto":
        if backend not in refusals:
            raise ValueError(f"no backend {backend!r}: auto, {', '.join(refusals)}")
        if refusals[backend]:
            raise ValueError(f"backend {backend!r} cannot run on {device}: {refusals[backend]}; 'auto' chooses")
        return backend, f"backend {backend!r} was asked for"
    first, where = ("numba", "the CPU") if device.type == "cpu" else ("triton", device.type)
    if refusals[first] is None:
        return first, f"on {where} {first} reads the packed codes"
    return "torch", f"on {where}, where {first} does not serve: {refusals[first]}"


def _numba_refusal(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it computes on the CPU"
    return None if _has_numba() else "numba cannot be imported"


def _require(weight: IntegerWeight, bias: Tensor | None) -> None:
    out, columns, bits = weight.out_features, weight.in_features, weight.bits
    if not 2 <= bits <= 8:
        raise ValueError(f"integer codes are 2 to 8 bits wide, not {bits}")
    if weight.group_size < 1:
        raise ValueError(f"group_size is at least 1, not {weight.group_size}")
    count = weight.scale.shape[1] if weight.scale.ndim == 2 else 0
    if weight.group is None and count != -(-columns // weight.group_size):
        raise ValueError(f"{columns} columns in groups of {weight.group_size} need that many scales a row, not {count}")
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("codes", weight.codes, (packed_bytes(out * columns, bits),), (torch.uint8,)),
        ("scale", weight.scale, (out, count), (torch.float16, torch.float32)),
        ("zero", weight.zero, (out, count), (torch.uint8,)),
        ("group", weight.group, (columns,), (torch.int32,)),
        ("levels", weight.levels, (1 << bits,), (torch.float32,)),
        ("bias", bias, (out,), (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    ]
    for name, tensor, shape, dtypes in wanted:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
            raise ValueError(
                f"{name} of a weight {out}x{columns} at {bits} bits is {shape} of "
                f"{' or '.join(map(str, dtypes))}, not {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if tensor is not None and name != "bias" and tensor.device != weight.codes.device:
            raise ValueError(f"{name} lies on {tensor.device}, the codes on {weight.codes.device}")
    if weight.levels is not None and weight.zero is not None:
        raise ValueError("a weight has levels or zero points, not both")
    if weight.group is not None and columns and not (0 <= int(weight.group.min()) <= int(weight.group.max()) < count):
        raise ValueError(f"group holds numbers outside 0 to {count - 1}")


def _hold_stored(weight: IntegerWeight, kind: str) -> dict[str, Tensor | None]:
    order = None
    if kind == "numba" and weight.group is not None:
        from evenbits.kernels.cpu_integer import in_runs

        if (sorted_by_group := in_runs(weight)) is not None:
            weight, order = sorted_by_group[0], sorted_by_group[1].to(torch.int32)
    return {
        "codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "group": weight.group,
        "levels": weight.levels, "order": order,
    }  # fmt: skip
