"""PocketLLM (arXiv:2511.17637): indices of sub-vectors, a codebook in latent space, a small network that decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Refusal, Role, Shared, Survey
from evenbits.errors import TrialFailed
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import require_finite
from evenbits.maths.nearest import nearest
from evenbits.maths.trellis import states
from evenbits.models import torch_dtype
from evenbits_pocketllm import scales
from evenbits_pocketllm.alternating import Searcher, fit_alternating
from evenbits_pocketllm.autoencoder import Trained, fine_tune_decoder, train
from evenbits_pocketllm.codebooks import (
    Coder,
    read_codebook,
    store_codebook,
    store_decoder,
    tunable_names,
)
from evenbits_pocketllm.cost import (
    Group,
    codebook_group,
    codebook_groups,
    decoder_group,
    decoder_groups,
    geometry,
    norm_width,
)
from evenbits_pocketllm.decoding import codewords, decoder_network, decoder_table
from evenbits_pocketllm.feedback import feed_back, least_squares_scale
from evenbits_pocketllm.layout import cut, join, order, restore_order
from evenbits_pocketllm.linear import PocketLinear
from evenbits_pocketllm.network import decode, encode
from evenbits_pocketllm.options import PocketOptions

_PIECE = 256  # sub-vectors of a line that a search for a shared decoder takes together


class PocketCompressor(LayerCompressor):
    """Stores per layer "codes" (packed, line by line) and row scales; "codebook" and "decoder" per layer, or shared:
    there the names end in ".model", ".kind" and the like. The encoder is dropped once the indices are known."""

    def __init__(self, options: PocketOptions) -> None:
        self.options = options
        self._encoders: dict[str, Tensor] = {}  # of shared codebooks, only while the model is compressed

    # -- what layers share ------------------------------------------------------------------------------------

    def prepare(self, survey: Survey, generator: torch.Generator) -> Shared | None:
        """Codebooks and decoders that layers share, trained on random lines of all of them.

        Raises TrialFailed where a codebook has more codewords than sub-vectors.
        """
        options = self.options
        by_codebook = options.codebook == "learned"
        if (options.scope if by_codebook else options.decoder_scope) == "matrix":
            return None
        shared = PackedLayer({}, {})
        groups = codebook_groups(options, survey.shapes) if by_codebook else decoder_groups(options, survey.shapes)
        for group in groups:
            self._prepare_group(group, survey, shared, generator)
        return shared if shared.tensors else None

    def _prepare_group(self, group: Group, survey: Survey, shared: Shared, generator: torch.Generator) -> None:
        settings, suffix = group.settings, f".{group.name}"
        if settings.codebook == "learned" and group.vectors < 1 << settings.window_bits:
            raise TrialFailed(
                f"codebook {group.name!r}: {1 << settings.window_bits} codewords for {group.vectors} sub-vectors; "
                "take fewer or share them"
            )
        members = {layer.name for layer in group.layers}
        share = min(1.0, settings.train_vectors / group.vectors)
        samples = []
        for layer, weight in survey:
            if layer.name in members:
                require_finite(weight, "weights", layer.name)
                lines = self._lines(weight.float(), settings, self._row_scale(weight, settings))
                samples.append(_some(lines, share, generator))
        if settings.training == "alternating":
            length = min(_PIECE, *(lines.shape[1] for lines in samples))
            pieces = torch.cat([_pieces(lines, length) for lines in samples])
            fitted = fit_alternating(pieces, settings, generator)
            coder = Coder(fitted.codebook, fitted.decoder)
        else:
            with torch.enable_grad():
                trained = train([order(lines, settings.rln) for lines in samples], settings, generator)
            self._encoders[group.name] = trained.encoder
            coder = Coder(trained.codebook, trained.decoder if settings.decoder == "mlp" else None)
        if coder.codebook is not None:
            store_codebook(shared, coder.codebook, settings.codebook_bits, suffix)
        # a decoder for each matrix starts from this one, which is then not stored
        if coder.decoder is not None:
            if settings.decoder_scope == "matrix":
                self._encoders[f"{group.name}/decoder"] = coder.decoder
            else:
                store_decoder(shared, coder.decoder, settings.decoder_bits, suffix)

    # -- one layer --------------------------------------------------------------------------------------------

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        """Raises TrialFailed, naming the layer, for values that are not finite, more codewords than sub-vectors, or
        feedback without a second moment."""
        settings = self.options.of(layer.shape)
        if settings is None:
            return PackedLayer({"weight": weight.to(torch_dtype(layer.shape.dtype))}, {"weight": Role.DENSE})
        require_finite(weight, "weights", layer.name)
        weight = weight.float()
        scale = self._row_scale(weight, settings)
        lines = self._lines(weight, settings, scale)
        packed = PackedLayer({}, {})
        trained = self._own(lines, settings, layer.shape, packed, generator)
        coder = self._coder(settings, packed, layer.shape, shared)
        if settings.search == "weights":
            codes = self._search(weight, lines, layer, settings, coder, scale)
        else:
            codes = self._encode(lines, settings, layer.shape, trained, shared, coder)
            if shared is not None and settings.decoder_scope == "matrix" and settings.decoder == "mlp":
                self._refit(lines, codes, settings, layer.shape, coder, packed, generator)
                coder = self._coder(settings, packed, layer.shape, shared)
        packed.tensors["codes"], packed.roles["codes"] = pack(codes, settings.index_bits), Role.CODE
        if scale is not None:
            if settings.refit_scales:
                pattern = self._decoded(codes, settings, layer.shape, coder)
                moment = layer.second_moment if settings.feedback else None
                found = least_squares_scale(weight, pattern, moment)
                tensors, roles = scales.store(found, settings.scale_bits, scale.stored.get("scale_frame"))
            else:
                tensors, roles = scale.stored, scale.roles
            packed.tensors.update(tensors)
            packed.roles.update(roles)
        return packed

    def _own(
        self, lines: Tensor, settings: PocketOptions, layer: LayerShape, packed: PackedLayer, generator: torch.Generator
    ) -> Trained | None:
        """Train and store what belongs to this matrix alone."""
        learned = settings.codebook == "learned"
        if (settings.scope if learned else settings.decoder_scope) != "matrix":
            return None
        count = lines.shape[0] * lines.shape[1]
        if learned and count < 1 << settings.window_bits:
            raise TrialFailed(
                f"{layer.name}: {1 << settings.window_bits} codewords for {count} sub-vectors; take fewer or share them"
            )
        trained = None
        if settings.training == "alternating":
            some = _some(lines, min(1.0, settings.train_vectors / count), generator)
            fitted = fit_alternating(_pieces(some, min(_PIECE, lines.shape[1])), settings, generator)
            coder = Coder(fitted.codebook, fitted.decoder)
        else:
            with torch.enable_grad():
                trained = train(order(lines, settings.rln), settings, generator)
            coder = Coder(trained.codebook, trained.decoder if settings.decoder == "mlp" else None)
        if coder.codebook is not None:
            store_codebook(packed, coder.codebook, settings.codebook_bits)
        if coder.decoder is not None:
            store_decoder(packed, coder.decoder, settings.decoder_bits)
        return trained

    def _search(
        self, weight: Tensor, lines: Tensor, layer: Layer, settings: PocketOptions, coder: Coder, scale: _Scale | None
    ) -> Tensor:
        """Indices (lines, chunks) of the nearest decoded sub-vectors, with feedback or without."""
        searcher = Searcher(self._table(settings, coder, weight.device), settings)
        rows = torch.ones(weight.shape[0], device=weight.device) if scale is None else scale.value
        if not settings.feedback:
            # along the inputs a line has one scale, which weighs nothing
            weights = None
            if settings.axis == "out" and scale is not None:
                weights = cut(rows.square()[:, None], "out", settings.d)
            return searcher(lines, weights)[0]
        if layer.second_moment is None:
            raise TrialFailed(f"{layer.name}: feedback needs the second moment of the layer's inputs")
        return feed_back(
            weight, rows, layer.second_moment, searcher, settings.d,
            damping=settings.damping, act_order=settings.act_order, name=layer.name,
        )  # fmt: skip

    def _encode(
        self,
        lines: Tensor,
        settings: PocketOptions,
        layer: LayerShape,
        trained: Trained | None,
        shared: Shared | None,
        coder: Coder,
    ) -> Tensor:
        """Indices (lines, chunks) of the codewords nearest to the latents, the codebook as it is stored."""
        assert coder.codebook is not None
        encoder = trained.encoder if trained else self._encoders[codebook_group(self.options, layer)]
        groups = order(lines, settings.rln)
        latents = groups
        if settings.decoder == "mlp":
            latents = encode(groups, encoder, decoder_network(settings, norm_width(settings, layer)))
        codes = nearest(latents.flatten(0, 1), coder.codebook).reshape(groups.shape[:2])
        return restore_order(codes, settings.rln, *lines.shape[:2])

    def _refit(
        self, lines: Tensor, codes: Tensor, settings: PocketOptions, layer: LayerShape, coder: Coder,
        packed: PackedLayer, generator: torch.Generator,
    ) -> None:  # fmt: skip
        assert coder.codebook is not None
        start = self._encoders[f"{codebook_group(self.options, layer)}/decoder"]
        groups, by_group = order(lines, settings.rln), order(codes, settings.rln)
        with torch.enable_grad():
            decoder = fine_tune_decoder(groups, by_group, coder.codebook, start, settings, generator)
        store_decoder(packed, decoder, settings.decoder_bits)

    # -- decoding ---------------------------------------------------------------------------------------------

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        settings = self.options.of(layer)
        assert settings is not None  # the harness restores layers left dense
        shape = geometry(settings, layer)
        codes = unpack(packed.tensors["codes"], settings.index_bits, shape.vectors).reshape(shape.lines, shape.chunks)
        weight = self._decoded(codes, settings, layer, self._coder(settings, packed, layer, shared))
        if not settings.row_scales:
            return weight
        return weight * scales.read(packed.tensors, settings.scale_bits, layer.out_features)[:, None]

    def linear(
        self,
        packed: PackedLayer,
        layer: LayerShape,
        shared: Shared | None,
        device: torch.device,
        *,
        folded: bool = False,
    ) -> nn.Module | Refusal:
        """A layer that decodes a tile of its weight at a time, exactly; without the bias, which its user adds.

        folded: by one table in place of groups' statistics, fitted here; an approximation, and nothing that is stored
        depends on it. `choice` of the layer says how good it is.
        """
        settings = self.options.of(layer)
        if settings is None:
            return Refusal("left dense: there is nothing to decode")
        coder = self._coder(settings, packed, layer, shared)
        return PocketLinear(packed, layer, settings, coder, device, folded="fit" if folded else None)

    def approximate_linear(
        self, packed: PackedLayer, layer: LayerShape, shared: Shared | None, device: torch.device
    ) -> nn.Module | Refusal:
        """Folded; where a table is exact anyway, as `linear`."""
        return self.linear(packed, layer, shared, device, folded=True)

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        """Row scales (of few bits: the frame of their grid), codebook and decoder, and all that is shared of these."""
        names = tunable_names(self.options)
        found = {name: packed.tensors[name] for name in names if name in packed.tensors}
        for name, tensor in (shared.tensors if shared is not None else {}).items():
            if name.partition(".")[0] in names:
                found[f"shared/{name}"] = tensor
        return found

    def _coder(self, settings: PocketOptions, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Coder:
        """Codebook and decoder of this layer, from what is stored."""
        codebook = decoder = None
        if settings.codebook == "learned":
            tensors, suffix = packed.tensors, ""
            if settings.scope != "matrix":
                assert shared is not None
                tensors, suffix = shared.tensors, f".{codebook_group(self.options, layer)}"
            codebook = read_codebook(tensors, settings.codebook_bits, suffix)
        if settings.decoder == "mlp":
            if settings.decoder_scope == "matrix":
                stored = packed.tensors.get("decoder")
            else:
                assert shared is not None
                stored = shared.tensors[f"decoder.{decoder_group(self.options, layer)}"]
            decoder = None if stored is None else stored.float()
        return Coder(codebook, decoder)

    def _table(self, settings: PocketOptions, coder: Coder, device: torch.device) -> Tensor:
        return decoder_table(settings, codewords(settings, coder.codebook, device), coder.decoder)

    def _decoded(self, codes: Tensor, settings: PocketOptions, layer: LayerShape, coder: Coder) -> Tensor:
        """(out, in) float32 from indices (lines, chunks), before row scales."""
        if settings.rln == "none":
            table = self._table(settings, coder, codes.device)
            state = states(codes, settings.index_bits, settings.window_bits) if settings.windowed else codes
            vectors = table[state]
        else:
            assert coder.codebook is not None
            groups = order(coder.codebook[codes], settings.rln)
            assert coder.decoder is not None
            network = decoder_network(settings, norm_width(settings, layer))
            vectors = restore_order(decode(groups, coder.decoder, network), settings.rln, *codes.shape)
        return join(vectors, settings.axis, layer.out_features, layer.in_features)

    def _row_scale(self, weight: Tensor, settings: PocketOptions) -> _Scale | None:
        if not settings.row_scales:
            return None
        tensors, roles = scales.store(scales.row_scale(weight), settings.scale_bits)
        return _Scale(scales.read(tensors, settings.scale_bits, weight.shape[0]), tensors, roles)

    def _lines(self, weight: Tensor, settings: PocketOptions, scale: _Scale | None) -> Tensor:
        """(lines, chunks, d): rows over their stored scales, cut."""
        if scale is not None:
            wide = scale.value[:, None]
            weight = torch.where(wide > 0, weight / wide, 0.0)
        return cut(weight, settings.axis, settings.d)


@dataclass(frozen=True)
class _Scale:
    """Row scales as stored, and their values (out,) float32."""

    value: Tensor
    stored: dict[str, Tensor]
    roles: dict[str, Role]


def _some(lines: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random share of the lines, at least one."""
    count = lines.shape[0]
    kept = max(1, round(share * count))
    return lines if kept == count else lines[torch.randperm(count, generator=generator)[:kept].to(lines.device)]


def _pieces(lines: Tensor, length: int) -> Tensor:
    """(n, chunks, d) -> (m, length, d): what is left at the end of a line is dropped."""
    parts = lines.shape[1] // length
    return lines[:, : parts * length].reshape(-1, length, lines.shape[2])
