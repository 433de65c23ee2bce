"""llm-compressor: rounding, GPTQ and AWQ, stored by compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import evaluated_dtype, layout_estimate
from evenbits_backends.integers import fit_rounding, paper_bits

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor

GROUPS = (None, 1024, 512, 256, 128, 64, 32, 16, 8)


class LlmCompressorOptions(Options):
    """Even levels; scales are stored in the dtype that the model is evaluated in."""

    algorithm: Literal["rtn", "gptq", "awq"] = Field(
        default="gptq", description="round to nearest; with error feedback; with rescaled columns"
    )
    bits: int = Field(default=4, ge=2, le=8, description="bits per code")
    group_size: int | None = Field(
        default=128, ge=1, description="columns per scale, a divisor of every layer's; none: one scale per row"
    )
    symmetric: bool = Field(default=True, description="levels around zero, no zero point stored")
    observer: Literal["memoryless_minmax", "memoryless_mse"] = Field(
        default="memoryless_minmax", description="what fits a group's range: its extremes, or the least squared error"
    )
    act_order: bool = Field(default=True, description="gptq: round the columns with the largest inputs first; no index")
    damping: float = Field(
        default=0.01, gt=0, description="gptq: share of the mean diagonal added to the second moment"
    )
    awq_grid: int = Field(default=20, ge=1, description="awq: exponents tried for each scale")

    def shown(self) -> tuple[str, ...]:
        own = {"gptq": ("act_order", "damping"), "awq": ("awq_grid",), "rtn": ()}[self.algorithm]
        return ("algorithm", "bits", "group_size", "symmetric", "observer", *own)


def facts(options: LlmCompressorOptions) -> dict[str, Any]:
    """What its checkpoint will say of itself."""
    scheme: dict[str, Any] = {"targets": ["Linear"], "bits": options.bits, "group": options.group_size or 0}
    return {"schemes": [scheme if options.symmetric else {**scheme, "asymmetric": True}]}


def predict(options: LlmCompressorOptions, shapes: ModelShapes) -> Estimate:
    """Exact: packed codes, a scale in the evaluated dtype, packed zero points, 16 bytes of shape a layer."""
    loaded = replace(shapes, layers=tuple(replace(one, dtype=evaluated_dtype(shapes, one)) for one in shapes.layers))
    return layout_estimate("compressed_tensors", facts(options), loaded, options.bits, paper_bits(options, shapes))


def objection(options: LlmCompressorOptions, layer: LayerShape) -> str | None:
    group = options.group_size
    if group is not None and layer.in_features % group:
        return (
            f"llm-compressor rounds only whole groups, and {layer.kind} has {layer.in_features} columns, no multiple "
            f"of {group}; what can: group_size none, or a divisor"
        )
    return None


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> LlmCompressorOptions | Refusal:
    """The widths and groups of least expected distortion inside the budget, of those that divide every layer."""
    choices = {"bits": range(2, 9), "group_size": GROUPS, "symmetric": (True, False)}
    return fit_rounding(LlmCompressorOptions, budget, shapes, fixed, predict, choices, objection)


def needs(options: LlmCompressorOptions) -> Needs:
    return Needs("none" if options.algorithm == "rtn" else "tokens", environment="llmcompressor")


def make(options: LlmCompressorOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    algorithm = options.algorithm
    claim = Claim(f"llm-compressor's {algorithm}", calibrated=algorithm != "rtn", rescales=algorithm == "awq")
    return Adapter("llmcompressor", options, claim, objection)


def descriptor() -> Compressor:
    return Compressor(
        name="llmcompressor",
        summary="llm-compressor 0.14.0.1: rounding, GPTQ or AWQ, stored by compressed-tensors",
        paper="arXiv:2210.17323, arXiv:2306.00978",
        options=LlmCompressorOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=needs,
    )
