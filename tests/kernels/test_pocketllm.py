"""PocketLLM's decode and fused kernels in Triton's interpreter, against their float64 twin."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from evenbits.maths.bitpack import pack
from evenbits_pocketllm import kernels
from evenbits_pocketllm.exact import ExactLinear
from evenbits_pocketllm.kernels import PocketWeight, padded, prepare
from evenbits_pocketllm.network import Network, decode_statistics, initial
from evenbits_pocketllm.prepared import Layout

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from evenbits_pocketllm.gpu.decode import gelu  # noqa: E402  # imports triton

# of the largest weight. float32: the GELU's 5e-7 and products of 22 bits, three times over; the others round once
# more, and bfloat16 alone multiplies in one float16 part inside the decoder
TOLERANCE = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each takes more than one step, as on a GPU, and the interpreter has fewer to run."""
    monkeypatch.setattr(kernels, "_PROGRAMS", 6)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(
    out_features: int, in_features: int, *, d: int = 8, latent: int | None = None, hidden: int = 16, units: int = 3,
    bits: int = 5, axis: Any = "in", affine: bool = False, code_order: bool = False, scaled: bool = False,
    seed: int = 0,
) -> PocketWeight:  # fmt: skip
    """Random indices, codewords and decoder, and the statistics of the groups by the slow way."""
    generator, latent = seeded(seed), latent or d
    lines, length = (out_features, in_features) if axis == "in" else (in_features, out_features)
    chunks = -(-length // d)
    network = Network(latent, d, hidden, units, "code" if code_order else "row", affine, chunks * latent)
    codes = torch.randint(1 << bits, (lines, chunks), generator=generator)
    codes = torch.minimum(codes, torch.randint(1 << bits, (lines, 1), generator=generator))  # groups that differ
    book = torch.randn(1 << bits, latent, generator=generator)
    flat = initial(network, generator)
    flat = flat + (0.3 if affine else 0.05) * torch.randn(flat.shape, generator=generator)
    groups = codes.t().reshape(lines, chunks) if code_order else codes
    statistics = decode_statistics(book.double()[groups], flat.double(), network).float()
    rows = torch.rand(out_features, generator=generator) + 0.1 if scaled else None
    return PocketWeight(
        padded(pack(codes, bits)), bits, book, flat, network, statistics, out_features, in_features, axis,
        code_order, rows,
    )  # fmt: skip


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number expected; NaN is not."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs()
    assert bool((error <= tolerance * expected.double().abs().max()).all()), float(error.max())


def dense(pocket: PocketWeight, dtype: torch.dtype) -> Tensor:
    """(out, in) through the decode kernel, in parts."""
    prepared = prepare(pocket)
    count = pocket.chunks if pocket.by_chunks else pocket.lines
    cut = [0, count // 3, count] if count > 2 else [0, count]
    parts = [kernels.decode_slab(prepared, a, b, dtype) for a, b in pairwise(cut) if a < b]
    lines = torch.cat(parts, 1 if pocket.by_chunks else 0)
    assert lines.dtype == dtype
    return lines if pocket.axis == "in" else lines.t()


def assert_decodes(pocket: PocketWeight, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    expected = kernels.weight(pocket)
    for dtype in dtypes:
        assert_near(dense(pocket, dtype), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_of_indices(bits: int) -> None:
    assert_decodes(made(3, 75, bits=bits, d=4, units=2, hidden=8))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("hidden", [5, 16, 40])
def test_shapes_of_decoders(d: int, hidden: int) -> None:
    assert_decodes(made(2, 37, d=d, hidden=hidden, units=2))


@pytest.mark.parametrize(
    ("units", "affine", "axis", "code_order"),
    [
        (2, False, "in", False), (2, True, "in", True), (3, False, "out", False), (3, False, "in", True),
        (3, True, "in", False), (3, True, "out", True), (4, True, "out", False), (4, False, "out", True),
    ],
)  # fmt: skip
def test_units_norms_and_axes(units: int, affine: bool, axis: str, code_order: bool) -> None:
    shape = (5, 13) if axis == "in" else (13, 5)
    pocket = made(*shape, d=4, units=units, affine=affine, axis=axis, code_order=code_order, scaled=units == 3)
    assert_decodes(pocket, tuple(TOLERANCE) if units == 3 and affine else (torch.float32,))


@pytest.mark.parametrize("code_order", [False, True])
def test_a_group_whose_end_is_in_a_row_with_others(code_order: bool) -> None:
    """A sub-vector of another group, here of other size by far, would overflow float16 under this one's statistics, and
    lie in one row of a tile with the last of this one."""
    plain = made(5, 24, units=2, hidden=8, bits=3, code_order=code_order)
    book = plain.codebook.clone()
    book[0], book[1] = 900.0, 1.0
    codes = torch.ones(5, 3, dtype=torch.long)
    codes[0, 0] = 0
    groups = codes.t().reshape(5, 3) if code_order else codes
    statistics = decode_statistics(book.double()[groups], plain.decoder.double(), plain.network).float()
    pocket = replace(plain, codes=padded(pack(codes, 3)), codebook=book, statistics=statistics)
    assert_decodes(pocket)
    if not code_order:
        assert bool(torch.isfinite(kernels.decode_matmul(prepare(pocket), torch.randn(2, 24))).all())


def test_the_largest_decoder_and_latents_of_another_size() -> None:
    assert_decodes(made(2, 70, d=64, latent=64, hidden=256, units=2))
    assert_decodes(made(3, 29, d=3, latent=7, hidden=17))
    assert_decodes(made(3, 29, d=9, latent=2, hidden=3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (9, 1), (2, 1027)])
def test_awkward_matrices(shape: tuple[int, int]) -> None:
    """Latents of 8 numbers: a group of two alone, which may lie near each other, is badly conditioned."""
    assert_decodes(made(*shape, d=2, latent=8, units=2))
    if shape[1] < 100:  # else as many lines, each a program for the interpreter
        assert_decodes(made(*shape, d=2, latent=8, units=2, axis="out"))


def assert_multiplies(pocket: PocketWeight, rows: int, dtype: torch.dtype) -> None:
    """Both roads, against the product in float64 of what is rounded as a dense layer would round it."""
    inputs = torch.randn(rows, pocket.in_features, generator=seeded(rows)).to(dtype)
    dense = kernels.weight(pocket)
    expected = inputs.double() @ dense.t()
    # errors of single weights add up at random
    bound = 4 * TOLERANCE[dtype] * dense.abs().max() * inputs.double().norm(dim=1, keepdim=True)
    prepared = prepare(pocket)
    part = dense.numel() * inputs.element_size() * 2 // 3
    roads = [kernels.slab_matmul(prepared, inputs, slab_bytes=part)]
    if not pocket.code_order:
        roads.append(kernels.decode_matmul(prepared, inputs))
    for found in roads:
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        # the slabs' products are themselves rounded to the inputs' dtype
        own = torch.finfo(dtype).eps * expected.abs()
        assert bool(((found.double() - expected).abs() <= bound + own).all()), float((found - expected).abs().max())


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("rows", [1, 17])
def test_products(rows: int, axis: str) -> None:
    shape = (17, 27) if axis == "in" else (27, 17)
    assert_multiplies(made(*shape, units=2, axis=axis, scaled=rows == 1), rows, torch.float32)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_short_floats(dtype: torch.dtype, axis: str) -> None:
    for code_order in (False, True):
        shape = (5, 17) if axis == "in" else (17, 5)
        pocket = made(*shape, d=3, units=2, axis=axis, affine=True, scaled=True, code_order=code_order)
        assert_multiplies(pocket, 5, dtype)


def test_products_of_broad_decoders() -> None:
    for axis, shape in (("in", (3, 43)), ("out", (43, 3))):
        assert_multiplies(made(*shape, d=40, units=2, hidden=20, axis=axis), 3, torch.float32)


def test_splits_are_summed_alike_each_time() -> None:
    pocket = made(18, 400, d=4, units=2, hidden=4)
    prepared, inputs = prepare(pocket), torch.randn(2, 400, generator=seeded(1))
    first = kernels.decode_matmul(prepared, inputs)
    assert torch.equal(first, kernels.decode_matmul(prepared, inputs))
    assert kernels.matmul(prepared, inputs[:0]).shape == (0, 18)
    expected = inputs.double() @ kernels.weight(pocket).t()
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-4)
    assert kernels.choose(prepared, 2).config == "broad"  # of those there are, the first: nothing is timed here


def test_a_mistake_in_one_unit_is_seen() -> None:
    """The tolerance finds a decoder whose last bias is off by a thousandth of the largest weight."""
    pocket = made(3, 37)
    flat = pocket.decoder.clone()
    place = pocket.network.hidden * 9 + pocket.network.hidden * 8  # the first bias outside unit 0
    flat[place] += 1e-3 * float(kernels.weight(pocket).abs().max())
    with pytest.raises(AssertionError):
        assert_near(dense(replace(pocket, decoder=flat), torch.float32), kernels.weight(pocket), 1e-5)


@triton.jit
def _gelus(x, out):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 65536)
    tl.store(out + i, gelu(tl.load(x + i)))


@pytest.mark.filterwarnings("ignore:overflow")  # of the polynomial, to minus infinity, which is meant
def test_gelu_is_the_exact_one() -> None:
    """The kernel's own, in float32: x Phi(x) within 5e-7 and the rounding of its result, at numbers of every size."""
    sizes = torch.arange(1, 0x7F80, dtype=torch.int32) << 16  # each exponent, 128 mantissas
    x = torch.cat([sizes.view(torch.float32), torch.linspace(1e-4, 20, (1 << 16) - sizes.numel())])
    for signed in (x, -x):
        found = torch.full_like(x, torch.nan)
        _gelus[(1,)](signed, found)
        exact = signed.double() * torch.special.ndtr(signed.double())
        assert bool(((found - exact).abs() <= 5e-7 + 2.0**-24 * exact.abs()).all())
        far = x > 20
        assert torch.equal(found[far], signed[far].clamp_min(0))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 12, 16, 17, 64])
def test_layouts_fit_a_matrix_unit(d: int) -> None:
    for hidden in (1, 5, 16, 40, 256):
        layout = Layout.of(Network(d, d, hidden, 3, "row", False, d))
        assert layout.wide >= 16
        assert layout.last >= 8
        assert layout.hidden >= 16
        assert layout.hidden % layout.block == 0
        assert layout.pack * d <= layout.wide
        assert layout.pack * hidden <= layout.hidden


# the layer


def test_which_road_and_why() -> None:
    pocket = made(37, 75)
    layer = ExactLinear(pocket, backend="triton")
    few, many = layer.choice(16), layer.choice(17)
    assert (few.kernel, many.kernel) == ("triton-pocket-fused", "triton-pocket-slabs")
    assert "16 rows" in few.reason
    assert "decoded once" in many.reason
    assert "run across" in ExactLinear(made(37, 75, code_order=True), backend="triton").choice(1).reason
    plain = ExactLinear(pocket)
    assert plain.choice(1).kernel == "torch-tiles"  # never the interpreter unasked
    assert "on the CPU" in plain.choice(1).reason
    assert layer.held_bytes > plain.held_bytes
    with pytest.raises(ValueError, match=r"no backend 'numba'.*folded"):
        ExactLinear(pocket, backend="numba")


def test_what_the_kernels_could_not_hold_goes_to_torch() -> None:
    pocket = made(5, 33)
    large, lost = pocket.decoder.clone(), pocket.decoder.clone()
    large[: pocket.network.hidden * 8] *= 1e5
    lost[-1], lost[0] = torch.inf, torch.nan
    level = made(5, 33, d=3)  # padded to four latents: zeros, far from a group's mean
    level = replace(level, statistics=torch.tensor([9e3, 10]).expand_as(level.statistics))
    for bad in (replace(pocket, decoder=large), replace(pocket, decoder=lost), level):
        with pytest.raises(ValueError, match=r"may reach .*beyond float16.*take 'auto' or 'torch'"):
            ExactLinear(bad, backend="triton")
    with pytest.raises(ValueError, match=r"sub-vectors, and the kernels count to 2\^31"):
        prepare(replace(pocket, out_features=1 << 30))


def test_a_stream_that_is_a_view_of_something_else() -> None:
    pocket = made(5, 33)
    view = torch.cat([torch.ones(1, dtype=torch.uint8), pocket.codes])[1:]
    with pytest.raises(ValueError, match="aligned 32-bit words"):
        prepare(replace(pocket, codes=view))
    assert_decodes(replace(pocket, codes=padded(view)))


def test_a_layer_is_cast_copied_loaded_and_saved() -> None:
    pocket, inputs = made(9, 33, units=2, scaled=True), torch.randn(3, 33, generator=seeded(1))
    layer, bias = ExactLinear(pocket, backend="triton"), torch.ones(9)
    expected = layer(inputs)
    for other in (copy.deepcopy(layer).half(), copy.deepcopy(layer).double(), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(inputs), expected)
        assert other.held_bytes == layer.held_bytes
    another = ExactLinear(made(9, 33, units=2, scaled=True, seed=1), backend="triton")
    another.load_state_dict(ExactLinear(pocket, backend="torch").state_dict())  # nothing but what was given
    assert torch.equal(another(inputs), expected)
    assert torch.equal(ExactLinear(pocket, bias.half(), "triton")(inputs), expected + 1)
    with pytest.raises(ValueError, match=r"inputs of 33 numbers expected, not of shape \(1, 66\)"):
        layer(inputs[:2].view(1, 66))


def test_what_a_layer_moved_to_another_device_takes() -> None:
    layer = ExactLinear(made(5, 33), backend="triton")
    assert layer.matrices is not None
    layer.to("meta")
    assert layer.choice(1).kernel == "torch-tiles"
    assert "does not run on meta" in layer.choice(1).reason
    assert layer.matrices is None


def test_gradients_keep_no_weight() -> None:
    layer, kept = ExactLinear(made(40, 64), tile_bytes=1), []
    inputs = torch.randn(2, 64, generator=seeded(3), requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs).sum().backward()
    assert sum(kept) < 40 * 64 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_of_both_backends_agree(dtype: torch.dtype) -> None:
    pocket, bias = made(19, 43, d=4, scaled=True, axis="out"), torch.randn(19, generator=seeded(2))
    inputs = torch.randn(2, 3, 43, generator=seeded(3)).to(dtype)
    torch_layer, triton_layer = ExactLinear(pocket, bias, "torch"), ExactLinear(pocket, bias, "triton")
    found, expected = triton_layer(inputs), torch_layer(inputs)
    assert found.dtype == dtype
    assert_near(found, expected, 4 * TOLERANCE[dtype])
    wanted = inputs.float().requires_grad_()
    triton_layer(wanted).sum().backward()
    assert wanted.grad is not None
    by_hand = kernels.weight(pocket).sum(0).expand(2, 3, -1)
    assert_near(wanted.grad, by_hand, 1e-5)
    assert triton_layer(inputs.double()).dtype == torch.float64
