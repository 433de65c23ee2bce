"""NormalFloat-4: the published levels, bytes, real layers, double quantisation, awkward weights."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenbits.budget import BitBudget
from evenbits.compressor import Layer, LayerShape, ModelShapes, PackedLayer, Refusal
from evenbits.errors import SuiteError, TrialFailed
from evenbits.shapes import LLAMA2_7B
from evenbits.testing import check_linear, make_case
from evenbits_nf4 import provide_compressors
from evenbits_nf4.compressor import Nf4Compressor, levels
from evenbits_nf4.options import Nf4Options, fit, predict

# QLoRA, appendix E
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def shape_of(weight: torch.Tensor) -> LayerShape:
    return LayerShape("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", weight.shape[0], weight.shape[1])


def compress(weight: torch.Tensor, **options: Any) -> tuple[PackedLayer, torch.Tensor]:
    compressor = Nf4Compressor(Nf4Options(**options))
    packed = compressor.compress(weight, Layer(shape_of(weight)), None, torch.Generator())
    return packed, compressor.restore(packed, shape_of(weight), None)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(weight: torch.Tensor, restored: torch.Tensor) -> float:
    return float((weight - restored).norm() / weight.norm())


def test_levels_are_the_published_ones() -> None:
    assert levels().tolist() == pytest.approx(PUBLISHED, abs=2e-6)


def test_codes_are_the_nearest_levels() -> None:
    weight = gaussian(6, 50)
    _, restored = compress(weight, block_size=10)
    blocks = weight.view(-1, 10)
    table = torch.tensor(PUBLISHED)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / absmax)[..., None].sub(table).abs().argmin(dim=-1)
    assert torch.allclose(restored.view(-1, 10), table[nearest] * absmax, atol=1e-5)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([2, 3, 16, 64, 4096]),
    double_quant=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "float16"]),
)
@settings(max_examples=60, deadline=None)
def test_predicted_bytes_are_the_stored_ones(
    rows: int, columns: int, block_size: int, double_quant: bool, scale_dtype: str
) -> None:
    weight = gaussian(rows, columns)
    fields: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant, "scale_dtype": scale_dtype}
    packed, restored = compress(weight, **fields)
    shapes = ModelShapes((shape_of(weight),), parameters=weight.numel(), rest_bytes=0)
    assert predict(Nf4Options(**fields), shapes).linear_bytes == packed.nbytes
    assert restored.shape == weight.shape
    assert relative(weight, restored) < 0.35


def test_paper_bits() -> None:
    plain, double = Nf4Options(), Nf4Options(double_quant=True)
    assert predict(plain, LLAMA2_7B).paper_bits == 4.5
    assert predict(plain, LLAMA2_7B).linear_bits(LLAMA2_7B) == 4.5
    assert predict(double, LLAMA2_7B).paper_bits == pytest.approx(4.127, abs=5e-4)
    assert predict(double, LLAMA2_7B).linear_bits(LLAMA2_7B) == pytest.approx(4.127, abs=5e-4)


def test_double_quantisation_costs_little() -> None:
    weight = gaussian(128, 352)
    plain, double = (relative(weight, compress(weight, double_quant=flag)[1]) for flag in (False, True))
    assert double == pytest.approx(plain, rel=0.002)
    assert double != plain


def test_real_layers_have_the_reference_error(data: Path) -> None:
    """Mean relative error by kind of layer, measured with another implementation of the same levels and blocks."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(data / "models" / "babyllama105" / "model.safetensors")
    errors: dict[str, list[float]] = defaultdict(list)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            errors[name.split(".")[-2]].append(relative(tensor.float(), compress(tensor.float())[1]))
    means = {kind: sum(values) / len(values) for kind, values in errors.items()}
    assert len(means) == 7
    assert means.pop("down_proj") == pytest.approx(0.0918, abs=5e-5)
    assert all(0.090 <= mean < 0.0931 for mean in means.values())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e7])
def test_awkward_magnitudes(double_quant: bool, scale_dtype: str, size: float) -> None:
    weight = gaussian(4, 100) * size
    weight[0] = 0
    _, restored = compress(weight, double_quant=double_quant, scale_dtype=scale_dtype)
    assert torch.isfinite(restored).all()
    assert (restored[0, :64] == 0).all()
    assert (restored - weight).norm() <= 1.01 * weight.norm()
    if scale_dtype == "float32" and size in (1e-7, 1e7):
        assert relative(weight, restored) < 0.12


def test_scales_can_be_trained() -> None:
    weight = gaussian(8, 100)
    for double_quant in (False, True):
        compressor = Nf4Compressor(Nf4Options(double_quant=double_quant))
        packed = compressor.compress(weight, Layer(shape_of(weight)), None, torch.Generator())
        leaves = {name: t.clone().requires_grad_() for name, t in compressor.tunable(packed, None).items()}
        packed.tensors.update(leaves)
        loss = compressor.restore(packed, shape_of(weight), None).square().sum()
        torch.autograd.backward(loss)
        assert all(leaf.grad is not None and (leaf.grad.abs() > 0).any() for leaf in leaves.values())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_fail_by_name(value: float) -> None:
    weight = gaussian(4, 8)
    weight[3, 7] = value
    with pytest.raises(TrialFailed, match=r"^model\.layers\.0\.mlp\.down_proj: 1 of 32 weights are NaN or infinite$"):
        compress(weight)


@pytest.mark.parametrize(("centre", "window"), [(4.5, 0.05), (4.127, 0.01), (4.0, 0.1), (5.0, 0.1)])
def test_fit_lands_inside_and_is_no_worse_than_the_paper(centre: float, window: float) -> None:
    budget = BitBudget(centre, window)
    chosen = fit(budget, LLAMA2_7B, {})
    assert isinstance(chosen, Nf4Options)
    assert predict(chosen, LLAMA2_7B).linear_bits(LLAMA2_7B) in budget
    weight = gaussian(256, 512)
    ours = relative(weight, compress(weight, **chosen.model_dump())[1])
    for paper in (Nf4Options(), Nf4Options(double_quant=True)):
        if predict(paper, LLAMA2_7B).linear_bits(LLAMA2_7B) in budget:
            assert ours <= relative(weight, compress(weight, **paper.model_dump())[1])


def test_fit_refuses_below_four_bits_and_wrong_options() -> None:
    for centre in (2.0, 3.0):
        refusal = fit(BitBudget(centre, 0.1), LLAMA2_7B, {})
        assert isinstance(refusal, Refusal)
        assert "nearest: 4.00" in refusal.reason
    fixed = fit(BitBudget(4.0, 0.1), LLAMA2_7B, {"block_size": 64, "double_quant": False, "scale_dtype": "float32"})
    assert isinstance(fixed, Refusal)
    assert "4.500" in fixed.reason
    kept = fit(BitBudget(4.127, 0.01), LLAMA2_7B, {"double_quant": True})
    assert isinstance(kept, Nf4Options)
    assert kept.double_quant
    with pytest.raises(SuiteError, match="option blocksize"):
        fit(BitBudget(4.0, 0.1), LLAMA2_7B, {"blocksize": 64})


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", [(7, 16), (5, 128), (3, 64)])  # blocks of four rows, of half a row, of one
def test_a_layer_computes_from_its_codes(size: tuple[int, int], double_quant: bool) -> None:
    options = Nf4Options(block_size=64, double_quant=double_quant)
    case = make_case(*size)
    packed, _ = compress(case.weight, **options.model_dump())
    module = Nf4Compressor(options).linear(packed, case.shape, None, torch.device("cpu"))
    assert isinstance(module, torch.nn.Module)
    (descriptor,) = provide_compressors()
    check_linear(descriptor, options, case)


def test_blocks_across_the_ends_of_rows_are_refused() -> None:
    packed, _ = compress(gaussian(24, 40), block_size=64)
    found = Nf4Compressor(Nf4Options(block_size=64)).linear(
        packed, shape_of(gaussian(24, 40)), None, torch.device("cpu")
    )
    assert isinstance(found, Refusal)
    assert "blocks of 64 weights run across the ends of rows of 40" in found.reason


def test_descriptor() -> None:
    (found,) = provide_compressors()
    assert found.name == "nf4"
    assert isinstance(found.make(Nf4Options()), Nf4Compressor)
