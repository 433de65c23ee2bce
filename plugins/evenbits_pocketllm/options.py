"""Options of PocketLLM (arXiv:2511.17637), its three recipes, and which settings a layer gets; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from evenbits.compressor import LayerShape, Needs, Options
from evenbits_pocketllm.recipes import RECIPES

Recipe = Literal["evenbits", "paper", "code"]
Scope = Literal["matrix", "kind", "model"]
Norm = Literal["row", "code", "layernorm", "none"]


class Part(Options):
    """Other settings for some of the layers; the first part that matches a layer counts."""

    kinds: tuple[str, ...] = Field(default=("*",), description='kinds of layers, patterns such as "self_attn.*"')
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="decoder blocks, from 0; null: all"
    )
    d: int | None = Field(default=None, ge=1, le=64, description="weights per sub-vector; null as elsewhere")
    codebook_size: int | None = Field(default=None, ge=2, le=1 << 16, description="codewords; null as elsewhere")
    skip: bool = Field(default=False, description="leave these layers dense, and bill them so")

    def matches(self, layer: LayerShape) -> bool:
        if self.blocks is not None and layer.block not in self.blocks:
            return False
        return any(fnmatchcase(layer.kind, pattern) for pattern in self.kinds)


class PocketOptions(Options):
    """Sub-vectors of d weights, an index each, and a small decoder network from codewords to weights."""

    recipe: Recipe = Field(default="evenbits", description="whose defaults: ours, the paper's or the released code's")

    # what is stored
    axis: Literal["in", "out"] = Field(
        default="in", description="a sub-vector's weights are neighbours along the inputs (a row) or the outputs"
    )
    d: int = Field(default=4, ge=1, le=64, description="weights per sub-vector")
    codebook_size: int = Field(default=256, ge=2, le=1 << 16, description="K, a power of two: log2 K bits an index")
    state_bits: int | None = Field(
        default=None, ge=1, le=16,
        description="the decoder reads the last so many bits of the line's indices, around its end, and there are as "
        "many codewords as these have values; null: the bits of the index itself",
    )  # fmt: skip
    codebook: Literal["learned", "computed"] = Field(
        default="learned", description="codewords are stored, or computed from their index by a fixed hash at no bits"
    )
    latent: int | None = Field(default=None, ge=1, le=64, description="numbers per codeword; null: d")
    symbols: int = Field(
        default=0, ge=0, le=8, description="so many latest indices of the window also have learned latents of their own"
    )
    symbol_latent: int = Field(default=2, ge=1, le=16, description="numbers per learned latent of an index")
    decoder: Literal["mlp", "none"] = Field(default="mlp", description="none: codewords are the sub-vectors")
    hidden: int = Field(default=16, ge=1, le=256, description="width inside an MLP unit")
    units: int = Field(default=3, ge=1, le=8, description="MLP units of the encoder, and of the decoder")
    rln: Norm = Field(
        default="none",
        description="what is normalised together: a line of the matrix, the released code's groups, one sub-vector",
    )
    affine: bool = Field(default=False, description="gain and bias of each normalisation, stored and billed")
    decoder_bits: Literal[16, 32] = Field(default=32, description="bits per number of a decoder")
    codebook_bits: Literal[8, 16] = Field(default=16, description="float16, or int8 with one float16 scale")
    scope: Scope = Field(default="matrix", description="one codebook per matrix, per kind of layer, or for the model")
    decoder_scope: Scope = Field(default="matrix", description="one decoder per matrix, per kind, or for the model")
    row_scales: bool = Field(default=False, description="divide output rows by their root mean square")
    scale_bits: Literal[4, 5, 6, 8, 16] = Field(
        default=16, description="float16 row scales, or logarithmic ones of fewer bits below one float16 a matrix"
    )
    parts: tuple[Part, ...] = Field(default=(), description="other d, K, or dense, for some kinds and blocks")

    # how it is found
    training: Literal["autoencoder", "alternating"] = Field(
        default="autoencoder",
        description="encoder, codebook and decoder by gradient, or search of indices and fit of the decoder in turn",
    )
    loss: Literal["rmse", "mse"] = Field(default="rmse", description="reconstruction term")
    vq_weight: float = Field(default=0.5, ge=0, description="lambda, of the codebook's term")
    init: Literal["normal", "uniform", "kmeans"] = Field(
        default="normal",
        description="codebook: normal of deviation 2/sqrt(d), uniform in [0, 1), k-means of the first latents",
    )
    learning_rate: float = Field(default=1.6e-2, gt=0, description="of Adam")
    schedule: Literal["step", "cosine", "constant"] = Field(default="step", description="step: a tenth each 15 epochs")
    epochs: int = Field(default=50, ge=0, description="passes over the data; alternating: rounds of search and fit")
    batch: int = Field(default=16384, ge=1, description="sub-vectors a step, rounded to whole normalisation groups")
    shuffle: bool = Field(default=False, description="other groups together in each epoch")
    revive: bool = Field(default=False, description="move codewords that an epoch left unused to the worst latents")
    closing_kmeans: int = Field(default=0, ge=0, description="Lloyd steps on the final latents")
    train_vectors: int = Field(default=1 << 20, ge=1, description="at most so many sub-vectors train a shared decoder")
    search: Literal["encoder", "weights"] = Field(
        default="encoder", description="index of the nearest latent, or of the nearest decoded sub-vector (rln none)"
    )
    feedback: bool = Field(
        default=False, description="columns in turn, each one's error made up for by the later ones, as in GPTQ"
    )
    damping: float = Field(default=0.01, ge=0, description="share of the mean diagonal added to the second moment")
    act_order: bool = Field(default=True, description="feedback: columns with the largest inputs first")
    refit_scales: bool = Field(default=False, description="row scales again by least squares, once indices are known")

    @model_validator(mode="before")
    @classmethod
    def _of_recipe(cls, data: Any) -> Any:
        """The recipe's values under those given."""
        if not isinstance(data, Mapping):
            return data
        return {**RECIPES.get(str(data.get("recipe", "evenbits")), {}), **data}

    @model_validator(mode="after")
    def _sound(self) -> PocketOptions:
        for size in (self.codebook_size, *(part.codebook_size for part in self.parts if part.codebook_size)):
            if size & (size - 1):
                raise ValueError(f"codebook_size: a power of two is needed, not {size}")
        if self.rln != "none" and (self.windowed or self.codebook == "computed"):
            raise ValueError("rln: a decoder of computed codewords, or of a window, has no normalisation; give none")
        lengths = {self.d, *(part.d for part in self.parts if part.d)}
        if self.decoder == "none" and (
            self.rln != "none" or {self.latent or d for d in lengths} != lengths or self.symbols
        ):
            raise ValueError(
                "decoder = none: codewords are sub-vectors, of latent = d numbers, without rln and symbols"
            )
        if self.rln != "none" and self.search == "weights":
            raise ValueError("search = weights needs rln = none: only then is a decoded sub-vector known by its index")
        if self.training == "alternating" and self.search != "weights":
            raise ValueError("training = alternating searches among decoded sub-vectors; give search = weights")
        if self.init == "kmeans" and self.training == "alternating" and {self.latent or d for d in lengths} != lengths:
            raise ValueError("init = kmeans with training = alternating starts from sub-vectors: latent = d is needed")
        if self.windowed and self.training != "alternating":
            raise ValueError("state_bits beyond the index: training = alternating is needed")
        if self.symbols and self.training != "alternating":
            raise ValueError("symbols: learned latents of indices have no encoder; give training = alternating")
        if self.windowed and max(self._widths()) > 8:
            raise ValueError(f"codebook_size: an index in a window has at most 8 bits, not {max(self._widths())}")
        if self.codebook == "computed" and self.training != "alternating":
            raise ValueError("codebook = computed has no encoder; give training = alternating")
        apart = self.decoder == "mlp" and self.codebook == "learned" and self.scope != self.decoder_scope
        if apart and (self.search == "weights" or self.decoder_scope != "matrix"):
            raise ValueError("decoder_scope: that of the codebook; with search = encoder, matrix is possible too")
        if self.feedback and (self.axis != "out" or self.search != "weights"):
            raise ValueError('feedback goes column by column: axis = "out" and search = "weights" are needed')
        if self.state_bits is not None and any(self.state_bits < bits for bits in self._widths()):
            raise ValueError(f"state_bits = {self.state_bits} is less than an index has")
        if self.affine and self.rln == "none":
            raise ValueError("affine without rln: there is nothing to normalise")
        if not self.row_scales and (self.scale_bits != 16 or self.refit_scales):
            raise ValueError("scale_bits and refit_scales need row_scales")
        return self

    def shown(self) -> tuple[str, ...]:
        """The recipe, d and K, and what differs from the recipe."""
        plain = type(self)(recipe=self.recipe)
        changed = (name for name in type(self).model_fields if getattr(self, name) != getattr(plain, name))
        return tuple(dict.fromkeys(("recipe", "d", "codebook_size", *changed)))

    def _widths(self) -> list[int]:
        sizes = [self.codebook_size, *(part.codebook_size for part in self.parts if part.codebook_size)]
        return [size.bit_length() - 1 for size in sizes]

    @property
    def index_bits(self) -> int:
        return self.codebook_size.bit_length() - 1

    @property
    def window_bits(self) -> int:
        """Bits that the decoder reads: those of the index alone, or of a window of indices."""
        return self.state_bits or self.index_bits

    @property
    def windowed(self) -> bool:
        return self.state_bits is not None and any(self.state_bits > bits for bits in self._widths())

    def of(self, layer: LayerShape) -> PocketOptions | None:
        """The settings of one layer; None where it is left dense."""
        for part in self.parts:
            if part.matches(layer):
                if part.skip:
                    return None
                changed = {"d": part.d, "codebook_size": part.codebook_size}
                return self.model_copy(update={k: v for k, v in changed.items() if v is not None} | {"parts": ()})
        return self.model_copy(update={"parts": ()}) if self.parts else self


def needs(options: PocketOptions) -> Needs:
    if not options.feedback:
        return Needs()
    return Needs("second_moment", sequential=True, within_block=True)
