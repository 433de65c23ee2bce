"""AutoAWQ 0.2.9, its last release: upstream ended in 2025 and names llm-compressor as its successor.

On a CPU its search spoils the weights that it searches on; the worker gives it the copies that it has on a GPU.
"""

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

GROUPS = (None, 1024, 512, 256, 128, 64, 32, 16, 8)
CLIPPED_ROWS = 64  # it searches ranges of so many rows at once, and of no fewer


class AutoAwqOptions(Options):
    """4 bits with zero points; columns are rescaled by what flows in, which the layers before undo."""

    bits: Literal[4] = Field(default=4, description="bits per code; it has no others")
    group_size: int | None = Field(
        default=128, ge=1, description="columns per scale, a divisor of every layer's; none: one scale per row"
    )
    symmetric: Literal[False] = Field(default=False, description="zero points are always stored")
    duo_scaling: bool = Field(default=True, description="scales also by the weights' mean magnitude")
    clip: bool = Field(
        default=True, description="shrink ranges to the least output error (not of queries and keys); rows by 64"
    )


def predict(options: AutoAwqOptions, shapes: ModelShapes) -> Estimate:
    """Exact: packed codes and zero points, float16 scales."""
    return layout_estimate("awq", {"group": options.group_size or 0}, shapes, 4, paper_bits(options, shapes))


def objection(options: AutoAwqOptions, layer: LayerShape) -> str | None:
    rows, columns, group = layer.out_features, layer.in_features, options.group_size
    if group is not None and columns % group:
        return (
            f"AutoAWQ rounds only whole groups, and {layer.kind} has {columns} columns, no multiple of {group}; "
            "what can: group_size none, or a divisor"
        )
    if rows % 8:
        return f"AutoAWQ packs rows by 8, and {layer.kind} has {rows}; what can: another library"
    if options.clip and rows % CLIPPED_ROWS and "q_" not in layer.name and "k_" not in layer.name:
        return (
            f"AutoAWQ searches ranges of {CLIPPED_ROWS} rows at once, and {layer.kind} has {rows}; "
            "what can: clip = false"
        )
    return None


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> AutoAwqOptions | Refusal:
    """The group of least expected distortion inside the budget, of those that divide every layer; without its search of
    ranges, unless that is pinned, where the library cannot make one on these shapes."""
    choices = {"bits": (4,), "group_size": GROUPS, "symmetric": (False,)}
    found = fit_rounding(AutoAwqOptions, budget, shapes, fixed, predict, choices, objection)
    if isinstance(found, Refusal) and "clip" not in fixed:
        without = fit_rounding(AutoAwqOptions, budget, shapes, {**fixed, "clip": False}, predict, choices, objection)
        return found if isinstance(without, Refusal) else without
    return found


def make(options: AutoAwqOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    return Adapter("autoawq", options, Claim("AutoAWQ", calibrated=True, rescales=True), objection)


def descriptor() -> Compressor:
    return Compressor(
        name="autoawq",
        summary="AutoAWQ 0.2.9, no longer maintained: llmcompressor with algorithm awq succeeds it",
        paper="arXiv:2306.00978",
        options=AutoAwqOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=Needs("tokens", environment="autoawq"),
    )
