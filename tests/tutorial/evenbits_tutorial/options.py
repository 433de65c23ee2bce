"""What a suite may say, and what a setting costs. Imports no torch: plans are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evenbits.budget import BitBudget, choose, pinned, whole_bytes
from evenbits.compressor import Estimate, ModelShapes, Options, Refusal, Role
from pydantic import Field


class PowersOptions(Options):
    bits: int = Field(default=3, ge=2, le=4, description="bits a weight: its sign, the others for the exponent")


def predict(options: PowersOptions, shapes: ModelShapes) -> Estimate:
    codes = sum(whole_bytes(options.bits * layer.weights) for layer in shapes.layers)
    scales = sum(2 * layer.out_features for layer in shapes.layers)  # one float16 a row
    return Estimate(options.bits, options.bits + 8 * scales / shapes.weights, {Role.CODE: codes, Role.SCALE: scales})


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> PowersOptions | Refusal:
    """The most bits that the budget has room for; what the suite fixed stays."""
    return choose(budget, shapes, [pinned(PowersOptions, {"bits": bits, **fixed}) for bits in (2, 3, 4)], predict)
