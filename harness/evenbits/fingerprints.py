"""Under which protocol a number was measured, and in which fields two protocols differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from evenbits.record import MetricFacts, Record

PER_TRIAL = frozenset({"trial", "artifact", "method", "label", "seed"})
"""Fingerprint fields that say which trial was measured, not how: they do not split a column."""

ABSENT = "(absent)"
_SHOWN = 4  # fields in a sentence; the rest are counted

Difference = tuple[str, str, str]  # field, a's, b's


def protocol_of(record: Record, metric: MetricFacts) -> dict[str, Any]:
    """The fields of a metric's fingerprint that decide what it may be compared with."""
    fields = record.fingerprints.get(metric.fingerprint, {"fingerprint": metric.fingerprint})
    return {key: value for key, value in fields.items() if key not in PER_TRIAL}


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as dotted names with their JSON text."""
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return flat


def differing_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """(field, a's value, b's) of two fingerprints, by dotted name; per-trial fields left out, "(absent)" for none.

    A list of tables (the tasks of a mean) is numbered, "tasks.0.bos"; what differs alike in all of them stands once,
    as "tasks.*.bos".
    """
    left, right = ({k: v for k, v in side.items() if k not in PER_TRIAL} for side in (a, b))
    return sorted(_differences(left, right, ""))


def name_fields(found: Sequence[Difference]) -> str:
    """The differences as part of a sentence, some of them."""
    shown = found if len(found) <= _SHOWN + 1 else found[:_SHOWN]  # "and 1 more" is as long as what it hides
    texts = [f"{field} ({_brief(a)} against {_brief(b)})" for field, a, b in shown]
    more = len(found) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> list[Difference]:
    found: list[Difference] = []
    for key in {**a, **b}:
        x, y, name = a.get(key, ABSENT), b.get(key, ABSENT), prefix + key
        if x == y and type(x) is type(y):
            continue
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += _differences(x, y, name + ".")
        elif _tables(x) and _tables(y) and len(x) == len(y):
            found += _in_tables(x, y, name)
        elif _text(x) != _text(y):
            found.append((name, _text(x), _text(y)))
    return found


def _in_tables(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], name: str) -> list[Difference]:
    each = [_differences(x, y, "") for x, y in zip(a, b, strict=True)]
    common = [one for one in each[0] if all(one in other for other in each)] if len(each) > 1 else []
    found = [(f"{name}.*.{field}", x, y) for field, x, y in common]
    for index, own in enumerate(each):
        found += [(f"{name}.{index}.{field}", x, y) for field, x, y in own if (field, x, y) not in common]
    return found


def _tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _text(value: Any) -> str:
    """A join rule may be a line break, which has to be seen."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, sort_keys=True)


def _brief(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
