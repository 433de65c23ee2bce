"""AQLM: Extreme Compression of Large Language Models via Additive Quantization (arXiv:2401.06118).

Residual k-means, then rounds of training codebooks and scales and of beam search over codes for the least
tr(E H E^T), and block tuning last. Unlike the paper, codebooks are trained by conjugate gradients unless `solver` says
adam; the second moment is damped; codes are chosen once more against codebooks and scales as they are stored;
statistics are taken anew before each group of layers of a block; and where matrices are small, layers may share
codebooks, which then stay what k-means made them while codes, scales and norms adapt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

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
from evenbits.kernels.codebook import CodebookLinear
from evenbits.kernels.codebook_held import share
from evenbits.kernels.weights import CodebookWeight, Stream
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import dead_columns, require_finite
from evenbits.maths.kmeans import kmeans
from evenbits.maths.nearest import nearest
from evenbits.maths.stored import (
    LARGEST,
    divide_rows,
    load_codebook,
    row_scale,
    sample_rows,
    store_codebook,
    tunable_parts,
)
from evenbits.tuning import compress_then_tune
from evenbits.vectors import chunks, codebook_of
from evenbits_aqlm.options import AqlmOptions, groups_by_codebook
from evenbits_aqlm.search import decode, search
from evenbits_aqlm.training import Code, adam, best_scale, descend, loss_of

_PARTS = ("codebook", "codebook_scale")
STEPS = {"conjugate": 10, "adam": 100}


class AqlmCompressor(BlockCompressor):
    """Stores "codes" (packed; row by row, group by group, codebook by codebook) and "row_scale" (out,) float16 per
    layer; "codebook" (M, K, g) float16, or int8 with "codebook_scale" (1,) float16, per layer or shared: there the
    names end in ".kind" or ".model"."""

    def __init__(self, options: AqlmOptions) -> None:
        self.options = options

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        """The shared codebooks: residual k-means on random groups of all their layers, in proportion to their number.

        Raises TrialFailed when a codebook has more entries than there are groups.
        """
        options = self.options
        if options.scope == "matrix":
            return None
        totals = groups_by_codebook(options, survey.shapes.layers)
        samples: dict[str, list[Tensor]] = {name: [] for name in totals}
        for layer, weight in survey:
            require_finite(weight, "weights", layer.name)
            name = codebook_of(layer, options.scope)
            groups = self._groups(divide_rows(weight.float(), row_scale(weight.float())))
            share = min(1.0, options.train_vectors / totals[name])
            samples[name].append(sample_rows(groups, math.ceil(share * groups.shape[0]), generator))
        shared = PackedLayer({}, {})
        for name, parts in samples.items():
            found = self._start(torch.cat(parts), f"codebook {name!r}", generator)
            tensors, roles = store_codebook(found, options.codebook_bits)
            shared.tensors.update({f"{key}.{name}": tensor for key, tensor in tensors.items()})
            shared.roles.update({f"{key}.{name}": role for key, role in roles.items()})
        return shared

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, without a second moment, for values not finite, or fewer groups than
        a codebook has entries."""
        options = self.options
        if layer.second_moment is None:
            raise TrialFailed(f"{layer.name}: AQLM needs the second moment of the layer's inputs")
        require_finite(weight, "weights", layer.name)
        require_finite(layer.second_moment, "entries of the second moment", layer.name)
        weight, moment = self._padded(weight.float(), layer.second_moment.to(weight.device))
        code = self._coded(weight, layer, shared, generator)
        self._improve(weight, moment, code, shared is None, generator)
        packed = PackedLayer({}, {})
        if shared is None:
            packed = PackedLayer(*store_codebook(code.codebooks, options.codebook_bits))
            code.codebooks = load_codebook(packed.tensors, options.codebook_bits)
        # once more against what is stored, so that its rounding costs as little as it can
        code.scale = _stored_scale(weight, code, moment).float()
        code.codes = search(
            divide_rows(weight, code.scale), moment, code.codebooks, code.codes, options.beam, generator
        )
        packed.tensors["row_scale"], packed.roles["row_scale"] = _stored_scale(weight, code, moment), Role.SCALE
        packed.tensors["codes"], packed.roles["codes"] = pack(code.codes, options.code_bits), Role.CODE
        return packed

    def compress_block(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        shared: Shared | None,
        generator: torch.Generator,
    ) -> BlockResult:
        """int8 codebooks are float16 while the block is tuned, and rounded after it."""
        options = self.options
        tune = options.tuning if options.tune else None
        rounded = tune is not None and shared is None and options.codebook_bits == 8
        wide = AqlmCompressor(options.model_copy(update={"codebook_bits": 16})) if rounded else self
        result = compress_then_tune(wide, block, inputs, targets, shared, generator, tune)
        if rounded:
            for packed in result.layers.values():
                tensors, roles = store_codebook(packed.tensors["codebook"].float(), 8)
                packed.tensors.update(tensors)
                packed.roles.update(roles)
        return result

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        codebooks = self.codebooks(packed, layer, shared)
        weight = decode(codebooks, self.codes(packed, layer))[:, : layer.in_features]
        return weight * packed.tensors["row_scale"].float()[:, None]

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """A layer that sums entries by the stored codes; without the bias, which its user adds."""
        options = self.options
        stored = self._stored_codebooks(packed, layer, shared)
        books = stored["codebook"].to(device)
        scale = packed.tensors["row_scale"].to(device).float()
        if options.codebook_bits == 8:  # whole numbers in float16, exactly; their step joins the row scales
            books, scale = share(books.half()), scale * stored["codebook_scale"].to(device).float()
        codes = packed.tensors["codes"].to(device)
        streams = tuple(
            Stream(codes, books[m : m + 1], options.code_bits, stride=options.codebooks, offset=m)
            for m in range(options.codebooks)
        )
        return CodebookLinear(
            CodebookWeight(streams, layer.out_features, layer.in_features, options.group_size, row_scale=scale)
        )

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        """Row scales, and the codebooks (of int8 ones, their scale)."""
        return tunable_parts(packed, shared, self.options.codebook_bits)

    def codes(self, packed: PackedLayer, layer: LayerShape) -> Tensor:
        """int64 (out, groups, M)."""
        options = self.options
        shape = layer.out_features, chunks(layer.in_features, options.group_size), options.codebooks
        return unpack(packed.tensors["codes"], options.code_bits, shape[0] * shape[1] * shape[2]).view(shape)

    def codebooks(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        """float32 (M, K, g)."""
        return load_codebook(self._stored_codebooks(packed, layer, shared), self.options.codebook_bits)

    def _stored_codebooks(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> dict[str, Tensor]:
        """Under their plain names, wherever they are."""
        if shared is None:
            return packed.tensors
        name = codebook_of(layer, self.options.scope)
        return {part: t for part in _PARTS if (t := shared.tensors.get(f"{part}.{name}")) is not None}

    def _padded(self, weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and moment with zeros up to whole groups; dead inputs' weights 0, the mean of the diagonal 1.

        The padding's own inputs are zero, so what the entries hold there costs nothing. Of dead inputs it would be
        stored as noise: they count a little, as does every input through the damping.
        """
        dead = dead_columns(moment)
        weight = weight.masked_fill(dead, 0.0)
        diagonal = torch.diagonal(moment)
        mean = diagonal.sum() / (~dead).sum().clamp_min(1)
        moment = moment / torch.where(mean > 0, mean, 1.0)
        torch.diagonal(moment).add_(torch.where(dead, 1.0, self.options.damping))
        missing = -weight.shape[1] % self.options.group_size
        return functional.pad(weight, (0, missing)), functional.pad(moment, (0, missing, 0, missing))

    def _groups(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out * groups, g), the last group of a row padded with zeros."""
        g = self.options.group_size
        return functional.pad(weight, (0, -weight.shape[1] % g)).reshape(-1, g)

    def _start(self, groups: Tensor, what: str, generator: torch.Generator) -> Tensor:
        """(M, K, g) float32: k-means on the groups (n, g), then on what it leaves of them, and so on."""
        options = self.options
        groups = sample_rows(groups, options.train_vectors, generator)
        if groups.shape[0] < options.entries:
            raise TrialFailed(
                f"{what}: {options.entries} entries for {groups.shape[0]} groups: take fewer code_bits, "
                'smaller groups, or scope = "model"'
            )
        books = []
        for _ in range(options.codebooks):
            centres, codes = kmeans(groups, options.entries, options.iterations, generator)
            groups = groups - centres[codes]
            books.append(centres)
        return torch.stack(books)

    def _coded(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> Code:
        """The start: for each group the nearest entry of each codebook to what the ones before left."""
        scale = row_scale(weight[:, : layer.shape.in_features])
        left = self._groups(divide_rows(weight, scale))
        books = (
            self._start(left, layer.name, generator)
            if shared is None
            else self.codebooks(PackedLayer({}, {}), layer.shape, shared).to(weight.device)
        )
        codes = []
        for book in books:
            code = nearest(left, book)
            left = left - book[code]
            codes.append(code.view(weight.shape[0], -1))
        return Code(scale.float(), books, torch.stack(codes, 2))

    def _improve(
        self, weight: Tensor, moment: Tensor, code: Code, train: bool, generator: torch.Generator
    ) -> list[float]:
        """Rounds of training and search; the loss at the start and after each half of a round."""
        options = self.options
        losses = [loss_of(weight, code.restore(), moment)]
        for _ in range(options.rounds):
            before = losses[-1]
            if not train:
                code.scale = best_scale(weight, decode(code.codebooks, code.codes), moment)
            elif options.solver == "adam":
                adam(weight, moment, code, options.steps or STEPS["adam"], options.lr)
            else:
                descend(weight, moment, code, options.steps or STEPS["conjugate"])
            losses.append(loss_of(weight, code.restore(), moment))
            target = divide_rows(weight, code.scale)
            code.codes = search(target, moment, code.codebooks, code.codes, options.beam, generator)
            losses.append(loss_of(weight, code.restore(), moment))
            if losses[-1] >= before * (1 - options.relative_gain):
                break
        return losses


def _stored_scale(weight: Tensor, code: Code, moment: Tensor) -> Tensor:
    return best_scale(weight, decode(code.codebooks, code.codes), moment).clamp(0, LARGEST).half()
