"""SparseGPT: identities, a slow twin, brain surgery in closed form, exact bytes, published bits, fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from evenbits.budget import BitBudget
from evenbits.compressor import Layer, LayerShape, ModelShapes, Needs, PackedLayer, Refusal, Role
from evenbits.errors import SuiteError, TrialFailed
from evenbits.maths.bitpack import pack, unpack
from evenbits.maths.hessian import calibrated_error
from evenbits.shapes import LLAMA2_7B, QWEN3_14B, llama_shapes
from evenbits.testing import check_compressor, check_linear, make_case
from evenbits_gptq.compressor import GptqCompressor
from evenbits_gptq.options import GptqOptions
from evenbits_sparsegpt import provide_compressors
from evenbits_sparsegpt.compressor import SparseGptCompressor
from evenbits_sparsegpt.options import SparseGptOptions, kept_count, predict, removed_of
from evenbits_sparsegpt.settings import expected_distortion, fit

(DESCRIPTOR,) = provide_compressors()


def shape_of(weight: Tensor) -> LayerShape:
    return LayerShape("model.layers.1.self_attn.o_proj", 1, "self_attn.o_proj", weight.shape[0], weight.shape[1])


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian weights and the second moment of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def compress(weight: Tensor, moment: Tensor | None, **options: Any) -> tuple[PackedLayer, Tensor]:
    compressor = SparseGptCompressor(SparseGptOptions(**options))
    packed = compressor.compress(weight, Layer(shape_of(weight), second_moment=moment), None, torch.Generator())
    return packed, compressor.restore(packed, shape_of(weight), None)


@pytest.mark.parametrize(
    "setting",
    [{"bits": 3, "group_size": 16, "symmetric": False}, {"pattern": "2:4", "bits": 4}, {"pattern": "4:8"}],
    ids=str,
)
def test_contract(setting: dict[str, Any]) -> None:
    assert check_compressor(DESCRIPTOR, setting, fitted=False) == []  # tests/contract has the defaults, and fit


# -- identities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_with_nothing_removed_the_weights_return(dtype: str) -> None:
    weight, moment = problem(24, 172)
    packed, restored = compress(weight, moment, sparsity=0.0, value_dtype=dtype)
    assert torch.equal(restored, weight.to(getattr(torch, dtype)).float())
    assert packed.nbytes == weight.numel() * restored.to(getattr(torch, dtype)).element_size()


@pytest.mark.parametrize("group_size", [None, 32, 200])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_with_nothing_removed_and_quantised_it_is_gptq(group_size: int | None, symmetric: bool, bits: int) -> None:
    weight, moment = problem(24, 172)
    setting: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    packed, restored = compress(weight, moment, sparsity=0.0, **setting)
    compressor = GptqCompressor(GptqOptions(**setting))
    twin = compressor.compress(weight, Layer(shape_of(weight), second_moment=moment), None, torch.Generator())
    assert packed.tensors.keys() == twin.tensors.keys()
    for name, tensor in twin.tensors.items():
        assert torch.equal(packed.tensors[name], tensor), name
    assert packed.roles == twin.roles
    assert torch.equal(restored, compressor.restore(twin, shape_of(weight), None))


def test_with_an_identity_moment_it_is_magnitude_pruning() -> None:
    weight = problem(24, 172)[0]
    _, restored = compress(weight, torch.eye(172), mask_block=64, value_dtype="float32")
    for start in (0, 64, 128):
        block, found = weight[:, start : start + 64], restored[:, start : start + 64]
        magnitudes = block.abs().flatten().sort().values
        threshold = magnitudes[block.numel() // 2 - 1]
        assert torch.equal(found, torch.where(block.abs() > threshold, block, 0.0))
    _, restored = compress(weight, torch.eye(172), pattern="1:4", value_dtype="float32")
    groups = weight.view(24, 43, 4)
    largest = groups.abs() == groups.abs().amax(dim=2, keepdim=True)
    assert torch.equal(restored, torch.where(largest, groups, 0.0).view(24, 172))


# -- an independent version ----------------------------------------------------------------------------------


def slow(
    weight: Tensor, moment: Tensor, sparsity: float, span: int, kept: int | None, bits: int | None, size: int
) -> Tensor:
    """SparseGPT row by row, weight by weight in float64; each inverse is that of the columns left, not a factor."""
    work, rows, columns = weight.double().clone(), weight.shape[0], weight.shape[1]
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(columns)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(columns)]
    removed: set[tuple[int, int]] = set()
    scale = zero = torch.zeros(rows, dtype=torch.float64)
    for i in range(columns):
        if i % span == 0:
            block = range(i, min(i + span, columns))
            scored = [(float(work[r, j] ** 2 / inverses[j][0, 0]), r, j) for r in range(rows) for j in block]
            if kept is None:
                removed |= {(r, j) for _, r, j in sorted(scored)[: int(sparsity * len(scored))]}
            else:
                for r in range(rows):
                    own = sorted(entry for entry in scored if entry[1] == r)
                    removed |= {(r, j) for _, _, j in own[: max(0, len(own) - kept)]}
        if bits is not None and i % size == 0:
            high = work[:, i : i + size].amax(1).clamp(min=0)
            low = work[:, i : i + size].amin(1).clamp(max=0)
            scale = ((high - low).float() / (2**bits - 1)).half().double()
            zero = (-low / scale).round()
        for r in range(rows):
            value = float(work[r, i])
            if (r, i) in removed:
                stays = 0.0
            elif bits is None:
                stays = value
            else:
                code = max(0, min(2**bits - 1, round(value / float(scale[r])) + int(zero[r])))
                stays = (code - int(zero[r])) * float(scale[r])
            work[r, i + 1 :] -= (value - stays) / inverses[i][0, 0] * inverses[i][0, 1:]
            work[r, i] = stays
    return work


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"sparsity": 0.5, "mask_block": 16}, None),
        ({"sparsity": 0.3, "mask_block": 20}, None),
        ({"pattern": "2:4"}, 2),
        ({"pattern": "3:10"}, 3),
        ({"sparsity": 0.5, "mask_block": 16, "bits": 4, "group_size": 12, "symmetric": False}, None),
        ({"pattern": "2:4", "bits": 3, "group_size": 16, "symmetric": False}, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [128, 7])
def test_slow_twin(options: dict[str, Any], kept: int | None, block_size: int) -> None:
    weight, moment = problem(12, 48, seed=5)
    found = SparseGptOptions(**options, value_dtype="float32", block_size=block_size)
    _, restored = compress(weight, moment, **found.model_dump())
    span = found.mask_block if kept is None else found.kept_of[1] if found.kept_of else 0
    expected = slow(weight, moment, found.sparsity, span, kept, found.bits, found.group_size or 48)
    # a score or weight within float32 noise of a border may fall on the other side, and changes what follows in its row
    close = torch.isclose(restored.double(), expected, rtol=1e-3, atol=2e-3)
    assert close.all(dim=1).float().mean() > 0.9
    if found.bits is None:
        assert torch.equal(restored[close.all(dim=1)] == 0, expected[close.all(dim=1)] == 0)


def test_one_removed_weight_is_brain_surgery() -> None:
    """The row after removing w_q is the closed form: w - w_q / [C]_qq C[:, q], C the inverse of the damped moment."""
    weight, moment = problem(1, 24, seed=3)
    weight[0] = 4 + weight[0].abs()
    weight[0, 0] = 1.0  # by far the least; being first, all others are free to make up for it
    _, restored = compress(weight, moment, sparsity=1 / 24, value_dtype="float32")
    inverse = torch.linalg.inv(moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(24))
    expected = weight.double() - inverse[0] / inverse[0, 0]
    assert restored[0, 0] == 0
    assert torch.allclose(restored.double(), expected, rtol=1e-4, atol=1e-4)
    # and it is the least error of all rows with that zero: the gradient on the others vanishes
    damped = torch.linalg.inv(inverse)
    gradient = ((restored.double() - weight.double()) @ damped)[0]
    assert gradient[1:].abs().max() < 1e-3 * gradient[0].abs()


def test_the_first_block_keeps_the_highest_scores() -> None:
    weight, moment = problem(16, 96, seed=8)
    _, restored = compress(weight, moment, sparsity=0.6, mask_block=32)
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(96)
    pivots = torch.tensor([float(torch.linalg.inv(damped[j:, j:])[0, 0]) for j in range(32)])
    kept = restored[:, :32] != 0
    score = weight[:, :32] ** 2 / pivots
    assert int((~kept).sum()) == removed_of(512, 0.6) == 307
    assert score[kept].min() >= score[~kept].max()


# -- what it is for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"sparsity": 0.5},
        {"pattern": "2:4"},
        {"sparsity": 0.5, "bits": 4},
        {"pattern": "4:8", "bits": 3, "group_size": 32},
    ],
    ids=str,
)
def test_it_beats_magnitude_pruning_on_correlated_inputs(setting: dict[str, Any]) -> None:
    weight, moment = problem(32, 256, seed=1)
    _, restored = compress(weight, moment, **setting)
    _, plain = compress(weight, torch.eye(256), **setting)
    assert calibrated_error(weight, restored, moment) < 0.75 * calibrated_error(weight, plain, moment)


def test_freer_patterns_and_more_bits_lose_less() -> None:
    weight, moment = problem(64, 256, seed=4)
    tried: dict[str, dict[str, Any]] = {
        "unstructured": {}, "4:8": {"pattern": "4:8"}, "2:4": {"pattern": "2:4"}, "1:2": {"pattern": "1:2"},
        "4 bits": {"bits": 4}, "3 bits": {"bits": 3}, "quarter": {"sparsity": 0.25},
    }  # fmt: skip
    error = {
        name: calibrated_error(weight, compress(weight, moment, **options)[1], moment)
        for name, options in tried.items()
    }
    assert error["quarter"] < error["unstructured"] < error["4:8"] < error["2:4"] < error["1:2"]
    assert error["unstructured"] < error["4 bits"] < error["3 bits"]


def test_joint_quantisation_beats_quantising_afterwards() -> None:
    weight, moment = problem(64, 256, seed=6)
    _, joint = compress(weight, moment, bits=3)
    _, pruned = compress(weight, moment)
    scale = 2 * pruned.abs().amax(1, keepdim=True) / 7
    after = (pruned / scale).round().clamp(-4, 3) * scale
    assert calibrated_error(weight, joint, moment) < 0.9 * calibrated_error(weight, after, moment)


def test_the_order_of_calibration_batches_and_the_scale_do_not_matter() -> None:
    weight, _ = problem(16, 96)
    generator = torch.Generator().manual_seed(2)
    batches = list((torch.randn(8, 40, 96, generator=generator) @ torch.randn(96, 96, generator=generator)).double())
    moments = [
        sum((b.T @ b for b in order), torch.zeros(96, 96).double()).float() for order in (batches, batches[::-1])
    ]
    first = compress(weight, moments[0])[1]
    assert (compress(weight, moments[1])[1] == first).float().mean() > 0.98
    assert torch.equal(compress(weight, moments[0] * 2.0**-12)[1], first)


# -- what is stored ------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 50),
    pattern=st.sampled_from(["unstructured", "2:4", "4:8", "1:2", "1:4", "3:7", "2:16"]),
    sparsity=st.floats(0, 0.99),
    bits=st.sampled_from([None, 2, 3, 8]),
    group_size=st.sampled_from([None, 5, 16]),
    symmetric=st.booleans(),
    mask_block=st.sampled_from([1, 7, 16, 128]),
    dead=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_predicted_bytes_are_the_stored_ones(dead: bool, rows: int, columns: int, **options: Any) -> None:
    if options["pattern"] != "unstructured":
        del options["sparsity"]
    weight, moment = problem(rows, columns)
    if dead:  # scores of 0 alike
        moment[: columns // 2], moment[:, : columns // 2] = 0, 0
        moment[0, 0] = 1
    made = SparseGptOptions(**options)
    packed, restored = compress(weight, moment, **made.model_dump())
    estimate = predict(made, ModelShapes((shape_of(weight),), parameters=weight.numel(), rest_bytes=0))
    assert estimate.linear_bytes == packed.nbytes
    assert estimate.index_bits == 8 * estimate.role_bytes.get(Role.CODE, 0) / weight.numel()  # as the ledger counts
    for role in Role:
        stored = sum(t.numel() * t.element_size() for n, t in packed.tensors.items() if packed.roles[n] == role)
        assert stored == estimate.role_bytes.get(role, 0)
    assert int((restored != 0).sum()) <= kept_count(made, rows, columns)
    if made.bits is None:
        assert len(packed.tensors["values"]) == kept_count(made, rows, columns)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "5:7"])
@pytest.mark.parametrize("columns", [64, 67, 33])
def test_every_group_keeps_exactly_n_of_m(pattern: str, columns: int) -> None:
    n, m = map(int, pattern.split(":"))
    weight, moment = problem(16, columns)
    _, restored = compress(weight, moment, pattern=pattern)
    for start in range(0, columns, m):
        group = restored[:, start : start + m]
        # the last group may be short; it keeps min(n, its width) without padding
        assert ((group != 0).sum(1) == min(n, group.shape[1])).all()


def test_masks_are_bitmaps_or_positions() -> None:
    weight, moment = problem(8, 64)
    packed, restored = compress(weight, moment, sparsity=0.7)
    assert torch.equal(packed.tensors["mask"], pack((restored != 0).long(), 1))
    assert torch.equal(packed.tensors["values"].float(), restored[restored != 0])  # row-major
    packed, restored = compress(weight, moment, pattern="2:4")
    places = unpack(packed.tensors["mask"], 2, 8 * 32).view(8, 16, 2)
    assert torch.equal(restored.view(8, 16, 4).gather(2, places), packed.tensors["values"].float().view(8, 16, 2))
    assert (places[:, :, 0] < places[:, :, 1]).all()
    assert SparseGptOptions(pattern="4:8").position_bits is None  # 1.5 bits a weight as positions
    assert SparseGptOptions(pattern="1:4").position_bits == 2
    for options in ({"sparsity": 0.7}, {"pattern": "2:4"}, {"bits": 3}):
        packed = compress(weight, moment, **options)[0]
        assert packed.roles["mask"] == Role.MASK


def test_a_weight_quantised_to_zero_counts_as_kept() -> None:
    weight, moment = problem(8, 64)
    weight[:, 5] = 40.0  # widens the grids, so that most of the others round to zero
    packed, restored = compress(weight, moment, bits=2, sparsity=0.25)
    kept = unpack(packed.tensors["mask"], 1, 512).bool().view(8, 64)
    assert int(kept.sum()) == 384
    assert int(((restored == 0) & kept).sum()) > 100
    assert (restored[~kept] == 0).all()


def test_ties_do_not_change_the_count() -> None:
    weight, moment = torch.zeros(8, 64), problem(8, 64)[1]
    packed, restored = compress(weight, moment, sparsity=0.3)
    assert len(packed.tensors["values"]) == 512 - 153
    assert (restored == 0).all()
    packed, _ = compress(torch.ones(8, 64), torch.eye(64), sparsity=0.3)
    assert len(packed.tensors["values"]) == 512 - 153
    assert removed_of(100, 0.29) == 29  # 28.999999999999996 in floats
    assert removed_of(3, 0.5) == 1


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"sparsity": 0.5}, 9.0),  # 16 (1 - s) + 1
        ({"sparsity": 0.75}, 5.0),
        ({"pattern": "2:4"}, 9.0),  # 8 + 2 bits per kept weight
        ({"pattern": "4:8"}, 9.0),
        ({"pattern": "1:4"}, 4.5),
        ({"bits": 4, "group_size": 128}, 3.125),  # 50 % and 4 bits are as much as 3 bits
        ({"bits": 4, "group_size": 128, "pattern": "2:4"}, 3.125),
        ({"sparsity": 0.0, "bits": 4, "group_size": 128}, 4.125),  # GPTQ's own
    ],
    ids=str,
)
def test_bits_on_llama2_7b(options: dict[str, Any], bits: float) -> None:
    estimate = predict(SparseGptOptions(**options), LLAMA2_7B)
    assert estimate.paper_bits == pytest.approx(bits, abs=1e-9)
    assert estimate.linear_bits(LLAMA2_7B) == pytest.approx(bits, abs=1e-6)


# -- fit -----------------------------------------------------------------------------------------------------

REFERENCE = llama_shapes(192, 512, 4, 192, 2048)
BABY = llama_shapes(128, 352, 5, 128, 4096)
CENTRES = [
    *((REFERENCE, centre, 0.05) for centre in (2.05, 3.05, 4.05)),
    *((BABY, centre, 0.045) for centre in (2.46, 3.46, 4.46)),
    *((shapes, centre, 0.05) for shapes in (LLAMA2_7B, QWEN3_14B) for centre in (2.0, 3.0, 4.0)),
]


@pytest.mark.parametrize(("shapes", "centre", "window"), CENTRES)
@pytest.mark.parametrize("fixed", [{}, {"bits": None}, {"symmetric": True, "mask_block": 64}], ids=str)
def test_fit_prunes_at_every_budget(shapes: ModelShapes, centre: float, window: float, fixed: dict[str, Any]) -> None:
    budget = BitBudget(centre, window)
    found = fit(budget, shapes, fixed)
    assert isinstance(found, SparseGptOptions)
    assert predict(found, shapes).linear_bits(shapes) in budget
    assert found.sparsity > 0
    for name, value in fixed.items():
        assert getattr(found, name) == value


def test_fit_takes_what_was_measured_best() -> None:
    """Of the settings tried (2 to 5 bits, 1:2), those of the least perplexity, or within 0.3 % of it."""
    chosen = [fit(BitBudget(centre, 0.05), REFERENCE, {}) for centre in (2.05, 3.05, 4.05)]
    chosen.append(fit(BitBudget(2.46, 0.045), BABY, {}))
    assert [(o.pattern, o.bits) for o in chosen if isinstance(o, SparseGptOptions)] == [
        ("unstructured", bits) for bits in (2, 3, 4, 3)
    ]


def test_fit_keeps_what_is_pinned() -> None:
    budget = BitBudget(3.05, 0.05)
    half = fit(budget, REFERENCE, {"sparsity": 0.5})
    assert isinstance(half, SparseGptOptions)
    assert (half.sparsity, half.bits) == (0.5, 4)
    structured = fit(budget, REFERENCE, {"pattern": "2:4"})
    assert isinstance(structured, SparseGptOptions)
    assert (structured.pattern, structured.sparsity, structured.bits) == ("2:4", 0.5, 4)
    none = fit(BitBudget(9.0, 0.05), REFERENCE, {"pattern": "2:4", "bits": None})
    assert none == SparseGptOptions(pattern="2:4")
    dense = fit(BitBudget(4.15, 0.05), LLAMA2_7B, {"sparsity": 0})
    assert isinstance(dense, SparseGptOptions)
    assert (dense.sparsity, dense.bits) == (0, 4)
    refused = fit(budget, REFERENCE, {"pattern": "2:4", "bits": None})
    assert isinstance(refused, Refusal)
    assert "9.000" in refused.reason
    for wrong in ({"pattern": "2:4", "sparsity": 0.25}, {"pattern": "4:2"}, {"pattern": "half"}, {"sparsity": 1.0}):
        with pytest.raises(SuiteError, match=r"^option"):
            fit(budget, REFERENCE, wrong)


def test_expected_distortion_is_that_of_gaussian_weights() -> None:
    """The model against pruning and rounding of drawn Gaussians, without feedback: the moment is the identity."""
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    shapes = ModelShapes((shape_of(weight),), parameters=weight.numel(), rest_bytes=0)
    # half of a Gaussian, the smaller weights, holds 1/2 - 2 t phi(t) of its energy, t = 0.6745
    half = 0.5 - 2 * 0.6745 * math.exp(-(0.6745**2) / 2) / math.sqrt(2 * math.pi)
    assert expected_distortion(SparseGptOptions(), shapes) == pytest.approx(half, rel=0.02)
    # of two, the smaller holds 1 - 2/pi of a weight's energy
    assert expected_distortion(SparseGptOptions(pattern="1:2"), shapes) == pytest.approx(0.5 - 1 / math.pi, rel=0.01)
    for options in (
        {}, {"sparsity": 0.2}, {"pattern": "2:4"}, {"pattern": "1:8"},
        {"bits": 4}, {"bits": 3, "sparsity": 0.3}, {"bits": 2, "sparsity": 0.6, "group_size": 64},
        {"bits": 2, "group_size": 32, "symmetric": False}, {"bits": 6, "sparsity": 0.1}, {"pattern": "1:2", "bits": 3},
    ):  # fmt: skip
        made = SparseGptOptions(**options)
        _, restored = compress(weight, torch.eye(256), **made.model_dump())
        error = float((weight - restored).square().mean())
        assert expected_distortion(made, shapes) == pytest.approx(error, rel=0.12), options


# -- awkward inputs ------------------------------------------------------------------------------------------


def test_options_agree_with_their_pattern() -> None:
    assert SparseGptOptions(pattern="1:4").sparsity == 0.75
    assert SparseGptOptions().sparsity == 0.5
    assert SparseGptOptions(pattern="1:3", sparsity=0.66666667).kept_of == (1, 3)
    for wrong in ({"pattern": "2:4", "sparsity": 0.6}, {"pattern": "4:4"}, {"pattern": "0:4"}, {"pattern": ["2:4"]}):
        with pytest.raises(ValidationError):
            SparseGptOptions.model_validate(wrong)


def test_dead_inputs_zero_rows_and_tiny_weights() -> None:
    weight, moment = problem(8, 40)
    moment[[0, 7]], moment[:, [0, 7]] = 0, 0
    _, restored = compress(weight, moment, sparsity=0.3)
    assert (restored[:, [0, 7]] == 0).all()
    assert calibrated_error(weight, restored, moment) < 0.1
    weight[3] = 0
    for size in (3e-3, 1.0, 1e3):
        for options in ({}, {"bits": 4}, {"pattern": "2:4"}):
            _, restored = compress(weight * size, moment, **options)
            assert (restored[3] == 0).all()
            assert calibrated_error(weight * size, restored, moment) < 0.5


def test_failures_are_one_line_and_name_the_layer() -> None:
    weight, moment = problem(4, 16)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: SparseGPT needs the second moment"):
        compress(weight, None)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: 1 of 64 weights are NaN"):
        compress(broken, moment)
    with pytest.raises(TrialFailed, match=r"o_proj: kept weights leave the range of float16; value_dtype"):
        compress(weight * 1e6, moment)
    assert torch.isfinite(compress(weight * 1e6, moment, value_dtype="bfloat16")[1]).all()
    assert compress(weight, torch.ones(16, 16), damping=0.0)[0].meta["damping"] > 0


def test_descriptor() -> None:
    assert DESCRIPTOR.name == "sparsegpt"
    assert DESCRIPTOR.needs_of(SparseGptOptions()) == Needs("second_moment", sequential=True, within_block=True)
    assert DESCRIPTOR.needs_of(SparseGptOptions(sequential=False)) == Needs("second_moment")
    assert DESCRIPTOR.needs_of(SparseGptOptions(true_sequential=False)) == Needs("second_moment", sequential=True)
    assert SparseGptOptions(bits=3).shown() == ("pattern", "sparsity", "bits", "group_size", "symmetric")
    assert SparseGptOptions(damping=0.1).shown() == ("pattern", "sparsity", "value_dtype", "damping")


# -- computing from the codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_without_a_mask_computes_from_its_codes(symmetric: bool) -> None:
    fields: dict[str, Any] = {"sparsity": 0.0, "bits": 3, "group_size": 16, "symmetric": symmetric}
    case = make_case(24, 40)
    packed, _ = compress(case.weight, case.second_moment, **fields)
    module = SparseGptCompressor(SparseGptOptions(**fields)).linear(packed, case.shape, None, torch.device("cpu"))
    assert isinstance(module, torch.nn.Module)
    check_linear(DESCRIPTOR, SparseGptOptions(**fields), case)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"bits": 4}, "no fused path for a mask"), ({"sparsity": 0.0}, "weights are stored as float16")],
)
def test_what_has_no_fused_path_says_so(fields: dict[str, Any], said: str) -> None:
    case = make_case(24, 40)
    packed, _ = compress(case.weight, case.second_moment, **fields)
    found = SparseGptCompressor(SparseGptOptions(**fields)).linear(packed, case.shape, None, torch.device("cpu"))
    assert isinstance(found, Refusal)
    assert said in found.reason
