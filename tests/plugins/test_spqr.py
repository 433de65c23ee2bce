"""SpQR: identity with GPTQ and round-to-nearest; the outlier test and the statistics against slow loops; bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenbits.budget import BitBudget
from evenbits.compressor import Layer, LayerShape, ModelShapes, Needs, PackedLayer, Refusal, Role
from evenbits.errors import SuiteError, TrialFailed
from evenbits.maths.bitpack import packed_bytes, unpack
from evenbits.maths.hessian import calibrated_error, inverse_factor
from evenbits.shapes import LLAMA2_7B, QWEN3_14B, llama_shapes
from evenbits.testing import check_compressor, check_linear, make_case
from evenbits_gptq.compressor import GptqCompressor
from evenbits_gptq.options import GptqOptions
from evenbits_spqr import provide_compressors
from evenbits_spqr.choice import fit
from evenbits_spqr.compressor import SpqrCompressor
from evenbits_spqr.options import SpqrOptions, length_bits, most_outliers, predict
from evenbits_spqr.outliers import Picker, above, error_drops, layer_threshold, put_outliers, store_outliers
from evenbits_spqr.statistics import make_statistics, read_sets, round_sets

(DESCRIPTOR,) = provide_compressors()


def shape_of(weight: torch.Tensor) -> LayerShape:
    return LayerShape("model.layers.1.self_attn.o_proj", 1, "self_attn.o_proj", weight.shape[0], weight.shape[1])


def shapes_of(*sizes: tuple[int, int]) -> ModelShapes:
    layers = tuple(LayerShape(f"layer{i}", 0, "any", *size) for i, size in enumerate(sizes))
    return ModelShapes(layers, sum(layer.weights for layer in layers), 0)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights and the second moment of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def compress(weight: torch.Tensor, moment: torch.Tensor | None, **options: Any) -> tuple[PackedLayer, torch.Tensor]:
    compressor = SpqrCompressor(SpqrOptions(**options))
    packed = compressor.compress(weight, Layer(shape_of(weight), second_moment=moment), None, torch.Generator())
    return packed, compressor.restore(packed, shape_of(weight), None)


def kept_of(packed: PackedLayer, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    """bool (out, in): where outliers are stored."""
    marked = {**packed.tensors, "kept": torch.ones_like(packed.tensors["kept"])}
    return put_outliers(torch.zeros_like(weight), marked, shape_of(weight), SpqrOptions(**options)) == 1


def slow_grid(weights: list[float], bits: int) -> tuple[float, float]:
    low, high = min([0.0, *weights]), max([0.0, *weights])
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    return scale, float(round(-low / scale)) if scale else 0.0


def slow_error(weights: list[float], pivots: list[float], bits: int) -> float:
    scale, zero = slow_grid(weights, bits)
    error = 0.0
    for w, pivot in zip(weights, pivots, strict=True):
        code = min(max(round(w / scale) + zero, 0), 2**bits - 1) if scale else zero
        error += ((w - (code - zero) * scale) / pivot) ** 2
    return error


@pytest.mark.parametrize("options", [{}, {"bits": 2, "stats_bits": None, "static_groups": True, "threshold": 0.0}])
def test_contract(options: dict[str, Any]) -> None:
    assert check_compressor(DESCRIPTOR, options, exact=False, fitted=not options) == []


# -- identities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 16, 200])
@pytest.mark.parametrize(("act_order", "static_groups"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("bits", [2, 3])
def test_without_outliers_and_with_full_statistics_it_is_gptq(
    bits: int, act_order: bool, static_groups: bool, group_size: int | None
) -> None:
    weight, moment = problem(24, 172, seed=bits)
    weight[3, :40] = 0
    same: dict[str, Any] = {
        "bits": bits, "group_size": group_size, "act_order": act_order, "static_groups": static_groups, "damping": 0.01
    }  # fmt: skip
    packed, restored = compress(weight, moment, stats_bits=None, outliers=0.0, **same)
    twin = GptqCompressor(GptqOptions(symmetric=False, **same))
    expected = twin.compress(weight, Layer(shape_of(weight), second_moment=moment), None, torch.Generator())
    assert packed.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(packed.tensors[name], tensor), name
    assert torch.equal(restored, twin.restore(expected, shape_of(weight), None))


@pytest.mark.parametrize(("bits", "stats_bits", "rows"), [(2, 3, 32), (3, 3, 21), (4, 2, 7)])
def test_with_an_identity_moment_it_rounds_to_nearest_on_two_level_grids(bits: int, stats_bits: int, rows: int) -> None:
    """Statistics and codes against loops over sets, rows and weights, in plain numbers."""
    weight = problem(rows, 40)[0]
    size, group = 16, 16
    packed, restored = compress(weight, torch.eye(40), bits=bits, stats_bits=stats_bits, outliers=0.0, set_size=size)
    top = 2**bits - 1
    expected = torch.empty_like(weight)
    for first in range(0, 40, group):
        part = weight[:, first : first + group]
        exact = []
        for row in part.tolist():
            low, high = min(0.0, *row), max(0.0, *row)
            scale = (high - low) / top
            exact.append((scale, -low / scale))
        for start in range(0, rows, size):
            of_set = exact[start : start + size]
            read = []
            for numbers in zip(*of_set, strict=True):  # scales, then zero points
                offset = float(torch.tensor(min(numbers)).half())
                step = float(torch.tensor((max(numbers) - min(numbers)) / (2**stats_bits - 1)).half())
                codes = [min(max(round((x - offset) / step), 0), 2**stats_bits - 1) if step else 0 for x in numbers]
                read.append([offset + code * step for code in codes])
            for row, (scale, zero) in enumerate(zip(*read, strict=True), start):
                for column, w in enumerate(part[row].tolist(), first):
                    code = min(max(round(w / scale + zero), 0), top)
                    expected[row, column] = (code - zero) * scale
    # a number within float32 noise of a border between two codes may fall on the other side
    assert torch.isclose(restored, expected, rtol=1e-4, atol=1e-5).float().mean() > 0.98
    stored = packed.tensors["scale_codes"]
    assert stored.numel() == packed_bytes(rows * 3, stats_bits)
    assert unpack(stored, stats_bits, rows * 3).max() == 2**stats_bits - 1


def test_it_beats_gptq_at_fewer_bits() -> None:
    """Groups of 16 with two-level statistics against groups of 32 in full: 3.34 bits against 3.71."""
    weight, moment = problem(64, 160, seed=4)
    packed, restored = compress(weight, moment, outliers=0.0, damping=0.01, set_size=64)
    twin = GptqCompressor(GptqOptions(bits=3, group_size=32, symmetric=False, act_order=True))
    full = twin.compress(weight, Layer(shape_of(weight), second_moment=moment), None, torch.Generator())
    assert packed.nbytes < full.nbytes
    theirs = twin.restore(full, shape_of(weight), None)
    assert calibrated_error(weight, restored, moment) < 0.9 * calibrated_error(weight, theirs, moment)


# -- statistics ----------------------------------------------------------------------------------------------


def test_sets_hold_equal_numbers_and_zeros_exactly() -> None:
    values = torch.tensor([[0.0], [0.5], [1.75], [0.25], [0.25], [0.25]])
    codes, offset, step = round_sets(values, 3, 3)
    assert codes.flatten().tolist() == [0, 2, 7, 0, 0, 0]
    assert offset.flatten().tolist() == [0.0, 0.25]
    assert step.flatten().tolist() == [0.25, 0.0]
    assert torch.equal(read_sets(codes, offset, step, 3), values)


@given(rows=st.integers(1, 40), size=st.integers(1, 20), bits=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_sets_lose_at_most_half_a_step(rows: int, size: int, bits: int) -> None:
    values = torch.rand(rows, 3, generator=torch.Generator().manual_seed(rows)) + 0.5
    codes, offset, step = round_sets(values, size, bits)
    assert offset.shape == step.shape == (-(-rows // size), 3)
    wide = step.float().repeat_interleave(size, 0)[:rows]
    half_rounding = 2.0**-10  # of offset and step themselves, to float16
    assert ((read_sets(codes, offset, step, size) - values).abs() <= wide / 2 + half_rounding).all()


# -- outliers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3])
def test_the_outlier_test_is_leaving_each_weight_out(bits: int) -> None:
    weight = problem(6, 9, seed=bits)[0]
    weight[0, 3] = 9.0
    weight[1] = weight[1].abs()  # no negative weight: leaving out the least changes no grid
    weight[2] = 0
    weight[3, 4] = weight[3, 5] = 4.0  # leaving out one of two greatest changes no grid
    pivots = torch.linspace(0.5, 2.0, 9)
    drops = error_drops(weight, pivots, bits)
    for row, found in zip(weight.tolist(), drops.tolist(), strict=True):
        total = slow_error(row, pivots.tolist(), bits)
        for i in range(9):
            others = row[:i] + row[i + 1 :]
            rest = pivots.tolist()[:i] + pivots.tolist()[i + 1 :]
            assert found[i] == pytest.approx(total - slow_error(others, rest, bits), rel=1e-3, abs=1e-5)
    assert error_drops(weight[:, :1], pivots[:1], bits).shape == (6, 1)


def test_threshold_is_relative_to_variance_over_squared_pivots() -> None:
    weight, pivots = problem(5, 7)[0], torch.linspace(0.5, 2.0, 7)
    expected = sum(float(weight[:, i].var(correction=0)) / float(pivots[i]) ** 2 for i in range(7)) / 7
    assert layer_threshold(weight, pivots, 0.2) == pytest.approx(0.2 * expected)
    # and so the choice does not depend on the weights' unit
    drops = error_drops(weight, pivots, 3) > layer_threshold(weight, pivots, 0.2)
    assert torch.equal(error_drops(4 * weight, pivots, 3) > layer_threshold(4 * weight, pivots, 0.2), drops)


def test_above_takes_the_largest_and_never_more() -> None:
    values = torch.tensor([[3.0, 1.0, 5.0], [4.0, 2.0, 4.0]])
    assert above(values, 1.5, 100).tolist() == [[True, False, True], [True, True, True]]
    assert above(values, 0.0, 3).tolist() == [[False, False, True], [True, False, True]]
    assert above(values, 0.0, 2).tolist() == [[False, False, True], [False, False, False]]  # two compete for one place
    assert not above(values, 0.0, 0).any()
    assert not above(values, 9.0, 3).any()


def test_what_a_group_does_not_keep_the_next_one_may() -> None:
    """Planned are two a group; the first keeps one, so that the second may keep three, and no more than four in all."""
    drops = torch.tensor([[9.0, 8.0, 0.0, 9.0, 8.0, 0.0]])
    picker = Picker(drops, [(0, 3), (3, 6)], 0.5, 4)
    first, second = torch.tensor([[5.0], [0.1], [0.2]]), torch.tensor([[5.0], [6.0], [7.0]])
    counts = []
    for group, errors in enumerate((first, second)):
        picker.left_out(group, drops[:, 3 * group : 3 * group + 3])
        picker.plan_group(errors)
        counts.append([int(picker.pick(3 * group + i, errors[i]).sum()) for i in range(3)])
    assert counts == [[1, 0, 0], [1, 1, 1]]
    assert not picker.pick(6, torch.tensor([99.0])).any()


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("stats_bits", [3, None])
def test_a_planted_weight_is_kept_and_its_group_is_fine_again(stats_bits: int | None, static_groups: bool) -> None:
    weight, moment = problem(32, 64, seed=1)
    hidden = {"stats_bits": stats_bits, "static_groups": static_groups, "damping": 0.01}
    plain, _ = compress(weight, moment, outliers=0.0, **hidden)
    planted = weight.clone()
    planted[5, 20] = 40.0
    packed, restored = compress(planted, moment, outliers=0.001, threshold=0.2, **hidden)
    kept = kept_of(packed, planted, outliers=0.001)
    assert kept[5, 20]
    # corrections may move it a little before it is stored; without an outlier the grid's step would be near 40 / 7
    assert restored[5, 20] == pytest.approx(40.0, abs=2.0)
    assert (restored - planted)[5].abs().max() < 2.5
    _, without = compress(planted, moment, outliers=0.0, **hidden)
    row = slice(5, 6)  # the others are as they would be without it
    errors = [calibrated_error(planted[row], made[row], moment) for made in (restored, without)]
    assert errors[0] < 0.1 * errors[1]
    if stats_bits is None:  # the scale of its group, in whatever order
        assert packed.tensors["scale"][5].max() < 1.5 * plain.tensors["scale"][5].max()


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_more_outliers_lower_the_error_and_the_cap_holds(bits: int, static_groups: bool) -> None:
    weight, moment = problem(48, 96, seed=2)
    errors = []
    for share in (0.0, 0.005, 0.02, 0.08):
        options = SpqrOptions(bits=bits, outliers=share, threshold=0.0, static_groups=static_groups, damping=0.01)
        packed, restored = compress(weight, moment, **options.model_dump())
        errors.append(calibrated_error(weight, restored, moment))
        most = int(share * weight.numel())
        count = packed.tensors["kept"].numel() if share else 0
        assert 0.95 * most <= count <= most  # the plan is from dense weights: the last groups may find fewer
        estimate = predict(options, shapes_of((48, 96)))
        assert 0.97 * estimate.linear_bytes <= packed.nbytes <= estimate.linear_bytes
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_the_threshold_bounds_the_outliers_where_the_cap_does_not() -> None:
    weight, moment = problem(48, 96, seed=2)
    counts = []
    for threshold in (0.0, 0.2, 1.0, 100.0):
        packed, _ = compress(weight, moment, outliers=0.2, threshold=threshold, damping=0.01)
        counts.append(packed.tensors["kept"].numel() if "kept" in packed.tensors else 0)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[1] > 0
    assert counts[-1] == 0


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_sparse_rows_come_back(rows: int, columns: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator).half()
    kept = torch.rand(rows, columns, generator=generator) < share
    layer = LayerShape("layer", 0, "any", rows, columns)
    options = SpqrOptions(outliers=0.25).model_copy(update={"outliers": 1.0})
    tensors, roles = store_outliers(values, kept, layer, options)
    assert set(roles.values()) <= {Role.KEPT}
    assert bool(tensors) == bool(kept.any())
    dense = torch.full((rows, columns), 7.5)
    assert torch.equal(put_outliers(dense, tensors, layer, options), torch.where(kept, values.float(), dense))


def test_sparse_rows_with_empty_ones_and_the_last() -> None:
    layer = LayerShape("layer", 0, "any", 5, 40)
    options = SpqrOptions(outliers=0.05)
    kept = torch.zeros(5, 40, dtype=torch.bool)
    kept[1, 39] = kept[1, 0] = kept[4, 38] = True
    values = torch.arange(200.0).view(5, 40).half()
    tensors, _ = store_outliers(values, kept, layer, options)
    assert tensors["kept"].tolist() == [40.0, 79.0, 198.0]
    assert unpack(tensors["kept_columns"], 16, 3).tolist() == [0, 39, 38]
    assert unpack(tensors["kept_lengths"], length_bits(options, layer), 5).tolist() == [0, 2, 0, 0, 1]
    restored = put_outliers(torch.zeros(5, 40), tensors, layer, options)
    assert torch.equal(restored, torch.where(kept, values.float(), 0.0))


@pytest.mark.parametrize(("bits", "group_size", "threshold"), [(3, 16, 0.1), (2, 16, 0.4), (3, 48, 0.1)])
def test_at_the_same_count_it_is_nearly_as_good_as_one_threshold_for_all(
    bits: int, group_size: int, threshold: float
) -> None:
    """The released rule, written out: what exceeds one threshold is kept, however many they are."""
    weight, moment = problem(48, 96, seed=3)
    options = SpqrOptions(bits=bits, group_size=group_size, threshold=threshold, act_order=False)
    upper = inverse_factor(moment.double(), options.damping, "layer").upper.float()
    pivots = upper.diagonal()
    least = layer_threshold(weight, pivots, options.threshold)
    statistics = make_statistics(48, 96 // group_size, options, weight.device)
    work, expected, count = weight.clone(), torch.empty_like(weight), 0
    for i in range(96):
        group, part = i // group_size, slice(i, i + group_size)
        if i % group_size == 0:
            likely = error_drops(work[:, part].contiguous(), pivots[part], bits) > least
            statistics.fit(group, work[:, part].masked_fill(likely, 0.0))
        restored = statistics.restored(group, statistics.code(group, work[:, i]))
        kept = ((work[:, i] - restored) / pivots[i]).square() > least
        expected[:, i] = torch.where(kept, work[:, i].half().float(), restored)
        work[:, i + 1 :] -= torch.outer((work[:, i] - expected[:, i]) / pivots[i], upper[i, i + 1 :])
        count += int(kept.sum())
    capped = options.model_copy(update={"outliers": (count + 0.5) / weight.numel(), "threshold": 0.0})
    packed, ours = compress(weight, moment, **capped.model_dump())
    assert 0.95 * count <= packed.tensors["kept"].numel() <= count
    assert calibrated_error(weight, ours, moment) < 1.2 * calibrated_error(weight, expected, moment)
    plain = compress(weight, moment, **options.model_copy(update={"outliers": 0.0}).model_dump())[1]
    assert calibrated_error(weight, ours, moment) < 0.9 * calibrated_error(weight, plain, moment)


def test_only_what_is_no_outlier_is_fed_on() -> None:
    """With every weight kept there is nothing to make up for, and the weight comes back as float16."""
    weight, moment = problem(8, 24)
    everything = SpqrOptions(threshold=0.0).model_copy(update={"outliers": 1.0})
    compressor = SpqrCompressor(everything)
    layer = Layer(shape_of(weight), second_moment=moment)
    packed = compressor.compress(weight, layer, None, torch.Generator())
    restored = compressor.restore(packed, shape_of(weight), None)
    kept = put_outliers(
        torch.zeros_like(weight), {**packed.tensors, "kept": torch.ones_like(packed.tensors["kept"])},
        shape_of(weight), everything,
    ) == 1  # fmt: skip
    assert kept.float().mean() > 0.9  # all whose test is above zero
    assert calibrated_error(weight, restored, moment) < 1e-3


def test_rows_too_wide_for_their_column_numbers() -> None:
    wide = LayerShape("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", 1, 65536)
    line = r"^model\.layers\.0\.mlp\.down_proj: 65536 columns, but outliers have 16-bit column numbers"
    with pytest.raises(TrialFailed, match=line):
        SpqrCompressor(SpqrOptions()).compress(
            torch.zeros(1, 65536), Layer(wide, torch.zeros(1, 1)), None, torch.Generator()
        )


# -- bits, fit, and what else must hold ----------------------------------------------------------------------


def test_published_bits() -> None:
    """reference: 2 bits, groups of 16, 3-bit statistics in sets of 16: 2.625, and 0.32 for each per cent kept."""
    paper = SpqrOptions(bits=2, group_size=16, stats_bits=3, set_size=16)
    for shapes in (LLAMA2_7B, QWEN3_14B):
        for percent in (0.0, 1.0, 1.1):
            estimate = predict(paper.model_copy(update={"outliers": percent / 100}), shapes)
            assert estimate.paper_bits == pytest.approx(2.625 + 0.32 * percent)
            # stored beside: rows' lengths and the group of each column, less than a hundredth of a bit
            assert 0 < estimate.linear_bits(shapes) - estimate.paper_bits < 0.01
    # the 2.98 bits of the literature's table
    fuller = paper.model_copy(update={"outliers": 0.011})
    assert predict(fuller, LLAMA2_7B).paper_bits == pytest.approx(2.98, abs=0.01)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 50),
    bits=st.integers(2, 4),
    group_size=st.sampled_from([None, 1, 5, 16]),
    stats_bits=st.sampled_from([None, 1, 3]),
    act_order=st.booleans(),
    static_groups=st.booleans(),
    outliers=st.sampled_from([0.0, 0.05, 0.2]),
)
@settings(max_examples=60, deadline=None)
def test_predicted_bytes_bound_the_stored_ones(rows: int, columns: int, **options: Any) -> None:
    weight, moment = problem(rows, columns)
    packed, restored = compress(weight, moment, set_size=4, threshold=0.0, **options)
    estimate = predict(SpqrOptions(set_size=4, **options), shapes_of((rows, columns)))
    predicted = estimate.role_bytes
    assert estimate.index_bits == 8 * predicted[Role.CODE] / weight.numel()  # as the ledger counts
    for role in Role:
        stored = sum(t.numel() * t.element_size() for n, t in packed.tensors.items() if packed.roles[n] == role)
        if role == Role.KEPT:
            assert stored <= predicted.get(role, 0)
        else:
            assert stored == predicted.get(role, 0), role
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize(("hidden", "wide", "centre", "window"), [
    (192, 512, 2.05, 0.05), (192, 512, 3.05, 0.05), (192, 512, 4.05, 0.05),
    (128, 352, 2.46, 0.045), (128, 352, 3.46, 0.045), (128, 352, 4.46, 0.05),
])  # fmt: skip
def test_fit_finds_settings_for_small_models(hidden: int, wide: int, centre: float, window: float) -> None:
    shapes = llama_shapes(hidden, wide, 4, hidden // 2, 1000)
    budget = BitBudget(centre, window)
    found = fit(budget, shapes, {})
    assert isinstance(found, SpqrOptions)
    assert predict(found, shapes).linear_bits(shapes) in budget


def test_fit_prefers_what_is_measured_to_be_better() -> None:
    """The order of expected errors is that of calibrated errors: small groups with short statistics at 3.5 bits."""
    weight, moment = problem(128, 128, seed=9)
    shapes = shapes_of((128, 128))
    budget = BitBudget(3.46, 0.06)
    found = fit(budget, shapes, {"damping": 0.01})
    assert isinstance(found, SpqrOptions)
    best = calibrated_error(weight, compress(weight, moment, **found.model_dump())[1], moment)
    others: list[dict[str, Any]] = [{"stats_bits": None}, {"bits": 2}, {"outliers": 0.01}]
    for pinned in others:
        other = fit(budget, shapes, {"damping": 0.01, **pinned})
        assert isinstance(other, SpqrOptions), pinned
        assert calibrated_error(weight, compress(weight, moment, **other.model_dump())[1], moment) > best, other


def test_fit_refuses_what_it_cannot_do() -> None:
    refused = fit(BitBudget(1.5, 0.05), LLAMA2_7B, {})
    assert isinstance(refused, Refusal)
    assert "no setting within 1.5" in refused.reason
    with pytest.raises(SuiteError, match="option outliers"):
        fit(BitBudget(3, 0.1), LLAMA2_7B, {"outliers": 2})


def test_scale_of_the_moment_and_order_of_batches_do_not_matter() -> None:
    weight, moment = problem(16, 64)
    expected = compress(weight, moment, damping=0.01)[1]
    assert torch.equal(compress(weight, 2.0**20 * moment, damping=0.01)[1], expected)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(8, 50, 64, generator=generator, dtype=torch.float64)
    forth, back = (sum((x.T @ x for x in batches), torch.zeros(64, 64)) for batches in (inputs, inputs.flip(0)))
    first, second = (compress(weight, (total / 400).float(), damping=0.01)[1] for total in (forth, back))
    assert (first == second).float().mean() > 0.99


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_the_lazy_block_does_not_change_the_result(block_size: int) -> None:
    weight, moment = problem(32, 100, seed=2)
    expected = compress(weight, moment, damping=0.01)[1]
    restored = compress(weight, moment, damping=0.01, block_size=block_size)[1]
    # sums in another order: what falls on the other side of a border changes what follows in its row
    assert torch.isclose(restored, expected, atol=1e-4).float().mean() > 0.9
    close = calibrated_error(weight, restored, moment) / calibrated_error(weight, expected, moment)
    assert close == pytest.approx(1.0, abs=0.05)


def test_dead_inputs_zero_rows_and_tiny_weights() -> None:
    weight, moment = problem(20, 40)
    dead = [0, 7, 39]
    moment[dead], moment[:, dead] = 0, 0
    weight[3] = 0
    for size in (1.0, 1e-12, 1e6):
        for stats_bits in (3, None):
            _, restored = compress(size * weight, moment, stats_bits=stats_bits, damping=0.01, bits=4)
            assert torch.isfinite(restored).all()
            assert (restored[3] == 0).all()
            if stats_bits is None:  # else zero points are no whole numbers, and zero is no level
                assert (restored[:, dead] == 0).all()
            assert restored[:, dead].abs().max() <= 0.6 * size
            if size == 1.0:
                assert calibrated_error(weight, restored, moment) < 0.02


def test_failures_are_one_line_and_name_the_layer() -> None:
    weight, moment = problem(4, 16)
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: SpQR needs the second moment"):
        compress(weight, None)
    weight[1, 2] = float("nan")
    with pytest.raises(TrialFailed, match=r"^model\.layers\.1\.self_attn\.o_proj: 1 of 64 weights are NaN"):
        compress(weight, moment)


def test_descriptor() -> None:
    assert DESCRIPTOR.name == "spqr"
    assert DESCRIPTOR.needs_of(SpqrOptions()) == Needs("second_moment", sequential=True, within_block=True)
    assert DESCRIPTOR.needs_of(SpqrOptions(sequential=False)) == Needs("second_moment")
    assert most_outliers(SpqrOptions(outliers=0.01), LayerShape("layer", 0, "any", 64, 128)) == 81


# -- computing from the codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("static_groups", [False, True])
def test_a_layer_without_extras_computes_from_its_codes(static_groups: bool) -> None:
    fields: dict[str, Any] = {"stats_bits": None, "outliers": 0.0, "group_size": 8, "static_groups": static_groups}
    case = make_case(24, 40)
    packed, _ = compress(case.weight, case.second_moment, **fields)
    module = SpqrCompressor(SpqrOptions(**fields)).linear(packed, case.shape, None, torch.device("cpu"))
    assert isinstance(module, torch.nn.Module)
    check_linear(DESCRIPTOR, SpqrOptions(**fields), case)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"stats_bits": None}, "weights kept in float16"), ({"outliers": 0.0}, "zero points that are themselves rounded")],
)
def test_what_has_no_fused_path_says_so(fields: dict[str, Any], said: str) -> None:
    case = make_case(24, 40)
    packed, _ = compress(case.weight, case.second_moment, **fields)
    found = SpqrCompressor(SpqrOptions(**fields)).linear(packed, case.shape, None, torch.device("cpu"))
    assert isinstance(found, Refusal)
    assert said in found.reason
    assert " and " not in found.reason
