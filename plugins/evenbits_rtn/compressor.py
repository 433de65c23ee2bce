"""Round to nearest: the data-free anchor that every cleverer integer method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from evenbits.compressor import Layer, PackedLayer, Shared
from evenbits.maths.hessian import require_finite
from evenbits.maths.integer_layer import IntegerLayerCompressor
from evenbits.maths.uniform import fit_grid, group_of_column, quantise_weight


class RtnCompressor(IntegerLayerCompressor):
    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, for weights that are not finite."""
        require_finite(weight, "weights", layer.name)
        options = self.options
        grid = fit_grid(
            weight,
            options.bits,
            options.group_size,
            symmetric=options.symmetric,
            clip_search=options.clip_search,
        )
        group = group_of_column(weight.shape[1], options.group_size, weight.device)
        return self.store(quantise_weight(weight, grid, group), grid, layer.shape, group)
