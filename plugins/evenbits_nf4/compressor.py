"""NormalFloat-4, the storage type of QLoRA (arXiv:2305.14314, section 3 and appendix E). No calibration.

Unlike the paper, double quantisation codes the scales as integers on an even grid, not as 8-bit floats: their
deviations from the mean are of one order of magnitude, so a float's exponent would be wasted on them.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor, nn

from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Refusal, Role, Shared
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import require_finite
from evenbits_nf4.options import SCALES_PER_BLOCK, WIDTH, Nf4Options

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@lru_cache(maxsize=1)
def levels() -> Tensor:
    """The 16 levels, float32, rising from -1 to 1.

    Quantiles of a standard Gaussian at even probabilities between 1/2 and 1 - (1/32 + 1/30) / 2: seven below zero,
    eight above (each side's outermost at that same end), and an exact zero; divided by the largest.
    """
    end = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(end + (0.5 - end) * i / 8) for i in range(8)]
    below = [-quantile(end + (0.5 - end) * i / 7) for i in range(7)]
    return torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64).div(above[0]).float()


class Nf4Compressor(LayerCompressor):
    """Stores "codes" packed to 4 bits, and per block "absmax"; with double quantisation instead "absmax_codes" uint8
    per block, "absmax_scale" per 256 blocks and "absmax_mean" (1,). Blocks run over the row-major flattened weight,
    across row ends; the last may be short."""

    def __init__(self, options: Nf4Options) -> None:
        self.options = options

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, for weights that are not finite."""
        require_finite(weight, "weights", layer.name)
        blocks = _in_blocks(weight.reshape(-1), self.options.block_size)
        tensors = self._store_scales(blocks.abs().amax(dim=1))
        roles = dict.fromkeys(tensors, Role.SCALE)
        # Against the scales as they are stored; a block whose stored scale is 0 gets the code of level 0.
        scale = self._scales(tensors, blocks.shape[0])
        table = levels().to(weight.device)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(blocks / torch.where(scale == 0, torch.inf, scale)[:, None], middles, out_int32=True)
        tensors["codes"], roles["codes"] = pack(codes.reshape(-1)[: weight.numel()], WIDTH), Role.CODE
        return PackedLayer(tensors, roles)

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        codes = unpack(packed.tensors["codes"], WIDTH, layer.weights)
        blocks = _in_blocks(levels().to(codes.device)[codes], self.options.block_size)
        weight = blocks * self._scales(packed.tensors, blocks.shape[0])[:, None]
        return weight.reshape(-1)[: layer.weights].view(layer.out_features, layer.in_features)

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        names = ("absmax_scale", "absmax_mean") if self.options.double_quant else ("absmax",)
        return {name: packed.tensors[name] for name in names}

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """Computes from the codes, with `evenbits.kernels.integer`; refused where a row's blocks are not its own."""
        from evenbits.kernels.integer import IntegerLinear
        from evenbits.kernels.weights import IntegerWeight

        block, rows, columns = self.options.block_size, layer.out_features, layer.in_features
        if columns % block and block % columns:
            return Refusal(
                f"blocks of {block} weights run across the ends of rows of {columns}: a kernel needs a block_size that "
                "divides the row, or that the row divides"
            )
        tensors = {name: tensor.detach().to(device) for name, tensor in packed.tensors.items()}
        scale = self._scales(tensors, -(-layer.weights // block))
        if columns % block:  # a block of several rows: each has its scale
            scale = scale.repeat_interleave(block // columns)[:rows]
        scale = scale.view(rows, -1)
        if not self.options.double_quant and self.options.scale_dtype == "float16":
            scale = scale.half()
        weight = IntegerWeight(
            tensors["codes"], scale, WIDTH, rows, columns, min(block, columns), levels=levels().to(device)
        )
        return IntegerLinear(weight)

    def _store_scales(self, absmax: Tensor) -> dict[str, Tensor]:
        """absmax: (blocks,) float32. Values past the dtype's largest are stored as that."""
        if not self.options.double_quant:
            return {"absmax": self._narrow(absmax)}
        mean = self._narrow(absmax.double().mean()[None])
        deviation = _in_blocks(absmax - mean.float(), SCALES_PER_BLOCK)
        scale = self._narrow(deviation.abs().amax(dim=1) / 127)
        wide = scale.float()
        steps = (deviation / torch.where(wide == 0, torch.inf, wide)[:, None]).round().clamp(-127, 127)
        codes = (steps + 128).to(torch.uint8).reshape(-1)[: absmax.numel()].clone()
        return {"absmax_codes": codes, "absmax_scale": scale, "absmax_mean": mean}

    def _scales(self, tensors: dict[str, Tensor], blocks: int) -> Tensor:
        """(blocks,) float32, never negative."""
        if not self.options.double_quant:
            return tensors["absmax"].float()
        steps = _in_blocks(tensors["absmax_codes"].float() - 128, SCALES_PER_BLOCK)
        deviation = steps * tensors["absmax_scale"].float()[:, None]
        return (deviation.reshape(-1)[:blocks] + tensors["absmax_mean"].float()).clamp(min=0)

    def _narrow(self, values: Tensor) -> Tensor:
        dtype = _DTYPES[self.options.scale_dtype]
        return values.clamp(max=torch.finfo(dtype).max).to(dtype)


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (ceil(n / size), size), the last block filled up with zeros."""
    short = -flat.numel() % size
    return torch.nn.functional.pad(flat, (0, short)).view(-1, size)
