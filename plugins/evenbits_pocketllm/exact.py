"""A linear layer whose groups are normalised, decoded exactly anew in each call: by kernels, or by tiles of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evenbits.kernels.launch import Backend, Choice
from evenbits.kernels.weights import Axis
from evenbits.maths.bitpack import unpack_at, unpack_range
from evenbits_pocketllm import kernels
from evenbits_pocketllm.groups import TILE_BYTES, network_bytes
from evenbits_pocketllm.network import decode_with
from evenbits_pocketllm.prepared import Layout, PocketWeight, Prepared, padded, prepare, refusal

Tile = tuple[slice, slice, Tensor]  # lines, chunks, and what they decode to: (lines, chunks, d) float32


class Tiled(Protocol):
    """What `multiply` takes a weight by."""

    codes: Tensor
    scale: Tensor | None  # (out,) float32 factor of its rows
    out_features: int
    in_features: int
    axis: Axis

    def tiles(self) -> Iterator[Tile]:
        """All of the weight once, before row scales."""
        ...

    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out) float32, by kernels or by tiles."""
        ...


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ExactLinear(nn.Module):
    """y = x W^T (+ bias); gradients reach the inputs alone, by tiles of torch that are decoded again.

    Moved to another device it takes what that has; its tensors keep their dtypes whatever the model is cast to.
    """

    codes: Tensor
    codebook: Tensor
    decoder: Tensor
    statistics: Tensor
    scale: Tensor | None  # (out,) float32
    bias: Tensor | None
    matrices: Tensor | None  # what kernels read in place of the decoder's matrices and biases
    floats: Tensor | None

    def __init__(
        self,
        pocket: PocketWeight,
        bias: Tensor | None = None,
        backend: Backend = "auto",
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        """pocket: its tensors, on the device to compute on, are held. bias: (out,).

        tile_bytes: what decoding by torch may take at once, indices and intermediate numbers included; one line, or one
        chunk of all lines under the code's order, is taken even where that is more.
        Raises ValueError for a backend that cannot run here.
        """
        super().__init__()
        self.tile_bytes, self.backend = tile_bytes, backend
        self.network, self.bits, self.axis, self.code_order = (
            pocket.network, pocket.bits, pocket.axis, pocket.code_order,
        )  # fmt: skip
        self.out_features, self.in_features = pocket.out_features, pocket.in_features
        held = {
            "codes": padded(pocket.codes), "codebook": pocket.codebook, "decoder": pocket.decoder,
            "statistics": pocket.statistics, "scale": pocket.row_scale, "bias": bias,
        }  # fmt: skip
        for name, tensor in held.items():
            dtype = torch.uint8 if name == "codes" else torch.float32
            kept = None if tensor is None else tensor.detach().to(pocket.codes.device, dtype).contiguous()
            self.register_buffer(name, kept)
        self._ran: dict[str, str] = {}
        if reason := _unable(self.pocket, backend):
            raise ValueError(reason)
        self.register_buffer("matrices", None, persistent=False)
        self.register_buffer("floats", None, persistent=False)
        self.settle()
        self.register_load_state_dict_post_hook(_settle_again)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Decide by the device what decodes, and lay the decoder out for it: when one of the two has changed."""
        pocket = self.pocket
        self.torch_because = _torch_because(pocket, self.backend)
        prepared = None if self.torch_because else prepare(pocket)
        self.matrices = None if prepared is None else prepared.matrices
        self.floats = None if prepared is None else prepared.floats

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = self.codes.device
        super()._apply(only_moves(fn), recurse)  # type: ignore[no-untyped-call]
        if self.codes.device != device:
            self.settle()
        return self

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def pocket(self) -> PocketWeight:
        """What this layer computes with: its buffers."""
        return PocketWeight(
            self.codes, self.bits, self.codebook, self.decoder, self.network, self.statistics, self.out_features,
            self.in_features, self.axis, self.code_order, self.scale,
        )  # fmt: skip

    def choice(self, rows: int) -> Choice:
        """What computes a call with so many rows, of float32, float16 or bfloat16."""
        prepared = self._prepared()
        if isinstance(prepared, str):
            return Choice("torch-tiles", f"{prepared}; at most {self.tile_bytes:,} bytes of them at a time")
        return kernels.choose(prepared, rows)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype.

        As in a dense layer the weight is rounded to the dtype of the inputs; sums are in float32.
        """
        return apply(inputs, self, self.bias)

    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out) float32."""
        prepared = self._prepared()
        if isinstance(prepared, Prepared) and rows.dtype in _FLOATS:
            return kernels.matmul(prepared, rows)
        return multiply(rows, self)

    def _prepared(self) -> Prepared | str:
        """What kernels read, or why torch decodes."""
        if self.matrices is None or self.floats is None:
            return self.torch_because
        return Prepared(self.pocket, Layout.of(self.network), self.matrices, self.floats, self._ran)

    def tiles(self) -> Iterator[Tile]:
        """All of the weight once, before row scales."""
        pocket = self.pocket
        lines, chunks = pocket.lines, pocket.chunks
        step = max(1, self.tile_bytes // (chunks * network_bytes(self.network)))
        for first in range(0, lines, step):
            last = min(first + step, lines)
            if self.code_order:
                place = torch.arange(first * chunks, last * chunks, device=self.codes.device).view(-1, chunks)
                codes = unpack_at(self.codes, self.bits, place % lines * chunks + place // lines)
            else:
                codes = unpack_range(self.codes, self.bits, first * chunks, (last - first) * chunks).view(-1, chunks)
            vectors = decode_with(self.codebook[codes], self.statistics[first:last], self.decoder, self.network)
            if self.code_order:
                yield spread(vectors, first, lines, chunks)
            else:
                yield slice(first, last), slice(0, chunks), vectors


def _settle_again(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, ExactLinear)
    layer.settle()


def _unable(pocket: PocketWeight, backend: Backend) -> str:
    """Why this backend cannot run here at all, "" where it can."""
    if backend not in ("auto", "torch", "triton"):
        return f"exact decoding has no backend {backend!r}: take 'torch' or 'auto', or a folded table, which has one"
    reason = refusal(pocket) if backend == "triton" else None
    return f"exact decoding cannot run on backend 'triton': {reason}; take 'auto' or 'torch'" if reason else ""


def _torch_because(pocket: PocketWeight, backend: Backend) -> str:
    """Why torch decodes, "" where Triton does."""
    if backend == "torch":
        return "backend 'torch' was asked for"
    if backend == "auto" and pocket.codes.device.type == "cpu":
        return "on the CPU, where exact decoding has no kernel; a folded table has"
    return refusal(pocket) or ""


def only_moves(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A cast of a module (`model.half()`) would ruin packed tensors: of what it does to them, only the device."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


def apply(inputs: Tensor, layer: Tiled, bias: Tensor | None) -> Tensor:
    """inputs (..., in), any float dtype -> (..., out) of that dtype. Raises ValueError for another width or device."""
    if inputs.shape[-1] != layer.in_features:
        raise ValueError(f"inputs of {layer.in_features} numbers expected, not of shape {tuple(inputs.shape)}")
    if inputs.device != layer.codes.device:
        raise ValueError(f"inputs on {inputs.device}, and the layer is on {layer.codes.device}")
    rows = inputs.reshape(-1, layer.in_features)
    if torch.is_grad_enabled() and rows.requires_grad:
        out: Tensor = _Product.apply(rows, layer)  # type: ignore[no-untyped-call]
    else:
        out = layer.product(rows)
    if bias is not None:
        out = out + bias
    return out.to(inputs.dtype).reshape(*inputs.shape[:-1], layer.out_features)


class _Product(torch.autograd.Function):
    """Decodes again on the way back: saved tiles would be the dense weight."""

    @staticmethod
    def forward(ctx, rows: Tensor, layer: Tiled) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.layer, ctx.dtype = layer, rows.dtype
        return layer.product(rows)

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        found = torch.zeros(outer.shape[0], ctx.layer.in_features, device=outer.device)
        for outputs, inputs, tile in _rounded(ctx.layer, ctx.dtype):
            found[:, inputs] += outer[:, outputs] @ tile.to(outer.dtype)
        return found.to(ctx.dtype), None


def multiply(rows: Tensor, layer: Tiled) -> Tensor:
    """rows (n, in) -> (n, out) float32, tiles rounded to the rows' dtype."""
    out = torch.zeros(rows.shape[0], layer.out_features, device=rows.device)
    for outputs, inputs, tile in _rounded(layer, rows.dtype):
        out[:, outputs] += rows[:, inputs] @ tile.t()
    return out


def _rounded(layer: Tiled, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """All of the weight once, row scales included: outputs, inputs, and their tile (outputs, inputs) of `dtype`."""
    length = layer.in_features if layer.axis == "in" else layer.out_features
    for lines, chunks, vectors in layer.tiles():
        d = vectors.shape[2]
        along = slice(chunks.start * d, min(chunks.stop * d, length))
        tile = vectors.flatten(1)[:, : along.stop - along.start]
        outputs, inputs, tile = (lines, along, tile) if layer.axis == "in" else (along, lines, tile.t())
        yield outputs, inputs, (tile if layer.scale is None else tile * layer.scale[outputs, None]).to(dtype)


def spread(vectors: Tensor, first: int, lines: int, chunks: int) -> Tile:
    """Groups of the released code's order, (groups, per_group, d) from group `first` on, as all lines of some chunks.

    Groups run through all lines of a chunk, then through the next. What is missing of the first and of the last chunk
    is zero, and comes with another tile.
    """
    start = first * chunks
    stop = start + vectors.shape[0] * vectors.shape[1]
    part = slice(start // lines, -(-stop // lines))
    ahead = start - part.start * lines
    held = vectors.new_zeros((part.stop - part.start) * lines, vectors.shape[2])
    held[ahead : ahead + stop - start] = vectors.flatten(0, 1)
    return slice(0, lines), part, held.view(-1, lines, vectors.shape[2]).transpose(0, 1)
