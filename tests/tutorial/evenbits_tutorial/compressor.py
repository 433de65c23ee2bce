"""Logarithmic quantisation, arXiv:1603.01025: a weight becomes +-2^-e times its row's scale, a product a shift.

Unlike the paper, scales are real numbers, one a row, and no level is zero.
"""

from __future__ import annotations

import torch
from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Role, Shared
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import require_finite
from torch import Tensor

from evenbits_tutorial.options import PowersOptions

TINY = 1e-30  # a row of zeros is divided by this, and has a scale of zero


class PowersCompressor(LayerCompressor):
    def __init__(self, options: PowersOptions) -> None:
        self.bits = options.bits
        self.exponents = 1 << (options.bits - 1)

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Of 32 scales from a row's largest weight down, the one of least squared error once refitted."""
        require_finite(weight, "weights", layer.name)
        largest = weight.abs().amax(1, keepdim=True).clamp_min(TINY)
        codes = torch.zeros_like(weight, dtype=torch.int64)
        scale, gain = torch.zeros_like(largest), torch.zeros_like(largest)
        for step in range(32):
            tried = self.nearest(weight / (largest * 2 ** (-step / 8)))
            levels = self.levels(tried)
            match, energy = (weight * levels).sum(1, keepdim=True), levels.square().sum(1, keepdim=True)
            better = match.square() / energy > gain  # the squared error is |w|^2 - match^2 / energy
            codes = torch.where(better, tried, codes)
            scale = torch.where(better, match / energy, scale)
            gain = torch.where(better, match.square() / energy, gain)
        tensors = {"codes": pack(codes, self.bits), "scale": scale.flatten().half()}
        return PackedLayer(tensors, {"codes": Role.CODE, "scale": Role.SCALE})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        codes = unpack(packed.tensors["codes"], self.bits, layer.weights)
        levels = self.levels(codes.view(layer.out_features, layer.in_features))
        return levels * packed.tensors["scale"].float()[:, None]

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {"scale": packed.tensors["scale"]}

    def nearest(self, ratio: Tensor) -> Tensor:
        """Between 2^-e and half of it the border is 0.75 * 2^-e."""
        exponent = torch.ceil(torch.log2(0.75 / ratio.abs())).clamp(0, self.exponents - 1).long()
        return exponent + self.exponents * (ratio < 0)

    def levels(self, codes: Tensor) -> Tensor:
        return (1 - 2 * (codes // self.exponents)) * torch.exp2(-(codes % self.exponents).float())
