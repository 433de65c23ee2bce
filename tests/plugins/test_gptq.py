"""GPTQ: identity with round-to-nearest, a slow twin, invariances, bytes, awkward inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenbits.compressor import Layer, LayerShape, ModelShapes, Needs, PackedLayer, Role
from evenbits.errors import TrialFailed
from evenbits.integer import predict
from evenbits.maths.bitpack import unpack
from evenbits.maths.hessian import calibrated_error
from evenbits_gptq import provide_compressors
from evenbits_gptq.compressor import GptqCompressor
from evenbits_gptq.options import GptqOptions
from evenbits_rtn.compressor import RtnCompressor
from evenbits_rtn.options import RtnOptions

SETTINGS: list[dict[str, Any]] = [
    {"group_size": None},
    {"group_size": None, "act_order": True},
    {"group_size": 32},
    {"group_size": 32, "act_order": True},
    {"group_size": 32, "static_groups": True},
    {"group_size": 32, "act_order": True, "static_groups": True},
    {"group_size": 32, "clip_search": True},
    {"group_size": 200, "block_size": 16},
]
IDS = [" ".join(f"{k}={v}" for k, v in setting.items()) for setting in SETTINGS]


def shape_of(weight: torch.Tensor) -> LayerShape:
    return LayerShape("model.layers.1.self_attn.o_proj", 1, "self_attn.o_proj", weight.shape[0], weight.shape[1])


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights and the second moment of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def compress(weight: torch.Tensor, moment: torch.Tensor | None, **options: Any) -> tuple[PackedLayer, torch.Tensor]:
    compressor = GptqCompressor(GptqOptions(**options))
    packed = compressor.compress(weight, Layer(shape_of(weight), second_moment=moment), None, torch.Generator())
    return packed, compressor.restore(packed, shape_of(weight), None)


def nearest(weight: torch.Tensor, **options: Any) -> tuple[PackedLayer, torch.Tensor]:
    compressor = RtnCompressor(RtnOptions(**{k: v for k, v in options.items() if k in RtnOptions.model_fields}))
    packed = compressor.compress(weight, Layer(shape_of(weight)), None, torch.Generator())
    return packed, compressor.restore(packed, shape_of(weight), None)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_with_an_identity_moment_it_is_round_to_nearest(setting: dict[str, Any], symmetric: bool, bits: int) -> None:
    weight = problem(24, 172)[0]
    packed, restored = compress(weight, torch.eye(172), bits=bits, symmetric=symmetric, **setting)
    twin, expected = nearest(weight, bits=bits, symmetric=symmetric, **setting)
    assert torch.equal(restored, expected)
    for name, tensor in twin.tensors.items():
        assert torch.equal(packed.tensors[name], tensor), name
    # equal diagonals keep their order, so the stored group index is that of neighbouring columns
    assert set(packed.tensors) - set(twin.tensors) <= {"group_index"}


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_round_to_nearest_on_correlated_inputs(setting: dict[str, Any], symmetric: bool, bits: int) -> None:
    weight, moment = problem(32, 172, seed=bits)
    _, restored = compress(weight, moment, bits=bits, symmetric=symmetric, **setting)
    _, expected = nearest(weight, bits=bits, symmetric=symmetric, **setting)
    assert calibrated_error(weight, restored, moment) < 0.8 * calibrated_error(weight, expected, moment)


def test_slow_twin_by_elimination() -> None:
    """Optimal brain surgeon in its textbook form, float64: after each column, eliminate it from the inverse."""
    weight, moment = problem(16, 48, seed=5)
    packed, _ = compress(weight, moment, bits=3, group_size=16, symmetric=False)
    work = weight.double().clone()
    inverse = torch.linalg.inv(moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(48))
    expected = torch.empty(16, 48, dtype=torch.int64)
    for i in range(48):
        if i % 16 == 0:
            low = work[:, i : i + 16].amin(1).clamp(max=0)
            high = work[:, i : i + 16].amax(1).clamp(min=0)
            scale = ((high - low).float() / 7).half().double()
            zero = (-low / scale).round()
        code = ((work[:, i] / scale).round() + zero).clamp(0, 7)
        expected[:, i] = code.long()
        error = (work[:, i] - (code - zero) * scale) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0
    codes = unpack(packed.tensors["codes"], 3, weight.numel()).view(16, 48)
    # a weight within float32 noise of a border may fall on the other side, and changes what follows in its row
    assert (codes == expected).float().mean() > 0.98


@pytest.mark.parametrize("setting", SETTINGS[:-1], ids=IDS[:-1])
def test_the_lazy_block_does_not_change_the_result(setting: dict[str, Any]) -> None:
    weight, moment = problem(32, 172, seed=2)
    expected, _ = compress(weight, moment, bits=3, symmetric=False, block_size=1, **setting)
    reference = unpack(expected.tensors["codes"], 3, weight.numel())
    for block_size in (7, 48, 128, 1000):
        packed, _ = compress(weight, moment, bits=3, symmetric=False, block_size=block_size, **setting)
        assert (unpack(packed.tensors["codes"], 3, weight.numel()) == reference).float().mean() > 0.98
        assert torch.allclose(packed.tensors["scale"].float(), expected.tensors["scale"].float(), rtol=0.02, atol=0.01)


def test_the_scale_of_the_moment_does_not_matter() -> None:
    weight, moment = problem(8, 64)
    for factor in (2.0, 2.0**-20, 2.0**20):
        assert torch.equal(compress(weight, moment, bits=3)[1], compress(weight, factor * moment, bits=3)[1])


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 50),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 1, 5, 16, 512]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    static_groups=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_predicted_bytes_are_the_stored_ones(
    rows: int,
    columns: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    act_order: bool,
    static_groups: bool,
) -> None:
    weight, moment = problem(rows, columns)
    options = GptqOptions(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        static_groups=static_groups,
    )
    packed, restored = compress(weight, moment, **options.model_dump())
    estimate = predict(options, ModelShapes((shape_of(weight),), parameters=weight.numel(), rest_bytes=0))
    assert estimate.linear_bytes == packed.nbytes
    for role in Role:
        stored = sum(t.numel() * t.element_size() for n, t in packed.tensors.items() if packed.roles[n] == role)
        assert stored == estimate.role_bytes.get(role, 0)
    assert restored.shape == weight.shape
    assert torch.isfinite(restored).all()


def test_act_order_stores_a_group_index_unless_static() -> None:
    weight, moment = problem(8, 172)
    moment = moment * torch.outer(torch.arange(1, 173), torch.arange(1, 173))  # the last inputs are the largest
    dynamic, _ = compress(weight, moment, group_size=32, act_order=True)
    index = unpack(dynamic.tensors["group_index"], 3, 172)
    assert index.bincount().tolist() == [32] * 5 + [12]
    order = moment.diagonal().argsort(descending=True)
    assert index[order].tolist() == sorted(index.tolist())
    assert dynamic.roles["group_index"] == Role.CODE
    for other in ({"static_groups": True, "group_size": 32}, {"group_size": None}):
        assert "group_index" not in compress(weight, moment, act_order=True, **other)[0].tensors


def test_static_groups_keep_the_grids_of_round_to_nearest() -> None:
    weight, moment = problem(16, 100)
    packed, restored = compress(
        weight, moment, bits=3, group_size=32, symmetric=False, act_order=True, static_groups=True
    )
    twin, expected = nearest(weight, bits=3, group_size=32, symmetric=False)
    assert torch.equal(packed.tensors["scale"], twin.tensors["scale"])
    assert torch.equal(packed.tensors["zero"], twin.tensors["zero"])
    assert not torch.equal(restored, expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs(act_order: bool) -> None:
    """Columns whose input is always zero restore to zero and do not disturb the others."""
    weight, moment = problem(8, 40)
    dead = [0, 7, 39]
    moment[dead], moment[:, dead] = 0, 0
    _, restored = compress(weight, moment, bits=4, group_size=None, symmetric=False, act_order=act_order)
    assert (restored[:, dead] == 0).all()
    assert calibrated_error(weight, restored, moment) < 0.02
    _, restored = compress(weight, torch.zeros(40, 40), bits=4, act_order=act_order)
    assert (restored == 0).all()


def test_zero_rows_and_tiny_weights() -> None:
    weight, moment = problem(8, 64)
    weight[3] = 0
    for size in (1.0, 3e-6, 1e4, 1e-12, 1e6):
        _, restored = compress(weight * size, moment, group_size=16)
        assert torch.isfinite(restored).all()
        assert (restored[3] == 0).all()
        if size not in (1e-12, 1e6):  # these leave float16's range
            assert calibrated_error(weight * size, restored, moment) < 0.05


def test_damping_is_noted_only_where_it_was_raised() -> None:
    weight, moment = problem(4, 16)
    assert compress(weight, moment)[0].meta == {}
    flat = torch.ones(16, 16)
    assert compress(weight, flat, damping=0.0)[0].meta["damping"] > 0


def test_failures_are_one_line_and_name_the_layer() -> None:
    weight, moment = problem(4, 16)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: GPTQ needs the second moment"):
        compress(weight, None)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: 1 of 64 weights are NaN"):
        compress(weight.index_fill(1, torch.tensor([2]), 0.0).masked_fill(_one(4, 16), float("nan")), moment)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: 1 of 256 entries"):
        compress(weight, moment.masked_fill(_one(16, 16), float("inf")))


def _one(rows: int, columns: int) -> torch.Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[1, 2] = True
    return mask


def test_inputs_are_left_as_they_were() -> None:
    weight, moment = problem(8, 40)
    before = weight.clone(), moment.clone()
    compress(weight, moment, group_size=16, act_order=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


def test_descriptor() -> None:
    (found,) = provide_compressors()
    assert found.name == "gptq"
    assert found.needs_of(GptqOptions()) == Needs("second_moment", sequential=True, within_block=True)
    assert found.needs_of(GptqOptions(sequential=False)) == Needs("second_moment")
    assert found.needs_of(GptqOptions(true_sequential=False)) == Needs("second_moment", sequential=True)
    assert isinstance(found.make(GptqOptions()), GptqCompressor)
