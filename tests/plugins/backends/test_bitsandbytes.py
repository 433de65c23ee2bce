"""bitsandbytes' layout against a plain encoder, our own NF4, and the library's own file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.plugins.backends.wide_golden import NARROW, WIDE, read_golden, taken
from torch import Tensor

from evenbits.budget import BitBudget
from evenbits.compressor import Layer, LayerShape, ModelShapes, Refusal
from evenbits.errors import TrialFailed
from evenbits_backends.layouts.bitsandbytes import LAYOUT
from evenbits_backends.libraries.bitsandbytes import BitsandbytesOptions, fit, predict
from evenbits_backends.trust import Claim, check_forward, check_weight
from evenbits_nf4.compressor import Nf4Compressor, levels
from evenbits_nf4.options import Nf4Options

CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


def encoded(rows: int, columns: int, *, double: bool = False) -> tuple[dict[str, Tensor], list[list[float]]]:
    """One weight after the other, in Python: what a file holds, and the weight that it stands for."""
    draw = torch.Generator().manual_seed(rows + columns)
    table = levels()
    codes = torch.randint(0, 16, (rows * columns,), generator=draw).tolist()
    blocks = -(-len(codes) // 64)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, columns]}
    tensors = {
        "weight": torch.tensor(
            [[16 * a + b] for a, b in zip(codes[::2], [*codes[1::2], 0], strict=False)], dtype=torch.uint8
        ),
        "weight.quant_map": table,
    }
    scales = torch.rand(blocks, generator=draw)
    tensors["weight.absmax"] = scales
    if double:
        nested = torch.linspace(-1, 1, 256)
        coarse = torch.rand(-(-blocks // 256), generator=draw)
        which = torch.randint(0, 256, (blocks,), generator=draw)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.123456789012345678}
        tensors |= {
            "weight.absmax": which.to(torch.uint8), "weight.nested_absmax": coarse, "weight.nested_quant_map": nested,
        }  # fmt: skip
        scales = torch.stack([nested[w] * coarse[i // 256] + state["nested_offset"] for i, w in enumerate(which)])
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    flat = [float(table[code] * scales[at // 64]) for at, code in enumerate(codes)]
    return tensors, [flat[row * columns : (row + 1) * columns] for row in range(rows)]


@pytest.mark.parametrize(("rows", "columns"), [(4, 64), (5, 172), (3, 33), (300, 64)])
@pytest.mark.parametrize("double", [False, True])
def test_decodes_what_a_plain_encoder_packed(rows: int, columns: int, double: bool) -> None:
    """172 columns: blocks run across the ends of rows; 99 weights: half a byte is left over."""
    tensors, weight = encoded(rows, columns, double=double)
    shape = LayerShape("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", rows, columns)
    facts = LAYOUT.facts({**CONFIG, "bnb_4bit_use_double_quant": double})
    assert facts is not None
    assert torch.equal(LAYOUT.decode(tensors, shape, facts), torch.tensor(weight))
    predicted, found = LAYOUT.role_bytes(shape, facts), taken(tensors, LAYOUT.roles(shape, facts))
    assert predicted.keys() == found.keys()
    slack = 3 if double else 0  # one number's digits
    assert all(abs(predicted[role] - found[role]) <= slack for role in found)


def test_nf4_is_the_nf4_of_this_project() -> None:
    """Same blocks, same codes: of the library's own file every value is the one that our method stores, but for the
    last digit of the table, which the library writes out and we compute."""
    kept = read_golden("bitsandbytes-nf4", NARROW)
    ours = Nf4Compressor(Nf4Options())
    packed = ours.compress(kept.weight, Layer(NARROW), None, torch.Generator())
    torch.testing.assert_close(ours.restore(packed, NARROW, None), kept.restored, rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-double"])
def test_the_librarys_own_file_decodes_to_what_its_layer_computes(name: str) -> None:
    kept = read_golden(name, NARROW)
    check_forward(NARROW, kept.restored, kept.probe, kept.outputs, kept.weight, "bitsandbytes")
    check_weight(NARROW, kept.weight, kept.restored, None, LAYOUT.grid(NARROW, kept.facts), Claim("bitsandbytes"))


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-double"])
def test_a_library_that_computes_with_wrong_weights_is_caught(name: str) -> None:
    """96 columns are one and a half blocks. On a CPU with AVX-512 the library stores the right codes, its layer cannot
    run, and its own dequantize multiplies by other blocks' scales: the outputs beside the file are those."""
    kept = read_golden(name, WIDE)
    check_weight(WIDE, kept.weight, kept.restored, None, LAYOUT.grid(WIDE, kept.facts), Claim("bitsandbytes"))
    with pytest.raises(TrialFailed, match=r"down_proj: the outputs of bitsandbytes's own layer have .* error of 0\.0"):
        check_forward(WIDE, kept.restored, kept.probe, kept.outputs, kept.weight, "bitsandbytes")
    # and were that weight the stored one, its error alone would give it away
    used = torch.linalg.lstsq(kept.probe, kept.outputs).solution.T  # of least norm, on the four probes' span
    span = torch.linalg.pinv(kept.probe) @ kept.probe
    with pytest.raises(TrialFailed, match=r"down_proj: bitsandbytes stored a weight with a relative squared error"):
        check_weight(
            WIDE, kept.weight, kept.restored + (used - kept.restored @ span) * (96 / 4) ** 0.5, None,
            LAYOUT.grid(WIDE, kept.facts), Claim("bitsandbytes"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "LLM.int8"),
        ({"bnb_4bit_quant_type": "af4"}, "af4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bfloat16"),
    ],
)
def test_refuses_what_it_cannot_read(change: dict[str, Any], named: str) -> None:
    with pytest.raises(TrialFailed, match=named):
        LAYOUT.facts({**CONFIG, **change})
    assert LAYOUT.facts({"quant_method": "gptq", "bits": 4}) is None


def test_refuses_codes_of_another_shape() -> None:
    tensors, _ = encoded(4, 64)
    with pytest.raises(TrialFailed, match=r"q_proj: 128 bytes of codes for a weight of \(4, 64\)"):
        LAYOUT.decode(tensors, LayerShape("q_proj", 0, "q_proj", 64, 4), {"type": "nf4", "double": False})


def test_fits_nf4_where_four_bits_and_a_half_are_wanted() -> None:
    shapes = ModelShapes((LayerShape("a", 0, "a", 512, 512),), 512 * 512, 0, dtype="float16")
    assert fit(BitBudget(4.5, 0.1), shapes, {}) == BitsandbytesOptions()
    assert isinstance(fit(BitBudget(3.0, 0.1), shapes, {}), Refusal)
    double = fit(BitBudget(4.2, 0.1), shapes, {})
    assert isinstance(double, BitsandbytesOptions)
    assert double.double_quant
    assert predict(double, shapes).paper_bits == pytest.approx(4.127, abs=1e-3)
