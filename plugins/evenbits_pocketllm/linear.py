"""A linear layer that computes from the packed indices, a tile of the weight at a time: never the whole of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evenbits.compressor import LayerShape, PackedLayer
from evenbits.maths.trellis import states
from evenbits_pocketllm import scales
from evenbits_pocketllm.codebooks import Coder
from evenbits_pocketllm.cost import Geometry
from evenbits_pocketllm.folding import Folded
from evenbits_pocketllm.groups import TILE_BYTES, GroupDecoder, PackedCodes, exact_table, load_decoder
from evenbits_pocketllm.options import PocketOptions

_Tile = tuple[slice, slice, Tensor]  # lines, chunks, and what they decode to: (lines, chunks, d) float32


class PocketLinear(nn.Module):
    """y = x W^T (+ bias), W decoded anew in each call; gradients reach the inputs alone.

    Held are the indices as stored, row scales (out,) float32, and the decoder: one table where that is exact, else
    codebook, network and the statistics of each group, computed here; or a folded table in their place.
    """

    codes: Tensor
    scale: Tensor | None  # (out,) float32
    bias: Tensor | None
    table: Tensor | None  # (2^window_bits, d) float32; None: codebook, decoder and statistics are there instead
    gain: Tensor | None
    offset: Tensor | None
    codebook: Tensor
    decoder: Tensor
    statistics: Tensor

    def __init__(
        self,
        packed: PackedLayer,
        layer: LayerShape,
        settings: PocketOptions,
        coder: Coder,
        device: torch.device | str = "cpu",
        *,
        folded: Folded | None = None,
        bias: Tensor | None = None,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        """settings: those of this layer (PocketOptions.of). coder: its codebook and decoder, as they are stored.

        folded: decode by this instead of exactly. bias: (out,); a compressor knows of none, so whoever puts the layer
        in a model adds it. tile_bytes: what decoding may take at once, indices and intermediate numbers included; one
        line, or one chunk of all lines under rln = code, is taken even where that is more.
        """
        super().__init__()
        self.layer, self.settings, self.tile_bytes = layer, settings, tile_bytes
        with torch.no_grad():
            tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
            codebook, flat = (None if part is None else part.to(device) for part in (coder.codebook, coder.decoder))
            codes, moved = PackedCodes(tensors["codes"], settings, layer), Coder(codebook, flat)
            table = folded.table if folded else exact_table(settings, layer, moved, codes.stored.device)
            exact = load_decoder(codes, moved, tile_bytes) if table is None else None
            rows = scales.read(tensors, settings.scale_bits, layer.out_features) if settings.row_scales else None
        held = {"codes": codes.stored, "scale": rows, "bias": bias, "table": table}
        held |= {"gain": folded.gain, "offset": folded.offset} if folded else {"gain": None, "offset": None}
        if exact is not None:
            held |= {"codebook": exact.codebook, "decoder": exact.decoder, "statistics": exact.statistics}
        for name, tensor in held.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(device))

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def _packed(self) -> PackedCodes:
        return PackedCodes(self.codes, self.settings, self.layer)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype.

        As in a dense layer the weight is rounded to the dtype of the inputs; tiles are summed in float32.
        """
        layer, settings = self.layer, self.settings
        rows = inputs.reshape(-1, layer.in_features)
        out = torch.zeros(rows.shape[0], layer.out_features, device=rows.device)
        length = self._packed.geometry.length
        for lines, chunks, vectors in self._tiles():
            along = slice(chunks.start * settings.d, min(chunks.stop * settings.d, length))
            tile = vectors.flatten(1)[:, : along.stop - along.start]
            if settings.axis == "in":
                tile = (tile if self.scale is None else tile * self.scale[lines, None]).to(rows.dtype)
                out[:, lines] += rows[:, along] @ tile.t()
            else:
                tile = (tile if self.scale is None else tile * self.scale[along]).to(rows.dtype)
                out[:, along] += rows[:, lines] @ tile
        if self.bias is not None:
            out = out + self.bias
        return out.to(inputs.dtype).reshape(*inputs.shape[:-1], layer.out_features)

    def _tiles(self) -> Iterator[_Tile]:
        """All of the weight once, before row scales."""
        if self.table is not None and (self.gain is None or self.settings.rln != "code"):
            return self._by_lines(Folded(self.table, self.gain, self.offset))
        return self._by_groups()

    def _by_lines(self, folded: Folded) -> Iterator[_Tile]:
        settings, packed = self.settings, self._packed
        # indices, more of them while a window slides; then numbers, scaled, and in another dtype
        taken = (48 if settings.windowed else 24) + 12 * settings.d
        for first, last in packed.parts(taken, self.tile_bytes):
            codes = packed.of_lines(first, last)
            state = states(codes, settings.index_bits, settings.window_bits) if settings.windowed else codes
            yield slice(first, last), slice(0, packed.geometry.chunks), folded.decode(state, first, last)

    def _by_groups(self) -> Iterator[_Tile]:
        packed = self._packed
        for first, last, vectors in self._decoded_groups():
            if self.settings.rln == "code":
                yield _spread(vectors, first, packed.geometry)
            else:
                yield slice(first, last), slice(0, packed.geometry.chunks), vectors

    def _decoded_groups(self) -> Iterator[tuple[int, int, Tensor]]:
        packed = self._packed
        if self.table is not None:
            folded = Folded(self.table, self.gain, self.offset)
            for first, last in packed.parts(64 + 16 * self.settings.d, self.tile_bytes):
                yield first, last, folded.decode(packed.of_groups(first, last), first, last)
            return
        decoder = GroupDecoder(packed, self.codebook, self.decoder, self.statistics)
        for first, last in decoder.parts(self.tile_bytes):
            yield first, last, decoder(first, last)


def _spread(vectors: Tensor, first: int, shape: Geometry) -> _Tile:
    """Groups of the released code's order, (groups, per_group, d) from group `first` on, as all lines of some chunks.

    Groups run through all lines of a chunk, then through the next. What is missing of the first and of the last chunk
    is zero, and comes with another tile.
    """
    start = first * shape.chunks
    stop = start + vectors.shape[0] * vectors.shape[1]
    chunks = slice(start // shape.lines, -(-stop // shape.lines))
    ahead = start - chunks.start * shape.lines
    held = vectors.new_zeros((chunks.stop - chunks.start) * shape.lines, vectors.shape[2])
    held[ahead : ahead + stop - start] = vectors.flatten(0, 1)
    return slice(0, shape.lines), chunks, held.view(-1, shape.lines, vectors.shape[2]).transpose(0, 1)
