"""The Python door: one method on a matrix, or on several."""

from __future__ import annotations

import random
from typing import Any

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
    with pytest.raises(ValueError, match=r"second moment 0 must be a float matrix \(96, 96\), not \(32, 32\)"):
        evenbits.compress_weight(weight, "gptq", second_moment=torch.eye(32))
    with pytest.raises(ValueError, match=r"1 second moment\(s\) for 2 weight\(s\)"):
        evenbits.compress_weight([weight, weight], "gptq", second_moment=[moment])
    with pytest.raises(TrialFailed, match=r"method 'gptq' needs the second moment"):
        evenbits.compress_weight(weight, "gptq")
    broken = weight.clone()
    broken[3, 4] = float("inf")
    with pytest.raises(TrialFailed, match=r"weight 0 is not finite"):
        evenbits.compress_weight(broken, "rtn")
    with pytest.raises(TrialFailed, match=r"weight 0 is not finite in float32"):
        evenbits.compress_weight(weight.double() * 1e300, "rtn")


@pytest.mark.parametrize("method", ["rtn", "nf4", "kmeans"])
@pytest.mark.parametrize("budget", [None, 4.5])
def test_a_mistyped_option_has_its_near_name(method: str, budget: float | None) -> None:
    option = {"rtn": "bits", "nf4": "block_size", "kmeans": "codebook_size"}[method]
    with pytest.raises(SuiteError, match=rf"options\.{option}s: unknown option; did you mean \"{option}\""):
        evenbits.compress_weight(matrix(), method, budget=budget, options={f"{option}s": 4})


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.empty(0, 8), r"weight 0 must be a float matrix \(out, in\), not \(0, 8\)"),
        (torch.empty(8, 0), r"weight 0 must be a float matrix \(out, in\), not \(8, 0\)"),
        (np.ones((4, 8), dtype=np.float32), "weight 0 must be a torch tensor, not ndarray"),
        ([torch.ones(4, 8), None], "weight 1 must be a torch tensor, not NoneType"),
        (3, "weight 0 must be a torch tensor, not int"),
    ],
)
def test_what_is_no_matrix(weight: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evenbits.compress_weight(weight, "rtn")


@pytest.mark.parametrize("seed", [None, -1, 2**63, 1.5])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\^63 - 1"):
        evenbits.compress_weight(matrix(), "rtn", seed=seed)


def test_the_largest_seed() -> None:
    evenbits.compress_weight(matrix(8, 16), "kmeans", options={"codebook_size": 4}, seed=2**63 - 1)


def test_second_moments_are_checked() -> None:
    weight, case = matrix(), make_case(32, 96)
    skewed, huge, missing = case.second_moment.clone(), case.second_moment.double(), case.second_moment.clone()
    skewed[0, 1] += 2e-4 * skewed.abs().max()
    huge[3, 3] = 1e300
    missing[5, 5] = float("nan")
    for moment, said in (
        (skewed, "second moment 0 is not symmetric"),
        (huge, "second moment 0 is not finite in float32"),
        (missing, "second moment 0 is not finite"),
        (torch.eye(96).long(), r"second moment 0 must be a float matrix \(96, 96\), not \(96, 96\) torch.int64"),
        (np.eye(96), "second moment 0 must be a torch tensor, not ndarray"),
    ):
        with pytest.raises(ValueError, match=said):
            evenbits.compress_weight(weight, "gptq", second_moment=moment)


def test_a_second_moment_may_be_part_of_a_graph_and_a_little_askew() -> None:
    case = make_case(32, 96)
    askew = case.second_moment.clone()
    askew[0, 1] += 1e-5 * askew.abs().max()
    found = evenbits.compress_weight(case.weight, "gptq", second_moment=askew.requires_grad_())
    assert not found.restored.requires_grad
    assert isinstance(found.calibrated_error, float)


def test_load_of_what_is_no_artifact(tmp_path: object) -> None:
    with pytest.raises(ArtifactError, match=r"not an artifact"):
        evenbits.load(str(tmp_path))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:", "cpu:1", ""])
def test_load_on_an_unknown_device(device: str) -> None:
    with pytest.raises(SuiteError, match=rf"unknown device '{device}'; give \"cpu\""):
        evenbits.load("anywhere", device=device)


def test_load_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SuiteError, match=r"no CUDA device here"):
        evenbits.load("anywhere", device="cuda")
