"""AutoRound: rounding and ranges learned by signed gradient descent; without iterations, plain rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import layout_estimate
from evenbits_backends.integers import fit_rounding, paper_bits

if TYPE_CHECKING:
    from typing import Self

    from evenbits.compressor import AnyCompressor

MULTIPLE = 32  # of rows and of columns: the library leaves other layers dense
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 8),
    "group_size": (None, 256, 128, 64, 32),
    "symmetric": (True, False),
}


class AutoRoundOptions(Options):
    """Even levels, float16 scales, zero points also where they are all alike."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits per code")
    group_size: Literal[32, 64, 128, 256] | None = Field(
        default=128, description="columns per scale, a divisor of every layer's; none: one scale per row"
    )
    symmetric: bool = Field(default=True, description="levels around zero; zero points are stored all the same")
    iters: int = Field(default=200, ge=0, description="steps a block; 0: plain rounding, without calibration")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.bits == 4 and not self.symmetric:  # WQLinear_GEMM refuses the arguments that it is packed with
            raise ValueError("auto-round 0.16.1 fails to save 4 bits with zero points; give symmetric = true")
        return self


def stays_dense(layer: LayerShape) -> bool:
    return layer.out_features % MULTIPLE != 0 or layer.in_features % MULTIPLE != 0


def predict(options: AutoRoundOptions, shapes: ModelShapes) -> Estimate:
    """Exact; layers whose rows or columns are not a multiple of 32 stay dense, as the library leaves them."""
    facts = {
        "bits": options.bits,
        "group": options.group_size or 0,
        "zero_offset": int(options.symmetric),
        "g_idx": False,
    }
    dense = [layer for layer in shapes.layers if stays_dense(layer)]
    return layout_estimate("auto_round", facts, shapes, float(options.bits), paper_bits(options, shapes), dense)


def objection(options: AutoRoundOptions, shape: LayerShape) -> str | None:
    """It saves short groups, and then finds nothing that runs them."""
    if options.group_size and shape.in_features % options.group_size and not stays_dense(shape):
        return f"{shape.name}: its {shape.in_features} columns are not whole groups of {options.group_size}"
    return None


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> AutoRoundOptions | Refusal:
    """The options of least expected distortion inside the budget."""
    return fit_rounding(AutoRoundOptions, budget, shapes, fixed, predict, CHOICES, objection)


def make(options: AutoRoundOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    return Adapter("autoround", options, Claim("auto-round", calibrated=options.iters > 0), objection)


def needs(options: AutoRoundOptions) -> Needs:
    return Needs(statistics="tokens" if options.iters else "none", environment="autoround")


def descriptor() -> Compressor:
    return Compressor(
        name="autoround",
        summary="AutoRound 0.16.1: rounding and ranges learned block by block by signed gradients",
        paper="arXiv:2309.05516",
        options=AutoRoundOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=needs,
        stochastic=True,
    )
