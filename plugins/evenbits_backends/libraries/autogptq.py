"""AutoGPTQ 0.7.1, its last release: upstream ended in 2025 and names GPTQModel as its successor. CUDA only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import layout_estimate
from evenbits_backends.integers import fit_rounding, paper_bits

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor

GROUPS = (None, 1024, 512, 256, 128, 64, 32, 16)


class AutoGptqOptions(Options):
    """Even levels, float16 scales, zero points also where they are all alike, and an int32 index of every column."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits per code")
    group_size: int | None = Field(default=128, ge=1, description="columns per scale; none: one scale per row")
    symmetric: bool = Field(default=True, description="levels around zero; zero points are stored all the same")
    desc_act: bool = Field(default=False, description="round the columns with the largest inputs first")
    static_groups: bool = Field(default=False, description="fit all grids on the dense weights")
    damping: float = Field(
        default=0.01, gt=0, lt=1, description="share of the mean diagonal added to the second moment"
    )


def predict(options: AutoGptqOptions, shapes: ModelShapes) -> Estimate:
    """Exact: whole words of codes and zero points, scales, and 4 bytes of index a column."""
    facts = {"bits": options.bits, "group": options.group_size or 0, "zero_offset": 1}
    return layout_estimate("gptq", facts, shapes, options.bits, paper_bits(options, shapes))


def objection(options: AutoGptqOptions, layer: LayerShape) -> str | None:
    rows, columns = layer.out_features, layer.in_features
    if rows % 32 or columns % 32:
        return f"AutoGPTQ packs whole blocks of 32, and {layer.kind} is {rows} x {columns}; what can: gptqmodel"
    return None


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> AutoGptqOptions | Refusal:
    """The widths and groups of least expected distortion inside the budget."""
    choices = {"bits": (2, 3, 4, 8), "group_size": GROUPS, "symmetric": (True, False)}
    return fit_rounding(AutoGptqOptions, budget, shapes, fixed, predict, choices, objection)


def make(options: AutoGptqOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    return Adapter("autogptq", options, Claim("AutoGPTQ", calibrated=True), objection)


def descriptor() -> Compressor:
    return Compressor(
        name="autogptq",
        summary="AutoGPTQ 0.7.1, no longer maintained, CUDA only: gptqmodel succeeds it",
        paper="arXiv:2210.17323",
        options=AutoGptqOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=Needs("tokens", device="cuda", environment="autogptq"),
    )
