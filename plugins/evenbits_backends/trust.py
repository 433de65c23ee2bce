"""Whether a library's stored weights are what it computes with, and near enough to the weights it was given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evenbits.compressor import Fold, LayerShape
from evenbits.errors import TrialFailed
from evenbits.maths.hessian import relative_error
from evenbits_backends.layout import Grid

# of the outputs' energy: half precision gives 1e-6, a library's bfloat16 kernel 1e-5; a wrong decode 0.05 and more
FORWARD_ERROR = 1e-4
# Times plain rounding's squared error that a layer may have. Measured on babyllama105, stories260K and Gaussian weights
# at 2 to 8 bits: symmetric rounding up to 1.5, GPTQ up to 3.8; rows out of order 7 to 14 at 2 bits, from 160 at 4.
ROUNDING, CALIBRATED = 3.0, 6.0
WORST = 0.9  # whatever the bits: at 1, nothing at all could have been stored


@dataclass(frozen=True)
class Claim:
    """library: its name, for messages. calibrated: it trades errors of weights for errors of outputs.
    rescales: layers are stored with rows and columns rescaled, which their neighbours undo (AWQ)."""

    library: str
    calibrated: bool = False
    rescales: bool = False


def check_forward(
    shape: LayerShape,
    restored: Tensor,
    probe: Tensor,
    outputs: Tensor,
    weight: Tensor | None = None,
    library: str = "the library",
) -> None:
    """restored (out, in) against outputs (rows, out) that the library's own layer gave for probe (rows, in).

    This finds a library that stores the right codes and computes with other weights, as well as a wrong decode here.
    weight: (out, in), what is stored stands for (rescaled as it is), to say by how much either is off.
    Raises TrialFailed with the layer and the numbers.
    """
    expected = outputs.float()
    found = probe.float() @ restored.float().T.to(probe.device)
    error = _energy_apart(found, expected)
    if error <= FORWARD_ERROR:
        return
    off = f"({error:.3g} of their energy, {FORWARD_ERROR:g} allowed)"
    if weight is None:
        raise TrialFailed(
            f"{shape.name}: what {library} stored decodes to other outputs than its own forward gives {off}: "
            "not trusted"
        )
    dense = probe.float() @ weight.float().T.to(probe.device)
    raise TrialFailed(
        f"{shape.name}: the outputs of {library}'s own layer have a relative squared error of "
        f"{_energy_apart(expected, dense):.3g}, what it stored decodes to {_energy_apart(found, dense):.3g} {off}: "
        "not trusted"
    )


def _energy_apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum().clamp_min(1e-30))


def rescaled(weight: Tensor, restored: Tensor) -> Fold:
    """By least squares, columns first and then rows: the libraries do not store what they rescaled by.

    The errors that follow are therefore a little below the true ones (one fitted number a column and a row). A whole
    row or column stored at a wrong scale is not seen through this; wrong values, orders and groups are.
    """
    columns = (restored * weight).sum(0) / weight.square().sum(0).clamp_min(1e-30)
    columns = torch.where(columns > 0, columns, torch.ones_like(columns))
    scaled = weight * columns
    rows = (restored * scaled).sum(1) / scaled.square().sum(1).clamp_min(1e-30)
    return Fold(torch.where(rows > 0, rows, torch.ones_like(rows)), columns)


def _folded(weight: Tensor, fold: Fold) -> Tensor:
    if fold.columns is not None:
        weight = weight * fold.columns
    return weight if fold.rows is None else weight * fold.rows[:, None]


def plain_rounding_error(weight: Tensor, grid: Grid) -> float:
    """Relative squared error of round to nearest on that grid, asymmetric, each group's extremes kept."""
    group = grid.group or weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group), value=0.0)
    parts = padded.reshape(len(weight), -1, group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**grid.bits - 1)).clamp_min(1e-30)
    rounded = (torch.round((parts - low) / step) * step + low).reshape(len(weight), -1)[:, : weight.shape[1]]
    return relative_error(weight, rounded)


def check_weight(
    shape: LayerShape, weight: Tensor, restored: Tensor, fold: Fold | None, grid: Grid | None, claim: Claim
) -> None:
    """The stored weight against the dense one, rescaled as it was stored: there its levels were even.

    Raises TrialFailed where its error is beyond what rounding explains.
    """
    if fold is not None:
        weight = _folded(weight, fold)
    error = relative_error(weight, restored)
    allowed, plain = WORST, None
    if grid is not None:
        plain = plain_rounding_error(weight, grid)
        allowed = min(WORST, (CALIBRATED if claim.calibrated else ROUNDING) * plain)
    if not error <= max(allowed, 1e-6):
        beside = "" if plain is None else f", plain rounding's is {plain:.3g}"
        raise TrialFailed(
            f"{shape.name}: {claim.library} stored a weight with a relative squared error of {error:.3g} where "
            f"{allowed:.3g} is allowed{beside}: not trusted"
        )
