"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv:2301.00774).

Unlike the released code, exactly the share is removed from each mask block (there, the weight at the threshold and
all its ties go too), and scales are fitted group by group on weights that carry all corrections made so far, as in
GPTQ here, rather than once on the dense row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Refusal, Role, Shared
from evenbits.errors import TrialFailed
from evenbits.integer import group_count
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import dead_columns, inverse_factor, require_finite, revive
from evenbits.maths.integer_layer import integer_linear
from evenbits.maths.sweep import Sweep
from evenbits.maths.uniform import Grid, OnGrid, divisor_of, fit_group, group_of_column, quantise
from evenbits_sparsegpt.options import SparseGptOptions, kept_in_row, removed_of

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class SparseGptCompressor(LayerCompressor):
    """Stores, in the row-major order of the mask, "codes" of the kept weights with "scale" (out, groups) float16 and
    "zero" unless symmetric, or the kept "values" as they are; and "mask", a bitmap of all weights, or at n:m the
    kept weights' positions among their m columns where these take no more. All but floats bit-packed."""

    def __init__(self, options: SparseGptOptions) -> None:
        self.options = options

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, without a second moment, for values that are not finite or leave the
        range of value_dtype, or for a second moment that no damping makes positive definite. A damping that had to
        be raised is kept in meta."""
        options = self.options
        if layer.second_moment is None:
            raise TrialFailed(f"{layer.name}: SparseGPT needs the second moment of the layer's inputs")
        require_finite(weight, "weights", layer.name)
        moment = revive(layer.second_moment.to(weight.device))
        weight = weight.masked_fill(dead_columns(layer.second_moment).to(weight.device), 0.0)
        factor = inverse_factor(moment, options.damping, layer.name)
        found = solve(weight, factor.upper.float(), options)
        packed = self._store(found, layer.shape)
        if factor.damping != options.damping:
            packed.meta["damping"] = factor.damping
        return packed

    def _store(self, found: Pruned, layer: LayerShape) -> PackedLayer:
        options, tensors, roles = self.options, {}, {}
        kept = found.stored[found.mask]
        if found.grid is None:
            if not bool(torch.isfinite(kept).all()):
                raise TrialFailed(
                    f"{layer.name}: kept weights leave the range of {options.value_dtype}; "
                    'value_dtype = "bfloat16" or "float32" holds them'
                )
            tensors["values"], roles["values"] = kept, Role.KEPT
        else:
            tensors["codes"], roles["codes"] = pack(kept, found.grid.bits), Role.CODE
            tensors["scale"], roles["scale"] = found.grid.scale.contiguous(), Role.SCALE
            if not options.symmetric:
                tensors["zero"], roles["zero"] = pack(found.grid.zero, found.grid.bits), Role.ZERO
        if options.masked:
            tensors["mask"], roles["mask"] = self._store_mask(found.mask), Role.MASK
        return PackedLayer(tensors, roles)

    def _store_mask(self, mask: Tensor) -> Tensor:
        width, kept = self.options.position_bits, self.options.kept_of
        if width is None or kept is None:
            return pack(mask, 1)
        places = (torch.arange(mask.shape[1], device=mask.device) % kept[1]).to(torch.uint8)
        return pack(places.expand_as(mask)[mask], width)

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        options, tensors = self.options, packed.tensors
        mask = self._restore_mask(packed, layer)
        if options.bits is None:
            values = tensors["values"].float()
            return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)
        return self._grid(packed, layer, mask).decode().masked_fill(~mask, 0.0)

    def on_grid(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> OnGrid | Refusal:
        """The codes and grids that are stored, with the code of zero for what was removed; refused without bits."""
        if self.options.bits is None:
            return Refusal(f"kept weights are stored as {self.options.value_dtype}, not as codes")
        mask = self._restore_mask(packed, layer)
        found = self._grid(packed, layer, mask)
        zero = found.grid.zero[:, found.group].to(torch.uint8)
        return replace(found, codes=torch.where(mask, found.codes, zero))

    def _grid(self, packed: PackedLayer, layer: LayerShape, mask: Tensor) -> OnGrid:
        """Codes of what is kept, zeros elsewhere."""
        options, tensors = self.options, packed.tensors
        assert options.bits is not None
        scale = tensors["scale"]
        codes = torch.zeros(mask.shape, dtype=torch.uint8, device=scale.device)
        codes[mask] = unpack(tensors["codes"], options.bits, int(mask.sum())).to(torch.uint8)
        columns, size = layer.in_features, options.group_size
        if options.symmetric:
            zero = torch.full(scale.shape, 2 ** (options.bits - 1), dtype=torch.int16, device=scale.device)
        else:
            zero = unpack(tensors["zero"], options.bits, scale.numel()).view(scale.shape).to(torch.int16)
        run = columns if size is None else min(size, columns)
        group = group_of_column(columns, size, scale.device)
        return OnGrid(codes, Grid(scale, zero, options.bits), group, run, neighbours=True)

    def _restore_mask(self, packed: PackedLayer, layer: LayerShape) -> Tensor:
        """bool (out, in): which weights are kept."""
        options, size = self.options, (layer.out_features, layer.in_features)
        device = next(iter(packed.tensors.values())).device
        if not options.masked:
            return torch.ones(size, dtype=torch.bool, device=device)
        if options.position_bits is None or options.kept_of is None:
            return unpack(packed.tensors["mask"], 1, layer.weights).bool().view(size)
        n, m = options.kept_of
        in_row = kept_in_row(layer.in_features, n, m)
        places = unpack(packed.tensors["mask"], options.position_bits, layer.out_features * in_row)
        starts = torch.arange(in_row, device=device) // n * m
        mask = torch.zeros(size, dtype=torch.bool, device=device)
        return mask.scatter_(1, places.view(layer.out_features, in_row) + starts, True)

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        name = "values" if self.options.bits is None else "scale"
        return {name: packed.tensors[name]}

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """Computes from the codes, with `evenbits.kernels.integer`, where no weight is removed."""
        options = self.options
        if options.masked:
            return Refusal(
                "no fused path for a mask: where a kept weight lies depends on all bits of the mask before it"
            )
        if options.bits is None:
            return Refusal(f"no codes to compute from: without bits, weights are stored as {options.value_dtype}")
        return integer_linear(packed.tensors, layer, options.bits, options.group_size, device)


@dataclass(frozen=True, slots=True)
class Pruned:
    """mask: bool (out, in), True where kept. stored: (out, in), of account where kept: uint8 codes on `grid`, or
    values in the dtype they are stored in where there is no grid."""

    mask: Tensor
    stored: Tensor
    grid: Grid | None


def solve(weight: Tensor, upper: Tensor, options: SparseGptOptions) -> Pruned:
    """Prune and quantise column by column, feeding each column's error to the later ones through the inverse factor.

    weight: (out, in) float32; upper: U (in, in) float32 of the second moment.
    """
    rows, columns = weight.shape
    sweep = Sweep(weight, upper, block_size=options.block_size)
    pivots = torch.tensor(sweep.pivots, device=weight.device)
    bits, size = options.bits, columns if options.group_size is None else min(options.group_size, columns)
    shape = (rows, group_count(columns, size))
    grid = None
    if bits is not None:
        scale = torch.zeros(shape, dtype=torch.float16, device=weight.device)
        grid = Grid(scale, torch.zeros(shape, dtype=torch.int32, device=weight.device), bits)
    # (in, out), so that a column is contiguous
    mask = torch.empty((columns, rows), dtype=torch.bool, device=weight.device)
    stored = torch.empty(
        (columns, rows), dtype=torch.uint8 if grid else _DTYPES[options.value_dtype], device=weight.device
    )
    span = options.mask_block if options.kept_of is None else options.kept_of[1]
    for i in sweep:
        if i % span == 0:
            last = min(i + span, columns)
            scores = sweep.ahead(i, last).abs_().div_(pivots[i:last])  # the root of w^2 / U_jj^2: the same order
            mask[i:last] = choose_mask(scores, options).t()
        if grid is not None and i % size == 0:
            current, g = sweep.ahead(i, min(i + size, columns)), i // size
            grid.scale[:, g], grid.zero[:, g] = fit_group(current, grid.bits, symmetric=options.symmetric)
            divisor, step, zero = divisor_of(grid.scale[:, g]), grid.scale[:, g].float(), grid.zero[:, g].float()
        column = sweep.column(i)
        if grid is None:
            stored[i] = column
            restored = column * mask[i]
        else:
            code = quantise(column, divisor, zero, grid.bits)
            stored[i] = code
            restored = code.sub_(zero).mul_(step).mul_(mask[i])
        sweep.settle(i, restored)
    return Pruned(mask.t(), stored.t(), grid)


def choose_mask(scores: Tensor, options: SparseGptOptions) -> Tensor:
    """bool, True where kept: the least scores (out, columns) are removed, exactly as many as the options say.

    Unstructured: over all rows and columns together. n:m: `scores` are one group, and each row keeps its n largest.
    Of equal scores the earlier ones are removed first, so that the count holds whatever the data.
    """
    if options.kept_of is not None:
        short = scores.shape[1] - options.kept_of[0]
        if short <= 0:
            return torch.ones_like(scores, dtype=torch.bool)
        lowest = scores.argsort(dim=1, stable=True)[:, :short]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)
    count = removed_of(scores.numel(), options.sparsity)
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.flatten().kthvalue(count).values
    kept = scores > threshold
    spare = scores.numel() - count - int(kept.sum())  # ties at the threshold that stay: the last ones
    if spare:
        ties = (scores == threshold).flatten().nonzero()[:, 0]
        kept.view(-1)[ties[-spare:]] = True
    return kept
