"""Decoders that normalise over groups, folded into one table of decoded codewords: decoding is then a look-up.

Folding is an approximation, made at load from what is stored and itself stored nowhere. Where no group's statistics
enter (rln none or layernorm, a single unit) the table is exact, and there is nothing to fold: `groups.exact_table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from evenbits_pocketllm.groups import TILE_BYTES, GroupDecoder
from evenbits_pocketllm.network import decode_with

if TYPE_CHECKING:
    from evenbits.compressor import Refusal

How = Literal["mean", "fitted"]
Rescale = Literal["none", "gain", "gain and offset", "by number"]
_ROUNDS = 4  # of gains and table in turn


@dataclass(frozen=True)
class Folded:
    """Sub-vector of index i in group g: gain[g] * table[i] + offset[g]."""

    table: Tensor  # (K, d) float32
    gain: Tensor | None = None  # (groups, 1), or by number (groups, d), float32
    offset: Tensor | None = None  # likewise

    def decode(self, codes: Tensor, first: int, last: int) -> Tensor:
        """(last - first, per_group, d) float32 from the indices of groups first to last - 1."""
        vectors = self.table[codes]
        if self.gain is not None:
            vectors *= self.gain[first:last, None]
        if self.offset is not None:
            vectors += self.offset[first:last, None]
        return vectors


@torch.no_grad()
def fold(
    decoder: GroupDecoder,
    how: How = "fitted",
    rescale: Rescale = "by number",
    scale: Tensor | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Folded | Refusal:
    """One table in place of the statistics of all groups.

    how      "mean": the decoder with constant statistics, their mean over the groups. "fitted": the table nearest to
             the exact weights by least squares, for the indices at hand; codewords that no index names decode as with
             constant statistics, or to zero with affine gains.
    rescale  a gain per group, also an offset, or both for each of the d numbers, by least squares against the exact
             weights. By number, 64 d bits are held for each group: little only where its sub-vectors are many.
    scale    (out,) row scales; errors count as they are in the restored weight, what is padding not at all.

    Gains and biases of the normalisations (affine) belong to places of a group: no mean stands for them, and "mean"
    is refused. "fitted" takes what they do on average at the places where a codeword is met.
    """
    table = None if decoder.network.affine else _mean_table(decoder, scale)
    if table is None and how == "mean":
        from evenbits.compressor import Refusal

        return Refusal("affine gains belong to places of a group: only a fitted table can stand for them")
    gain = offset = None
    if how == "fitted":
        for _ in range(1 if rescale == "none" else _ROUNDS):
            table = _fit_table(decoder, table, rescale, scale, tile_bytes)
    assert table is not None
    if rescale != "none":
        found = [
            _least_squares(table[codes], exact, weights, rescale)
            for codes, exact, weights in _walk(decoder, scale, tile_bytes)
        ]
        gain = torch.cat([part for part, _ in found])
        offset = None if rescale == "gain" else torch.cat([part for _, part in found])
    return Folded(table, gain, offset)


@torch.no_grad()
def folded_error(
    decoder: GroupDecoder, folded: Folded, scale: Tensor | None = None, tile_bytes: int = TILE_BYTES
) -> float:
    """Ratio of the exactly restored weight's squares to those of the difference, in dB; inf where there is none."""
    signal = noise = 0.0
    for first, last in decoder.parts(tile_bytes):
        exact, weights = decoder(first, last), _weights(decoder, first, last, scale)
        difference = folded.decode(decoder.codes.of_groups(first, last), first, last) - exact
        signal += float((weights * exact.square()).sum(dtype=torch.float64))
        noise += float((weights * difference.square()).sum(dtype=torch.float64))
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """10 log10 of a ratio of squares; inf without noise."""
    return 10 * math.log10(signal / noise) if noise and signal else math.inf if not noise else -math.inf


def _mean_table(decoder: GroupDecoder, scale: Tensor | None) -> Tensor:
    """(K, d): all codewords, with the mean of the groups' statistics, weighted by what the groups weigh in the end."""
    mass = torch.cat(
        [_weights(decoder, *part, scale).sum((1, 2), dtype=torch.float64) for part in decoder.parts(TILE_BYTES)]
    )
    share = mass / mass.sum() if bool(mass.sum() > 0) else torch.full_like(mass, 1 / len(mass))
    mean = (share[:, None, None] * decoder.statistics).sum(0, keepdim=True).float()
    return decode_with(decoder.codebook[None], mean, decoder.decoder, decoder.network)[0]


def _fit_table(
    decoder: GroupDecoder, table: Tensor | None, rescale: Rescale, scale: Tensor | None, tile_bytes: int
) -> Tensor:
    """The table of least error, each group rescaled as is best for the table before; without one, not rescaled.

    A GPU adds up in any order, in float64: now and then a last bit differs.
    """
    shape = decoder.codebook.shape[0], decoder.codes.settings.d
    above, below = (torch.zeros(shape, dtype=torch.float64, device=decoder.codebook.device) for _ in range(2))
    for codes, exact, weights in _walk(decoder, scale, tile_bytes):
        target, mass = exact, weights
        if table is not None and rescale != "none":
            gain, offset = (part[:, None] for part in _least_squares(table[codes], exact, weights, rescale))
            target, mass = gain * (exact - offset), weights * gain.square()
        above.index_add_(0, codes.flatten(), (weights * target).flatten(0, 1).double())
        below.index_add_(0, codes.flatten(), mass.flatten(0, 1).double())
    unseen = torch.zeros(shape, device=above.device) if table is None else table
    return torch.where(below > 0, (above / below).float(), unseen)


def _walk(decoder: GroupDecoder, scale: Tensor | None, tile_bytes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Indices (groups, per_group), exact sub-vectors (groups, per_group, d) and weights that broadcast to these."""
    for first, last in decoder.parts(tile_bytes):
        yield decoder.codes.of_groups(first, last), decoder(first, last), _weights(decoder, first, last, scale)


def _weights(decoder: GroupDecoder, first: int, last: int, scale: Tensor | None) -> Tensor:
    """(groups, per_group, d) float32: the square of the row scale that a number will be multiplied by, 0 of padding."""
    codes, shape = decoder.codes, decoder.codes.geometry
    lines, chunks = codes.places(first, last)
    along = chunks[..., None] * codes.settings.d + torch.arange(codes.settings.d, device=chunks.device)
    along = along.expand(last - first, -1, -1)
    inside = along < shape.length
    if scale is None:
        return inside.float()
    if codes.settings.axis == "in":
        return inside * scale[lines].square()[..., None]
    return inside * scale[along.clamp_max(shape.length - 1)].square()


def _least_squares(table: Tensor, exact: Tensor, weights: Tensor, rescale: Rescale) -> tuple[Tensor, Tensor]:
    """Gain and offset, (groups, 1) or by number (groups, d), that bring a group's table entries nearest to what is
    exact; both are (groups, per_group, d)."""
    over = 1 if rescale == "by number" else (1, 2)

    def total(part: Tensor) -> Tensor:
        found = (weights * part).sum(over)
        return found if found.ndim == 2 else found[:, None]

    mass = total(torch.ones_like(table)).clamp_min(1e-30)
    middle, target = torch.zeros_like(mass), torch.zeros_like(mass)
    if rescale != "gain":
        middle, target = total(table) / mass, total(exact) / mass
    inner, outer = table - middle[:, None], exact - target[:, None]
    spread = total(inner.square())
    gain = torch.where(spread > 0, total(inner * outer) / spread, 1.0)
    return gain, target - gain * middle
