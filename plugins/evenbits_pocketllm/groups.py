"""Indices of a packed layer a part at a time, by lines or by the groups that are normalised together, and the exact
decoding of whole groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits.maths.bitpack import unpack_at, unpack_range
from evenbits_pocketllm.cost import Geometry, geometry, norm_width
from evenbits_pocketllm.decoding import codewords, decoder_network, decoder_table
from evenbits_pocketllm.network import Network, decode, decode_statistics, decode_with

if TYPE_CHECKING:
    from evenbits.compressor import LayerShape
    from evenbits_pocketllm.codebooks import Coder
    from evenbits_pocketllm.settings import Settings

TILE_BYTES = 1 << 24


@dataclass(frozen=True)
class PackedCodes:
    """The stored indices of one layer; a group is a line but under rln = code, and there are as many of both."""

    stored: Tensor  # uint8, as packed
    settings: Settings
    layer: LayerShape

    @property
    def geometry(self) -> Geometry:
        return geometry(self.settings, self.layer)

    def of_lines(self, first: int, last: int) -> Tensor:
        """(last - first, chunks) int64."""
        chunks = self.geometry.chunks
        found = unpack_range(self.stored, self.settings.index_bits, first * chunks, (last - first) * chunks)
        return found.view(-1, chunks)

    def of_groups(self, first: int, last: int) -> Tensor:
        """(last - first, per_group) int64: as `layout.order` puts them."""
        if self.settings.rln != "code":
            return self.of_lines(first, last)
        lines, chunks = self.places(first, last)
        return unpack_at(self.stored, self.settings.index_bits, lines * self.geometry.chunks + chunks)

    def places(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Line and chunk of each sub-vector of some groups, int64, of shapes that broadcast to (groups, per_group)."""
        shape, device = self.geometry, self.stored.device
        if self.settings.rln != "code":
            return torch.arange(first, last, device=device)[:, None], torch.arange(shape.chunks, device=device)[None]
        place = torch.arange(first * shape.chunks, last * shape.chunks, device=device).view(-1, shape.chunks)
        return place % shape.lines, place // shape.lines

    def parts(self, bytes_per_vector: int, tile_bytes: int) -> Iterator[tuple[int, int]]:
        """Lines, or groups, cut so that a part stays within `tile_bytes`; at least one at a time."""
        shape = self.geometry
        step = max(1, tile_bytes // (shape.chunks * bytes_per_vector))
        return ((first, min(first + step, shape.lines)) for first in range(0, shape.lines, step))


def layer_network(settings: Settings, layer: LayerShape) -> Network:
    return decoder_network(settings, norm_width(settings, layer))


def exact_table(settings: Settings, layer: LayerShape, coder: Coder, device: torch.device) -> Tensor | None:
    """(2^window_bits, d) float32 where what an index (or window) decodes to depends on nothing else; None where it
    depends on the statistics of a group."""
    words = codewords(settings, coder.codebook, device)
    if coder.decoder is None or settings.rln == "none":
        return decoder_table(settings, words, coder.decoder)
    network = layer_network(settings, layer)
    return None if network.group_norms else decode(words[:, None], coder.decoder, network)[:, 0]


@dataclass(frozen=True)
class GroupDecoder:
    """Exact decoding of a matrix whose groups are normalised; their statistics are known once its indices are."""

    codes: PackedCodes
    codebook: Tensor  # (K, latent) float32
    decoder: Tensor  # flat float32
    statistics: Tensor  # (groups, norms, 2) float32

    @property
    def network(self) -> Network:
        return layer_network(self.codes.settings, self.codes.layer)

    def __call__(self, first: int, last: int) -> Tensor:
        """(last - first, per_group, d) float32: whole groups."""
        words = self.codebook[self.codes.of_groups(first, last)]
        return decode_with(words, self.statistics[first:last], self.decoder, self.network)

    def parts(self, tile_bytes: int) -> Iterator[tuple[int, int]]:
        return self.codes.parts(network_bytes(self.network), tile_bytes)


def network_bytes(network: Network) -> int:
    """What decoding takes a sub-vector: indices and places, latents twice over, and what is inside a unit."""
    return 64 + 4 * (4 * network.inputs + 2 * network.hidden + 3 * network.outputs)


@torch.no_grad()
def load_decoder(codes: PackedCodes, coder: Coder, tile_bytes: int = TILE_BYTES) -> GroupDecoder:
    """Compute the statistics of all groups, a part at a time; they are stored nowhere.

    Raises ValueError for a decoder whose table is exact.
    """
    network = layer_network(codes.settings, codes.layer)
    if coder.codebook is None or coder.decoder is None or not network.group_norms:
        raise ValueError("this decoder has no statistics of groups")
    found = [
        decode_statistics(coder.codebook[codes.of_groups(*part)], coder.decoder, network)
        for part in codes.parts(network_bytes(network), tile_bytes)
    ]
    return GroupDecoder(codes, coder.codebook.detach(), coder.decoder.detach(), torch.cat(found))
