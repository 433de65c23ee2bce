"""HQQ's layout against a plain encoder and the library's own file."""

from __future__ import annotations

import pytest
import torch
from tests.plugins.backends.wide_golden import NARROW, WIDE, read_golden

from evenbits.budget import BitBudget
from evenbits.compressor import LayerShape, ModelShapes, Refusal
from evenbits.errors import TrialFailed
from evenbits_backends.layouts.hqq import LAYOUT
from evenbits_backends.libraries.hqq import HqqOptions, fit
from evenbits_backends.trust import Claim, check_forward, check_weight

PER_UNIT = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def config(bits: int, group: int | None) -> dict[str, object]:
    chosen = {"weight_quant_params": {"nbits": bits, "group_size": group, "axis": 1}}
    return {"quant_method": "hqq", "quant_config": chosen, "compute_dtype": "float32"}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 64, 32), (32, 172, 64 * 43 // 16), (24, 96, None)])
def test_decodes_what_a_plain_encoder_packed(bits: int, rows: int, columns: int, group: int | None) -> None:
    """172: groups that end within a row. The first of p groups of a unit is in its highest bits."""
    size = group or columns
    groups = rows * columns // size
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (groups, size), generator=draw).tolist()
    held = PER_UNIT[bits]
    units = -(-groups // held)
    packed = [
        [
            sum(codes[p * units + unit][at] << bits * (held - 1 - p) for p in range(held) if p * units + unit < groups)
            for at in range(size)
        ]
        for unit in range(units)
    ]
    zero, scale = torch.rand(groups, 1, generator=draw), torch.rand(groups, 1, generator=draw)
    tensors = {
        "W_q": torch.tensor(packed, dtype=torch.int32 if bits == 3 else torch.uint8),
        "zero": zero,
        "scale": scale,
    }
    shape = LayerShape("q", 0, "q", rows, columns)
    facts = LAYOUT.facts(config(bits, group))
    assert facts == {"bits": bits, "group": group or 0, "dtype": "float32"}
    weight = torch.stack([(torch.tensor(codes[i]) - zero[i]) * scale[i] for i in range(groups)]).view(rows, columns)
    assert torch.equal(LAYOUT.decode(tensors, shape, facts), weight)


@pytest.mark.parametrize("name", ["hqq-2", "hqq-3"])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["64", "96"])
def test_the_librarys_own_file_decodes_to_what_its_layer_computes(name: str, shape: LayerShape) -> None:
    kept = read_golden(name, shape)
    check_forward(shape, kept.restored, kept.probe, kept.outputs)
    check_weight(shape, kept.weight, kept.restored, None, LAYOUT.grid(shape, kept.facts), Claim("hqq"))


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(TrialFailed, match="axis 0"):
        LAYOUT.facts({**config(4, 64), "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 0}}})
    with pytest.raises(TrialFailed, match=r"q: W_q has the shape \(2, 32\), for 8 groups of 32"):
        LAYOUT.decode({"W_q": torch.zeros(2, 32)}, LayerShape("q", 0, "q", 4, 64), {"bits": 4, "group": 32})


def test_fit_leaves_out_what_the_library_cuts_or_refuses() -> None:
    """172 columns of 5 rows: whole rows are 5 groups, which do not fill bytes of 2 codes."""
    shapes = ModelShapes((LayerShape("odd", 0, "odd", 5, 172),), 860, 0, dtype="float16")
    found = fit(BitBudget(4.0, 0.9), shapes, {"bits": 4})
    assert isinstance(found, Refusal)
    assert "odd" in found.reason
    plain = ModelShapes((LayerShape("even", 0, "even", 256, 256),), 65536, 0, dtype="float16")
    assert fit(BitBudget(4.5, 0.1), plain, {}) == HqqOptions(bits=4, group_size=64)
