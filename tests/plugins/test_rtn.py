"""Round to nearest: bytes, the plain formula, Gaussian anchors, awkward weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenbits.compressor import Layer, LayerShape, ModelShapes, PackedLayer
from evenbits.errors import TrialFailed
from evenbits.integer import predict
from evenbits.maths.bitpack import unpack
from evenbits_rtn import provide_compressors
from evenbits_rtn.compressor import RtnCompressor
from evenbits_rtn.options import RtnOptions

LLOYD_MAX_2_BITS = 0.1175  # least squared error of four levels on a unit Gaussian


def shape_of(weight: torch.Tensor) -> LayerShape:
    return LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", weight.shape[0], weight.shape[1])


def compress(weight: torch.Tensor, **options: Any) -> tuple[PackedLayer, torch.Tensor]:
    compressor = RtnCompressor(RtnOptions(**options))
    packed = compressor.compress(weight, Layer(shape_of(weight)), None, torch.Generator())
    return packed, compressor.restore(packed, shape_of(weight), None)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 1, 5, 16, 32, 512]),
    symmetric=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_predicted_bytes_are_the_stored_ones(
    rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool
) -> None:
    weight = gaussian(rows, columns)
    packed, restored = compress(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    shapes = ModelShapes((shape_of(weight),), parameters=weight.numel(), rest_bytes=0)
    options = RtnOptions(bits=bits, group_size=group_size, symmetric=symmetric)
    estimate = predict(options, shapes)
    assert estimate.linear_bytes == packed.nbytes
    for role, stored in estimate.role_bytes.items():
        assert stored == sum(t.numel() * t.element_size() for n, t in packed.tensors.items() if packed.roles[n] == role)
    assert restored.shape == weight.shape
    assert restored.dtype == torch.float32


def test_symmetric_is_absmax_over_seven_and_a_half() -> None:
    """The plain formula of the reference measurement: codes -8..7 at scale absmax / 7.5."""
    weight = gaussian(16, 96)
    packed, restored = compress(weight, bits=4, group_size=32)
    groups = weight.view(16, 3, 32)
    exact = groups.abs().amax(dim=2, keepdim=True) / 7.5
    near = exact.half()
    scale = torch.where(near.float() > exact, torch.nextafter(near, torch.zeros_like(near)), near).float()
    codes = (groups / scale).round().clamp(-8, 7)
    assert torch.equal(restored, (codes * scale).view(16, 96))
    assert torch.equal(unpack(packed.tensors["codes"], 4, 16 * 96), (codes + 8).long().flatten())
    assert "zero" not in packed.tensors


def test_more_bits_and_smaller_groups_are_never_worse() -> None:
    weight = gaussian(64, 256)
    errors = [float((compress(weight, bits=bits)[1] - weight).norm()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    errors = [float((compress(weight, group_size=size)[1] - weight).norm()) for size in (None, 128, 64, 32, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_bits_on_gaussians_stay_above_the_best_scalar_quantiser(symmetric: bool) -> None:
    weight = gaussian(32, 4096)
    plain = (compress(weight, bits=2, group_size=None, symmetric=symmetric)[1] - weight).square().mean()
    clipped = (
        (compress(weight, bits=2, group_size=None, symmetric=symmetric, clip_search=True)[1] - weight).square().mean()
    )
    assert LLOYD_MAX_2_BITS < clipped < 0.2
    assert clipped < plain / 2


def test_eight_bits_are_nearly_exact() -> None:
    weight = gaussian(16, 128)
    assert float((compress(weight, bits=8, group_size=32)[1] - weight).norm() / weight.norm()) < 0.007


def test_scales_can_be_trained() -> None:
    weight = gaussian(4, 40)
    compressor = RtnCompressor(RtnOptions(bits=3, group_size=16, symmetric=False))
    packed = compressor.compress(weight, Layer(shape_of(weight)), None, torch.Generator())
    assert compressor.tunable(packed, None)["scale"] is packed.tensors["scale"]
    scale = packed.tensors["scale"].float().requires_grad_()
    packed.tensors["scale"] = scale
    loss = compressor.restore(packed, shape_of(weight), None).square().sum()
    torch.autograd.backward(loss)
    assert scale.grad is not None
    assert (scale.grad.abs() > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_fail_by_name(value: float) -> None:
    weight = gaussian(4, 8)
    weight[1, 2] = value
    with pytest.raises(TrialFailed, match=r"^model\.layers\.0\.mlp\.up_proj: 1 of 32 weights are NaN or infinite$"):
        compress(weight)


def test_real_layers_against_the_formula_in_float32(data: Path) -> None:
    """Reference measurement: RTN absmax / 7.5 in groups of 32; storing the scale in float16 may not matter."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(data / "models" / "babyllama105" / "model.safetensors")
    weights = [tensor.float() for name, tensor in tensors.items() if name.endswith("proj.weight")]
    assert len(weights) == 35
    for weight in weights:
        groups = weight.view(weight.shape[0], -1, 32)
        scale = groups.abs().amax(dim=2, keepdim=True) / 7.5
        plain = ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)
        _, restored = compress(weight, bits=4, group_size=32)
        ours, theirs = (restored - weight).norm(), (plain - weight).norm()
        assert float(ours) == pytest.approx(float(theirs), rel=0.005)


def test_listing_and_fitting_import_no_torch() -> None:
    script = (
        "import sys, evenbits_rtn, evenbits_gptq, evenbits_nf4\n"
        "from evenbits.budget import BitBudget\n"
        "from evenbits.shapes import LLAMA2_7B\n"
        "for plugin in (evenbits_rtn, evenbits_gptq, evenbits_nf4):\n"
        "    found = plugin.provide_compressors()[0]\n"
        "    assert found.fit(BitBudget(4.1, 0.1), LLAMA2_7B, {}), found.name\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_descriptor() -> None:
    (found,) = provide_compressors()
    assert found.name == "rtn"
    assert found.needs_of(RtnOptions()).statistics == "none"
    assert not found.stochastic
    assert isinstance(found.make(RtnOptions()), RtnCompressor)
