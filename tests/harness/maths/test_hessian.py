"""The damped inverse's factor, and the two errors."""

from __future__ import annotations

import pytest
import torch

from evenbits.errors import TrialFailed
from evenbits.maths.hessian import (
    calibrated_error,
    dead_columns,
    inverse_factor,
    relative_error,
    require_finite,
    revive,
)


def moment(columns: int, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixing
    return inputs.T @ inputs / rows


@pytest.mark.parametrize("columns", [1, 5, 40])
def test_factor_of_the_damped_inverse(columns: int) -> None:
    second = moment(columns, 200)
    factor = inverse_factor(second, 0.02, "layer")
    damped = second + 0.02 * second.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = factor.upper
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(upper, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), rtol=1e-6, atol=1e-9)
    assert factor.damping == 0.02


def test_singular_moment_raises_the_damping() -> None:
    second = torch.ones(6, 6, dtype=torch.float64)
    second[0, 0] -= 1e-9
    factor = inverse_factor(second, 0.0, "layer")
    assert factor.damping == pytest.approx(1e-3)
    assert torch.isfinite(factor.upper).all()


def test_hopeless_moments_fail_by_name() -> None:
    with pytest.raises(TrialFailed, match=r"layers\.3\.q: the second moment is not positive definite, even with damp"):
        inverse_factor(torch.tensor([[1.0, 99.0], [99.0, 1.0]], dtype=torch.float64), 0.01, "layers.3.q")
    with pytest.raises(TrialFailed, match=r"layers\.3\.q: 1 of 4 entries of the second moment are NaN"):
        inverse_factor(torch.tensor([[1.0, 0], [float("nan"), 1]], dtype=torch.float64), 0.01, "layers.3.q")


def test_dead_columns_are_revived_in_a_copy() -> None:
    second = torch.diag(torch.tensor([2.0, 0.0, 3.0]))
    assert dead_columns(second).tolist() == [False, True, False]
    revived = revive(second)
    assert revived.dtype == torch.float64
    assert revived.diagonal().tolist() == [2.0, 1.0, 3.0]
    assert second[1, 1] == 0
    doubled = second.double()
    revive(doubled)
    assert doubled[1, 1] == 0


def test_require_finite() -> None:
    require_finite(torch.zeros(3), "weights", "layer")
    with pytest.raises(TrialFailed, match="layer: 2 of 3 weights are NaN or infinite"):
        require_finite(torch.tensor([1.0, float("inf"), float("nan")]), "weights", "layer")


def test_errors_against_outputs() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 12, generator=generator) * torch.arange(1, 13)
    weight = torch.randn(5, 12, generator=generator)
    restored = weight + 0.1 * torch.randn(5, 12, generator=generator)
    second = inputs.T @ inputs / 500
    expected = (inputs @ (weight - restored).T).square().sum() / (inputs @ weight.T).square().sum()
    assert calibrated_error(weight, restored, second) == pytest.approx(float(expected), rel=1e-4)
    assert relative_error(weight, restored) == pytest.approx(
        float((weight - restored).norm() ** 2 / weight.norm() ** 2), rel=1e-5
    )
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.zeros(2, 2), torch.ones(2, 2)) == float("inf")
