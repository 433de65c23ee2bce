"""VPTQ's layout: the vptq package's own forward, kept in a golden file, and one encoder in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.plugins.backends.small_checkpoints import pack_bits, vptq, vptq_config
from tests.plugins.backends.test_aqlm_layout import check_golden

from evenbits.compressor import LayerShape
from evenbits.errors import TrialFailed
from evenbits_backends.layout import layout

LAYOUT = layout("vptq")
SHAPE = LayerShape("up", 0, "up", 22, 20)


def facts(**changes: Any) -> dict[str, Any]:
    found = LAYOUT.facts(vptq_config({"up": (22, 20)}, **changes))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "name", ["v8-k64-16", "v4-k256-0", "v4-k32-32-groups-outliers", "shuffled", "unpacked"]
)  # fmt: skip
def test_the_package_computes_with_what_is_decoded(name: str) -> None:
    check_golden("vptq", name)


def test_plain_loops_agree() -> None:
    tensors, expected = vptq(torch.randn(22, 20), torch.Generator().manual_seed(1))
    assert torch.allclose(LAYOUT.decode(tensors, SHAPE, facts()), expected, rtol=1e-5, atol=1e-6)


def test_all_bits_of_a_residual_index_are_read() -> None:
    """More of them than the main index has, where the package 0.0.5 drops the upper ones."""
    plain = {"enable_norm": False, "enable_perm": False}
    main = torch.zeros(1, 4 * 4)
    residual = torch.arange(16.0).repeat_interleave(4)[None]
    wanted = [[(3 * column + row) % 16 for column in range(20)] for row in range(6)]
    packed = [pack_bits([0 + 4 * index for index in row], 6) for row in wanted]
    tensors = {
        "indices": torch.tensor([packed], dtype=torch.int32),
        "centroids.weight": main,
        "res_centroids.weight": residual,
    }
    told = facts(num_centroids=[-1, 4], num_res_centroids=[-1, 16], **plain)
    expected = torch.tensor(wanted, dtype=torch.float32).repeat_interleave(4, 0)[:22]
    assert torch.equal(LAYOUT.decode(tensors, SHAPE, told), expected)


def test_facts_are_told_once_for_layers_alike() -> None:
    config = vptq_config({f"model.layers.{i}.up": (22, 20) for i in range(9)})
    config["config_for_layers"]["model.layers.7.up"]["num_centroids"] = [-1, 64]
    found = LAYOUT.facts(config)
    assert found is not None
    assert [setting["centroids"] for setting in found["settings"]] == [32, 64]
    assert found["layers"] == {"model.layers.7.up": 1}
    bits = [LAYOUT.roles(LayerShape(f"model.layers.{i}.up", i, "up", 22, 20), found) for i in (0, 7)]
    assert bits[0] == bits[1]
    shared = {"quant_method": "vptq", "shared_layer_config": {"up": config["config_for_layers"]["model.layers.7.up"]}}
    by_kind = LAYOUT.facts(shared)
    assert by_kind is not None
    assert LAYOUT.role_bytes(LayerShape("model.layers.3.up", 3, "up", 22, 20), by_kind) == LAYOUT.role_bytes(
        LayerShape("model.layers.7.up", 7, "up", 22, 20), found
    )


@pytest.mark.parametrize(("changes", "message"), [
    ({"vector_quant_dim": "in"}, "vector_quant_dim = 'in' cannot be read"),
    ({"norm_dim": 1}, "norm_dim = 1 cannot be read"),
    ({"num_centroids": [-1, 48]}, "packed indices of 48 centroids; powers of two"),
    ({"num_centroids": 32}, "up: its entry in config_for_layers cannot be read"),
])  # fmt: skip
def test_configs_that_cannot_be_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrialFailed, match=message):
        facts(**changes)


def test_what_does_not_fit_is_refused() -> None:
    assert LAYOUT.facts({"quant_method": "aqlm"}) is None
    with pytest.raises(TrialFailed, match="says nothing of any layer"):
        LAYOUT.facts({"quant_method": "vptq"})
    tensors, _ = vptq(torch.randn(22, 20), torch.Generator().manual_seed(1))
    with pytest.raises(TrialFailed, match=r"up.indices: \(1, 6, 5\) in the checkpoint, \(1, 8, 5\) for a layer of 30"):
        LAYOUT.decode(tensors, LayerShape("up", 0, "up", 30, 20), facts())
    tensors["perm"] = torch.zeros_like(tensors["perm"])
    with pytest.raises(TrialFailed, match=r"up.perm: is no permutation of its 20 inputs"):
        LAYOUT.decode(tensors, SHAPE, facts())
