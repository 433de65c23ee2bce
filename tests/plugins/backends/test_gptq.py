"""GPTQ's layout against a plain encoder: a row of codes is one whole number, cut into words of 32 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layouts.gptq import LAYOUT, decode_gptq

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n) -> (rows, words) int32."""
    count = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    cut = [[(row >> (32 * k)) & 0xFFFFFFFF for k in range(count)] for row in rows]
    return np.array(cut, dtype=np.uint32).view(np.int32)


def encoded(
    out: int, columns: int, bits: int, group: int, *, offset: int = 1, order: bool = False, least_zero: int = 1
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a file holds, and the weight (out, in) that it stands for."""
    draw = np.random.default_rng(bits * columns + group)
    groups = -(-columns // group)
    codes = draw.integers(0, 2**bits, (out, columns))
    zeros = draw.integers(least_zero, 2**bits, (groups, out))
    scales = draw.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
    index = draw.permutation(np.arange(columns) // group) if order else np.arange(columns) // group
    weight = (codes - zeros.T[:, index]) * scales.astype(np.float32).T[:, index]
    tensors = {
        "qweight": words(codes, bits).T,
        "qzeros": words(zeros - offset, bits),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}, torch.from_numpy(weight)


def layer(out: int, columns: int) -> LayerShape:
    return LayerShape("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", out, columns)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "columns", "group"), [(64, 128, 32), (40, 172, 32), (8, 352, 64), (24, 96, 96)])
def test_decodes_what_a_plain_encoder_packed(bits: int, out: int, columns: int, group: int) -> None:
    """172 columns fill no whole words, 352 columns are five and a half groups of 64."""
    tensors, weight = encoded(out, columns, bits, group)
    config = {**CONFIG, "bits": bits, "group_size": -1 if group == columns else group}
    facts = LAYOUT.facts(config)
    assert facts is not None
    assert torch.equal(LAYOUT.decode(tensors, layer(out, columns), facts), weight)
    roles = LAYOUT.roles(layer(out, columns), facts)
    count = dict.fromkeys(roles.values(), 0)
    for name, role in roles.items():
        count[role] += tensors[name].numel() * tensors[name].element_size()
    assert LAYOUT.role_bytes(layer(out, columns), facts) == count


def test_second_format_stores_zero_points_as_they_are() -> None:
    tensors, weight = encoded(16, 64, 4, 32, offset=0, least_zero=0)
    facts = LAYOUT.facts({**CONFIG, "checkpoint_format": "gptq_v2"})
    assert facts is not None
    assert facts["zero_offset"] == 0
    assert torch.equal(LAYOUT.decode(tensors, layer(16, 64), facts), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_borrows_from_its_neighbour(bits: int) -> None:
    """GPTQModel lowers all zero points of a word in one subtraction."""
    tensors, weight = encoded(64, 1024, bits, 32, offset=0, least_zero=0)
    ones = sum(1 << at for at in range(0, 32, bits))
    stored = tensors["qzeros"].numpy().view(np.uint32).astype(np.int64)
    # a 0 with a neighbour above it in its word
    assert any((stored >> at & (2**bits - 1) == 0).any() for at in range(0, 32 - bits, bits))
    tensors["qzeros"] = torch.from_numpy(((stored - ones) & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
    assert torch.equal(decode_gptq(tensors, layer(64, 1024), bits, 32, 1), weight)


def test_3_bits_lower_each_zero_point_by_itself() -> None:
    tensors, weight = encoded(32, 64, 3, 32, offset=0, least_zero=0)
    groups, codes = 2, np.random.default_rng(3 * 64 + 32)
    codes.integers(0, 8, (32, 64))
    zeros = codes.integers(0, 8, (groups, 32))
    tensors["qzeros"] = torch.from_numpy(words((zeros - 1) % 8, 3))
    assert (zeros == 0).any()
    assert torch.equal(decode_gptq(tensors, layer(32, 64), 3, 32, 1), weight)


def test_columns_may_lie_in_any_group() -> None:
    tensors, weight = encoded(16, 96, 4, 32, order=True)
    assert torch.equal(decode_gptq(tensors, layer(16, 96), 4, 32, 1), weight)
    del tensors["g_idx"]
    assert not torch.equal(decode_gptq(tensors, layer(16, 96), 4, 32, 1), weight)


def test_layers_of_a_pattern_have_their_own_bits() -> None:
    facts = LAYOUT.facts({**CONFIG, "dynamic": {"-:.*q_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}}})
    assert facts is not None
    assert LAYOUT.grid(layer(8, 128), facts) == (8, 64)
    other = LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 8, 128)
    assert LAYOUT.grid(other, facts) == (4, 32)
    tensors, weight = encoded(8, 128, 8, 64)
    assert torch.equal(LAYOUT.decode(tensors, layer(8, 128), facts), weight)


def test_an_old_config_names_no_method() -> None:
    assert LAYOUT.facts({"bits": 4, "group_size": 128, "desc_act": True}) == {"bits": 4, "group": 128, "zero_offset": 1}
    assert LAYOUT.facts({"quant_method": "awq", "bits": 4, "group_size": 128}) is None
    assert LAYOUT.facts({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, "'marlin' cannot be read; what can: gptq, gptq_v2"),
        ({"bits": 5}, "5 bits cannot be read; what can: 2, 3, 4, 8"),
        ({"pack_dtype": "int16"}, "int16 cannot be read"),
    ],
)
def test_what_cannot_be_decoded_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrialFailed, match=message):
        LAYOUT.facts({**CONFIG, **change})


def test_damaged_tensors_are_refused() -> None:
    tensors, _ = encoded(16, 64, 4, 32)
    with pytest.raises(TrialFailed, match=r"qweight has the shape \(8, 16\), not \(16, 16\)"):
        decode_gptq(tensors, layer(16, 128), 4, 32, 1)
    with pytest.raises(TrialFailed, match="g_idx points past its 2 groups"):
        decode_gptq({**tensors, "g_idx": tensors["g_idx"] + 1}, layer(16, 64), 4, 32, 1)
    with pytest.raises(TrialFailed, match="no scales"):
        decode_gptq({name: t for name, t in tensors.items() if name != "scales"}, layer(16, 64), 4, 32, 1)


def test_zero_points_are_billed_even_where_all_are_alike() -> None:
    found = LAYOUT.role_bytes(layer(128, 352), {"bits": 4, "group": 32, "zero_offset": 1})
    assert found == {
        Role.CODE: 44 * 128 * 4,
        Role.ZERO: 11 * 16 * 4,
        Role.SCALE: 11 * 128 * 2,
        Role.META: 352 * 4,
    }
