"""torchao's layout: a byte a weight whatever the bits, and the library's own file."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tests.plugins.backends.wide_golden import NARROW, WIDE, read_golden

from evenbits.budget import BitBudget
from evenbits.compressor import LayerShape, ModelShapes, Refusal
from evenbits.errors import TrialFailed
from evenbits_backends.layouts.torchao import LAYOUT
from evenbits_backends.libraries.torchao import TorchaoOptions, fit, predict
from evenbits_backends.trust import Claim, check_forward, check_weight

SHAPES = ModelShapes((LayerShape("q", 0, "q", 128, 256),), 128 * 256, 0, dtype="float16")


def test_decodes_codes_zero_points_and_scales() -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (4, 96), generator=draw, dtype=torch.int8)
    zero = torch.randint(-8, 8, (4, 3), generator=draw, dtype=torch.int8)
    scale = torch.rand(4, 3, generator=draw)
    tensors = {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}
    weight = [[(int(codes[r, c]) - int(zero[r, c // 32])) * scale[r, c // 32] for c in range(96)] for r in range(4)]
    found = LAYOUT.decode(tensors, LayerShape("q", 0, "q", 4, 96), {"bits": 4, "group": 32, "dtype": "float32"})
    assert torch.equal(found, torch.tensor(weight))
    with pytest.raises(TrialFailed, match=r"q: scales of \(4, 3\) do not go with groups of 96"):
        LAYOUT.decode(tensors, LayerShape("q", 0, "q", 4, 96), {"bits": 4, "group": 0, "dtype": "float32"})


@pytest.mark.parametrize("name", ["torchao-int8", "torchao-intx3"])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["64", "96"])
def test_the_librarys_own_file_decodes_to_what_its_layer_computes(name: str, shape: LayerShape) -> None:
    kept = read_golden(name, shape)
    check_forward(shape, kept.restored, kept.probe, kept.outputs)
    check_weight(shape, kept.weight, kept.restored, None, LAYOUT.grid(shape, kept.facts), Claim("torchao"))


def test_three_bits_are_billed_as_the_eight_that_they_take() -> None:
    estimate = predict(TorchaoOptions(kernel="intx", bits=3, group_size=32), SHAPES)
    assert estimate.index_bits == 3
    assert estimate.linear_bits(SHAPES) > 8.7  # 8 + (16 + 8) / 32
    below = fit(BitBudget(3.0, 0.1), SHAPES, {"kernel": "intx", "bits": 3})
    assert isinstance(below, Refusal)
    assert "8." in below.reason


def test_fits_within_eight_bits_and_says_what_does_not_go_together() -> None:
    assert fit(BitBudget(8.1, 0.05), SHAPES, {}) == TorchaoOptions()
    wider = fit(BitBudget(8.4, 0.1), SHAPES, {})
    assert isinstance(wider, TorchaoOptions)
    assert (wider.kernel, wider.group_size) == ("intx", 64)
    with pytest.raises(ValidationError, match="int8 is 8 bits, symmetric"):
        TorchaoOptions(bits=4)


def test_refuses_what_it_cannot_read() -> None:
    kind = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}
    with pytest.raises(TrialFailed, match=r"Int4WeightOnlyConfig .* cannot be read; what can: Int8WeightOnlyConfig"):
        LAYOUT.facts({"quant_method": "torchao", "quant_type": kind})
