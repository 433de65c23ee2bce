"""AQLM's layout: the aqlm package's own forward, kept in a golden file, and one encoder in plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.plugins.backends.small_checkpoints import AQLM, aqlm
from torch import Tensor

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import layout

LAYOUT = layout("aqlm")


def golden(which: str) -> dict[str, tuple[dict[str, Any], LayerShape, dict[str, Tensor]]]:
    """Layers with random codes by name: config, shape, and tensors with inputs (3, in) and the package's outputs."""
    with safe_open(Path(__file__).parent / "golden" / f"{which}_layers.safetensors", framework="pt") as opened:
        facts = json.loads(opened.metadata()["facts"])
        names = list(opened.keys())
        return {
            layer: (
                told["config"],
                LayerShape(layer, 0, layer, told["out"], told["in"]),
                {name.removeprefix(f"{layer}."): opened.get_tensor(name) for name in names if name.startswith(layer)},
            )
            for layer, told in facts.items()
        }


def check_golden(which: str, name: str) -> None:
    """Decodes to what the package's own layer computes with; every tensor is billed, as many bytes as foretold."""
    config, shape, tensors = golden(which)[name]
    inputs, outputs = tensors.pop("inputs"), tensors.pop("outputs")
    facts = layout(which).facts(config)
    assert facts is not None
    roles = layout(which).roles(shape, facts)
    assert roles.keys() == tensors.keys()
    restored = layout(which).decode(tensors, shape, json.loads(json.dumps(facts)))
    assert restored.dtype == torch.float32
    assert torch.allclose(inputs @ restored.T, outputs, rtol=1e-5, atol=1e-5 * float(outputs.abs().max()))
    stored: dict[Role, int] = {}
    for part, role in roles.items():
        stored[role] = stored.get(role, 0) + tensors[part].numel() * tensors[part].element_size()
    assert layout(which).role_bytes(shape, facts) == stored
    assert layout(which).grid(shape, facts) is None


@pytest.mark.parametrize("name", ["2x8g8", "3x5g4", "2x6g4o2", "1x10g8"])
def test_the_package_computes_with_what_is_decoded(name: str) -> None:
    check_golden("aqlm", name)


def test_plain_loops_agree() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    tensors, expected = aqlm(weight, torch.Generator().manual_seed(1))
    facts = LAYOUT.facts(AQLM)
    assert facts is not None
    restored = LAYOUT.decode(tensors, LayerShape("up", 0, "up", 12, 20), facts)
    assert torch.allclose(restored, expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_with_both_shapes() -> None:
    facts = LAYOUT.facts(AQLM)
    assert facts is not None
    tensors, _ = aqlm(torch.randn(12, 20), torch.Generator().manual_seed(1))
    with pytest.raises(TrialFailed, match=r"up.codes: \(12, 5, 2\) in the checkpoint, \(16, 5, 2\) for a layer of 16"):
        LAYOUT.decode(tensors, LayerShape("up", 0, "up", 16, 20), facts)
    with pytest.raises(TrialFailed, match="up: a layer of 12 x 22 has no groups of 1 x 4"):
        LAYOUT.decode(tensors, LayerShape("up", 0, "up", 12, 22), facts)


def test_configs() -> None:
    assert LAYOUT.facts({"quant_method": "gptq", "bits": 4}) is None
    assert LAYOUT.facts({"quant_method": "aqlm"}) == {
        "nbits_per_codebook": 16, "num_codebooks": 1, "in_group_size": 8, "out_group_size": 1,
    }  # fmt: skip
    with pytest.raises(TrialFailed, match="num_codebooks = 0 in its config"):
        LAYOUT.facts({**AQLM, "num_codebooks": 0})
    with pytest.raises(TrialFailed, match="codes of 24 bits; up to 16"):
        LAYOUT.facts({**AQLM, "nbits_per_codebook": 24})
