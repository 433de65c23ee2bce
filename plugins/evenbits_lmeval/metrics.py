"""From lm-eval's value of each item to measurements: of tasks, of groups, and the mean over all that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement
from evenbits.statistics import Statistic, bootstrap_interval
from evenbits_lmeval.choices import NO_GOLD, ChoiceScores
from evenbits_lmeval.rules import kind_of, scoring_rules
from evenbits_lmeval.scoring import CHOSEN, Items, Lengths

Floats = NDArray[np.float64]
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


@dataclass(frozen=True)
class Column:
    """One metric of one task: a value an item, and the statistic of them that is lm-eval's figure.

    scoring: what the task says on how answers become this metric, for fingerprints.
    weights: how much text (words, bytes) each item stands for, where the metric is per unit of text.
    """

    metric: str
    items: Floats
    statistic: Statistic
    better_higher: bool
    scoring: Mapping[str, Any] = field(default_factory=dict)
    weights: Floats | None = None

    @property
    def value(self) -> float:
        mean = float(self.items.mean())
        return float(np.exp(mean)) if self.statistic == "exp-mean" else mean

    @property
    def unit(self) -> str:
        if self.metric.split("@")[0] in SHARES:
            return "accuracy"
        if self.metric.endswith("perplexity"):
            return "perplexity"
        return "bits/byte" if self.metric == "bits_per_byte" else "score"


@dataclass(frozen=True)
class Whole:
    """A metric that is no statistic of single items (F1, correlations): it has neither items nor an interval."""

    value: float
    count: int
    better_higher: bool
    scoring: Mapping[str, Any]


def columns(items: Items) -> tuple[dict[str, Column], dict[str, Whole]]:
    """A task's metrics by name. A metric of one of several filters is called "METRIC_FILTER".

    Of rolling perplexities the items are a document's nats over the mean number of words (or bytes) of a document:
    their mean is lm-eval's. The weights are those words, so that the bootstrap draws them together with the nats.
    Raises TrialFailed where an aggregation of the task's own fails.
    """
    found: dict[str, Column] = {}
    others: dict[str, Whole] = {}
    several = len({filtered for _, filtered in items.values}) > 1
    higher = items.task.higher_is_better()
    for (metric, filtered), by_item in items.values.items():
        name = f"{metric}_{filtered}" if several else metric
        aggregate = items.task.aggregation().get(metric)
        better = bool(higher.get(metric, True))
        scoring = scoring_rules(items.task, metric, filtered)
        raw = [by_item.get(index) for index in range(len(items.docs))]
        made = None if any(each is None for each in raw) else _per_item(kind_of(aggregate), raw)
        if made is not None:
            found[name] = Column(metric, made[0], made[1], better, scoring, made[2])
            continue
        try:
            value = float((aggregate or np.mean)(list(by_item.values())))
        except Exception as error:  # a task's own aggregation may raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise TrialFailed(f"lm-eval: task {items.name}: no {name} can be made of its items ({said})") from error
        others[name] = Whole(value, len(by_item), better, scoring)
    return found, others


def _per_item(kind: str, raw: Sequence[Any]) -> tuple[Floats, Statistic, Floats | None] | None:
    """The items, their statistic and weights, of an aggregation in PER_ITEM; None for values it cannot be taken of."""
    try:
        values = np.array(raw, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if kind == "mean" and values.ndim == 1:
        return values, "mean", None
    if kind == "perplexity" and values.ndim == 1:  # log-likelihoods
        return -values, "exp-mean", None
    if kind in ("weighted_perplexity", "bits_per_byte") and values.ndim == 2:  # log-likelihoods and weights
        units = values[:, 1]
        per_unit = -values[:, 0] * len(values) / units.sum()
        weights = units if (units > 0).all() else None  # an empty document cannot be drawn in proportion
        return (per_unit, "exp-mean", weights) if kind != "bits_per_byte" else (per_unit / np.log(2), "mean", weights)
    return None


def measured(
    name: str,
    column: Column,
    protocol: Mapping[str, Any],
    details: Mapping[str, Any],
    attachments: Mapping[str, bytes] | None = None,
    strata: Sequence[int] | None = None,
) -> Measurement:
    """With its 95 % interval over items: Wilson's of right or wrong answers, else the bootstrap's, within strata."""
    design = {
        **({} if strata is None else {"strata": list(strata)}),
        **({} if column.weights is None else {"weights": column.weights.tolist()}),
    }
    low = high = None
    if len(column.items) > 1 and np.isfinite(column.items).all():
        low, high = bootstrap_interval(column.items, column.statistic, strata=strata, weights=column.weights)
        if column.unit == "accuracy":  # of few items intervals are widened; weighted items do not show their bounds
            low, high = max(low, 0.0), min(high, 1.0)
    return Measurement(
        name=name,
        value=column.value,
        unit=column.unit,
        better="higher" if column.better_higher else "lower",
        low=low,
        high=high,
        fingerprint=protocol,
        details={"items": len(column.items), **details, **design},
        items=column.items,
        attachments=attachments or {},
    )


def without_items(
    name: str, whole: Whole, protocol: Mapping[str, Any], details: Mapping[str, Any], attachments: Mapping[str, bytes]
) -> Measurement:
    return Measurement(
        name=name,
        value=whole.value,
        unit="score",
        better="higher" if whole.better_higher else "lower",
        fingerprint=protocol,
        details={"items": whole.count, **details},
        attachments=attachments,
    )


# -- means over tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a mean is taken of: a column, the sizes of the groups its items are drawn from, and its protocol."""

    name: str
    column: Column
    strata: tuple[int, ...]
    protocol: Mapping[str, Any]


def mean_of(parts: Sequence[Part], metric: str, by_items: bool = False) -> tuple[Column, tuple[int, ...]]:
    """The mean of several parts' figures, each counting alike (or each of their items), and its strata.

    Its items are those of all parts, weighted so that their plain mean is that mean.
    """
    total = sum(len(part.column.items) for part in parts)
    weights = [1.0 if by_items else total / (len(part.column.items) * len(parts)) for part in parts]
    items = np.concatenate([part.column.items * weight for part, weight in zip(parts, weights, strict=True)])
    column = replace(parts[0].column, metric=metric, items=items, weights=None)
    return column, tuple(size for part in parts for size in part.strata)


def joint_protocol(parts: Sequence[Part], metric: str) -> dict[str, Any]:
    """What all parts have in common, once; under "tasks" what each has of its own."""
    first = parts[0].protocol
    common = {key: first[key] for key in first if all(part.protocol.get(key, _ABSENT) == first[key] for part in parts)}
    own = {part.name: {k: v for k, v in part.protocol.items() if k not in common} for part in parts}
    return {**common, "tasks": own, "metric": metric}


_ABSENT = object()


def choice_scores(items: Items, hashes: Sequence[str]) -> ChoiceScores | None:
    """What `items` got as lm-eval compares it; None for tasks without log-likelihoods of continuations."""
    if items.kind not in CHOSEN:
        return None
    several = items.kind == "multiple_choice"
    choices = items.choices if several else [[each[0].args[1].removeprefix(" ")] for each in items.requests]
    gold = [each if isinstance(each, int) else NO_GOLD for each in items.gold] if several else [NO_GOLD] * len(choices)
    texts = [text for each in choices for text in each]
    rows: list[tuple[float, bool, Lengths]] = []
    for each, requests, lengths in zip(choices, items.requests, items.lengths, strict=True):
        # a task may ask for more than its choices: acc_mutual_info scores each without context, too
        asked = zip(requests[: len(each)], lengths[: len(each)], strict=True)
        rows.extend((*request.resps[0], length) for request, length in asked)
    scores = np.array([row[0] for row in rows], dtype=np.float64)
    single = scores.astype(np.float32)
    return ChoiceScores(
        item=np.array([each[:16].encode() for each in hashes], dtype="S16"),
        gold=np.array(gold, dtype=np.int16),
        choices=np.array([len(each) for each in choices], dtype=np.int16),
        log_likelihood=single if np.array_equal(single, scores) else scores,
        greedy=np.array([row[1] for row in rows], dtype=bool),
        tokens=np.array([row[2].continuation for row in rows], dtype=np.int32),
        context_tokens=np.array([row[2].context for row in rows], dtype=np.int32),
        cut_tokens=np.array([row[2].cut for row in rows], dtype=np.int32),
        characters=np.array([len(text) for text in texts], dtype=np.int32),
        utf8_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int32),
    )
