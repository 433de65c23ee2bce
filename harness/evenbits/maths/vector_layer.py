"""How sub-vectors of a matrix become codes of a codebook, and come back: what k-means and LLM-Codebook share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Refusal, Role, Shared, Survey
from evenbits.errors import TrialFailed
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import require_finite
from evenbits.maths.kmeans import kmeans
from evenbits.maths.nearest import nearest
from evenbits.maths.stored import (
    divide_rows,
    least_squares_scale,
    load_codebook,
    row_scale,
    sample_rows,
    store_codebook,
    tunable_parts,
)
from evenbits.maths.weighted_kmeans import nearest_weighted, weighted_kmeans
from evenbits.vectors import VectorOptions, chunks, codebook_of, vectors_by_codebook


class VectorLayerCompressor(LayerCompressor):
    """Stores "codes" (packed, row by row) and "row_scale" (out,) float16 per layer; "codebook" (K, d) float16, or
    int8 with "codebook_scale" (1,) float16, per layer or shared: there the names end in ".kind" or ".model".

    All weights count alike, unless `importance` says otherwise.
    """

    def __init__(self, options: VectorOptions) -> None:
        self.options = options

    def importance(self, weight: Tensor, layer: Layer) -> Tensor | None:
        """What the squared error of each weight (out, in) counts: (out, in) float32, not negative; None: all alike."""
        return None

    def told(self, layer: LayerShape, survey: Survey) -> Layer:
        """The layer with what `importance` needs, for the codebooks that layers share."""
        return Layer(layer)

    def coded(self, layer: LayerShape) -> bool:
        """Whether codebooks stand for this layer."""
        return True

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        """The shared codebooks, each trained on random sub-vectors of all its layers, in proportion to their number.

        Raises TrialFailed when a codebook has more codewords than sub-vectors.
        """
        options = self.options
        if options.scope == "matrix":
            return None
        totals = vectors_by_codebook(options, [layer for layer in survey.shapes.layers if self.coded(layer)])
        samples: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in totals}
        for layer, raw in survey:
            if not self.coded(layer):
                continue
            require_finite(raw, "weights", layer.name)
            weight = raw.float()
            name = codebook_of(layer, options.scope)
            scale = self._row_scale(weight)
            vectors, weights = self._vectors(weight, scale), self._weights(weight, self.told(layer, survey), scale)
            share = min(1.0, options.train_vectors / totals[name])
            samples[name].append(_sample(vectors, weights, math.ceil(share * vectors.shape[0]), generator))
        shared = PackedLayer({}, {})
        for name, parts in samples.items():
            together = [weights for _, weights in parts if weights is not None]
            drawn = torch.cat([vectors for vectors, _ in parts]), torch.cat(together) if together else None
            sample = _sample(*drawn, options.train_vectors, generator)  # shares were rounded up
            tensors, roles = self._codebook(*sample, f"codebook {name!r}", generator, f".{name}")
            shared.tensors.update(tensors)
            shared.roles.update(roles)
        return shared if samples else None

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, for weights not finite, or fewer sub-vectors than codewords."""
        require_finite(weight, "weights", layer.name)
        weight = weight.float()
        scale = self._row_scale(weight)
        vectors, weights = self._vectors(weight, scale), self._weights(weight, layer, scale)
        packed = PackedLayer({}, {})
        if shared is None:
            sample = _sample(vectors, weights, self.options.train_vectors, generator)
            packed = PackedLayer(*self._codebook(*sample, layer.name, generator))
        # codes are chosen against the codebook and scales as they are stored, so that rounding those costs nothing more
        codebook = self._decode_codebook(packed, layer.shape, shared).to(weight.device)
        codes = nearest(vectors, codebook) if weights is None else nearest_weighted(vectors, weights, codebook)
        packed.tensors["codes"], packed.roles["codes"] = pack(codes, self.options.index_bits), Role.CODE
        if scale is not None:
            pattern = self._rows(codebook[codes], layer.shape)
            if weights is not None:
                # rows times the roots of their weights: plain least squares on these is the weighted one
                root = self._rows(weights, layer.shape).sqrt()
                weight, pattern = weight * root, pattern * root
            packed.tensors["row_scale"] = least_squares_scale(weight, pattern)
            packed.roles["row_scale"] = Role.SCALE
        return packed

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        count = layer.out_features * chunks(layer.in_features, self.options.d)
        codes = unpack(packed.tensors["codes"], self.options.index_bits, count)
        weight = self._rows(self._decode_codebook(packed, layer, shared)[codes], layer)
        return weight * packed.tensors["row_scale"].float()[:, None] if self.options.row_scales else weight

    def linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """A layer that gathers codewords by the stored indices; without the bias, which its user adds."""
        if not self.coded(layer):
            return Refusal("left dense: there is nothing to decode")
        from evenbits.kernels.codebook import CodebookLinear
        from evenbits.kernels.codebook_held import share
        from evenbits.kernels.weights import CodebookWeight, Stream

        tensors, suffix = self._stored_codebook(packed, layer, shared)
        codebook = tensors[f"codebook{suffix}"].to(device)
        scale = packed.tensors["row_scale"].to(device).float() if self.options.row_scales else None
        if self.options.codebook_bits == 8:  # whole numbers in float16, exactly; their step joins the row scales
            codebook, step = share(codebook.half()), tensors[f"codebook_scale{suffix}"].to(device).float()
            scale = step.expand(layer.out_features) if scale is None else scale * step
        stream = Stream(packed.tensors["codes"].to(device), codebook[None], self.options.index_bits)
        return CodebookLinear(
            CodebookWeight((stream,), layer.out_features, layer.in_features, self.options.d, row_scale=scale)
        )

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        """Row scales, and the codebooks (of int8 ones, their scale)."""
        return tunable_parts(packed, shared, self.options.codebook_bits)

    def _row_scale(self, weight: Tensor) -> Tensor | None:
        return row_scale(weight) if self.options.row_scales else None

    def _vectors(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """(out, in) -> (out * chunks, d): rows over their scales, padded with zeros, cut."""
        return self._cut(weight if scale is None else divide_rows(weight, scale))

    def _weights(self, weight: Tensor, layer: Layer, scale: Tensor | None) -> Tensor | None:
        """(out * chunks, d): what the squared error of each number of a sub-vector counts; nothing in the padding.

        An error of a row over its scale s is s times as large in the weights, so it counts s^2 times.
        """
        importance = self.importance(weight, layer)
        if importance is None:
            return None
        return self._cut(importance if scale is None else importance * scale.float().square()[:, None])

    def _cut(self, matrix: Tensor) -> Tensor:
        columns = chunks(matrix.shape[1], self.options.d) * self.options.d
        return functional.pad(matrix, (0, columns - matrix.shape[1])).reshape(-1, self.options.d)

    def _rows(self, vectors: Tensor, layer: LayerShape) -> Tensor:
        """(out * chunks, d) -> (out, in): the padding is cut off."""
        return vectors.reshape(layer.out_features, -1)[:, : layer.in_features]

    def _codebook(
        self, vectors: Tensor, weights: Tensor | None, what: str, generator: torch.Generator, suffix: str = ""
    ) -> tuple[dict[str, Tensor], dict[str, Role]]:
        """Train a codebook on `vectors` (n, d) and round it to its stored form."""
        size, iterations = self.options.codebook_size, self.options.iterations
        if vectors.shape[0] < size:
            raise TrialFailed(f"{what}: {size} codewords for {vectors.shape[0]} sub-vectors; take fewer or share them")
        if weights is None:
            centres, _ = kmeans(vectors, size, iterations, generator)
        else:
            centres, _ = weighted_kmeans(vectors, weights, size, iterations, generator)
        return store_codebook(centres, self.options.codebook_bits, suffix=suffix)

    def _decode_codebook(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        """(K, d) float32."""
        tensors, suffix = self._stored_codebook(packed, layer, shared)
        return load_codebook(tensors, self.options.codebook_bits, suffix=suffix)

    def _stored_codebook(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None
    ) -> tuple[dict[str, Tensor], str]:
        """The tensors that hold it, and what their names end in."""
        if shared is None:
            return packed.tensors, ""
        return shared.tensors, f".{codebook_of(layer, self.options.scope)}"


def _sample(
    vectors: Tensor, weights: Tensor | None, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """At most `count` random sub-vectors with their weights; the same ones with and without weights."""
    if weights is None:
        return sample_rows(vectors, count, generator), None
    if count >= vectors.shape[0]:
        return vectors, weights
    kept = sample_rows(torch.arange(vectors.shape[0], device=vectors.device)[:, None], count, generator)[:, 0]
    return vectors[kept], weights[kept]
