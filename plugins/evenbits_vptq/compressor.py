"""VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models (arXiv:2409.17066).

Unlike the paper, codebooks may be shared by layers and stored in int8, weights may be divided by scales of the matrix
or of its rows, and indices are stored with as many bits as they have. k-means takes at most 25 steps, not 100, on at
most 64 vectors a codeword, not on all; both are options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evenbits.compressor import (
    Block,
    BlockCompressor,
    BlockResult,
    Layer,
    LayerShape,
    PackedLayer,
    Refusal,
    Role,
    Shared,
    Survey,
)
from evenbits.errors import TrialFailed
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import dead_columns, inverse_factor, require_finite, revive
from evenbits.tuning import compress_then_tune
from evenbits_vptq.assign import Codes, assign
from evenbits_vptq.codebooks import Books, Sample, decode, load_books, store_books, train_books, wanted_vectors
from evenbits_vptq.columns import Columns, cut, load_columns, plan_columns, store_columns
from evenbits_vptq.linear import packed_linear
from evenbits_vptq.options import VptqOptions, codebook_of, outlier_columns, vectors_of, width_of
from evenbits_vptq.scales import Scaled, divide, refit, restore_scales


class VptqCompressor(BlockCompressor):
    """Stores "codes", "residual_codes" and "outlier_codes" (packed, column by column), "codebook" (groups, k, v),
    "residual_codebook" and "outlier_codebook", the scales, "outlier_mask" and "column_group"; what the options do not
    ask for is left out. Shared codebooks have names that end in ".kind" or ".model"."""

    def __init__(self, options: VptqOptions) -> None:
        self.options = options

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        """The shared codebooks, trained on random vectors of all their layers, in proportion to their number.

        A layer's vectors count by their columns' second moments of the dense model over the mean of these, so that
        layers with large inputs do not decide alone.
        Raises TrialFailed where a codebook has more codewords than vectors.
        """
        options = self.options
        if options.scope == "matrix":
            return None
        totals: dict[str, int] = {}
        for layer in survey.shapes.layers:
            name = codebook_of(layer, options.scope)
            others = layer.in_features - outlier_columns(layer.in_features, options)
            totals[name] = totals.get(name, 0) + others * vectors_of(layer.out_features, options.v)
        samples: dict[str, list[Sample]] = {name: [] for name in totals}
        apart: dict[str, list[Sample]] = {name: [] for name in totals}
        for layer, weight in survey:
            require_finite(weight, "weights", layer.name)
            diagonal = torch.diagonal(survey.second_moment(layer.name)).to(weight.device, torch.float32)
            name = codebook_of(layer, options.scope)
            groups, outliers = self._samples(divide(weight.float(), options), diagonal, plan_columns(diagonal, options))
            share = min(1.0, wanted_vectors(options) / totals[name])
            samples[name] += [one.draw(math.ceil(share * len(one.vectors)), generator) for one in groups]
            apart[name] += [] if outliers is None else [outliers]
        shared = PackedLayer({}, {})
        for name, parts in samples.items():
            outliers = Sample.join(apart[name]) if apart[name] else None
            books = train_books([Sample.join(parts)], outliers, options, f"codebook {name!r}", generator)
            tensors, roles = store_books(books, options.codebook_bits, f".{name}")
            shared.tensors.update(tensors)
            shared.roles.update(roles)
        return shared

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, without a second moment, for values that are not finite, a second
        moment that no damping makes positive definite, or more codewords than vectors. A damping that had to be raised
        is kept in meta."""
        options = self.options
        if layer.second_moment is None:
            raise TrialFailed(f"{layer.name}: VPTQ needs the second moment of the layer's inputs")
        require_finite(weight, "weights", layer.name)
        observed = layer.second_moment.to(weight.device)
        dead = dead_columns(observed)
        weight = weight.float().masked_fill(dead, 0.0)
        diagonal = torch.diagonal(observed).float()
        columns = plan_columns(diagonal, options)
        scaled = divide(weight, options)
        packed = PackedLayer({}, {})
        if shared is None:
            groups, outliers = self._samples(scaled, diagonal, columns)
            books = train_books(groups, outliers, options, layer.name, generator)
            packed = PackedLayer(*store_books(books, options.codebook_bits))
        # codes are chosen against the codebooks as they are stored, so that rounding those costs nothing more
        books = self._books(packed, layer.shape, shared)
        order = columns.order
        factor = inverse_factor(revive(observed)[order][:, order], options.damping, layer.name)
        upper = factor.upper if scaled.columns is None else factor.upper / scaled.columns[order]
        importance = None if scaled.rows is None else scaled.rows.square()
        codes = assign(scaled.weight, upper.float(), columns, books, importance, options.block_size)
        self._add_codes(packed, codes)
        for name, tensor in store_columns(columns, options).items():
            packed.tensors[name], packed.roles[name] = tensor, Role.MASK if name == "outlier_mask" else Role.CODE
        for name, tensor in scaled.tensors.items():
            packed.tensors[name], packed.roles[name] = tensor, Role.SCALE
        if options.scales in ("matrix", "row"):
            pattern = self._pattern(packed, layer.shape, shared)
            packed.tensors["scale"] = refit(weight, pattern, observed.float(), options.scales == "row")
        if factor.damping != options.damping:
            packed.meta["damping"] = factor.damping
        return packed

    def compress_block(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        shared: Shared | None,
        generator: torch.Generator,
    ) -> BlockResult:
        """Layers in order, then tuning. Codebooks of 8 bits are tuned in 16 and rounded after that, because of int8
        ones only the step could be trained."""
        options = self.options
        tuning = options.tuning if options.tune else None
        if tuning is None or options.codebook_bits == 16 or shared is not None:
            return compress_then_tune(self, block, inputs, targets, shared, generator, tuning)
        finer = VptqCompressor(options.model_copy(update={"codebook_bits": 16}))
        result = compress_then_tune(finer, block, inputs, targets, shared, generator, tuning)
        for packed in result.layers.values():
            tensors, roles = store_books(load_books(packed.tensors, 16), options.codebook_bits)
            packed.tensors.update(tensors)
            packed.roles.update(roles)
        return result

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return restore_scales(self._pattern(packed, layer, shared), packed.tensors, self.options)

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """A layer that gathers codewords by the stored indices; without the bias, which its user adds."""
        books, suffix = (packed, "") if shared is None else (shared, f".{codebook_of(layer, self.options.scope)}")
        return packed_linear(packed.tensors, books.tensors, suffix, layer, self.options, device)

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        """Scales and codebooks (of int8 ones, their step)."""
        names = [name for name, role in packed.roles.items() if role in (Role.SCALE, Role.CODEBOOK)]
        found = {name: packed.tensors[name] for name in names}
        for name, tensor in (shared.tensors if shared is not None else {}).items():
            found[f"shared/{name}"] = tensor
        return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}

    def _samples(self, scaled: Scaled, diagonal: Tensor, columns: Columns) -> tuple[list[Sample], Sample | None]:
        """The vectors of each group, and those of the outliers, each with the second moment of its column's input,
        over their mean, and the squared scales of its weights."""
        options = self.options
        counts = diagonal / diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        if scaled.columns is not None:
            counts = counts * scaled.columns.square() / scaled.columns.square().mean()
        rows = torch.ones(scaled.weight.shape[0], device=diagonal.device)
        if scaled.rows is not None:
            rows = scaled.rows.square() / scaled.rows.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        turned = scaled.weight.t()

        def sample(chosen: Tensor, v: int) -> Sample:
            weights = counts[chosen, None] * cut(rows[None], v)[0].mean(1)
            return Sample(cut(turned[chosen], v).reshape(-1, v), weights.reshape(-1))

        groups = [sample(columns.others[columns.group == g], options.v) for g in range(options.groups)]
        return groups, sample(columns.outliers, options.outlier_v) if options.outlier_percent else None

    def _books(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Books:
        if shared is None:
            return load_books(packed.tensors, self.options.codebook_bits)
        return load_books(shared.tensors, self.options.codebook_bits, f".{codebook_of(layer, self.options.scope)}")

    def _add_codes(self, packed: PackedLayer, codes: Codes) -> None:
        options = self.options
        parts = {
            "codes": (codes.first, options.codebook_size),
            "residual_codes": (codes.residual, options.residual_size),
            "outlier_codes": (codes.outlier, options.outlier_size),
        }
        for name, (part, size) in parts.items():
            if part is not None:
                packed.tensors[name], packed.roles[name] = pack(part, width_of(size)), Role.CODE

    def _pattern(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        """(out, in): the decoded weight in units of its scales."""
        options, books = self.options, self._books(packed, layer, shared)
        outliers, others, group = load_columns(packed.tensors, layer.in_features, options)
        rows = vectors_of(layer.out_features, options.v)

        def codes(name: str, columns: Tensor, vectors: int, size: int | None) -> Tensor:
            count = columns.numel() * vectors
            return unpack(packed.tensors[name], width_of(size), count).view(columns.numel(), vectors)

        turned = decode(codes("codes", others, rows, options.codebook_size), books.first, group)
        if books.residual is not None:
            left = codes("residual_codes", others, rows, options.residual_size)
            turned = turned + decode(left, books.residual, group)
        turned = turned[:, : layer.out_features]
        if books.outlier is not None:
            vectors = vectors_of(layer.out_features, options.outlier_v)
            apart = decode(codes("outlier_codes", outliers, vectors, options.outlier_size), books.outlier)
            back = torch.argsort(torch.cat([others, outliers]))
            turned = torch.cat([turned, apart[:, : layer.out_features]])[back]
        return turned.t()
