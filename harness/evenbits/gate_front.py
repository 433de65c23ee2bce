"""The gate's judgement of the Pareto front as a whole: the best that can be had, whichever method gives it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evenbits.gate_checks import FALSE_ALARMS, SHARES, Check, Comparison, Outcome, budget_bits, mean_of
from evenbits.gate_noise import SeedTest, holm, judge_change
from evenbits.gate_quality import Pair, limits_shown
from evenbits.gate_snapshot import KeptRow


@dataclass(frozen=True)
class _Step:
    """The front at one budget: the rows that have the best number at no more bits than `edge`, then and now."""

    model: str
    metric: str
    edge: float
    before: Pair
    now: Pair
    test: SeedTest


def judge_fronts(one: Comparison, pairs: Sequence[Pair]) -> Iterator[Check]:
    """One check for every model and metric of quality: of the budget at which the front moved most surely.

    A number that is the best of several is drawn towards the good side by chance, one of a single seed more so than
    the baseline's means, which errs towards silence. Rows with a recovery stage are left out.
    """
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        row, now = one.before[pair.place], one.now[pair.place]
        known = pair.main and pair.kind != "layers" and (pair.settled or pair.scatter is not None)
        if row.budget is not None and not row.recovery and row.within and now.within and known:
            groups.setdefault((row.model, pair.before.name), []).append(pair)
    steps = [
        step
        for (model, metric), group in groups.items()
        if len({pair.logarithmic for pair in group}) == 1
        for step in _steps(one, model, metric, group)
    ]
    worse, better = holm([step.test.p_worse for step in steps]), holm([step.test.p_better for step in steps])
    for key in dict.fromkeys((step.model, step.metric) for step in steps):
        own = [i for i, step in enumerate(steps) if (step.model, step.metric) == key]
        index = min(own, key=lambda i: (worse[i], better[i]))
        yield _check(one, steps[index], worse[index] if steps[index].test.change > 0 else better[index])


def _steps(one: Comparison, model: str, metric: str, group: Sequence[Pair]) -> Iterator[_Step]:
    edges = {budget.centre + budget.window for pair in group if (budget := one.before[pair.place].budget) is not None}
    for edge in sorted(edges):
        before, now = _best(group, one.before, edge, 0), _best(group, one.now, edge, 1)
        if before is None or now is None:
            continue
        error, freedom = 0.0, math.inf
        for pair, side in ((before, before.before), (now, now.now)):
            if pair.scatter is not None:
                error += pair.scatter.deviation**2 / len(side.values)
                freedom = min(freedom, pair.scatter.freedom)
        change = before.sign * (now.centres()[1] - before.centres()[0])
        test = judge_change(change, math.sqrt(error), freedom, one.level)
        yield _Step(model, metric, edge, before, now, test)


def _best(group: Sequence[Pair], rows: Mapping[str, KeptRow], edge: float, side: int) -> Pair | None:
    allowed = [pair for pair in group if budget_bits(rows[pair.place]) <= edge + 1e-9]
    return min(allowed, key=lambda pair: pair.sign * pair.centres()[side], default=None)


def _check(one: Comparison, step: _Step, p_value: float) -> Check:
    before, now, test = step.before, step.now, step.test
    outcome: Outcome = "ok"
    if abs(test.change) > before.material * (1 + 1e-9) and p_value <= FALSE_ALARMS * SHARES["front"]:
        outcome = "regression" if test.change > 0 else "improvement"
    led = before.place if before.place == now.place else f"{before.place}, now {now.place}"
    word = {"regression": "worse", "improvement": "better"}.get(outcome, "within the scatter of seeds")
    change, low, high = limits_shown(before, test)
    return Check(
        step.model,
        f"Pareto front: {step.metric}",
        outcome,
        f"{word}: the best at no more than {step.edge:g} bits ({led})",
        mean_of(before.before),
        mean_of(now.now),
        change,
        low,
        high,
        absolute=before.kind == "accuracy",
        p_value=p_value,
        causes=one.causes(before.place) if outcome != "ok" else (),
        main=before.main,
    )
