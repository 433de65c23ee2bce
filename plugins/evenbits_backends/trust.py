"""Whether a library's stored weights are what it computes with, and near enough to the weights it was given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evenbits.compressor import Fold, LayerShape
from evenbits.errors import TrialFailed
from evenbits.maths.hessian import calibrated_error, relative_error
from evenbits_backends.layout import Grid

# of the outputs' energy: half precision gives 1e-6, a library's bfloat16 kernel 1e-5; a wrong decode 0.05 and more
FORWARD_ERROR = 1e-4
OUTPUT_ERROR = 1e-2  # of any one output's energy: of a wide layer one wrong row is little of the whole
LEFT_DENSE = 1e-5  # of a layer's energy where nothing was quantized: bfloat16 gives 3e-6
# Times plain rounding's squared error that a layer may have. Measured on babyllama105, stories260K and Gaussian weights
# at 2 to 8 bits: symmetric rounding up to 1.5, GPTQ up to 3.8; rows out of order 7 to 14 at 2 bits, from 160 at 4.
# Where inputs fill few directions GPTQ's goes beyond any such limit (8.3 at 4 bits on the reference model's down_proj,
# whose outputs are good): there the outputs' error is held to ROUNDING times plain rounding's.
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
        energy = expected.square().sum(0)
        by_output = (found - expected).square().sum(0) / energy.clamp_min(max(1e-3 * float(energy.mean()), 1e-30))
        if (worst := float(by_output.max())) <= OUTPUT_ERROR:
            return
        off = f"({worst:.3g} of the energy of output {int(by_output.argmax())}, {OUTPUT_ERROR:g} allowed)"
    else:
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


def check_left(name: str, weight: Tensor, restored: Tensor, claim: Claim, allowed: float = LEFT_DENSE) -> None:
    """What the library left dense: `weight`, rescaled as it was stored, rounded to half precision at most.

    Raises TrialFailed where it is anything else.
    """
    error = relative_error(weight, restored)
    if not error <= allowed:
        raise TrialFailed(
            f"{name}: {claim.library} left it dense, with a relative squared error of {error:.3g} where "
            f"{allowed:.3g} is allowed: not trusted"
        )


def folded(weight: Tensor, fold: Fold) -> Tensor:
    """(out, in): the weight as it was rescaled for storing."""
    if fold.columns is not None:
        weight = weight * fold.columns
    return weight if fold.rows is None else weight * fold.rows[:, None]


def plain_rounding(weight: Tensor, grid: Grid) -> Tensor:
    """(out, in) rounded to nearest on that grid, asymmetric, each group's extremes kept."""
    group = grid.group or weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group), value=0.0)
    parts = padded.reshape(len(weight), -1, group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**grid.bits - 1)).clamp_min(1e-30)
    rounded: Tensor = torch.round((parts - low) / step) * step + low
    return rounded.reshape(len(weight), -1)[:, : weight.shape[1]]


def check_weight(
    shape: LayerShape,
    weight: Tensor,
    restored: Tensor,
    fold: Fold | None,
    grid: Grid | None,
    claim: Claim,
    moment: Tensor | None = None,
) -> None:
    """The stored weight against the dense one, rescaled as it was stored: there its levels were even.

    moment: (in, in) second moment of the dense layer's inputs. Where these fill few directions, a method that reads
    them may pay for smaller errors of the outputs with any error of the weights: then the outputs' error is asked.
    Raises TrialFailed where the error is beyond what rounding explains.
    """
    if fold is not None:
        weight, moment = folded(weight, fold), None
    rounded = None if grid is None else plain_rounding(weight, grid)
    error, plain = relative_error(weight, restored), None if rounded is None else relative_error(weight, rounded)
    allowed = WORST if plain is None else min(WORST, (CALIBRATED if claim.calibrated else ROUNDING) * plain)
    if error <= max(allowed, 1e-6):
        return
    beside = "" if plain is None else f", plain rounding's is {plain:.3g}"
    if claim.calibrated and moment is not None and rounded is not None:
        felt, limit = calibrated_error(weight, restored, moment), ROUNDING * calibrated_error(weight, rounded, moment)
        if felt <= min(WORST, limit):
            return
        beside += f"; of the outputs {felt:.3g}, {min(WORST, limit):.3g} allowed"
    raise TrialFailed(
        f"{shape.name}: {claim.library} stored a weight with a relative squared error of {error:.3g} where "
        f"{allowed:.3g} is allowed{beside}: not trusted"
    )
