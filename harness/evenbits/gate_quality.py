"""The gate's judgement of quality: every number against the baseline's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evenbits.gate_causes import describe_changes, same_machine
from evenbits.gate_checks import (
    FALSE_ALARMS,
    MATERIAL,
    MATERIAL_ACCURACY,
    MATERIAL_LAYERS,
    SHARES,
    Check,
    Comparison,
    Kind,
    Outcome,
    mean_of,
)
from evenbits.gate_noise import SETTLED, Scatter, SeedTest, holm, judge_change, pool_scatter
from evenbits.gate_snapshot import LAYER_ERROR, Design, KeptMetric
from evenbits.significance import Sampled, difference
from evenbits.statistics import Floats, Statistic, statistic_value


@dataclass
class Pair:
    """A metric of a row on both sides. logarithmic: judged by its logarithm; `sign` times a change above 0 is worse.

    settled: no seed changes it. scatter: between seeds, None where nothing tells.
    """

    place: str
    before: KeptMetric
    now: KeptMetric
    logarithmic: bool
    sign: float
    settled: bool
    design: Design
    scatter: Scatter | None = None

    @property
    def kind(self) -> Kind:
        if self.before.name == LAYER_ERROR:
            return "layers"
        return "accuracy" if self.before.unit == "accuracy" else "perplexity"

    @property
    def main(self) -> bool:
        """Perplexities, and means over tasks."""
        return self.kind != "accuracy" or self.design.strata is not None

    @property
    def material(self) -> float:
        """On the scale it is judged on."""
        if self.logarithmic:
            return MATERIAL_LAYERS if self.kind == "layers" else MATERIAL
        return MATERIAL_ACCURACY if self.kind == "accuracy" else MATERIAL * abs(mean_of(self.before))

    def scaled(self, side: KeptMetric) -> list[float]:
        return [math.log(value) for value in side.values] if self.logarithmic else list(side.values)

    def centres(self) -> tuple[float, float]:
        """(before, now) on the scale it is judged on."""
        return float(np.mean(self.scaled(self.before))), float(np.mean(self.scaled(self.now)))

    def seed_test(self, change: float, level: float, scale: float = 1.0) -> SeedTest:
        """Of a change of the means over seeds, above 0 for worse. A night of the baseline's own seeds scatters less
        than this takes it to."""
        scatter = self.scatter or SETTLED  # where nothing is known of seeds, items alone decide
        error = scale * scatter.deviation * math.sqrt(1 / len(self.before.values) + 1 / len(self.now.values))
        return judge_change(change, error, scatter.freedom, level)


@dataclass
class Tested:
    """A pair's own change, or that of its share of the dense model's number (recovery)."""

    pair: Pair
    dense: Pair | None
    seeds: SeedTest
    p_worse: float
    p_better: float
    on_items: bool = False


def judge_qualities(one: Comparison) -> tuple[list[Check], list[Pair]]:
    """A check for every metric of quality of every row that both sides have; and the pairs that could be compared."""
    checks: list[Check] = []
    pairs: list[Pair] = []
    for place in one.common:
        for before in one.before[place].metrics:
            if before.quality:
                found = _pair(one, place, before)
                (pairs if isinstance(found, Pair) else checks).append(found)  # type: ignore[arg-type]
    dense = {(pair.place, pair.before.name): pair for pair in pairs if one.is_dense(pair.place)}

    def beside(pair: Pair) -> Pair | None:
        return dense.get((one.dense_of(pair.place) or "", pair.before.name))

    names = dict.fromkeys(pair.before.name for pair in pairs)
    for name in names:
        _pool([pair for pair in pairs if pair.before.name == name], beside)
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        limit = FALSE_ALARMS * SHARES[kind]
        tests = [test for pair in pairs if pair.kind == kind for test in _tests(pair, beside(pair), limit, one.level)]
        worse, better = holm([test.p_worse for test in tests]), holm([test.p_better for test in tests])
        for test, *adjusted in zip(tests, worse, better, strict=True):
            p_value = adjusted[0] if test.seeds.change > 0 else adjusted[1]
            checks.append(_judge(one, test, p_value, limit))
    return checks, pairs


def _pair(one: Comparison, place: str, before: KeptMetric) -> Pair | Check:
    """What is compared, or why it is not."""
    now, apart, _ = one.counterpart(place, before)
    if now is None:
        return Check(place, before.name, "regression", "no longer measured", mean_of(before), causes=one.causes(place))
    numbers = mean_of(before), mean_of(now)
    if apart:
        text = f"protocol changed: {describe_changes(apart)}; if meant, --update"
        return Check(place, before.name, "regression", text, *numbers, causes=one.causes(place))
    logarithmic = before.unit != "accuracy" and min(*before.values, *now.values) > 0
    # beside rows of several seeds, a row of one depends on none: the plan runs such methods once
    settled = one.is_dense(place) or (one.several_seeds and len(one.before[place].seeds) == 1)
    design = one.baseline.designs[before.design] if before.design is not None else Design()
    return Pair(place, before, now, logarithmic, 1.0 if before.better == "lower" else -1.0, settled, design)


def _pool(pairs: Sequence[Pair], beside: Callable[[Pair], Pair | None]) -> None:
    """Each row's scatter between seeds, pooled over the rows of one metric; perplexities scatter as they lose."""
    varying = [pair for pair in pairs if not pair.settled]
    losses: list[float] | None = []
    for pair in varying:
        base = beside(pair)
        if losses is None or base is None or not (pair.logarithmic and base.logarithmic):
            losses = None
            break
        losses.append(max(pair.sign * (pair.centres()[0] - base.centres()[0]), MATERIAL))
    for pair, scatter in zip(
        varying, pool_scatter([pair.scaled(pair.before) for pair in varying], losses), strict=True
    ):
        pair.scatter = scatter


def _tests(pair: Pair, dense: Pair | None, limit: float, level: float) -> Iterator[Tested]:
    """Of the number; and of its recovery where the dense model's own number is another than in the baseline."""
    before, now = pair.centres()
    yield _tested(pair, None, pair.seed_test(pair.sign * (now - before), level), limit)
    if dense is None or dense is pair or set(dense.before.values) == set(dense.now.values):
        return
    base, base_now = dense.centres()
    if pair.logarithmic and dense.logarithmic:
        change, scale = (now - base_now) - (before - base), 1.0
    elif base and base_now:
        change, scale = now / base_now - before / base, 1 / abs(base)
    else:
        return
    yield _tested(pair, dense, pair.seed_test(pair.sign * change, level, scale), limit)


def _tested(pair: Pair, dense: Pair | None, seeds: SeedTest, limit: float) -> Tested:
    """Worse by more than seeds and by more than items: the larger of two p-values. What no seed changes is known
    exactly on these items, and whether it would differ on others is not asked."""
    found = Tested(pair, dense, seeds, seeds.p_worse, seeds.p_better)
    if pair.settled or min(seeds.p_worse, seeds.p_better) > limit:  # no alarm then, whatever the items say
        return found
    if pair.kind != "layers" and (p_value := _p_of_items(pair, dense, seeds.change)) is not None:
        found.p_worse, found.p_better = max(found.p_worse, p_value), max(found.p_better, p_value)
        found.on_items = True
    elif pair.scatter is None:  # neither seeds nor items say what is chance
        found.p_worse = found.p_better = 1.0
    return found


def _p_of_items(pair: Pair, dense: Pair | None, change: float) -> float | None:
    """Of the paired test on the same items, seeds averaged, one-sided for that change; None where none were kept.

    dense: what the dense model has on each item is taken off on both sides.
    """
    a = _items(pair.before, None if dense is None else dense.before)
    b = _items(pair.now, None if dense is None else dense.now)
    kept = pair.before.items
    if a is None or b is None or kept is None or a.shape != b.shape:
        return None
    weights = None if pair.design.weights is None else np.asarray(pair.design.weights)
    statistic: Statistic = "mean" if dense is not None else kept.statistic
    strata = pair.design.strata
    after, earlier = (
        Sampled(np.array([statistic_value(own, statistic, weights)]), own[None], statistic, strata, weights)
        for own in (b, a)
    )
    found = difference(after, earlier)
    if math.isnan(found.p_value):
        return None
    return found.p_value / 2 if pair.sign * found.difference * change > 0 else 1.0


def _items(metric: KeptMetric, base: KeptMetric | None) -> Floats | None:
    """(items,), seeds averaged, less the dense model's."""
    if metric.items is None:
        return None
    own: Floats = metric.items.array().mean(axis=0)
    if base is None:
        return own
    if base.items is None or base.items.items != metric.items.items:
        return None
    return np.asarray(own - base.items.array().mean(axis=0))


def _judge(one: Comparison, test: Tested, p_value: float, limit: float) -> Check:
    pair, change = test.pair, test.seeds.change
    large = abs(change) > pair.material * (1 + 1e-9)
    outcome: Outcome = "ok"
    text = "within the scatter of seeds"
    if pair.before.values == pair.now.values and test.dense is None:
        text = "the same number"
    elif test.dense is None and large and (trial := _not_reproduced(one, pair)):
        outcome, text = "regression", f"not reproduced: trial {trial} gave another number on the same kind of machine"
    elif large and p_value <= limit:
        outcome = "regression" if change > 0 else "improvement"
        text = _how(test)
    elif not large:
        text = "too small a change to matter"
    if test.dense is not None:
        text = f"recovery, of the dense model's number: {text}"
    return _check(one, test, outcome, text, p_value)


def _how(test: Tested) -> str:
    word = "worse" if test.seeds.change > 0 else "better"
    if test.pair.settled:
        return f"{word}: no seed changes this number"
    if test.pair.scatter is None:
        return f"{word} on the same items"
    times = abs(test.seeds.change) / test.seeds.error
    return f"{word}, {times:.1f} times the scatter of seeds" + (", and on the same items" if test.on_items else "")


def _not_reproduced(one: Comparison, pair: Pair) -> str:
    """A trial that both sides have, made on the same kind of machine, with two numbers; "" where there is none."""
    before, now = one.before[pair.place], one.now[pair.place]
    for seed, value in zip(pair.now.seeds, pair.now.values, strict=True):
        trial = now.trials[now.seeds.index(seed)]
        if seed in pair.before.seeds and trial in before.trials:
            old = pair.before.values[pair.before.seeds.index(seed)]
            if value != old and same_machine(before, now, trial, one.baseline, one.night):
                return trial
    return ""


def _check(one: Comparison, test: Tested, outcome: Outcome, text: str, p_value: float) -> Check:
    pair, seeds = test.pair, test.seeds
    before, now = mean_of(pair.before), mean_of(pair.now)
    name = pair.before.name
    if test.dense is not None:
        before, now = before / mean_of(test.dense.before), now / mean_of(test.dense.now)
        name = f"{name} over dense"
    change, low, high = limits_shown(pair, seeds)
    return Check(
        pair.place,
        name,
        outcome,
        text,
        before,
        now,
        change,
        low,
        high,
        absolute=pair.kind == "accuracy",
        p_value=p_value,
        causes=one.causes(pair.place) if outcome != "ok" else (),
        main=pair.main,
    )


def limits_shown(pair: Pair, test: SeedTest) -> tuple[float, float, float]:
    """(change, low, high) above 0 for a larger number: relative, of an accuracy absolute."""
    change = pair.sign * test.change
    low, high = sorted((pair.sign * test.low, pair.sign * test.high))
    if pair.logarithmic:
        return math.expm1(change), math.expm1(low), math.expm1(high)
    scale = 1.0 if pair.kind == "accuracy" else abs(mean_of(pair.before)) or 1.0
    return change / scale, low / scale, high / scale
