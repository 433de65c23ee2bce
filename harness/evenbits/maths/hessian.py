"""The second moment of a layer's inputs as a metric on weights: damping, its inverse's Cholesky factor, errors.

GPTQ's Hessian is twice the second moment; the factor cancels everywhere, since damping is relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evenbits.errors import TrialFailed

RETRIES = 3  # times that damping is raised tenfold before giving up
_LEAST_RETRY = 1e-3  # what a damping of 0 is raised to first


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """upper: U (in, in) float64, upper triangular, with U^T U = (H + damping mean(diag H) I)^-1."""

    upper: Tensor
    damping: float


def require_finite(tensor: Tensor, what: str, layer: str) -> None:
    """Raises TrialFailed naming the layer where `tensor` holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise TrialFailed(f"{layer}: {bad} of {tensor.numel()} {what} are NaN or infinite")


def dead_columns(second_moment: Tensor) -> Tensor:
    """bool (in,): inputs that were never other than zero. Their weights do no work and may be set to zero."""
    return torch.diagonal(second_moment) == 0


def revive(second_moment: Tensor) -> Tensor:
    """float64 copy with 1 on the diagonal of dead columns, so that it can be inverted."""
    moment = second_moment.to(torch.float64, copy=True)
    diagonal = torch.diagonal(moment)
    diagonal[diagonal == 0] = 1
    return moment


def inverse_factor(moment: Tensor, damping: float, layer: str) -> InverseFactor:
    """Upper Cholesky factor of the inverse of the damped moment.

    moment: (in, in) float64, diagonal above 0 (see `revive`). damping: share of the mean diagonal that is added to it;
    raised tenfold, at most three times, while the sum is not positive definite.
    Raises TrialFailed, naming the layer, for values that are not finite or when no damping helps.

    H = R R^T with R upper triangular (the Cholesky factor of H with both axes reversed, reversed back), so
    H^-1 = U^T U with U = R^-1: one factorisation and one triangular solve, and H^-1 itself is never formed.
    float64, because the condition number of H squares what float32 would lose, and it costs only O(in^3).
    """
    require_finite(moment, "entries of the second moment", layer)
    mean = torch.diagonal(moment).mean()
    eye = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    tried = damping
    for attempt in range(RETRIES + 1):
        tried = damping if attempt == 0 else max(10 * tried, _LEAST_RETRY)
        lower, info = torch.linalg.cholesky_ex((moment + tried * mean * eye).flip(0, 1))
        if int(info) == 0:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return InverseFactor(upper, tried)
    raise TrialFailed(f"{layer}: the second moment is not positive definite, even with damping {tried:g}")


def relative_error(weight: Tensor, restored: Tensor) -> float:
    """||W - W'||^2 / ||W||^2, squared Frobenius norms; 0 for two zero matrices."""
    return _ratio(_square(weight.double() - restored.double()), _square(weight.double()))


def calibrated_error(weight: Tensor, restored: Tensor, second_moment: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - W': the share of the layer's output energy that is error.

    weight, restored: (out, in); second_moment: (in, in).
    """
    wide = weight.double()
    moment = second_moment.double()
    error = wide - restored.double()
    return _ratio(float(((error @ moment) * error).sum()), float(((wide @ moment) * wide).sum()))


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _ratio(error: float, signal: float) -> float:
    if signal > 0:
        return error / signal
    return 0.0 if error <= 0 else float("inf")
