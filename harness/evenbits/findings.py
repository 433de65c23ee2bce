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

RESERVED = ("record.json", "log.txt")


def take(result: StageResult, stage: Stage, finding: Finding) -> None:
    """Add one finding of `stage` to the result.

    Raises TrialFailed for a value that is not finite, a second metric or file of one name, and details or
    fingerprints that JSON has no form for.
    """
    if isinstance(finding, Remark):
        result.remarks.append(f"{stage.name}: {finding.text}")
    elif isinstance(finding, Sample):
        details = _plain(finding.details, f"{stage.name}: the details of a sample")
        result.samples.append(SampleFacts(source=stage.name, prompt=finding.prompt, text=finding.text, details=details))
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


def _attach(result: StageResult, source: str, name: str, data: bytes) -> None:
    """Two metrics may share a file, if it says the same."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name in RESERVED or name.startswith("items-"):
        raise TrialFailed(f"{source}: {name!r} cannot be the name of a file beside the record")
    if result.attachments.setdefault(name, data) != data:
        raise TrialFailed(f"{source}: a second file of the name {name!r} beside the record; give one a label")


def _plain(facts: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    except (TypeError, ValueError) as error:
        raise TrialFailed(f"{what} are not JSON ({error})") from None
    return found
