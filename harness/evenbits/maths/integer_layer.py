"""How integer codes on a grid are stored, and restored: the part that round-to-nearest and GPTQ share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.compressor import LayerCompressor, LayerShape, PackedLayer, Refusal, Role, Shared
from evenbits.integer import IntegerOptions, group_count, index_width
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.uniform import Grid, OnGrid, group_of_column


class IntegerLayerCompressor(LayerCompressor):
    """Stores "codes" (out, in), "scale" (out, groups) float16, "zero" (out, groups) unless symmetric, and
    "group_index" (in,) where groups are not neighbouring columns; all but the scales bit-packed."""

    def __init__(self, options: IntegerOptions) -> None:
        self.options = options

    def store(
        self,
        codes: Tensor,
        grid: Grid,
        layer: LayerShape,
        group: Tensor,
        meta: dict[str, Any] | None = None,
    ) -> PackedLayer:
        """codes: (out, in) integer in the original column order; group: (in,) which group each column belongs to."""
        tensors = {"codes": pack(codes, grid.bits), "scale": grid.scale.contiguous()}
        roles = {"codes": Role.CODE, "scale": Role.SCALE}
        if not self.options.symmetric:
            tensors["zero"], roles["zero"] = pack(grid.zero, grid.bits), Role.ZERO
        if self.options.has_group_index(layer):
            width = index_width(grid.scale.shape[1])
            tensors["group_index"], roles["group_index"] = pack(group, width), Role.CODE
        return PackedLayer(tensors, roles, meta or {})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return self.on_grid(packed, layer, shared).decode()

    def on_grid(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> OnGrid:
        """The codes and grids that are stored, unpacked."""
        tensors, bits = packed.tensors, self.options.bits
        columns, size = layer.in_features, self.options.group_size
        groups = group_count(columns, size)
        scale = tensors["scale"]
        codes = unpack(tensors["codes"], bits, layer.weights, torch.uint8).view(layer.out_features, columns)
        if self.options.symmetric:
            zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.int64, device=scale.device)
        else:
            zero = unpack(tensors["zero"], bits, layer.out_features * groups).view(layer.out_features, groups)
        neighbours = not self.options.has_group_index(layer)
        if neighbours:
            group = group_of_column(columns, size, scale.device)
        else:
            group = unpack(tensors["group_index"], index_width(groups), columns)
        run = columns if size is None else min(size, columns)
        return OnGrid(codes, Grid(scale, zero, bits), group, run, neighbours)

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {"scale": packed.tensors["scale"]}

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """Computes from the codes, with `evenbits.kernels.integer`."""
        return integer_linear(packed.tensors, layer, self.options.bits, self.options.group_size, device)


def integer_linear(
    stored: Mapping[str, Tensor], layer: LayerShape, bits: int, group_size: int | None, device: torch.device
) -> nn.Module:
    """An `evenbits.kernels.integer.IntegerLinear` of tensors under the names that `IntegerLayerCompressor` stores:
    "zero" and "group_index" may be missing. group_size None: one group a row."""
    from evenbits.kernels.integer import IntegerLinear
    from evenbits.kernels.weights import IntegerWeight

    columns = layer.in_features
    tensors = {name: tensor.detach().to(device) for name, tensor in stored.items()}
    scale, zero, group = tensors["scale"], None, None
    if "zero" in tensors:
        zero = unpack(tensors["zero"], bits, scale.numel(), torch.uint8).view(scale.shape)
    if "group_index" in tensors:
        group = unpack(tensors["group_index"], index_width(scale.shape[1]), columns, torch.int32)
    size = columns if group_size is None else min(group_size, columns)
    return IntegerLinear(IntegerWeight(tensors["codes"], scale, bits, layer.out_features, columns, size, zero, group))
