"""HQQ: zero points by half-quadratic splitting, no calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evenbits.budget import BitBudget, choose, pinned
from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import evaluated_dtype, layout_estimate
from evenbits_backends.integers import first_objection
from evenbits_backends.layouts.hqq import PACKINGS

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor

BITS = (2, 3, 4, 8)  # at 1 its levels lie at a group's extremes, further off than zero would be
GROUPS = (None, 256, 128, 64, 32, 16, 8)


class HqqOptions(Options):
    """Even levels between each group's extremes, zero points optimized; scales and zero points in the model's dtype."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits per code; 3 are packed ten to 32 bits")
    group_size: Literal[8, 16, 32, 64, 128, 256] | None = Field(
        default=64, description="weights per scale, across the ends of rows; none: one scale per row"
    )


def objection(options: HqqOptions, shape: LayerShape) -> str | None:
    """The library cuts what it cannot pack, or refuses it."""
    group = options.group_size or shape.in_features
    if shape.weights % group:
        return f"{shape.name}: its {shape.weights} weights are not whole groups of {group}"
    held = PACKINGS[options.bits][3]
    if options.bits != 3 and shape.weights // group % held:  # 3 bits are filled up with zeros
        return f"{shape.name}: its {shape.weights // group} groups of {group} do not fill bytes of {held} codes"
    return None


def predict(options: HqqOptions, shapes: ModelShapes) -> Estimate:
    """Exact. Paper bits: b + 32 / g, with scale and zero point of 16 bits (the library's own account)."""
    dtype = evaluated_dtype(shapes, shapes.layers[0])
    facts = {"bits": options.bits, "group": options.group_size or 0, "dtype": dtype}
    paper = options.bits + sum(
        32 / (options.group_size or layer.in_features) * layer.weights / shapes.weights for layer in shapes.layers
    )
    return layout_estimate("hqq", facts, shapes, float(options.bits), paper)


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> HqqOptions | Refusal:
    """The most bits a code inside the budget, then the smallest groups; or why no setting can be had."""
    base = pinned(HqqOptions, fixed)
    candidates = [
        base.model_copy(update={"bits": bits, "group_size": group})
        for bits in ([base.bits] if "bits" in fixed else BITS)
        for group in ([base.group_size] if "group_size" in fixed else GROUPS)
    ]
    taken = [options for options in candidates if first_objection(options, shapes, objection) is None]
    if not taken:
        return Refusal(first_objection(candidates[0], shapes, objection) or "no setting is valid with what is pinned")
    return choose(budget, shapes, taken, predict, lambda o: (o.bits, -(o.group_size or 1 << 30)))


def make(options: HqqOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    return Adapter("hqq", options, Claim("hqq"), objection)


def descriptor() -> Compressor:
    return Compressor(
        name="hqq",
        summary="HQQ 0.2.8.post1: zero points by half-quadratic splitting, without calibration",
        paper="https://mobiusml.github.io/hqq_blog/",
        options=HqqOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=Needs(environment="hqq"),
    )
