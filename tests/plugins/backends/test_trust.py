"""What is refused and what is not: honest rounding passes with room to spare, whatever is out of place does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evenbits.compressor import Fold, Layer, LayerShape
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid
from evenbits_backends.rescaling import fitted
from evenbits_backends.trust import Claim, check_forward, check_left, check_weight, folded
from evenbits_gptq.compressor import GptqCompressor
from evenbits_gptq.options import GptqOptions

SHAPE = LayerShape("model.layers.0.mlp.down_proj", 0, "mlp.down_proj", 128, 352)
PLAIN, LEARNED, AWQ = Claim("x"), Claim("x", calibrated=True), Claim("x", calibrated=True, rescales=True)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(128, 352, generator=torch.Generator().manual_seed(0))


def rounded(weight: Tensor, bits: int, group: int = 32) -> Tensor:
    """Symmetric, the largest magnitude at the end of the levels."""
    parts = weight.view(len(weight), -1, group)
    step = parts.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    found: Tensor = (torch.round(parts / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step).view_as(weight)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 352])
def test_rounding_passes_and_rows_out_of_order_do_not(weight: Tensor, bits: int, group: int) -> None:
    grid, stored = Grid(bits, group), rounded(weight, bits, group)
    check_weight(SHAPE, weight, stored, None, grid, PLAIN)
    for wrong in (stored.flip(0), stored.roll(1, 1), stored.roll(group // 2, 1), torch.zeros_like(stored), -stored):
        for claim in (PLAIN, LEARNED):
            with pytest.raises(TrialFailed, match=r"down_proj: x stored a weight with a relative squared error of"):
                check_weight(SHAPE, weight, wrong, None, grid, claim)


@pytest.mark.parametrize("bits", [2, 4])
def test_error_feedback_passes_as_calibrated(weight: Tensor, bits: int) -> None:
    """Inputs that are nearly alike: the errors of weights are traded for those of outputs as far as it goes."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 24, generator=draw) @ torch.randn(24, 352, generator=draw)
    inputs += 0.3 * torch.randn(512, 352, generator=draw)
    compressor = GptqCompressor(GptqOptions(bits=bits, group_size=32))
    layer = Layer(SHAPE, inputs.T @ inputs / 512)
    packed = compressor.compress(weight, layer, None, torch.Generator().manual_seed(0))
    check_weight(SHAPE, weight, compressor.restore(packed, SHAPE, None), None, Grid(bits, 32), LEARNED)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_rescaling_explains_awq_and_hides_no_disorder(weight: Tensor, bits: int) -> None:
    draw = torch.Generator().manual_seed(2)
    rows, columns = torch.rand(128, generator=draw) + 0.5, 3 * torch.rand(352, generator=draw) + 0.3
    grid = Grid(bits, 32)
    stored = rounded(rows[:, None] * weight * columns, bits)
    with pytest.raises(TrialFailed):
        check_weight(SHAPE, weight, stored, None, grid, AWQ)
    fold = fitted(weight, stored)
    check_weight(SHAPE, weight, stored, fold, grid, AWQ)
    for wrong in (stored.flip(0), stored.roll(1, 1), stored.roll(32, 1), stored[torch.randperm(128, generator=draw)]):
        with pytest.raises(TrialFailed):
            check_weight(SHAPE, weight, wrong, fitted(weight, wrong), grid, AWQ)


def test_a_row_at_a_wrong_scale_is_hidden_by_a_fitted_rescaling_only(weight: Tensor) -> None:
    """The limit of what a fit can see, as its docstring says."""
    stored = rounded(weight, 4)
    stored[5] *= 8
    with pytest.raises(TrialFailed):
        check_weight(SHAPE, weight, stored, None, Grid(4, 32), PLAIN)
    check_weight(SHAPE, weight, stored, fitted(weight, stored), Grid(4, 32), AWQ)


def test_what_is_no_grid_must_be_nearer_than_nothing(weight: Tensor) -> None:
    check_weight(SHAPE, weight, 0.5 * weight, None, None, PLAIN)
    with pytest.raises(TrialFailed, match=r"error of 1 where 0\.9 is allowed: not trusted"):
        check_weight(SHAPE, weight, torch.zeros_like(weight), None, None, PLAIN)
    with pytest.raises(TrialFailed, match="nan"):
        check_weight(SHAPE, weight, weight * float("nan"), Fold(), None, PLAIN)


def test_the_forward_may_round_but_not_differ(weight: Tensor) -> None:
    probe = torch.randn(8, 352, generator=torch.Generator().manual_seed(3))
    stored = rounded(weight, 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_forward(SHAPE, stored, probe, probe.to(dtype) @ stored.T.to(dtype))
    other = probe @ rounded(weight, 3).T
    with pytest.raises(TrialFailed, match=r"down_proj: what the library stored decodes to other outputs"):
        check_forward(SHAPE, stored, probe, other)
    with pytest.raises(TrialFailed, match=r"x's own layer have .* error of 0\.039\d*, .* to 0\.009\d+ \("):
        check_forward(SHAPE, stored, probe, other, weight, "x")


def test_one_wrong_row_of_a_wide_layer_is_found() -> None:
    """It is less of the whole than half precision may be off."""
    draw = torch.Generator().manual_seed(4)
    probe, stored = torch.randn(8, 16, generator=draw), torch.randn(20000, 16, generator=draw)
    stored[7] = 0  # a row without energy is not divided by
    outputs = probe.bfloat16() @ stored.T.bfloat16()
    check_forward(SHAPE, stored, probe, outputs)
    outputs[:, 5] = outputs[:, 6]
    with pytest.raises(TrialFailed, match=r"\(.* of the energy of output 5, 0\.01 allowed\): not trusted"):
        check_forward(SHAPE, stored, probe, outputs)


def test_what_is_left_dense_is_the_weight_itself(weight: Tensor) -> None:
    check_left(SHAPE.name, weight, weight.bfloat16().float(), PLAIN)
    columns = torch.rand(352, generator=torch.Generator().manual_seed(5)) + 0.5
    stored = (weight * columns).half().float()
    check_left(SHAPE.name, folded(weight, fitted(weight, stored)), stored, AWQ)
    for wrong in (stored, rounded(weight, 8)):
        with pytest.raises(TrialFailed, match=r"down_proj: x left it dense, with a relative squared error of"):
            check_left(SHAPE.name, weight, wrong, PLAIN)


def test_where_inputs_fill_few_directions_the_outputs_tell() -> None:
    """There GPTQ leaves weights further off than any rounding, and outputs nearer; rows out of order do neither."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(SHAPE.out_features, SHAPE.in_features, generator=generator)
    seen = torch.randn(SHAPE.in_features, 8, generator=generator)
    moment = seen @ seen.T
    unseen = torch.eye(SHAPE.in_features) - seen @ torch.linalg.pinv(seen)
    stored = weight + 0.7 * torch.randn(weight.shape, generator=generator) @ unseen
    with pytest.raises(TrialFailed, match="not trusted"):
        check_weight(SHAPE, weight, stored, None, Grid(4, 32), LEARNED)
    check_weight(SHAPE, weight, stored, None, Grid(4, 32), LEARNED, moment)
    with pytest.raises(TrialFailed, match=r"of the outputs .* allowed: not trusted"):
        check_weight(SHAPE, weight, stored.flip(0), None, Grid(4, 32), LEARNED, moment)
    with pytest.raises(TrialFailed, match="not trusted"):  # what promises plain rounding is held to it
        check_weight(SHAPE, weight, stored, None, Grid(4, 32), PLAIN, moment)
