"""A matrix under a decoder that normalises over groups, and how kernels read it: block-diagonal, in two parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evenbits.kernels.launch import triton_refusal
from evenbits.kernels.weights import Axis
from evenbits_pocketllm.network import Network

_LARGEST = 6e4  # of float16, with some room


@dataclass(frozen=True)
class PocketWeight:
    """A matrix of indices under a decoder whose groups are normalised, and the statistics of these groups.

    codes       uint8, the bit stream of lines * chunks indices, line by line; `padded`
    codebook    (K, latent) float32
    decoder     flat float32, as `network` reads it
    statistics  (lines, norms, 2) float32: groups are lines, or under the code's order as many others
    axis        "in": a line is a row of W (out, in); "out": a column
    code_order  groups of the released code: all lines of a chunk, then of the next, `chunks` sub-vectors a group
    row_scale   (out,) float32 factor of W's rows; None: ones
    """

    codes: Tensor
    bits: int
    codebook: Tensor
    decoder: Tensor
    network: Network
    statistics: Tensor
    out_features: int
    in_features: int
    axis: Axis = "in"
    code_order: bool = False
    row_scale: Tensor | None = None

    @property
    def lines(self) -> int:
        return self.out_features if self.axis == "in" else self.in_features

    @property
    def length(self) -> int:
        return self.in_features if self.axis == "in" else self.out_features

    @property
    def chunks(self) -> int:
        return -(-self.length // self.network.outputs)

    @property
    def by_chunks(self) -> bool:
        """Whether slabs are all lines of some chunks, not some lines: so that a slab is whole outputs where it can."""
        return self.axis == "out" or self.code_order


def padded(codes: Tensor) -> Tensor:
    """A bit stream of whole and aligned 32-bit words, as kernels read it: with up to three zero bytes more; or the same
    tensor, where it is that."""
    if codes.numel() % 4:
        return functional.pad(codes, (0, -codes.numel() % 4))
    return codes.contiguous() if codes.storage_offset() % 4 == 0 else codes.clone()


@dataclass(frozen=True)
class Layout:
    """How a network lies in tiles: `pack` sub-vectors a row, each part padded to a power of two."""

    pack: int
    latent_pad: int
    hidden: int  # columns inside a unit, of all sub-vectors of a row
    block: int  # of these at a time
    d_pad: int

    @staticmethod
    def of(network: Network) -> Layout:
        latent, hidden, d = (_power(n) for n in (network.inputs, network.hidden, network.outputs))
        pack = max(1, min(16 // latent, 64 // hidden))
        latent, hidden = max(latent, 16 // pack), max(hidden, 16 // pack)
        columns = pack * hidden
        # what the registers hold beside a tile of latents
        block = 64 if pack * latent <= 16 else 32 if pack * latent <= 32 else 16
        return Layout(pack, latent, columns, min(columns, block), max(d, -(-8 // pack)))

    @property
    def wide(self) -> int:
        return self.pack * self.latent_pad

    @property
    def last(self) -> int:
        return self.pack * self.d_pad


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Prepared:
    """A PocketWeight as kernels read it.

    matrices    float16: for each unit, residual ones first, the two linears as high and low parts, block-diagonal
    floats      float32: for each unit the biases inside and outside, and what both products are to be multiplied by
    ran         which configuration ran, by kernel, kept by whoever keeps the rest
    """

    pocket: PocketWeight
    layout: Layout
    matrices: Tensor
    floats: Tensor
    ran: dict[str, str] = field(default_factory=dict)

    def constants(self, split: bool) -> dict[str, Any]:
        """What a kernel is compiled for: the same for all shapes of a model."""
        pocket, layout = self.pocket, self.layout
        scaled = 0 if pocket.row_scale is None else 1 if pocket.axis == "in" else 2
        return {
            "BITS": pocket.bits, "D": pocket.network.outputs, "LATENT": pocket.network.inputs,
            "UNITS": pocket.network.units, "PACK": layout.pack, "LATENT_PAD": layout.latent_pad,
            "HIDDEN": layout.hidden, "BLOCK": layout.block, "D_PAD": layout.d_pad, "AFFINE": pocket.network.affine,
            "RAGGED": pocket.length % pocket.network.outputs != 0, "SPLIT": split, "SCALED": scaled,
        }  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        pocket, network = self.pocket, self.pocket.network
        words = pocket.codes.view(torch.int32)
        scale = self.floats if pocket.row_scale is None else pocket.row_scale
        gain = bias = self.floats  # not read
        if network.affine:
            gain, bias = pocket.decoder[network.mlp_parameters :].chunk(2)
        return {
            "words": words, "last_word": words.numel() - 1, "book": pocket.codebook, "matrices": self.matrices,
            "floats": self.floats, "statistics": pocket.statistics, "gain": gain, "bias": bias, "scale": scale,
            "lines": pocket.lines, "chunks": pocket.chunks, "length": pocket.length,
        }  # fmt: skip


def refusal(pocket: PocketWeight) -> str | None:
    """Why the kernels cannot decode this on its device; None where they can."""
    network = pocket.network
    if found := triton_refusal(pocket.codes.device):
        return found
    if not network.group_norms or network.inputs > 64 or network.outputs > 64 or network.hidden > 256:
        return "the kernels take decoders that normalise over groups, of at most 64 numbers and 256 hidden ones"
    if pocket.lines * pocket.chunks >= 1 << 31:
        return f"{pocket.lines * pocket.chunks:,} sub-vectors, and the kernels count to 2^31"
    if pocket.codes.numel() % 4 or pocket.codes.storage_offset() % 4 or not pocket.codes.is_contiguous():
        return "the indices are not whole and aligned 32-bit words, which `padded` makes of them"
    largest = _bound(pocket)
    if not largest < _LARGEST:
        return f"numbers inside the decoder may reach {largest:.3g}, beyond float16, which the kernels multiply in"
    return None


def _bound(pocket: PocketWeight) -> float:
    """What no normalised or hidden number exceeds: of n normalised numbers none exceeds sqrt(n - 1). NaN stays NaN.

    Padding of latents counts: it is zero before it is normalised.
    """
    network, parts = pocket.network, pocket.network.views(pocket.decoder)
    normalised = torch.full((network.norms,), math.sqrt(max(network.width - 1, 1)), device=pocket.decoder.device)
    if network.affine:
        normalised = parts["gain"].abs().amax(1) * normalised + parts["bias"].abs().amax(1)
    found = [normalised]
    for unit in range(network.units):
        hidden = parts[f"unit{unit}.in.weight"].abs().sum(1) * normalised.max() + parts[f"unit{unit}.in.bias"].abs()
        found.append(hidden)
    if not network.affine and Layout.of(network).latent_pad > network.inputs:
        found.append(pocket.statistics.prod(2).abs().flatten())
    return float(torch.cat(found).max())


def prepare(pocket: PocketWeight) -> Prepared:
    """Lay a decoder out for the kernels. Raises ValueError where `refusal` says why not."""
    if reason := refusal(pocket):
        raise ValueError(f"PocketLLM's kernels: {reason}; take backend 'torch'")
    network, layout = pocket.network, Layout.of(pocket.network)
    parts = network.views(pocket.decoder)
    matrices, floats = [], []
    for unit in (*range(1, network.units), 0):
        outside = layout.latent_pad if unit else layout.d_pad
        factors = []
        for name, rows, columns in (
            ("in", layout.latent_pad, layout.hidden // layout.pack),
            ("out", layout.hidden // layout.pack, outside),
        ):
            high, low, factor = _halves(_diagonal(parts[f"unit{unit}.{name}.weight"].t(), rows, columns, layout.pack))
            matrices += [high.flatten(), low.flatten()]
            factors.append(factor)
        stored = max(layout.wide, layout.last)
        inner = _repeated(parts[f"unit{unit}.in.bias"], layout.hidden // layout.pack, layout.pack)
        outer = _repeated(parts[f"unit{unit}.out.bias"], outside, layout.pack)
        numbers = torch.cat([inner, outer, torch.stack(factors)])
        floats.append(functional.pad(numbers, (0, layout.hidden + stored + 2 - numbers.numel())))
    return Prepared(pocket, layout, torch.cat(matrices), torch.cat(floats))


def _diagonal(matrix: Tensor, rows: int, columns: int, pack: int) -> Tensor:
    """(pack * rows, pack * columns): `pack` times the matrix, padded with zeros, along the diagonal."""
    own = functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    return torch.block_diag(*[own] * pack)  # type: ignore[no-untyped-call,no-any-return]


def _halves(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """High and low float16 parts of a float32 matrix times a power of two, and what undoes that power.

    The largest number comes to lie in [1024, 2048), so that numbers down to 2^-14 of it keep 22 bits: low parts of
    smaller ones lose some below 2^-24, the smallest float16.
    """
    largest = matrix.abs().max().clamp_min(2.0**-100)
    factor = torch.exp2(10 - torch.floor(torch.log2(largest)))
    scaled = matrix * factor
    high = scaled.half()
    return high, (scaled - high.float()).half(), 1 / factor


def _repeated(bias: Tensor, size: int, pack: int) -> Tensor:
    return functional.pad(bias, (0, size - bias.numel())).repeat(pack)
