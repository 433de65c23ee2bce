"""PocketLLM's layers from packed indices: the restored weight's outputs in tiles, and decoders folded into a table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evenbits.compressor import LayerShape, PackedLayer, Refusal, Role, Shared
from evenbits.maths.bitpack import pack, unpack
from evenbits.testing import make_case, run_case
from evenbits_pocketllm import provide_compressors, scales
from evenbits_pocketllm.codebooks import store_codebook, store_decoder
from evenbits_pocketllm.compressor import PocketCompressor
from evenbits_pocketllm.cost import geometry, norm_width
from evenbits_pocketllm.decoding import decoder_network
from evenbits_pocketllm.folding import Folded, fold, folded_error
from evenbits_pocketllm.groups import GroupDecoder, PackedCodes, exact_table, load_decoder
from evenbits_pocketllm.layout import join, order, restore_order
from evenbits_pocketllm.linear import PocketLinear
from evenbits_pocketllm.network import decode, initial
from evenbits_pocketllm.options import PocketOptions

CPU = torch.device("cpu")
PAPER: dict[str, Any] = {"recipe": "paper", "d": 4, "codebook_size": 16, "hidden": 8, "epochs": 1}
CODE: dict[str, Any] = {"recipe": "code", "d": 4, "codebook_size": 16, "hidden": 8, "epochs": 1}
OURS: dict[str, Any] = {"recipe": "evenbits", "state_bits": 6, "epochs": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "evenbits": OURS,
    "evenbits without feedback": {**OURS, "feedback": False, "axis": "in", "d": 2},
    "evenbits, few bits a scale": {**OURS, "scale_bits": 5},
    "paper": PAPER,
    "paper along the inputs": {**PAPER, "axis": "in"},
    "paper with row scales": {**PAPER, "row_scales": True, "scale_bits": 4, "affine": True},
    "paper, three-bit indices": {**PAPER, "codebook_size": 8, "d": 3},
    "paper, one unit": {**PAPER, "units": 1},
    "code": CODE,
    "code along the outputs": {**CODE, "axis": "out", "affine": False, "row_scales": True},
    "layernorm": {**PAPER, "rln": "layernorm", "affine": True},
    "no decoder": {**PAPER, "rln": "none", "decoder": "none", "codebook_bits": 8},
    "one codebook": {**PAPER, "scope": "model", "decoder_scope": "model", "axis": "in"},
    "parts": {**PAPER, "d": 2, "parts": [{"kinds": ["mlp.*"], "d": 5, "codebook_size": 32}]},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(rows: int, columns: int, seed: int = 0, **options: Any) -> tuple[PocketCompressor, PackedLayer, LayerShape]:
    """A layer of random indices under a random decoder, without any training: groups differ as they do in earnest."""
    settings = PocketOptions.model_validate(options)
    layer = LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", rows, columns, "float32")
    shape, packed, generator = geometry(settings, layer), PackedLayer({}, {}), seeded(seed)
    # a line prefers some indices: else all groups would have nearly the same statistics
    codes = torch.randint(settings.codebook_size, (shape.lines, shape.chunks), generator=generator)
    codes = torch.minimum(codes, torch.randint(settings.codebook_size, (shape.lines, 1), generator=generator))
    packed.tensors["codes"], packed.roles["codes"] = pack(codes, settings.index_bits), Role.CODE
    book = torch.randn(settings.codebook_size, settings.latent or settings.d, generator=generator)
    store_codebook(packed, book, settings.codebook_bits)
    decoder = initial(decoder_network(settings, norm_width(settings, layer)), generator)
    if settings.affine:
        decoder += 0.3 * torch.randn(decoder.shape, generator=generator)
    store_decoder(packed, decoder, settings.decoder_bits)
    if settings.row_scales:
        tensors, roles = scales.store(torch.rand(rows, generator=generator) + 0.1, settings.scale_bits)
        packed.tensors.update(tensors)
        packed.roles.update(roles)
    return PocketCompressor(settings), packed, layer


def opened(compressor: PocketCompressor, packed: PackedLayer, layer: LayerShape) -> tuple[GroupDecoder, Tensor | None]:
    """The decoder with the statistics of its groups, and the row scales."""
    settings = compressor.options
    decoder = load_decoder(
        PackedCodes(packed.tensors["codes"], settings, layer), compressor._coder(settings, packed, layer, None)
    )
    rows = scales.read(packed.tensors, settings.scale_bits, layer.out_features) if settings.row_scales else None
    return decoder, rows


def linear_of(
    compressor: PocketCompressor, packed: PackedLayer, layer: LayerShape, shared: Shared | None = None, **options: Any
) -> PocketLinear:
    settings = compressor.options.of(layer)
    assert settings is not None
    coder = compressor._coder(settings, packed, layer, shared)
    return PocketLinear(packed, layer, settings, coder, **options)


def unfolded(compressor: PocketCompressor, packed: PackedLayer, layer: LayerShape, folded: Folded) -> Tensor:
    """(out, in): the weight that a folded decoder stands for, restored whole."""
    settings = compressor.options
    shape = geometry(settings, layer)
    codes = unpack(packed.tensors["codes"], settings.index_bits, shape.vectors).view(shape.lines, shape.chunks)
    groups = folded.table[order(codes, settings.rln)]
    if folded.gain is not None:
        groups = groups * folded.gain[:, None]
    if folded.offset is not None:
        groups = groups + folded.offset[:, None]
    vectors = restore_order(groups, settings.rln, shape.lines, shape.chunks)
    weight = join(vectors, settings.axis, layer.out_features, layer.in_features)
    if settings.row_scales:
        weight = weight * scales.read(packed.tensors, settings.scale_bits, layer.out_features)[:, None]
    return weight


def assert_same_outputs(linear: nn.Module, weight: Tensor, *leading: int) -> None:
    inputs = torch.randn(*(leading or (5,)), weight.shape[1], generator=seeded(9))
    expected = inputs.double() @ weight.double().t()
    found = linear(inputs)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# linear


@pytest.mark.parametrize(
    ("recipe", "size"), [*((name, (15, 37)) for name in RECIPES), *((name, (24, 40)) for name in ("evenbits", "code"))]
)
def test_outputs_are_those_of_the_restored_weight(recipe: str, size: tuple[int, int]) -> None:
    (descriptor,) = provide_compressors()
    options = descriptor.options.model_validate(RECIPES[recipe])
    compressor, packed, shared, weight = run_case(descriptor, options, make_case(*size))
    assert isinstance(compressor, PocketCompressor)
    layer = make_case(*size).shape
    assert_same_outputs(_module(compressor.linear(packed, layer, shared, CPU)), weight, 2, 3)
    for tile_bytes in (1, 3000, 1 << 30):
        linear = linear_of(compressor, packed, layer, shared, tile_bytes=tile_bytes, backend="torch")
        assert linear.choice(5).kernel == "torch-tiles"
        assert_same_outputs(linear, weight)
    if recipe in ("evenbits", "paper with row scales", "paper along the inputs", "code", "one codebook"):
        by_kernels = linear_of(compressor, packed, layer, shared, backend="triton")  # interpreted
        assert by_kernels.choice(5).kernel.startswith("triton-")
        assert_same_outputs(by_kernels, weight)


def _module(found: nn.Module | Refusal) -> nn.Module:
    assert isinstance(found, nn.Module)
    return found


@pytest.mark.parametrize("bits", [4, 5, 16])
@pytest.mark.parametrize("recipe", ["paper", "code"])
def test_bits_of_scales_and_indices(recipe: str, bits: int) -> None:
    """Lines of 19 sub-vectors: neither lines nor tiles end on a byte border."""
    for index_bits in (1, 3, 7, 11):
        chosen: dict[str, Any] = {
            "recipe": recipe,
            "d": 4,
            "codebook_size": 1 << index_bits,
            "row_scales": True,
            "scale_bits": bits,
        }
        compressor, packed, layer = made(75, 75, **chosen)
        weight = compressor.restore(packed, layer, None)
        for tile_bytes in (1, 60_000):
            assert_same_outputs(linear_of(compressor, packed, layer, tile_bytes=tile_bytes), weight)


@pytest.mark.parametrize("rln", ["row", "none"])
def test_inputs_dtype_bias_and_gradient(rln: str) -> None:
    compressor, packed, layer = made(24, 40, **PAPER, rln=rln)
    weight, bias = compressor.restore(packed, layer, None), torch.randn(24, generator=seeded(3))
    linear = linear_of(compressor, packed, layer, bias=bias, backend="torch", tile_bytes=3000)
    inputs = torch.randn(7, 40, generator=seeded(4), requires_grad=True)
    assert torch.allclose(linear(inputs), inputs @ weight.t() + bias, atol=1e-4)
    linear(inputs).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, weight.sum(0).expand(7, -1), atol=1e-4)
    half = inputs.detach().to(torch.bfloat16)
    found = linear(half)
    assert found.dtype == torch.bfloat16
    dense = half.float() @ weight.to(torch.bfloat16).float().t() + bias
    assert float((found.float() - dense).abs().max()) <= 2**-7 * float(dense.abs().max())


def test_a_layer_left_dense_has_none() -> None:
    compressor = PocketCompressor(PocketOptions.model_validate({**PAPER, "parts": [{"skip": True}]}))
    packed = PackedLayer({"weight": torch.zeros(8, 8)}, {"weight": Role.DENSE})
    refusal = compressor.linear(packed, LayerShape("x", 0, "mlp.up_proj", 8, 8), None, CPU)
    assert isinstance(refusal, Refusal)
    assert "dense" in refusal.reason


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers of the largest tensor that any operation inside returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return found


@pytest.mark.parametrize(
    ("options", "gains"),
    [(PAPER, False), (PAPER, True), ({**PAPER, "axis": "in"}, False), (CODE, False), (CODE, True)],
    ids=["paper", "paper folded", "paper along the inputs", "code", "code folded"],
)
def test_no_tensor_is_near_the_dense_weight(options: dict[str, Any], gains: bool) -> None:
    compressor, packed, layer = made(128, 256, **options)
    coder = compressor._coder(compressor.options, packed, layer, None)
    tile_bytes = 1 << 14
    folded = fold(opened(compressor, packed, layer)[0], tile_bytes=tile_bytes) if gains else None
    assert not isinstance(folded, Refusal)
    inputs = torch.randn(3, 256, generator=seeded(2))
    with Sizes() as sizes:  # type: ignore[no-untyped-call]
        linear = PocketLinear(packed, layer, compressor.options, coder, folded=folded, tile_bytes=tile_bytes)
        linear(inputs)
    stored = packed.tensors["codes"].numel()
    assert 1000 < sizes.largest <= max(tile_bytes // 4, stored + 16)  # the stream and what aligns its end
    assert sizes.largest < layer.weights / 4
    with Sizes() as sizes:  # type: ignore[no-untyped-call]
        compressor.restore(packed, layer, None)
    assert sizes.largest >= layer.weights  # the measure sees a whole weight where there is one


def test_nor_with_a_window() -> None:
    (descriptor,) = provide_compressors()
    case = make_case(128, 256)
    options = descriptor.options.model_validate({**OURS, "feedback": False, "refit_scales": False})
    compressor, packed, shared, weight = run_case(descriptor, options, case)
    assert isinstance(compressor, PocketCompressor)
    with Sizes() as sizes:  # type: ignore[no-untyped-call]
        linear = linear_of(compressor, packed, case.shape, shared, tile_bytes=1 << 15)
        found = linear(case.inputs[:3])
    assert sizes.largest <= packed.tensors["codes"].numel() + 16  # one byte of four weights, and what aligns the end
    torch.testing.assert_close(found, case.inputs[:3] @ weight.t(), rtol=1e-4, atol=1e-5)
    assert (
        linear.held_bytes <= packed.nbytes + 4 * (1 << 6) + 4 * 128 + 16
    )  # what is stored, a table, scales in float32


# folding


def test_where_a_table_is_exact() -> None:
    for options, exact in (
        (PAPER, False), (CODE, False), ({**PAPER, "units": 1}, True), ({**PAPER, "rln": "layernorm"}, True),
        ({**PAPER, "rln": "none"}, True),
    ):  # fmt: skip
        compressor, packed, layer = made(16, 24, **options)
        coder = compressor._coder(compressor.options, packed, layer, None)
        table = exact_table(compressor.options, layer, coder, CPU)
        assert (table is not None) == exact
        if table is not None:
            weight = unfolded(compressor, packed, layer, Folded(table))
            torch.testing.assert_close(weight, compressor.restore(packed, layer, None), rtol=1e-5, atol=1e-6)
            with pytest.raises(ValueError, match="no statistics"):
                load_decoder(PackedCodes(packed.tensors["codes"], compressor.options, layer), coder)


@pytest.mark.parametrize("options", [PAPER, {**PAPER, "axis": "in", "affine": True}, CODE], ids=["row", "in", "code"])
def test_statistics_and_groups_do_not_depend_on_the_parts(options: dict[str, Any]) -> None:
    compressor, packed, layer = made(23, 41, **options)
    settings = compressor.options
    coder = compressor._coder(settings, packed, layer, None)
    assert coder.codebook is not None
    assert coder.decoder is not None
    codes = PackedCodes(packed.tensors["codes"], settings, layer)
    shape = codes.geometry
    whole = unpack(codes.stored, settings.index_bits, shape.vectors).view(shape.lines, shape.chunks)
    decoder = load_decoder(codes, coder, tile_bytes=1)
    torch.testing.assert_close(decoder.statistics, load_decoder(codes, coder).statistics)
    groups = order(whole, settings.rln)
    exact = decode(coder.codebook[groups], coder.decoder, decoder.network)
    for first, last in decoder.parts(20_000):
        assert torch.equal(codes.of_groups(first, last), groups[first:last])
        torch.testing.assert_close(decoder(first, last), exact[first:last], rtol=1e-4, atol=1e-5)


def test_groups_of_equal_statistics_fold_without_loss() -> None:
    compressor, packed, layer = made(64, 20, **PAPER)
    codes = torch.randint(16, (16,), generator=seeded())
    shuffled = torch.stack([codes[torch.randperm(16, generator=seeded(i))] for i in range(20)])
    packed.tensors["codes"] = pack(shuffled, 4)
    decoder, _ = opened(compressor, packed, layer)
    folded = fold(decoder, "mean", "none")
    assert isinstance(folded, Folded)
    assert folded_error(decoder, folded) > 90
    assert folded_error(decoder, Folded(2 * folded.table)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("options", [PAPER, {**PAPER, "axis": "in"}, CODE], ids=["out", "in", "code"])
def test_the_fitted_table_is_the_weighted_mean_of_what_each_index_decodes_to(
    options: dict[str, Any], rows: bool
) -> None:
    compressor, packed, layer = made(21, 30, **{**options, "row_scales": rows})
    settings, (decoder, scale) = compressor.options, opened(compressor, packed, layer)
    folded = fold(decoder, "fitted", "none", scale)
    assert isinstance(folded, Folded)
    exact = PocketCompressor(settings.model_copy(update={"row_scales": False})).restore(packed, layer, None)
    lines = exact if settings.axis == "in" else exact.t()
    weights = (torch.ones(21) if scale is None else scale.square())[:, None].expand(21, 30)
    weights = weights if settings.axis == "in" else weights.t()
    shape = geometry(settings, layer)
    codes = unpack(packed.tensors["codes"], 4, shape.vectors).view(shape.lines, shape.chunks)
    above, below = torch.zeros(16, 4), torch.zeros(16, 4)
    for line in range(shape.lines):
        for place in range(shape.length):
            at = codes[line, place // 4], place % 4
            above[at] += weights[line, place] * lines[line, place]
            below[at] += weights[line, place]
    seen = below > 0
    torch.testing.assert_close(folded.table[seen], (above / below)[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("options", [PAPER, {**PAPER, "axis": "in"}, CODE], ids=["out", "in", "code"])
def test_folded_outputs_and_errors(options: dict[str, Any], affine: bool) -> None:
    """Each step of freedom brings the folded weight nearer to the exact one, and the layer computes with it."""
    compressor, packed, layer = made(45, 50, **{**options, "affine": affine, "row_scales": True})
    decoder, scale = opened(compressor, packed, layer)
    exact = compressor.restore(packed, layer, None)
    errors: dict[tuple[str, str], float] = {}
    hows: tuple[Any, ...] = ("fitted",) if affine else ("mean", "fitted")
    rescales: tuple[Any, ...] = ("none", "gain", "gain and offset", "by number")
    for how in hows:
        for rescale in rescales:
            folded = fold(decoder, how, rescale, scale, tile_bytes=20_000)
            assert isinstance(folded, Folded)
            assert (folded.gain is not None, folded.offset is not None) == (
                rescale != "none",
                rescale in ("gain and offset", "by number"),
            )
            weight = unfolded(compressor, packed, layer, folded)
            error = 10 * math.log10(float(exact.square().sum() / (exact - weight).square().sum()))
            errors[how, rescale] = folded_error(decoder, folded, scale, tile_bytes=20_000)
            assert errors[how, rescale] == pytest.approx(error, abs=0.01)
            for tile_bytes in (1, 20_000):
                linear = linear_of(compressor, packed, layer, folded=folded, tile_bytes=tile_bytes)
                assert_same_outputs(linear, weight)
    for how in hows:
        assert errors[how, "none"] < errors[how, "gain"] < errors[how, "gain and offset"] < errors[how, "by number"]
    if not affine:
        assert all(errors["fitted", rescale] > errors["mean", rescale] for rescale in rescales)


def test_mean_statistics_refuse_affine_gains() -> None:
    decoder, _ = opened(*made(16, 24, **{**PAPER, "affine": True}))
    refusal = fold(decoder, "mean")
    assert isinstance(refusal, Refusal)
    assert "affine gains belong to places" in refusal.reason


@pytest.mark.parametrize("options", [PAPER, {**CODE, "row_scales": True}], ids=["paper", "code"])
def test_a_folded_layer_is_had_by_asking(options: dict[str, Any]) -> None:
    compressor, packed, layer = made(45, 50, **options)
    stored = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    decoder, scale = opened(compressor, packed, layer)
    folded = fold(decoder, scale=scale)
    assert isinstance(folded, Folded)
    linear = _module(compressor.linear(packed, layer, None, CPU, folded=True))
    assert_same_outputs(linear.half(), unfolded(compressor, packed, layer, folded))
    assert isinstance(linear, PocketLinear)
    error = folded_error(decoder, folded, scale)
    assert "folded into one table, as asked" in linear.choice(1).reason
    assert linear.choice(1).decibels == pytest.approx(error)
    assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in stored.items())
    exact = _module(compressor.linear(packed, layer, None, CPU))
    assert isinstance(exact, PocketLinear)
    assert "folded into" not in exact.choice(1).reason


def test_where_there_is_nothing_to_fold() -> None:
    compressor, packed, layer = made(16, 24, **{**PAPER, "units": 1})
    linear = _module(compressor.linear(packed, layer, None, CPU, folded=True))
    assert_same_outputs(linear, compressor.restore(packed, layer, None))
    assert isinstance(linear, PocketLinear)
    assert "nothing to fold" in linear.choice(1).reason
