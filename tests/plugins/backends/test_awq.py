"""AWQ's layout against a plain encoder: word by word, output by output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evenbits.compressor import LayerShape
from evenbits.errors import TrialFailed
from evenbits_backends.layouts.awq import LAYOUT, decode_awq

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word, lowest four bits first


def words(codes: np.ndarray) -> np.ndarray:
    """(n, out) -> (n, out / 8) int32."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for word in range(packed.shape[1]):
        for place, output in enumerate(ORDER):
            packed[:, word] |= codes[:, 8 * word + output].astype(np.uint32) << np.uint32(4 * place)
    return packed.view(np.int32)


def encoded(out: int, columns: int, group: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = np.random.default_rng(out + columns + group)
    codes = draw.integers(0, 16, (columns, out))
    zeros = draw.integers(0, 16, (columns // group, out))
    scales = draw.uniform(0.01, 0.1, (columns // group, out)).astype(np.float16)
    index = np.arange(columns) // group
    weight = ((codes - zeros[index]) * scales.astype(np.float32)[index]).T
    tensors = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}
    return {name: torch.from_numpy(t) for name, t in tensors.items()}, torch.from_numpy(np.ascontiguousarray(weight))


def layer(out: int, columns: int) -> LayerShape:
    return LayerShape("model.layers.0.self_attn.v_proj", 0, "self_attn.v_proj", out, columns)


@pytest.mark.parametrize(("out", "columns", "group"), [(64, 64, 32), (8, 352, 32), (24, 172, 172), (352, 128, 128)])
def test_decodes_what_a_plain_encoder_packed(out: int, columns: int, group: int) -> None:
    tensors, weight = encoded(out, columns, group)
    facts = LAYOUT.facts({**CONFIG, "group_size": -1 if group == columns else group})
    assert facts is not None
    assert torch.equal(LAYOUT.decode(tensors, layer(out, columns), facts), weight)
    roles = LAYOUT.roles(layer(out, columns), facts)
    count = {role: tensors[name].numel() * tensors[name].element_size() for name, role in roles.items()}
    assert LAYOUT.role_bytes(layer(out, columns), facts) == count
    assert LAYOUT.grid(layer(out, columns), facts) == (4, facts["group"])


def test_an_old_config_names_no_method() -> None:
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert LAYOUT.facts(old) == {"group": 64}
    assert LAYOUT.facts({"quant_method": "gptq", "bits": 4}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "version 'gemv' cannot be read; what can: gemm"),
        ({"bits": 3}, "3 bits cannot be read; what can: 4"),
        ({"zero_point": False}, "without zero points"),
    ],
)
def test_what_cannot_be_decoded_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrialFailed, match=message):
        LAYOUT.facts({**CONFIG, **change})


def test_damaged_tensors_are_refused() -> None:
    tensors, _ = encoded(16, 64, 32)
    with pytest.raises(TrialFailed, match=r"qweight has the shape \(64, 2\), not \(128, 2\)"):
        decode_awq(tensors, layer(16, 128), 32)
    with pytest.raises(TrialFailed, match="does not fit words of 8 and groups of 48"):
        decode_awq(tensors, layer(16, 64), 48)
