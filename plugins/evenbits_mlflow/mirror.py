"""What a record looks like as an MLflow run: plain strings and numbers. Pure; imports no mlflow.

Names before a slash are what MLflow's page folds its charts by. Without one stand quality and bits, which is what one
compares; the rest is in the groups interval, bytes, cost, seconds, peak_bytes, layer, error and calibrated_error.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from evenbits.layers import place_of, short_kinds
from evenbits.record import LayerFacts, MetricFacts, Record
from evenbits.report import as_json
from evenbits.rows import COST_UNITS
from evenbits.tables import flatten
from evenbits_mlflow.notes import trial_note

FORMAT = "2"
"""Of what is mirrored. A run of another one is replaced, so that all of an experiment can be compared."""

LAYER = "layer/"  # before the curves over the layers
TRIAL_TAG = "evenbits.trial"
RUN_TAG = "evenbits.run"
LEFT_TAG = "evenbits.not_mirrored"
FORMAT_TAG = "evenbits.format"
NOTE_TAG = "mlflow.note.content"  # what MLflow's page shows as a run's description
RECORD_TAG = "evenbits.record"
"""Digest of the mirrored record.json; set last, so that a run which has it is whole."""

_LONGEST = 5000  # characters of a param or tag; servers refuse more than 6000 and 8000
_LONGEST_NAME = 250  # of a param, metric, tag or run
_LONGEST_TITLE, _LONGEST_SOURCE = 500, 65_535  # of a data set
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


@dataclass(frozen=True)
class Point:
    """A number of a metric. step: of a layer's its index in the model's order, else 0."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True)
class Data:
    """A text or task set that went in. digest: of its content; a calibration's, which has none, of its settings."""

    name: str
    digest: str
    context: str
    source: str


@dataclass(frozen=True)
class Mirrored:
    """One trial's run. started, ended: milliseconds since 1970, None where the record has no time."""

    name: str
    params: Mapping[str, str]
    metrics: tuple[Point, ...]
    tags: Mapping[str, str]
    data: tuple[Data, ...]
    status: str
    started: int | None
    ended: int | None


def mirror(record: Record) -> Mirrored:
    """Params are what was asked for, metrics what was measured, tags what identifies it and what it ran on.

    Numbers that are not finite have no place in every MLflow store: they become a tag "nonfinite.NAME".
    """
    budget = "" if record.budget is None else f" @ {record.budget.centre:g}"
    stages = "".join(f"+{stage}" for stage in record.recovery)
    measured = list(_measured(record))
    names = accepted(point.name for point in measured)
    return Mirrored(
        name=f"{record.label or record.method}{stages}{budget} seed {record.seed}"[:_LONGEST_NAME],
        params=texts(_params(record)),
        metrics=tuple(Point(names[p.name], p.value, p.step) for p in measured if math.isfinite(p.value)),
        tags=texts(_tags(record) | _nonfinite(measured)),
        data=tuple(_data(record)),
        status="FAILED" if record.status == "failed" else "FINISHED",
        started=_milliseconds(record.started),
        ended=_milliseconds(record.finished),
    )


def environment_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Git commit, under the name that MLflow's page knows too, and versions."""
    tags = {f"version.{name}": str(version) for name, version in (environment.get("versions") or {}).items()}
    git = environment.get("git") or {}
    if git.get("commit"):
        tags |= {"mlflow.source.git.commit": str(git["commit"]), "git.dirty": str(bool(git.get("dirty"))).lower()}
    return texts(tags)


def texts(pairs: Mapping[str, str]) -> dict[str, str]:
    """Names and texts as a server takes them."""
    names = accepted(pairs)
    return {names[name]: text if len(text) <= _LONGEST else text[:_LONGEST] + "…" for name, text in pairs.items()}


def accepted(names: Iterable[str]) -> dict[str, str]:
    """Each name as a server takes it; two stay two.

    One that is refused would end a mirror for good: every push would fail at it. MLflow takes word characters, dashes,
    periods, spaces, and slashes where the name is a path in its plainest form.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        parts = _NOT_IN_NAMES.sub("_", name).split("/")
        clean = "/".join(part for part in parts if part not in ("", ".", "..")).lstrip(".") or "_"
        if len(clean) > _LONGEST_NAME or clean in taken:
            clean = f"{clean[: _LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        taken.add(clean)
        found[name] = clean
    return found


def _nonfinite(measured: Iterable[Point]) -> dict[str, str]:
    """Tags that say what is no number, and of a curve at which layers."""
    found: dict[str, list[str]] = {}
    for point in measured:
        if not math.isfinite(point.value):
            where = f"layer {point.step}: " if point.name.startswith(LAYER) else ""
            found.setdefault(f"nonfinite.{point.name}", []).append(f"{where}{point.value}")
    return {name: ", ".join(values) for name, values in found.items()}


def _measured(record: Record) -> Iterator[Point]:
    """Quality and bits, then what they cost, then intervals: MLflow's page lists them as they come.

    A second number of one name is "name@fingerprint".
    """
    quality: list[Point] = []
    cost: list[Point] = []
    intervals: list[Point] = []
    seen: set[str] = set()
    for metric in record.metrics:
        name = metric.name if metric.name not in seen else f"{metric.name}@{metric.fingerprint}"
        seen.add(name)
        if _is_quality(metric):
            quality.append(Point(name, metric.value))
        else:
            cost.append(Point(f"cost/{name}", metric.value))
        for end, bound in (("low", metric.low), ("high", metric.high)):
            if bound is not None:
                intervals.append(Point(f"interval/{name}.{end}", bound))
    (plain,) = as_json([record])
    yield from quality
    for kind, value in (plain["bits"] or {}).items():
        yield Point(f"bits.{kind}", float(value))
    yield from _of_layers(record)
    for group in ("bytes", "seconds"):
        for name, value in (plain[group] or {}).items():
            yield Point(f"{group}/{name}", float(value))
    for stage, peak in record.peaks.items():
        yield Point(f"peak_bytes/{stage}", float(peak))
    yield from cost
    yield from intervals


def _is_quality(metric: MetricFacts) -> bool:
    return metric.unit not in COST_UNITS and not metric.volatile


def _of_layers(record: Record) -> Iterator[Point]:
    """Curves over the layers, and each error's mean over all, worst layer, and mean by kind of layer.

    A layer left dense has bits and no error: its 0 says nothing of the method.
    """
    dense = set() if record.ledger is None else set(record.ledger.left_dense)
    kinds = short_kinds(list(dict.fromkeys(place_of(layer.name).kind for layer in record.layers)))
    by_kind: dict[str, dict[str, list[float]]] = {}
    curves: list[Point] = []
    for step, layer in enumerate(record.layers):
        curves.append(Point(f"{LAYER}bits", layer.bits, step))
        for error, value in _errors(layer):
            if value is not None and layer.name not in dense:
                curves.append(Point(f"{LAYER}{error}", value, step))
                by_kind.setdefault(error, {}).setdefault(kinds[place_of(layer.name).kind], []).append(value)
    for error, found in by_kind.items():
        known = [value for values in found.values() for value in values]
        yield Point(f"{error}/all", _mean(known))
        yield Point(f"{error}/worst", max(known, key=lambda value: (math.isnan(value), value)))
        for kind, values in found.items():
            yield Point(f"{error}/{kind}", _mean(values))
    yield from curves


def _mean(values: Sequence[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # their sum may be beyond what a float holds


def _errors(layer: LayerFacts) -> tuple[tuple[str, float | None], ...]:
    return ("error", layer.error), ("calibrated_error", layer.calibrated_error)


def _params(record: Record) -> dict[str, str]:
    """In the order of MLflow's list; its comparison opens with the first by name that differ: budget, label, method."""
    model = record.model
    params = {
        "label": record.label or record.method,
        "method": record.method,
        "budget": "none" if record.budget is None else f"{record.budget.centre:g}",
        "recovery": "+".join(record.recovery) or "none",
        "seed": str(record.seed),
        "model": model.name,
        "revision": model.revision,
        "dtype": model.dtype,
    }
    params |= flatten(record.options, "options.")
    for stage, options in zip(record.recovery, record.recovery_options, strict=False):
        params |= flatten(options, f"recovery.{stage}.")
    if record.budget is not None:
        params |= {"protocol.budget.window": f"{record.budget.window:g}", "protocol.budget.on": record.budget.on}
    return params | flatten(record.calibration or {}, "protocol.calibration.")


def _tags(record: Record) -> dict[str, str]:
    tags = {
        TRIAL_TAG: record.trial,
        FORMAT_TAG: FORMAT,
        NOTE_TAG: trial_note(record),
        "evenbits.status": record.status,
        "evenbits.suite": record.suite,
        "evenbits.distribution": record.distribution,
        **environment_tags(record.environment),
        **{f"fingerprint.{metric.name}": metric.fingerprint for metric in record.metrics if _is_quality(metric)},
    }
    if record.artifact is not None:
        tags["evenbits.artifact"] = record.artifact
    if record.within_budget is not None:
        tags["evenbits.within_budget"] = json.dumps(record.within_budget)
    if record.remarks:
        tags["evenbits.remarks"] = "\n".join(record.remarks)
    if record.reason:
        tags["evenbits.reason"] = record.reason
    if record.failure is not None:
        tags |= {"evenbits.failure": record.failure.message, "evenbits.failure.stage": record.failure.stage}
    return tags


def _data(record: Record) -> Iterator[Data]:
    """Each text and task set once. Protocols name a corpus by name and sha256, tasks by task and items_sha256."""
    used = {metric.fingerprint for metric in record.metrics}
    found = dict.fromkeys(
        data for key, protocol in record.fingerprints.items() if key in used for data in _evaluated(protocol)
    )
    yield from found
    if record.calibration is not None:
        corpus = record.calibration.get("corpus")
        named = _corpus_name(corpus) if isinstance(corpus, Mapping) and "name" in corpus else "calibration text"
        settings = json.dumps(record.calibration, sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        yield Data(named[:_LONGEST_TITLE], digest, "calibration", settings[:_LONGEST_SOURCE])


def _evaluated(value: Any) -> Iterator[Data]:
    if not isinstance(value, Mapping):
        return
    for name, digest in (("name", "sha256"), ("task", "items_sha256")):
        if isinstance(value.get(name), str) and isinstance(value.get(digest), str):
            title = _corpus_name(value) if name == "name" else value[name]
            source = json.dumps(_plain(value), sort_keys=True)[:_LONGEST_SOURCE]
            yield Data(title[:_LONGEST_TITLE], value[digest][:36], "evaluation", source)
    for inner in value.values():
        yield from _evaluated(inner)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """What says which items these are, for equal items asked in different ways are one set."""
    keys = ("task", "items_sha256") if "items_sha256" in value else tuple(value)
    return {key: value[key] for key in keys}


def _corpus_name(corpus: Mapping[str, Any]) -> str:
    return " ".join(str(corpus[key]) for key in ("name", "split") if corpus.get(key))


def _milliseconds(time: str) -> int | None:
    try:
        return round(datetime.fromisoformat(time).timestamp() * 1000)
    except ValueError:
        return None
