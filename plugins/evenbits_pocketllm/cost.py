"""What PocketLLM stores (arXiv:2511.17637), to the byte, from shapes alone; no torch.

Layers with the same codebook, or the same decoder, form a group: the model, a kind of layer, or one layer. Layers to
which `parts` give another d or K than the rest have groups of their own, since neither can then be shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenbits.errors import SuiteError

# what brings in pydantic comes in where it is used: kernels need the geometry on machines without it
if TYPE_CHECKING:
    from evenbits.compressor import Estimate, LayerShape, ModelShapes
    from evenbits_pocketllm.options import PocketOptions, Scope
    from evenbits_pocketllm.settings import Settings

SCALE_BITS = 16  # of one float16: what an int8 codebook is relative to, and, by two, scales of fewer bits


@dataclass(frozen=True, slots=True)
class Geometry:
    """A matrix as lines cut into chunks of d weights; the last chunk of a line is padded with zeros."""

    lines: int
    length: int
    chunks: int

    @property
    def vectors(self) -> int:
        return self.lines * self.chunks


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a codebook or a decoder, with the settings that all of them have."""

    name: str
    settings: PocketOptions
    layers: tuple[LayerShape, ...]

    @property
    def vectors(self) -> int:
        """Sub-vectors of all its layers."""
        return sum(geometry(self.settings, layer).vectors for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Census:
    """A model's layers by what decides their bytes: one of each sort, and how many there are."""

    sorts: tuple[tuple[LayerShape, int], ...]
    weights: int


def geometry(settings: Settings, layer: LayerShape) -> Geometry:
    """axis "in": a line is a row, of length in_features; "out": a column, of length out_features."""
    lines, length = layer.out_features, layer.in_features
    if settings.axis == "out":
        lines, length = length, lines
    return Geometry(lines, length, -(-length // settings.d))


def code_bytes(settings: PocketOptions, layer: LayerShape) -> int:
    from evenbits.budget import whole_bytes

    return whole_bytes(geometry(settings, layer).vectors * settings.index_bits)


def dense_bytes(layer: LayerShape) -> int:
    """Bytes of a layer that a part skips: its weight as the checkpoint stores it, which loses nothing."""
    from evenbits.shapes import WIDTHS

    return layer.weights * WIDTHS[layer.dtype]


def latent_numbers(settings: Settings) -> int:
    return settings.latent or settings.d


def input_numbers(settings: Settings) -> int:
    """What a decoder sees of a sub-vector: the codeword, and the learned latents of the latest indices."""
    return latent_numbers(settings) + settings.symbols * settings.symbol_latent


def mlp_numbers(settings: PocketOptions) -> tuple[int, int]:
    """(weights, biases) of a decoder's MLP units: inputs -> hidden -> inputs in all but the last, which goes to d."""
    n, d, hidden, residual = input_numbers(settings), settings.d, settings.hidden, settings.units - 1
    return residual * 2 * n * hidden + n * hidden + hidden * d, residual * (hidden + n) + hidden + d


def norm_width(settings: Settings, layer: LayerShape) -> int:
    """Numbers that one normalisation takes together: those of a line, or of a sub-vector with rln = layernorm."""
    inputs = input_numbers(settings)
    return inputs if settings.rln == "layernorm" else geometry(settings, layer).chunks * inputs


def affine_numbers(settings: PocketOptions, layers: Iterable[LayerShape]) -> int:
    """Gains and biases of a decoder's normalisations: as many as units, none with a single unit.

    Raises SuiteError when layers of different width share the decoder.
    """
    if not settings.affine or settings.units == 1:
        return 0
    widths: dict[int, str] = {}
    for layer in layers:
        widths.setdefault(norm_width(settings, layer), layer.name)
    if len(widths) > 1:
        (one, first), (other, second) = sorted(widths.items())[:2]
        raise SuiteError(
            f"affine: {first} normalises {one} numbers together and {second} {other}, so they cannot share a decoder; "
            'give decoder_scope = "matrix", or affine = false'
        )
    return settings.units * 2 * next(iter(widths))


def decoder_numbers(settings: PocketOptions, layers: Iterable[LayerShape]) -> int:
    """All that one stored decoder holds: MLP units, gains and biases, and the learned latents of the K indices."""
    symbols = settings.codebook_size * settings.symbol_latent if settings.symbols else 0
    return sum(mlp_numbers(settings)) + affine_numbers(settings, layers) + symbols


def codebook_numbers(settings: PocketOptions) -> int:
    """2^window_bits codewords of a stored codebook."""
    return latent_numbers(settings) << settings.window_bits


def codebook_group(options: PocketOptions, layer: LayerShape) -> str:
    """Name of the group whose codebook this layer uses: "model", its kind, or its name; where parts give it another
    d or K than the rest has, ".d8k4096" follows. The layer must not be left dense."""
    return _group(options, options.scope, layer)


def decoder_group(options: PocketOptions, layer: LayerShape) -> str:
    """Name of the group whose decoder this layer uses, as in `codebook_group`."""
    return _group(options, options.decoder_scope, layer)


def codebook_groups(options: PocketOptions, shapes: ModelShapes) -> tuple[Group, ...]:
    """Who shares which codebook, in the order of the layers; those left dense are in none.

    Computed codebooks have groups too: nothing is stored for them.
    """
    return _groups(options, options.scope, shapes)


def decoder_groups(options: PocketOptions, shapes: ModelShapes) -> tuple[Group, ...]:
    """Who shares which decoder, in the order of the layers; nothing at all with decoder = none."""
    return _groups(options, options.decoder_scope, shapes) if options.decoder == "mlp" else ()


def take_census(options: PocketOptions, shapes: ModelShapes) -> Census:
    """The sorts of layers that `parts` and sizes tell apart; valid for any options with the same parts."""
    # one matrix alone, or what a stage leaves, is no model: what is meant for other kinds may well not be there
    for part in options.parts if len(shapes.layers) > 1 and not shapes.partial else ():
        if not any(part.matches(layer) for layer in shapes.layers):
            kinds = ", ".join(dict.fromkeys(layer.kind for layer in shapes.layers))
            raise SuiteError(
                f"pocketllm: parts: no layer matches kinds {list(part.kinds)}, blocks {part.blocks}; kinds are {kinds}"
            )
    count: dict[tuple[int, str, int, int, str], int] = {}
    first: dict[tuple[int, str, int, int, str], LayerShape] = {}
    for layer in shapes.layers:
        which = next((i for i, part in enumerate(options.parts) if part.matches(layer)), -1)
        sort = (which, layer.kind, layer.out_features, layer.in_features, layer.dtype)
        count[sort] = count.get(sort, 0) + 1
        first.setdefault(sort, layer)
    return Census(tuple((first[sort], count[sort]) for sort in first), shapes.weights)


def predict(options: PocketOptions, shapes: ModelShapes) -> Estimate:
    """Exact bytes. index_bits and paper_bits are averages over the compressed weights; linear bits count all.

    index_bits  what the packed indices take, their padding included
    paper_bits  the paper's formula, per matrix 16 K d + log2(K) N / d + 32 N_fd with N_fd the decoder's MLP weights,
                extended to what the paper has not: bits per number as stored, shared codebooks and decoders once,
                learned latents of indices, row scales. As in the paper, it leaves out layers left dense, padding,
                biases, gains and biases of the normalisation, and the 16 bits that few-bit numbers are relative to.

    Raises SuiteError when layers that share a decoder with gains and biases differ in width.
    """
    return estimate(options, take_census(options, shapes))


def estimate(options: PocketOptions, census: Census) -> Estimate:
    """`predict` for one of many settings over the same shapes and parts."""
    from evenbits.budget import whole_bytes
    from evenbits.compressor import Estimate, Role

    code = scale = dense = weights = 0
    index = paper = 0.0
    books: dict[str, tuple[PocketOptions, int, list[LayerShape]]] = {}
    decoders: dict[str, tuple[PocketOptions, int, list[LayerShape]]] = {}
    for layer, count in census.sorts:
        settings = options.of(layer)
        if settings is None:
            dense += count * dense_bytes(layer)
            continue
        weights += count * layer.weights
        code += count * code_bytes(settings, layer)
        paper += count * layer.weights * settings.index_bits / settings.d
        if settings.row_scales:
            scale += count * _scale_bytes(settings.scale_bits, layer.out_features)
            paper += count * layer.out_features * settings.scale_bits
        if settings.codebook == "learned":
            name = codebook_group(options, layer)
            copies = count if options.scope == "matrix" else 1
            books.setdefault(name, (settings, copies, []))[2].append(layer)
        if settings.decoder == "mlp":
            name = decoder_group(options, layer)
            copies = count if options.decoder_scope == "matrix" else 1
            decoders.setdefault(name, (settings, copies, []))[2].append(layer)
    codebook = decoder = 0
    for settings, copies, layers in books.values():
        affine_numbers(settings, layers)  # what shares a codebook is trained together: widths must agree here too
        numbers = codebook_numbers(settings)
        codebook += copies * whole_bytes(numbers * options.codebook_bits)
        scale += copies * (SCALE_BITS // 8 if options.codebook_bits == 8 else 0)
        paper += copies * numbers * options.codebook_bits
    for settings, copies, layers in decoders.values():
        numbers = decoder_numbers(settings, layers)
        uncounted = mlp_numbers(settings)[1] + affine_numbers(settings, layers)
        decoder += copies * whole_bytes(numbers * options.decoder_bits)
        paper += copies * (numbers - uncounted) * options.decoder_bits
    if weights:
        index, paper = 8 * code / weights, paper / weights
    roles = {Role.CODE: code, Role.SCALE: scale, Role.CODEBOOK: codebook, Role.DECODER: decoder, Role.DENSE: dense}
    return Estimate(index, paper, {role: count for role, count in roles.items() if count})


def _scale_bytes(bits: int, rows: int) -> int:
    """Of few bits: with the two float16 of their grid."""
    from evenbits.budget import whole_bytes

    return whole_bytes(rows * bits) + (2 * SCALE_BITS // 8 if bits < SCALE_BITS else 0)


def _group(options: PocketOptions, scope: Scope, layer: LayerShape) -> str:
    settings = options.of(layer)
    if settings is None:
        raise ValueError(f"{layer.name} is left dense: it has no codebook and no decoder")
    name = {"matrix": layer.name, "kind": layer.kind, "model": "model"}[scope]
    if (settings.d, settings.codebook_size) == (options.d, options.codebook_size):
        return name
    return f"{name}.d{settings.d}k{settings.codebook_size}"


def _groups(options: PocketOptions, scope: Scope, shapes: ModelShapes) -> tuple[Group, ...]:
    found: dict[str, tuple[PocketOptions, list[LayerShape]]] = {}
    for layer in shapes.layers:
        settings = options.of(layer)
        if settings is not None:
            found.setdefault(_group(options, scope, layer), (settings, []))[1].append(layer)
    return tuple(Group(name, settings, tuple(layers)) for name, (settings, layers) in found.items())
