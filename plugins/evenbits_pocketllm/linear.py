"""A linear layer that computes from the packed indices, a tile of the weight at a time: never the whole of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from evenbits.kernels.codebook import CodebookLinear
from evenbits.kernels.codebook_held import share
from evenbits.kernels.launch import Backend, Choice, triton_refusal
from evenbits.kernels.weights import CodebookWeight, Stream
from evenbits.maths.trellis import states
from evenbits_pocketllm import scales
from evenbits_pocketllm.codebooks import Coder
from evenbits_pocketllm.exact import ExactLinear, Tile, apply, multiply, only_moves, spread
from evenbits_pocketllm.folding import Folded, fold, folded_error
from evenbits_pocketllm.groups import TILE_BYTES, PackedCodes, exact_table, layer_network, load_decoder
from evenbits_pocketllm.prepared import PocketWeight

if TYPE_CHECKING:
    from evenbits.compressor import LayerShape, PackedLayer
    from evenbits_pocketllm.settings import Settings


# of decoding by torch on a GPU, also when statistics are computed at load: a 7B model takes some 1,400 parts of about
# 115 launches; at TILE_BYTES it would be 20,000 parts, and launching alone 15 to 25 s
_TILE_BYTES_GPU = 1 << 28


class PocketLinear(nn.Module):
    """y = x W^T (+ bias), W decoded anew in each call; gradients reach the inputs alone.

    Held are the indices as stored, row scales (out,) float32, and the decoder: one table where that is exact, else
    codebook, network and the statistics of each group, computed here; or a folded table in their place. `inner` is the
    layer that computes:

    ExactLinear     decoders that normalise over groups, exactly
    CodebookLinear  a table, exact or folded, on CUDA and, with numba, on the CPU
    TableTiles      a table by torch: without a kernel, and folded groups of the released code, which run across lines
    """

    def __init__(
        self,
        packed: PackedLayer,
        layer: LayerShape,
        settings: Settings,
        coder: Coder,
        device: torch.device | str = "cpu",
        *,
        folded: Folded | Literal["fit"] | None = None,
        bias: Tensor | None = None,
        tile_bytes: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        """settings: those of this layer (PocketOptions.of). coder: its codebook and decoder, as they are stored.

        folded: decode by this instead of exactly: what `folding.fold` makes of `groups.load_decoder`, or "fit" to have
        that made here. It is far cheaper, and an approximation; of one fitted here `choice` says how good. Where one
        table is exact anyway, "fit" changes nothing. bias: (out,); a compressor knows of none, so whoever puts the
        layer in a model adds it. tile_bytes: what decoding by torch may take at once, at load too, indices and
        intermediate numbers included; one line, or one chunk of all lines under rln = code, is taken even where that is
        more. None: 16 MiB on the CPU, 256 MiB elsewhere.
        Raises ValueError for a backend that cannot run here.
        """
        super().__init__()
        self.layer, self.settings, self.note = layer, settings, ""
        self.decibels: float | None = None  # of a table fitted here
        if tile_bytes is None:
            tile_bytes = TILE_BYTES if torch.device(device).type == "cpu" else _TILE_BYTES_GPU
        with torch.no_grad():
            tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
            codebook, flat = (None if part is None else part.to(device) for part in (coder.codebook, coder.decoder))
            codes, moved = PackedCodes(tensors["codes"], settings, layer), Coder(codebook, flat)
            rows = scales.read(tensors, settings.scale_bits, layer.out_features) if settings.row_scales else None
            self.inner: ExactLinear | CodebookLinear | TableTiles
            if isinstance(folded, Folded):
                held = _moved(folded, device)
            elif (table := exact_table(settings, layer, moved, codes.stored.device)) is not None:
                held = Folded(share(table.detach()))  # layers of one codebook hold its table once
                self.note = "" if folded is None else "nothing to fold: one table is exact"
            else:
                decoder = load_decoder(codes, moved, tile_bytes)
                if folded is None:
                    pocket = PocketWeight(
                        codes.stored, settings.index_bits, decoder.codebook, decoder.decoder,
                        layer_network(settings, layer), decoder.statistics, layer.out_features, layer.in_features,
                        settings.axis, settings.rln == "code", rows,
                    )  # fmt: skip
                    self.inner = ExactLinear(pocket, bias, backend, tile_bytes)
                    return
                found = fold(decoder, scale=rows, tile_bytes=tile_bytes)
                assert isinstance(found, Folded)  # refused is only a table of mean statistics
                held, self.decibels = found, folded_error(decoder, found, rows, tile_bytes)
                self.note = "folded into one table, as asked"
            because = _tiles_because(codes, held, backend)
            if because:
                self.inner = TableTiles(codes, held, rows, bias, tile_bytes, because)
                return
            window = settings.window_bits if settings.windowed else None
            stream = Stream(codes.stored, held.table[None], settings.index_bits, window=window)
            weight = CodebookWeight(
                (stream,), layer.out_features, layer.in_features, settings.d, settings.axis, held.gain, held.offset,
                rows,
            )  # fmt: skip
            self.inner = CodebookLinear(weight, bias, backend)

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def choice(self, rows: int) -> Choice:
        """What computes a call with so many rows (batch times tokens)."""
        found = self.inner.choice(rows)
        if not self.note:
            return found
        return replace(found, reason=f"{found.reason}; {self.note}", decibels=self.decibels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(only_moves(fn), recurse)  # type: ignore[no-untyped-call]

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype.

        As in a dense layer the weight is rounded to the dtype of the inputs at most; sums are in float32.
        """
        found: Tensor = self.inner(inputs)
        return found


def _moved(folded: Folded, device: torch.device | str) -> Folded:
    gain, offset = (None if part is None else part.to(device) for part in (folded.gain, folded.offset))
    return Folded(folded.table.detach().to(device), gain, offset)


def _tiles_because(codes: PackedCodes, folded: Folded, backend: Backend) -> str:
    """Why torch decodes a table by tiles, "" where there is a kernel. Raises ValueError for one asked for in vain."""
    if backend == "torch":
        return "backend 'torch' was asked for"
    if codes.settings.rln == "code" and folded.gain is not None:
        reason = "gains belong to the released code's groups, which run across lines"
        if backend != "auto":
            raise ValueError(f"a folded table cannot run on backend {backend!r}: {reason}; take 'auto' or 'torch'")
        return reason
    device = codes.stored.device
    if backend == "auto" and device.type == "cpu" and importlib.util.find_spec("numba") is None:
        return "built on the CPU, and numba cannot be imported"
    if backend == "auto" and device.type != "cpu":
        return triton_refusal(device) or ""
    return ""


class TableTiles(nn.Module):
    """y = x W^T (+ bias) by torch from a table, tile by tile."""

    codes: Tensor
    scale: Tensor | None
    bias: Tensor | None
    table: Tensor  # (2^window_bits, d) float32
    gain: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        codes: PackedCodes,
        folded: Folded,
        scale: Tensor | None,
        bias: Tensor | None,
        tile_bytes: int,
        because: str,
    ) -> None:
        """because: why this and no kernel, for `choice`. The others: as PocketLinear's."""
        super().__init__()
        self.layer, self.settings, self.tile_bytes, self.because = codes.layer, codes.settings, tile_bytes, because
        self.out_features, self.in_features = codes.layer.out_features, codes.layer.in_features
        self.axis = codes.settings.axis
        held = {"codes": codes.stored, "scale": scale, "bias": bias, "table": folded.table}
        held |= {"gain": folded.gain, "offset": folded.offset}
        for name, tensor in held.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(codes.stored.device))

    def choice(self, rows: int) -> Choice:
        return Choice("torch-tiles", f"{self.because}; at most {self.tile_bytes:,} bytes of them at a time")

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype."""
        return apply(inputs, self, self.bias)

    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out) float32."""
        return multiply(rows, self)

    @property
    def _packed(self) -> PackedCodes:
        return PackedCodes(self.codes, self.settings, self.layer)

    def tiles(self) -> Iterator[Tile]:
        """All of the weight once, before row scales."""
        folded = Folded(self.table, self.gain, self.offset)
        by_groups = self.settings.rln == "code" and self.gain is not None
        return self._by_groups(folded) if by_groups else self._by_lines(folded)

    def _by_lines(self, folded: Folded) -> Iterator[Tile]:
        settings, packed = self.settings, self._packed
        # indices, more of them while a window slides; then numbers, scaled, and in another dtype
        taken = (48 if settings.windowed else 24) + 12 * settings.d
        for first, last in packed.parts(taken, self.tile_bytes):
            codes = packed.of_lines(first, last)
            state = states(codes, settings.index_bits, settings.window_bits) if settings.windowed else codes
            yield slice(first, last), slice(0, packed.geometry.chunks), folded.decode(state, first, last)

    def _by_groups(self, folded: Folded) -> Iterator[Tile]:
        packed, shape = self._packed, self._packed.geometry
        for first, last in packed.parts(64 + 16 * self.settings.d, self.tile_bytes):
            vectors = folded.decode(packed.of_groups(first, last), first, last)
            yield spread(vectors, first, shape.lines, shape.chunks)
