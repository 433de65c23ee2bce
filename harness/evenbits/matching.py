"""A method's settings under a budget, and what they cost with the recovery stages that follow. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Estimate, ModelShapes, Options, Recovery, Refusal, Role
from evenbits.errors import PluginError, SuiteError
from evenbits.plugins import Provided
from evenbits.shapes import WIDTHS
from evenbits.suite_errors import check_options

Stages = Sequence[tuple[Recovery, Options]]
ROUNDS = 10  # of halving what is left for recovery stages, where a method's options decide what these cost


@dataclass(frozen=True)
class Choice:
    """options: the method's. estimate: of all that will be stored, recovery stages included."""

    options: Any
    estimate: Estimate


def call_plugin(provided: Provided[Compressor], what: str, expected: tuple[type, ...], *arguments: Any) -> Any:
    """Plugin code at planning: a crash names the plugin and does not take the plan down with a riddle."""
    who = f"method {provided.value.name!r} of plugin {provided.plugin.origin}: {what}"
    try:
        found = getattr(provided.value, what)(*arguments)
    except SuiteError:
        raise
    except Exception as error:
        raise PluginError(f"{who} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(found, expected):
        names = " or ".join(kind.__name__ for kind in expected)
        raise PluginError(f"{who} returned {type(found).__name__}, expected {names}")
    return found


def choose_settings(
    provided: Provided[Compressor],
    given: Mapping[str, Any],
    budget: BitBudget | None,
    stages: Stages,
    shapes: ModelShapes,
) -> Choice | Refusal:
    """What `fit` makes of the budget that recovery stages leave, or `given` as it is where there is no budget.

    Raises SuiteError for what the suite gives wrongly, PluginError where the plugin's own code fails.
    """
    compressor = provided.value
    if budget is None:
        free: Any = check_options(compressor.options, given, f"method {compressor.name}: options")
        return Choice(free, _estimate(provided, free, stages, shapes))
    if compressor.shapes_after is not None:
        return _choose_together(provided, given, budget, stages, shapes)
    options = _fit(provided, given, _less(budget, recovery_bytes(stages, shapes), shapes), shapes)
    return options if isinstance(options, Refusal) else Choice(options, _estimate(provided, options, stages, shapes))


def recovery_bytes(stages: Stages, shapes: ModelShapes) -> dict[Role, int]:
    """What the stages store on layers of these shapes."""
    extra: dict[Role, int] = {}
    for descriptor, options in stages:
        for role, count in descriptor.predict(options, shapes).items():
            extra[role] = extra.get(role, 0) + count
    return extra


def _choose_together(
    provided: Provided[Compressor], given: Mapping[str, Any], budget: BitBudget, stages: Stages, shapes: ModelShapes
) -> Choice | Refusal:
    """Where the method changes shapes: its options decide what adapters cost, and adapters what is left for the
    options. What to leave for them is sought by halving, up to what they cost on the dense layers."""
    most = _beside(recovery_bytes(stages, shapes))
    low, high, share = 0.0, 1.0, 1.0
    totals: list[float] = []
    options: Any = None
    for _ in range(ROUNDS if most else 1):
        assumed = {role: round(share * count) for role, count in most.items()}
        options = _fit(provided, given, _less(budget, assumed, shapes), shapes)
        total = 0.0  # too much was left for adapters
        if not isinstance(options, Refusal):
            estimate = _estimate(provided, options, stages, shapes)
            total = budget.bits(estimate, shapes)
            if total in budget:
                return Choice(options, estimate)
            totals.append(total)
        low, high = (share, high) if total > budget.centre else (low, share)
        share = (low + high) / 2
    if isinstance(options, Refusal) and not totals:
        return options
    nearest = min(totals, key=lambda total: abs(total - budget.centre))
    return Refusal(f"no setting together with the recovery stages within {budget}; nearest: {nearest:.3f}")


def _estimate(provided: Provided[Compressor], options: Options, stages: Stages, shapes: ModelShapes) -> Estimate:
    """Of the method and of what the stages add. What a stage makes dense again costs what the stage says, and the
    method nothing; in paper bits it counts at its dtype."""
    if provided.value.shapes_after is not None:
        after = call_plugin(provided, "shapes_after", (ModelShapes,), options, shapes)
        found = call_plugin(provided, "predict", (Estimate,), options, shapes)
        return _with_bytes(found, _beside(recovery_bytes(stages, after)))
    dense = {name for descriptor, given in stages for name in descriptor.dense(given, shapes)}
    left = shapes
    if dense:
        kept = tuple(layer for layer in shapes.layers if layer.name not in dense)
        left = replace(shapes, layers=kept, partial=True)
    estimate = Estimate(0.0, 0.0, {})
    if left.layers:
        estimate = call_plugin(provided, "predict", (Estimate,), options, left)
    if dense:
        width = 8 * WIDTHS[shapes.dtype or shapes.layers[0].dtype]
        paper = estimate.paper_bits * left.weights + width * (shapes.weights - left.weights)
        estimate = replace(estimate, paper_bits=paper / shapes.weights)
    return _with_bytes(estimate, recovery_bytes(stages, shapes))


def _with_bytes(estimate: Estimate, extra: Mapping[Role, int]) -> Estimate:
    roles = dict(estimate.role_bytes)
    for role, count in extra.items():
        roles[role] = roles.get(role, 0) + count
    return replace(estimate, role_bytes=roles)


def _beside(extra: Mapping[Role, int]) -> dict[Role, int]:
    """What recovery stages add to a method that changes shapes: its smaller weights are stored as they are, so that
    what is merged into them changes them, and no byte."""
    return {role: count for role, count in extra.items() if role != Role.DENSE}


def _fit(
    provided: Provided[Compressor], given: Mapping[str, Any], room: BitBudget | Refusal, shapes: ModelShapes
) -> Any:
    """The method's options in the budget that is left for it, or why there are none."""
    if isinstance(room, Refusal):
        return room
    return call_plugin(provided, "fit", (provided.value.options, Refusal), room, shapes, given)


def _less(budget: BitBudget, extra: Mapping[Role, int], shapes: ModelShapes) -> BitBudget | Refusal:
    """The budget that is left once the recovery stage's own bytes are paid."""
    total = sum(extra.values())
    if not total:
        return budget
    taken = 8 * total / (shapes.weights if budget.on == "linear" else shapes.parameters)
    if taken >= budget.lower:
        return Refusal(f"the recovery stage alone takes {taken:.3f} bits of {budget}")
    return BitBudget(budget.centre - taken, budget.window, budget.on)
