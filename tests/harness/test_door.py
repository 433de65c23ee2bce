"""The Python door: one method on a matrix, or on several."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

import evenbits
from evenbits.budget import BitBudget
from evenbits.compressor import Role
from evenbits.errors import ArtifactError, SuiteError, TrialFailed
from evenbits.testing import make_case, untouched_randomness


def matrix(rows: int = 32, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_matrix_with_options() -> None:
    weight = matrix()
    found = evenbits.compress_weight(weight, "rtn", options={"bits": 4, "group_size": 32})
    assert found.restored.dtype == torch.float32
    assert found.restored.shape == weight.shape
    assert found.error == pytest.approx(float((weight - found.restored).square().sum() / weight.square().sum()))
    assert found.calibrated_error is None
    assert found.shared is None
    assert found.options["bits"] == 4
    assert found.bits.linear == 8 * found.packed.nbytes / weight.numel() == 4 + 16 / 32
    assert found.bits.index == 4
    assert found.bits.paper == 4.5
    assert found.packed.roles["codes"] is Role.CODE


@pytest.mark.parametrize("method", ["rtn", "nf4", "kmeans"])
@pytest.mark.parametrize("budget", [3.0, 4.5, BitBudget(4.0, 0.9)])
def test_a_budget_is_kept(method: str, budget: float | BitBudget) -> None:
    weight = matrix(256, 256)
    window = budget if isinstance(budget, BitBudget) else BitBudget(budget, 0.1)
    if method == "nf4" and window.upper < 4:  # it has 4 bits and its scales, nothing below
        with pytest.raises(SuiteError, match=r"^method nf4: no setting within 3 \+- 0\.1"):
            evenbits.compress_weight(weight, method, budget=budget)
        return
    found = evenbits.compress_weight(weight, method, budget=budget)
    assert found.bits.linear in window


def test_pinned_options_stay_under_a_budget() -> None:
    found = evenbits.compress_weight(matrix(64, 256), "rtn", budget=BitBudget(4.5, 0.6), options={"symmetric": False})
    assert found.options["symmetric"] is False
    assert found.bits.linear in BitBudget(4.5, 0.6)


def test_several_matrices_share_and_are_billed_once() -> None:
    weights = [matrix(64, 64, seed) for seed in range(3)]
    options = {"d": 2, "codebook_size": 64, "scope": "model"}
    found = evenbits.compress_weight(weights, "kmeans", options=options)
    assert [result.restored.shape for result in found] == [(64, 64)] * 3
    shared = found[0].shared
    assert shared is not None
    assert all(result.shared is shared for result in found)
    total = shared.nbytes + sum(result.packed.nbytes for result in found)
    assert {result.bits.linear for result in found} == {8 * total / (3 * 64 * 64)}
    assert len({result.error for result in found}) == 3


def test_a_second_moment_is_used() -> None:
    case = make_case(32, 96)
    options = {"bits": 3, "group_size": 32}
    nearest = evenbits.compress_weight(case.weight, "rtn", options=options, second_moment=case.second_moment)
    gptq = evenbits.compress_weight(case.weight, "gptq", options=options, second_moment=case.second_moment)
    assert nearest.calibrated_error is not None
    assert gptq.calibrated_error is not None
    assert gptq.calibrated_error < 0.9 * nearest.calibrated_error
    difference = (case.weight - gptq.restored).double()
    moment, wide = case.second_moment.double(), case.weight.double()
    by_hand = float((difference @ moment * difference).sum() / (wide @ moment * wide).sum())
    assert gptq.calibrated_error == pytest.approx(by_hand, rel=1e-6)


def test_seeds() -> None:
    weight = matrix(64, 64)
    options = {"d": 2, "codebook_size": 32}
    with untouched_randomness("compress_weight"):
        first, again, other = (evenbits.compress_weight(weight, "kmeans", options=options, seed=s) for s in (0, 0, 1))
    random.random(), np.random.rand(), torch.rand(1)
    later = evenbits.compress_weight(weight, "kmeans", options=options, seed=0)
    assert torch.equal(first.restored, again.restored)
    assert torch.equal(first.restored, later.restored)
    assert not torch.equal(first.restored, other.restored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_taken_and_left_alone(dtype: torch.dtype) -> None:
    weight = matrix().to(dtype).requires_grad_()
    before = weight.detach().clone()
    found = evenbits.compress_weight(weight, "rtn", options={"bits": 8})
    assert found.restored.dtype == torch.float32
    assert not found.restored.requires_grad
    assert torch.equal(weight.detach(), before)


def test_errors() -> None:
    weight = matrix()
    moment = torch.eye(96)
    with pytest.raises(SuiteError, match=r"unknown method 'rtm'; did you mean \"rtn\""):
        evenbits.compress_weight(weight, "rtm")
    with pytest.raises(SuiteError, match=r"method rtn: options.*bit"):
        evenbits.compress_weight(weight, "rtn", options={"bit": 3})
    with pytest.raises(SuiteError, match=r"method rtn: no setting within 0\.1.*nearest: "):
        evenbits.compress_weight(weight, "rtn", budget=BitBudget(0.1, 0.05))
    with pytest.raises(ValueError, match="centre"):
        evenbits.compress_weight(weight, "rtn", budget=0.0)
    with pytest.raises(ValueError, match=r"weight 0 must be a float matrix \(out, in\), not \(96,\)"):
        evenbits.compress_weight(weight[0], "rtn")
    with pytest.raises(ValueError, match=r"weight 1 must be a float matrix"):
        evenbits.compress_weight([weight, weight.long()], "rtn")
    with pytest.raises(ValueError, match=r"at least one weight"):
        evenbits.compress_weight([], "rtn")
    with pytest.raises(ValueError, match=r"second moment 0 must be \(96, 96\), not \(32, 32\)"):
        evenbits.compress_weight(weight, "gptq", second_moment=torch.eye(32))
    with pytest.raises(ValueError, match=r"1 second moment\(s\) for 2 weight\(s\)"):
        evenbits.compress_weight([weight, weight], "gptq", second_moment=[moment])
    with pytest.raises(TrialFailed, match=r"method 'gptq' needs the second moment"):
        evenbits.compress_weight(weight, "gptq")
    broken = weight.clone()
    broken[3, 4] = float("inf")
    with pytest.raises(TrialFailed, match=r"weight 0 is not finite"):
        evenbits.compress_weight(broken, "rtn")


def test_load_of_what_is_no_artifact(tmp_path: object) -> None:
    with pytest.raises(ArtifactError, match=r"not an artifact"):
        evenbits.load(str(tmp_path))


def test_load_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SuiteError, match=r"no CUDA device here"):
        evenbits.load("anywhere", device="cuda")
