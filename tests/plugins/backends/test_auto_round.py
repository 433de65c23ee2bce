"""AutoRound's packings are GPTQ's and AWQ's: which of them, with what zero points, and the library's own file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.plugins.backends.wide_golden import NARROW, WIDE, read_golden

from evenbits.budget import BitBudget
from evenbits.compressor import LayerShape, ModelShapes, Role
from evenbits.errors import TrialFailed
from evenbits.foreign import Bench
from evenbits_backends.adapter import Adapter
from evenbits_backends.layouts.auto_round import LAYOUT
from evenbits_backends.libraries.autoround import AutoRoundOptions, descriptor, fit, predict
from evenbits_backends.trust import Claim, check_forward, check_weight

CONFIG = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize("name", ["autoround-2", "autoround-asymmetric"])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["64", "96"])
def test_the_librarys_own_file_decodes_to_what_its_layer_computes(name: str, shape: LayerShape) -> None:
    """The symmetric one stores zero points one too low, the asymmetric one as they are."""
    kept = read_golden(name, shape)
    assert kept.facts["zero_offset"] == (name == "autoround-2")
    check_forward(shape, kept.restored, kept.probe, kept.outputs)
    check_weight(shape, kept.weight, kept.restored, None, LAYOUT.grid(shape, kept.facts), Claim("auto-round", True))


def test_reads_the_packing_that_the_config_names() -> None:
    assert LAYOUT.facts(CONFIG) == {"bits": 4, "group": 32, "zero_offset": 1, "g_idx": False}
    for packing in ("auto_round", "auto_round:gptqmodel"):
        assert LAYOUT.facts({**CONFIG, "packing_format": packing}) == {
            "bits": 4, "group": 32, "zero_offset": 0, "g_idx": False,
        }  # fmt: skip
    awq = LAYOUT.facts({**CONFIG, "packing_format": "auto_round:auto_awq"})
    assert awq is not None
    assert LAYOUT.roles(NARROW, awq).keys() == {"qweight", "qzeros", "scales"}
    assert LAYOUT.facts({"quant_method": "gptq"}) is None
    for change in ({"data_type": "mx_fp"}, {"packing_format": "auto_round:llm_compressor"}, {"bits": 5}):
        with pytest.raises(TrialFailed, match=r"auto-round: .* cannot be read; what can"):
            LAYOUT.facts({**CONFIG, **change})


def test_layers_that_the_library_leaves_dense_are_billed_dense() -> None:
    """172 is no multiple of 32."""
    layers = (LayerShape("a", 0, "a", 64, 64), LayerShape("b", 0, "b", 172, 64))
    shapes = ModelShapes(layers, 64 * 236, 0, dtype="float16")
    roles = predict(AutoRoundOptions(bits=4, group_size=32), shapes).role_bytes
    assert roles[Role.DENSE] == 172 * 64 * 2
    assert roles[Role.CODE] == 64 * 64 // 2


def test_refuses_what_the_library_fails_to_save() -> None:
    with pytest.raises(ValidationError, match="fails to save 4 bits with zero points"):
        AutoRoundOptions(bits=4, symmetric=False)


def test_fit_and_needs() -> None:
    shapes = ModelShapes((LayerShape("a", 0, "a", 256, 256),), 65536, 0, dtype="float16")
    found = fit(BitBudget(4.2, 0.1), shapes, {"iters": 0, "symmetric": True})
    assert found == AutoRoundOptions(bits=4, group_size=128, iters=0)
    library = descriptor()
    assert library.needs_of(AutoRoundOptions(iters=0)).statistics == "none"
    assert library.needs_of(AutoRoundOptions()).statistics == "tokens"


def test_groups_that_do_not_divide_are_refused_before_the_library_starts(tmp_path: Path) -> None:
    """Of layers that it quantizes: one that it leaves dense has no groups."""
    layers = (LayerShape("a", 0, "a", 64, 352), LayerShape("b", 0, "b", 172, 64), LayerShape("c", 0, "c", 64, 172))
    adapter = descriptor().make(AutoRoundOptions(group_size=64, iters=0))
    assert isinstance(adapter, Adapter)
    bench = Bench(tmp_path, ModelShapes(layers, 1, 0), "float32", "cpu", 0, None, None, tmp_path)
    with pytest.raises(TrialFailed, match=r"a: its 352 columns are not whole groups of 64"):
        adapter.open(bench)
    bench = replace(bench, shapes=ModelShapes(layers[1:], 1, 0))
    with pytest.raises(TrialFailed, match=r"autoround\.py: no environment to run it in"):
        adapter.open(bench)
