"""What a task says on how answers become a metric: aggregation, settings, filters, functions; part of its protocol."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PER_ITEM = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
"""lm-eval's aggregations that are a statistic of a number an item."""


def kind_of(aggregate: Any) -> str:
    """Which of PER_ITEM it is, or ""; by identity: a task's own function may have any name."""
    from lm_eval.api import metrics

    if aggregate is None:
        return "mean"  # as lm-eval does it for a metric that the task does not list
    return next((name for name in PER_ITEM if getattr(metrics, name, None) is aggregate), "")


def scoring_rules(task: Any, metric: str, filtered: str) -> dict[str, Any]:
    """How answers become this metric, where a task may say so: aggregation, settings, filters, functions of its own."""
    aggregate = task.aggregation().get(metric)
    rules: dict[str, Any] = {"aggregation": kind_of(aggregate) or _told(aggregate)}
    for each in task.get_config("metric_list") or ():
        given = each.get("metric")
        if metric == getattr(given, "__name__", given):
            plain = ("aggregation", "higher_is_better", *(() if callable(given) else ("metric",)))
            rules |= {key: _told(value) for key, value in each.items() if key not in plain}
    for each in task.get_config("filter_list") or ():
        if each.get("name") == filtered:
            rules["filter"] = _told(each.get("filter"))
    if task.get_config("process_results") is not None:
        rules["process_results"] = _told(task.get_config("process_results"))
    if (repeats := task.get_config("repeats") or 1) > 1:
        rules["repeats"] = repeats
    return rules


def _told(value: Any) -> Any:
    """JSON; for a function its name and the digest of the file that it stands in."""
    if isinstance(value, Mapping):
        return {str(key): _told(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    if not callable(value):
        return value if isinstance(value, str | int | float | None) else str(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    try:
        file = inspect.getsourcefile(inspect.unwrap(value))
    except TypeError:  # of a built-in there is none
        file = None
    return name if file is None else f"{name} sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
