"""The gate's judgement of costs: sizes, which are counted, and times and memory, which are ratios to dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from evenbits.gate_causes import describe_changes
from evenbits.gate_checks import FALSE_ALARMS, SHARES, Check, Comparison, Outcome
from evenbits.gate_noise import SeedTest, holm, judge_change, pool_scatter
from evenbits.gate_snapshot import KeptMetric, KeptRow

WIDE = 2.0
"""Times a ratio to the dense model, in time or memory, from which on it is an alarm.

On a shared machine neighbours come and go within seconds, the clock follows the temperature, and the dense model is
timed minutes away from each method: ratios of the same code were seen 1.5 times apart. What is twice as slow is a
kernel that no longer runs, or a copy that should not be there."""

ONE_RUN = 2 * 3600.0
"""Seconds between a method's measurement and the dense model's beyond which their ratio is of two runs: what has not
changed since the night before is not measured again, and the machine was another then, or as good as one."""


def judge_sizes(one: Comparison) -> Iterator[Check]:
    """Bytes and bits, one check a row; what no seed changes is compared exactly."""
    limit = FALSE_ALARMS * SHARES["size"] / max(2 * 4 * len(one.common), 1)  # both ways, of four counts
    for place in one.common:
        before, now = (_counts(row) for row in (one.before[place], one.now[place]))
        changed = [name for name in before if _resized(before[name], now[name], limit)]
        means = [(name, float(np.mean(before[name])), float(np.mean(now[name]))) for name in changed or before]
        _, a, b = means[0]
        numbers = a, b, b / a - 1 if a else None
        if not changed:
            yield Check(place, "size", "ok", "as large as it was", *numbers)
            continue
        words = ", ".join(f"{name} {_count(x)} -> {_count(y)}" for name, x, y in means)
        if any(y > x for _, x, y in means):
            text = f"grew: {words}"
        else:
            text = f"size changed: {words}; it is compared at other bits than in the baseline; if meant, --update"
        yield Check(place, "size", "regression", text, *numbers, causes=one.causes(place))


def _counts(row: KeptRow) -> dict[str, Sequence[float]]:
    return {
        "linear bytes": row.linear_bytes,
        "model bytes": row.model_bytes,
        "index bits": [bits.index for bits in row.bits],
        "paper bits": [bits.paper for bits in row.bits],
    }


def _resized(before: Sequence[float], now: Sequence[float], limit: float) -> bool:
    if len(set(before)) == 1:
        return any(not math.isclose(value, before[0], rel_tol=1e-12) for value in now)
    mean = float(np.mean(now))
    (scatter,) = pool_scatter([before])
    if scatter is None or min(before) <= mean <= max(before):
        return False
    error = scatter.deviation * math.sqrt(1 / len(before) + 1 / len(now))
    found = judge_change(mean - float(np.mean(before)), error, scatter.freedom, 0.95)
    return min(found.p_worse, found.p_better) <= limit


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"


@dataclass
class _Ratio:
    """A time or memory over the dense model's of the same run, as logarithms, one a seed."""

    place: str
    metric: KeptMetric
    before: list[float]
    now: list[float]
    named: str


def judge_ratios(one: Comparison) -> Iterator[Check]:
    """Every volatile metric of every row that both runs have beside a dense model's."""
    ratios: list[_Ratio] = []
    for place in one.common:
        for metric in one.before[place].metrics:
            if metric.volatile and not one.is_dense(place):
                found = _ratio(one, place, metric)
                if isinstance(found, Check):
                    yield found
                else:
                    ratios.append(found)
    tests: list[tuple[_Ratio, SeedTest]] = []
    for name in dict.fromkeys(ratio.metric.name for ratio in ratios):
        group = [ratio for ratio in ratios if ratio.metric.name == name]
        for ratio, scatter in zip(group, pool_scatter([ratio.before for ratio in group]), strict=True):
            if scatter is None:
                yield Check(ratio.place, name, "not judged", "one seed: nothing says how much this scatters")
                continue
            # the dense model, measured once on each side, scatters as its neighbours do
            error = scatter.deviation * math.sqrt(1 / len(ratio.before) + 1 / len(ratio.now) + 2)
            sign = 1.0 if ratio.metric.better == "lower" else -1.0
            change = sign * float(np.mean(ratio.now) - np.mean(ratio.before))
            tests.append((ratio, judge_change(change, error, scatter.freedom, one.level)))
    worse, better = (holm([getattr(test, side) for _, test in tests]) for side in ("p_worse", "p_better"))
    for (ratio, test), p_worse, p_better in zip(tests, worse, better, strict=True):
        yield _judge(one, ratio, test, p_worse if test.change > 0 else p_better)


def _ratio(one: Comparison, place: str, before: KeptMetric) -> _Ratio | Check:
    now, apart, named = one.counterpart(place, before)
    if now is None:
        return Check(place, before.name, "not judged", "not measured this time")
    if apart:
        return Check(place, before.name, "not judged", f"measured otherwise: {describe_changes(apart)}")
    dense = one.dense_of(place)
    bases = [
        next((metric for metric in rows[dense].metrics if metric.name == before.name), None) if dense else None
        for rows in (one.before, one.now)
    ]
    values = [list(side.values) for side in (before, now, *bases) if side is not None]
    if len(values) < 4 or dense is None:
        return Check(place, before.name, "not judged", "no dense model's number beside it")
    for rows, when in ((one.now, "this time"), (one.before, "in the baseline")):
        hours = _seconds_apart(rows[place], rows[dense]) / 3600
        if 3600 * hours > ONE_RUN:
            text = f"{when} the dense model was measured {hours:.0f} hours away: no ratio of one run"
            return Check(place, before.name, "not judged", text)
    if not all(np.isfinite(side).all() and min(side) > 0 for side in values):
        return Check(place, before.name, "not judged", "no ratio: a number is 0")
    shares = [
        [math.log(value) - float(np.mean(np.log(base))) for value in side]
        for side, base in zip(values[:2], values[2:], strict=True)
    ]
    return _Ratio(place, before, shares[0], shares[1], describe_changes(named))


def _seconds_apart(row: KeptRow, dense: KeptRow) -> float:
    """Largest time between a seed's measurement and the nearest of the dense model; 0 where times are not known."""
    times, others = ([datetime.fromisoformat(at) for at in one.measured_at if at] for one in (row, dense))
    return max((min(abs((at - other).total_seconds()) for other in others) for at in times if others), default=0.0)


def _judge(one: Comparison, ratio: _Ratio, test: SeedTest, p_value: float) -> Check:
    sign = 1.0 if ratio.metric.better == "lower" else -1.0
    outcome: Outcome = "ok"
    text = "within the scatter of the machine"
    if p_value <= FALSE_ALARMS * SHARES["time"]:
        outcome = "advisory"
        text = f"{'worse' if test.change > 0 else 'better'} by more than the machine's scatter"
        if test.change > math.log(WIDE):
            outcome, text = "regression", f"worse, more than {WIDE:g} times"
    elif abs(test.change) > math.log(WIDE):
        outcome, text = "advisory", f"{math.exp(abs(test.change)):.1f} times, but so does the machine scatter"
    if ratio.named:
        text += f" ({ratio.named})"
    before, now = (math.exp(float(np.mean(side))) for side in (ratio.before, ratio.now))
    low, high = sorted(math.expm1(sign * value) for value in (test.low, test.high))
    causes = one.causes(ratio.place) if outcome != "ok" else ()
    name = f"{ratio.metric.name} over dense"
    change = math.expm1(sign * test.change)
    return Check(ratio.place, name, outcome, text, before, now, change, low, high, p_value=p_value, causes=causes)
