"""The gate's judgement of single layers: a fault in one block is large there, and lost in any mean.

Layers scatter unlike each other (a down projection that is seldom driven, ten times its neighbours), and some jump for
one seed in many, so that a t test of each would raise alarms. Asked instead is one number of a row: how far its most
changed layer stands out, in scatters of that layer. What the baseline's own seeds give for it, each against the others,
says how far a seed that changes nothing makes some layer stand out.

Yet that has a longer tail than five seeds tell: of 65 real unchanged rows one stood out 25 scatters (two of VPTQ's
layers, by half). So by itself it is told and raises no alarm; where the row's quality fell, it says where to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from evenbits.gate_checks import MATERIAL_LAYERS, Check, Comparison, Outcome
from evenbits.gate_noise import SETTLED, holm, judge_change, pool_scatter
from evenbits.gate_quality import Pair
from evenbits.statistics import Floats

LEVEL = 0.001  # of all rows together
ENOUGH_SEEDS = 3  # in a baseline, so that each can be judged by two others
NAMED = 3  # layers in a line; the rest are counted


def judge_layers(one: Comparison, pairs: Sequence[Pair], qualities: Sequence[Check]) -> Iterator[Check]:
    """One check for each row whose layers were measured on both sides. qualities: what was found of the rows."""
    worse = {check.row for check in qualities if check.outcome == "regression"}
    rows: list[tuple[Pair, Floats, Floats]] = []  # with the change of each layer's logarithm, and how far it stands out
    apart: list[list[float]] = []
    for pair in pairs:
        if pair.kind != "layers" or pair.before.items is None or pair.now.items is None:
            continue
        before, now = pair.before.items.array(), pair.now.items.array()
        if pair.settled:
            change = now.mean(axis=0) - before.mean(axis=0)
            yield _check(one, pair, change, change > MATERIAL_LAYERS, None, "no seed changes them", alarm=True)
        elif len(before) >= ENOUGH_SEEDS:
            rows.append((pair, now.mean(axis=0) - before.mean(axis=0), _standing_out(before, now)))
            alone = [_standing_out(np.delete(before, i, axis=0), before[i : i + 1]) for i in range(len(before))]
            apart.append([_most(found) for found in alone])
        else:
            text = f"of {len(before)} seeds nothing says how much single layers scatter; {ENOUGH_SEEDS} would"
            yield Check(pair.place, "layers", "not judged", text)
    p_values = []
    for (_, _, found), seeds, scatter in zip(rows, apart, pool_scatter(apart), strict=True):
        deviation, freedom = (scatter.deviation, scatter.freedom) if scatter is not None else (0.0, SETTLED.freedom)
        error = deviation * math.sqrt(1 + 1 / len(seeds))
        p_values.append(judge_change(_most(found) - float(np.mean(seeds)), error, freedom, one.level).p_worse)
    for (pair, change, found), seeds, p_value in zip(rows, apart, holm(p_values), strict=True):
        usual = math.expm1(max(seeds))
        faulty = (change > MATERIAL_LAYERS) & (found > usual)
        text = f"up to {found.max():.0f} times the scatter of seeds, which themselves reach {usual:.0f}"
        yield _check(one, pair, change, faulty, p_value, text, alarm=pair.place in worse)


def _standing_out(before: Floats, now: Floats) -> Floats:
    """(layers,): by how many standard errors each is worse, beyond what all layers of its seed have in common (which
    `layer_error` judges). Scatter is pooled over the row's layers."""
    before, now = (side - side.mean(axis=1, keepdims=True) for side in (before, now))
    scatter = pool_scatter(before.T.tolist())
    errors = np.array([0.0 if found is None else found.deviation for found in scatter])
    errors *= math.sqrt(1 / len(before) + 1 / len(now))
    change = now.mean(axis=0) - before.mean(axis=0)
    found: Floats = np.where(change > 0, np.inf, 0.0)
    np.divide(change, errors, out=found, where=errors > 0)
    return found


def _most(found: Floats) -> float:
    """Of the layer that stands out most; by its logarithm, for it is a largest of many."""
    return min(math.log1p(max(0.0, float(found.max()))), 100.0)


def _check(
    one: Comparison,
    pair: Pair,
    change: Floats,
    faulty: NDArray[np.bool_],
    p_value: float | None,
    how: str,
    *,
    alarm: bool,
) -> Check:
    names = one.baseline.protocols[pair.before.protocol]["layers"]
    before, now = (side.items.array().mean(axis=0) for side in (pair.before, pair.now) if side.items is not None)
    first = int(np.argmax(np.where(faulty, change, -np.inf) if faulty.any() else change))
    numbers = float(np.exp(before[first])), float(np.exp(now[first])), float(np.expm1(change[first]))
    if not faulty.any() or (p_value is not None and p_value > LEVEL):
        return Check(pair.place, "layers", "ok", "no layer stands out", *numbers, p_value=p_value)
    order = [i for i in np.argsort(-change) if faulty[i]]
    worst = ", ".join(f"{names[i]} {100 * np.expm1(change[i]):+.0f} %" for i in order[:NAMED])
    more = f" and {len(order) - NAMED} more" if len(order) > NAMED else ""
    text = f"worse in {len(order)} of {len(names)}: {worst}{more}; {how}"
    causes = one.causes(pair.place)
    outcome: Outcome = "regression" if alarm else "advisory"
    return Check(pair.place, "layers", outcome, text, *numbers, p_value=p_value, causes=causes, main=True)
