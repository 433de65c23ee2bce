"""SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression (arXiv:2306.03078).

GPTQ's walk with small groups, whose scales and zero points are themselves rounded in sets, and with the weights that
lose most kept in float16.

As in the released code there are two tests: a group's grid is fitted without the weights that it gains most from
leaving out, and a weight whose error is too large when its turn comes is kept. Unlike there, a layer never keeps more
than a given share of its weights: thresholds are raised so that it holds (`Picker`). At the same number of outliers
the calibrated error on a small Llama was 0 to 7 % above that of the released rule, one threshold for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Refusal, Role, Shared
from evenbits.errors import TrialFailed
from evenbits.integer import group_count, index_width
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import dead_columns, inverse_factor, require_finite, revive
from evenbits.maths.integer_layer import integer_linear
from evenbits.maths.stored import LARGEST
from evenbits.maths.sweep import Sweep
from evenbits.maths.uniform import dequantise, group_of_column
from evenbits_spqr.options import SpqrOptions, has_group_index, most_outliers, require_columns
from evenbits_spqr.outliers import Picker, error_drops, layer_threshold, put_outliers, store_outliers
from evenbits_spqr.statistics import Statistics, make_statistics, read_statistics


@dataclass(frozen=True, slots=True)
class Solved:
    """codes: (out, in) uint8; kept: (out, in) bool, which weights are outliers; values: (out, in) float16, of which
    those at `kept` count; group: (in,) of each column; all in the original order."""

    codes: Tensor
    statistics: Statistics
    kept: Tensor
    values: Tensor
    group: Tensor


class SpqrCompressor(LayerCompressor):
    def __init__(self, options: SpqrOptions) -> None:
        self.options = options

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, without a second moment, for values that are not finite, for a
        second moment that no damping makes positive definite, or for a row too wide for 16-bit column numbers.
        A damping that had to be raised is kept in meta."""
        options = self.options
        if layer.second_moment is None:
            raise TrialFailed(f"{layer.name}: SpQR needs the second moment of the layer's inputs")
        require_columns(options, layer.shape)
        require_finite(weight, "weights", layer.name)
        moment = revive(layer.second_moment.to(weight.device))
        weight = weight.masked_fill(dead_columns(layer.second_moment).to(weight.device), 0.0)
        # Stable, so that equal diagonals keep their order on every machine.
        order = (
            torch.argsort(torch.diagonal(moment), descending=True, stable=True)
            if options.act_order
            else torch.arange(weight.shape[1], device=weight.device)
        )
        factor = inverse_factor(moment[order][:, order], options.damping, layer.name)
        solved = solve(weight, factor.upper.float(), order, options, most_outliers(options, layer.shape))
        tensors, roles = {"codes": pack(solved.codes, options.bits)}, {"codes": Role.CODE}
        if has_group_index(options, layer.shape):
            groups = group_count(layer.shape.in_features, options.group_size)
            tensors["group_index"], roles["group_index"] = pack(solved.group, index_width(groups)), Role.CODE
        for more, their in (
            solved.statistics.store(),
            store_outliers(solved.values, solved.kept, layer.shape, options),
        ):
            tensors |= more
            roles |= their
        return PackedLayer(tensors, roles, {} if factor.damping == options.damping else {"damping": factor.damping})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        options, tensors = self.options, packed.tensors
        codes = unpack(tensors["codes"], options.bits, layer.weights, torch.uint8).view(
            layer.out_features, layer.in_features
        )
        scale, zero = read_statistics(tensors, layer, options)
        if has_group_index(options, layer):
            group = unpack(tensors["group_index"], index_width(scale.shape[1]), layer.in_features)
        else:
            group = group_of_column(layer.in_features, options.group_size, scale.device)
        return put_outliers(dequantise(codes, scale, zero, group), tensors, layer, options)

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        """Scales, or the two levels of scales and zero points, and the outliers. A step of which all are zero has no
        number to change: every set of it holds one value."""
        names = ("scale", "scale_offset", "zero_offset", "scale_step", "zero_step", "kept")
        found = {name: packed.tensors[name] for name in names if name in packed.tensors}
        return {name: t for name, t in found.items() if not name.endswith("_step") or bool((t != 0).any())}

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """From the codes, with `evenbits.kernels.integer`, where no weight is kept and statistics are whole."""
        parts = ["weights kept in float16 among the codes"] if "kept" in packed.tensors else []
        if self.options.stats_bits is not None:
            parts.append("zero points that are themselves rounded, to no whole numbers")
        if parts:
            return Refusal(f"no fused path for {' and '.join(parts)}: the layer runs on its restored dense weight")
        return integer_linear(packed.tensors, layer, self.options.bits, self.options.group_size, device)


def solve(weight: Tensor, upper: Tensor, order: Tensor, options: SpqrOptions, most: int) -> Solved:
    """Walk the columns in `order`, keeping at most `most` weights and feeding the others' errors to later columns.

    weight: (out, in) float32; upper: U (in, in) float32 of the permuted second moment; order: (in,) permutation.
    """
    rows, columns = weight.shape
    size = columns if options.group_size is None else min(options.group_size, columns)
    groups = group_count(columns, size)
    bounds = [(start, min(start + size, columns)) for start in range(0, columns, size)]
    # a whole row's grid is fitted on the dense weights either way
    static = options.static_groups or groups == 1
    back = torch.argsort(order)
    pivots = torch.diagonal(upper)[back] if static else torch.diagonal(upper)
    arranged = weight if static else weight[:, order]  # columns of a group stand side by side
    turns = (order if static else torch.arange(columns, device=weight.device)).tolist()  # where each turn's column is

    picker = None
    if most:
        drops = torch.cat([error_drops(arranged[:, a:b].contiguous(), pivots[a:b], options.bits) for a, b in bounds], 1)
        picker = Picker(drops, bounds, layer_threshold(arranged, pivots, options.threshold), most)
        del drops
    statistics = make_statistics(rows, groups, options, weight.device)
    if static:
        for group, (a, b) in enumerate(bounds):
            part = arranged[:, a:b]
            statistics.fit(group, part.masked_fill(picker.likely[:, a:b], 0.0) if picker else part)
        if picker:
            pairs = enumerate(bounds)
            errors = torch.cat([statistics.errors(g, arranged[:, a:b].t(), pivots[a:b]) for g, (a, b) in pairs])
            picker.plan_all(errors[order])
            del errors
    del arranged

    sweep = Sweep(weight, upper, order, options.block_size)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    kept = torch.zeros(columns, rows if picker else 0, dtype=torch.bool, device=weight.device)
    values = kept.half()
    for i in sweep:
        group = turns[i] // size
        if not static and i % size == 0:
            a, b = bounds[group]
            current = sweep.ahead(a, b)
            if picker:
                left_out = picker.left_out(group, error_drops(current, pivots[a:b], options.bits))
                statistics.fit(group, current.masked_fill(left_out, 0.0))
                picker.plan_group(statistics.errors(group, current.t(), pivots[a:b]))
            else:
                statistics.fit(group, current)
        column = sweep.column(i)
        code = statistics.code(group, column)
        codes[i] = code
        restored = statistics.restored(group, code)
        if picker:
            kept[i] = picker.pick(i, torch.sub(column, restored).div_(sweep.pivots[i]).square_())
            values[i] = column.clamp(-LARGEST, LARGEST)
            restored = torch.where(kept[i], values[i].float(), restored)
        sweep.settle(i, restored)

    group_of = (torch.arange(columns, device=weight.device) if static else back) // size
    return Solved(codes[back].t(), statistics, kept[back].t(), values[back].t(), group_of)
