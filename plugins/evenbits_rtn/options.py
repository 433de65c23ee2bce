"""Options, cost and fit of round-to-nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evenbits import integer
from evenbits.budget import BitBudget
from evenbits.compressor import ModelShapes, Refusal


class RtnOptions(integer.IntegerOptions):
    """Each weight goes to its nearest level; no calibration."""


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> RtnOptions | Refusal:
    """The widths and groups of least expected distortion inside the budget."""
    return integer.fit(RtnOptions, budget, shapes, fixed)
