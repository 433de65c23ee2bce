"""What evaluators and profilers return, checked and made ready for a record."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from evenbits.errors import TrialFailed
from evenbits.job import StageResult
from evenbits.measure import Finding, Measurement, Remark, Sample, fingerprint_id
from evenbits.plan import Stage
from evenbits.record import MetricFacts, SampleFacts
from evenbits.statistics import check_strata, check_weights

RESERVED = ("record.json", "log.txt")
LONGEST_NAME = 150  # of a metric or file: file systems take 255 bytes, and more is put around it


def writable(text: str) -> str:
    """Half of a surrogate pair, as a "\\ud800" in somebody's JSON or a file's odd name gives it, has no UTF-8 form."""
    return text.encode(errors="replace").decode()


def take(result: StageResult, stage: Stage, finding: Finding) -> None:
    """Add one finding of `stage` to the result.

    Raises TrialFailed for a value that is not finite, a second metric or file of one name, a name that no file can
    have, items that are not one number each, strata that are not of these items, and details or fingerprints that
    JSON has no form for.
    """
    if isinstance(finding, Remark):
        source = stage.name if stage.label is None else f"{stage.name} {stage.label}"
        result.remarks.append(writable(f"{source}: {finding.text}"))
    elif isinstance(finding, Sample):
        details = _plain(finding.details, f"{stage.name}: the details of a sample")
        prompt, text = writable(finding.prompt), writable(finding.text)
        result.samples.append(SampleFacts(source=stage.name, prompt=prompt, text=text, details=details))
    else:
        _take_measurement(result, stage, finding)


def _take_measurement(result: StageResult, stage: Stage, measurement: Measurement) -> None:
    source = stage.name
    if stage.label is not None:
        measurement = replace(
            measurement,
            name=f"{stage.label}_{measurement.name}",
            attachments={f"{stage.label}-{name}": data for name, data in measurement.attachments.items()},
        )
    if not re.fullmatch(rf"[^/\\\x00-\x1f]{{1,{LONGEST_NAME}}}", measurement.name):
        raise TrialFailed(f"{source}: {measurement.name!r} cannot be the name of a metric: its items' file bears it")
    if not np.isfinite(measurement.value):
        raise TrialFailed(f"{source}: {measurement.name} is {measurement.value}")
    if any(metric.name == measurement.name for metric in result.metrics):
        raise TrialFailed(f"{source}: a second metric of the name {measurement.name!r}; give one a label")
    details = _plain(measurement.details, f"{source}: the details of {measurement.name}")
    fields = _plain(
        {"evaluator": source, **measurement.fingerprint}, f"{source}: the fingerprint of {measurement.name}"
    )
    key = fingerprint_id(fields)
    result.fingerprints[key] = fields
    items = None
    if measurement.items is not None:
        _check_items(measurement.items, details, f"{source}: {measurement.name}")
        items = f"items-{measurement.name}.npy"
        buffer = io.BytesIO()
        np.save(buffer, measurement.items, allow_pickle=False)
        result.items[items] = buffer.getvalue()
    for name, data in measurement.attachments.items():
        _attach(result, source, name, data)
    result.metrics.append(
        MetricFacts(
            name=measurement.name,
            value=float(measurement.value),
            low=measurement.low,
            high=measurement.high,
            unit=measurement.unit,
            better=measurement.better,
            source=source,
            fingerprint=key,
            details=details,
            items=items,
            attachments=tuple(measurement.attachments),
            volatile=measurement.volatile,
        )
    )


def _check_items(items: np.ndarray[Any, Any], details: Mapping[str, Any], what: str) -> None:
    """Said now: a report would stumble over it, once everything was measured."""
    if items.ndim != 1 or items.dtype.kind not in "fiub":
        raise TrialFailed(f"{what}: items are one number each, not {items.dtype} of shape {items.shape}")
    try:
        check_strata(details.get("strata"), len(items))
        check_weights(details.get("weights"), len(items))
    except (TypeError, ValueError) as error:
        raise TrialFailed(f"{what}: {error}") from None


def _attach(result: StageResult, source: str, name: str, data: bytes) -> None:
    """Two metrics may share a file, if it says the same."""
    fits = re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name)
    if not fits or name in RESERVED or name.startswith("items-"):
        raise TrialFailed(f"{source}: {name!r} cannot be the name of a file beside the record")
    if result.attachments.setdefault(name, data) != data:
        raise TrialFailed(f"{source}: a second file of the name {name!r} beside the record; give one a label")


def _plain(facts: Mapping[str, Any], what: str) -> dict[str, Any]:
    """As they will be read back: numbers that are not finite, which JSON has no form for, become null."""
    try:
        text = writable(json.dumps(dict(facts), ensure_ascii=False))
        found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    except (TypeError, ValueError) as error:
        raise TrialFailed(f"{what} are not JSON ({error})") from None
    return found
