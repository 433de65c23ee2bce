"""compressed-tensors' layouts against an encoder written by whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layouts.compressed_tensors import LAYOUT

NAME = "model.layers.0.mlp.down_proj"


def config(bits: int, group: int | None, *, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group,
        "strategy": "group" if group else "channel", **more,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def words(codes: np.ndarray, bits: int, *, padded: bool = False) -> np.ndarray:
    """(rows, n) not below 0 -> (rows, words) int32; padded: no code crosses into another word."""
    if padded:
        per_word = 32 // bits
        count = -(-codes.shape[1] // per_word)
        filled = np.zeros((len(codes), count * per_word), dtype=np.int64)
        filled[:, : codes.shape[1]] = codes
        parts = filled.reshape(len(codes), count, per_word)
        cut = [[sum(int(c) << (bits * i) for i, c in enumerate(word)) for word in row] for row in parts]
    else:
        count = -(-codes.shape[1] * bits // 32)
        rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
        cut = [[(row >> (32 * k)) & 0xFFFFFFFF for k in range(count)] for row in rows]
    return np.array(cut, dtype=np.uint32).view(np.int32)


def encoded(
    out: int, columns: int, bits: int, group: int | None, *, symmetric: bool = True, padded: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = np.random.default_rng(bits * columns + (group or 0))
    half, size = 2 ** (bits - 1), group or columns
    groups = -(-columns // size)
    codes = draw.integers(-half, half, (out, columns))
    zeros = np.zeros((out, groups), int) if symmetric else draw.integers(-half, half, (out, groups))
    scales = draw.uniform(0.01, 0.1, (out, groups)).astype(np.float32)
    index = np.arange(columns) // size
    weight = (codes - zeros[:, index]).astype(np.float32) * scales[:, index]
    tensors = {
        "weight_packed": words(codes + half, bits, padded=padded),
        "weight_scale": scales,
        "weight_shape": np.array([out, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(words((zeros + half).T, bits, padded=padded).T)
    return {name: torch.from_numpy(t) for name, t in tensors.items()}, torch.from_numpy(weight)


def layer(out: int, columns: int, name: str = NAME) -> LayerShape:
    return LayerShape(name, 0, "mlp.down_proj", out, columns, dtype="float32")


def facts_of(found: dict[str, Any]) -> dict[str, Any]:
    facts = LAYOUT.facts(found)
    assert facts is not None
    return facts


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "columns", "group"), [(40, 352, 32), (24, 172, None), (64, 172, 4)])
def test_decodes_what_a_plain_encoder_packed(
    bits: int, symmetric: bool, out: int, columns: int, group: int | None
) -> None:
    tensors, weight = encoded(out, columns, bits, group, symmetric=symmetric)
    facts = facts_of(config(bits, group, symmetric=symmetric))
    assert torch.equal(LAYOUT.decode(tensors, layer(out, columns), facts), weight)
    count: dict[Role, int] = {}
    roles = LAYOUT.roles(layer(out, columns), facts)
    assert roles.keys() == tensors.keys()
    for name, role in roles.items():
        count[role] = count.get(role, 0) + tensors[name].numel() * tensors[name].element_size()
    assert LAYOUT.role_bytes(layer(out, columns), facts) == count


@pytest.mark.parametrize("symmetric", [True, False])
def test_older_files_leave_bits_of_a_word_unused(symmetric: bool) -> None:
    tensors, weight = encoded(40, 352, 3, 32, symmetric=symmetric, padded=True)
    assert tensors["weight_packed"].shape == (40, 36)  # 33 without
    assert torch.equal(LAYOUT.decode(tensors, layer(40, 352), facts_of(config(3, 32, symmetric=symmetric))), weight)


def test_columns_may_lie_in_any_group() -> None:
    tensors, weight = encoded(8, 64, 4, 32)
    order = torch.from_numpy(np.random.default_rng(0).permutation(64))
    codes, _ = encoded(8, 64, 4, 32)
    facts = facts_of(config(4, 32, actorder="group"))
    assert "weight_g_idx" in LAYOUT.roles(layer(8, 64), facts)
    scale = tensors["weight_scale"]
    expected = weight / scale[:, torch.arange(64) // 32] * scale[:, order // 32]
    found = LAYOUT.decode({**codes, "weight_g_idx": (order // 32).int()}, layer(8, 64), facts)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_int8_as_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (16, 32), generator=draw, dtype=torch.int8)
    scale = torch.rand(16, 1, generator=draw)
    facts = facts_of({**config(8, None), "format": "naive-quantized"})
    assert LAYOUT.role_bytes(layer(16, 32), facts) == {Role.CODE: 512, Role.SCALE: 64}
    found = LAYOUT.decode({"weight": codes, "weight_scale": scale}, layer(16, 32), facts)
    assert torch.equal(found, codes.float() * scale)
    whole = facts_of({**config(8, None, strategy="tensor"), "format": "naive-quantized"})
    found = LAYOUT.decode({"weight": codes, "weight_scale": scale[:1, 0]}, layer(16, 32), whole)
    assert torch.equal(found, codes.float() * scale[0])
    assert LAYOUT.grid(layer(16, 32), whole) is None


def test_each_target_has_its_scheme() -> None:
    """A name goes before a pattern, a pattern before the class, in whatever order they stand."""
    found = config(4, 32)
    weights = found["config_groups"]["group_0"]["weights"]
    found["config_groups"]["group_1"] = {"targets": ["re:.*mlp"], "weights": {**weights, "num_bits": 3}}
    found["config_groups"]["group_2"] = {"targets": [NAME], "weights": {**weights, "num_bits": 8}}
    facts = facts_of(found)
    names = (NAME, "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    assert [LAYOUT.grid(layer(8, 64, name), facts) for name in names] == [(8, 32), (3, 32), (4, 32)]
    found["config_groups"].pop("group_0")
    tensors, _ = encoded(8, 64, 4, 32)
    with pytest.raises(TrialFailed, match="no target of the config is this layer"):
        LAYOUT.decode(tensors, layer(8, 64, names[2]), facts_of(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "a quantized cache"),
        ({"transform_config": {"config_groups": {}}}, "rotations"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({"format": "float-quantized"}, "float-quantized of int cannot be read"),
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": {"g": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, "activations"),
    ],
)
def test_what_cannot_be_decoded_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrialFailed, match=message):
        LAYOUT.facts({**config(4, 32), **change})
    assert LAYOUT.facts({"quant_method": "gptq"}) is None


def test_damaged_tensors_are_refused() -> None:
    tensors, _ = encoded(16, 64, 4, 32)
    facts = facts_of(config(4, 32))
    with pytest.raises(TrialFailed, match=r"weight_shape is \(16, 64\), not \(16, 128\)"):
        LAYOUT.decode(tensors, layer(16, 128), facts)
    with pytest.raises(TrialFailed, match="64 scales, not 32"):
        LAYOUT.decode({**tensors, "weight_scale": torch.ones(16, 4)}, layer(16, 64), facts)
    with pytest.raises(TrialFailed, match=r"weight_packed has the shape \(16, 4\)"):
        LAYOUT.decode({**tensors, "weight_packed": tensors["weight_packed"][:, :4]}, layer(16, 64), facts)
