"""A suite on another model than its own (`--model`): what is of its own model gives way, and it is said what did.

Sizes are left to each method's `fit`; what the suite's [elsewhere] table names gives way too. Nothing else changes, so
methods, protocols and seeds are the suite's. Reads nothing: the model comes as its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evenbits.suite_spec import BudgetSpec, ElsewhereSpec, StageSpec, Suite

CONTEXTS = ("context", "max_length")
"""Options of evaluators that are numbers of tokens which a model must have positions for."""
SLOW = "float16"


@dataclass(frozen=True)
class Elsewhere:
    """The suite as it runs on the other model, and what was changed, in words."""

    suite: Suite
    changes: tuple[str, ...]

    @property
    def said(self) -> str | None:
        """One line, None where nothing but the model changed."""
        return f"elsewhere: {', '.join(self.changes)}" if self.changes else None


def elsewhere(suite: Suite, config: Mapping[str, Any], *, cuda: bool) -> Elsewhere:
    """config: the other model's config.json. cuda: whether there is a CUDA device here.

    A suite without [elsewhere] loses its methods' `sizes` alone. With it, windows and contexts change as the table says
    and, where the suite asks for CUDA and there is none, the device is the CPU. float16, in which a CPU takes four
    times as long as in float32 and nine times as long as in bfloat16, then becomes the other model's own dtype.
    """
    changes: list[str] = []
    update: dict[str, Any] = {}
    if sized := sum(bool(method.sizes) for method in suite.methods):
        update["methods"] = tuple(method.model_copy(update={"sizes": {}}) for method in suite.methods)
        changes.append(f"sizes of {sized} method{'s' if sized > 1 else ''} left to fit")
    given = suite.elsewhere
    if given is not None:
        update |= _windows(suite, given, changes) | _contexts(suite, given, config, changes)
        if suite.device.startswith("cuda") and not cuda:
            update["device"] = "cpu"
            changes.append(f"device {suite.device} -> cpu")
            if suite.dtype == SLOW:
                update["dtype"] = "auto"
                changes.append(f"dtype {suite.dtype} -> the model's own")
    return Elsewhere(suite.model_copy(update=update), tuple(changes))


def _windows(suite: Suite, given: ElsewhereSpec, changes: list[str]) -> dict[str, Any]:
    if given.window is None:
        return {}
    budgets = [spec.budget() for spec in suite.budgets]
    wider = [max(budget.window, given.window) for budget in budgets]
    if any(window > budget.window for window, budget in zip(wider, budgets, strict=True)):
        changes.append(f"windows +-{given.window:g}")
    found = zip(suite.budgets, wider, strict=True)
    return {"budgets": tuple(BudgetSpec(centre=spec.centre, window=window, on=spec.on) for spec, window in found)}


def _contexts(suite: Suite, given: ElsewhereSpec, config: Mapping[str, Any], changes: list[str]) -> dict[str, Any]:
    if given.context is None:
        return {}
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(positions, int):
        changes.append("contexts as they are, for the model's config has no max_position_embeddings")
        return {}
    cut: dict[int, None] = {}

    def shorter(stage: StageSpec) -> StageSpec:
        options = dict(stage.options)
        for name in CONTEXTS:
            if isinstance(options.get(name), int) and options[name] > positions:
                cut[options[name]] = None
                options[name] = positions
        return stage.model_copy(update={"options": options})

    update: dict[str, Any] = {"evaluators": tuple(shorter(stage) for stage in suite.evaluators)}
    if cut:
        changes.append(f"context {', '.join(map(str, cut))} -> {positions}")
    calibration = suite.calibration
    if calibration is not None and calibration.length > positions:
        update["calibration"] = calibration.model_copy(update={"length": positions})
        changes.append(f"calibration length {calibration.length} -> {positions}")
    return update
