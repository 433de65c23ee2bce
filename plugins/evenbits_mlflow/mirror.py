"""What a record looks like as an MLflow run: plain strings and numbers. Pure; imports no mlflow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from evenbits.record import Record
from evenbits.report import as_json
from evenbits.tables import flatten

TRIAL_TAG = "evenbits.trial"
RUN_TAG = "evenbits.run"
LEFT_TAG = "evenbits.not_mirrored"
RECORD_TAG = "evenbits.record"
"""Digest of the mirrored record.json; set last, so that a run which has it is whole."""

_LONGEST = 5000  # characters of a param or tag; servers refuse more than 6000 and 8000
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


@dataclass(frozen=True)
class Mirrored:
    """One trial's run. started, ended: milliseconds since 1970, None where the record has no time."""

    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    status: str
    started: int | None
    ended: int | None


def mirror(record: Record) -> Mirrored:
    """Params are what was asked for, metrics what was measured, tags what identifies it and what it ran on.

    Numbers that are not finite have no place in every MLflow store: they become a tag "nonfinite.NAME".
    """
    (plain,) = as_json([record])
    budget = "" if record.budget is None else f" @ {record.budget.centre:g}"
    stages = "".join(f"+{stage}" for stage in record.recovery)
    measured: dict[str, float] = {}
    for metric in record.metrics:
        measured[metric.name] = metric.value
        measured |= {
            f"{metric.name}.{end}": bound
            for end, bound in (("low", metric.low), ("high", metric.high))
            if bound is not None
        }
    for group in ("bits", "bytes", "seconds"):
        measured |= {f"{group}.{name}": float(value) for name, value in (plain[group] or {}).items()}
    measured |= {f"peak_bytes.{stage}": float(peak) for stage, peak in record.peaks.items()}
    tags = _tags(record)
    tags |= {f"nonfinite.{name}": str(value) for name, value in measured.items() if not math.isfinite(value)}
    return Mirrored(
        name=f"{record.label or record.method}{stages}{budget} seed {record.seed}",
        params=_texts(_params(record)),
        metrics={_name(name): value for name, value in measured.items() if math.isfinite(value)},
        tags=_texts(tags),
        status="FAILED" if record.status == "failed" else "FINISHED",
        started=_milliseconds(record.started),
        ended=_milliseconds(record.finished),
    )


def samples_page(record: Record) -> str:
    """What the model wrote, as Markdown; fenced, as the text may be anything."""
    blocks = []
    for sample in record.samples:
        text = f"{sample.prompt}|{sample.text}"
        fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
        blocks.append(f"{fence}text\n{text}\n{fence}\n")
    return "Prompts, and after the bar what the model wrote.\n\n" + "\n".join(blocks)


def environment_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Git commit, under the name that MLflow's page knows too, and versions."""
    tags = {f"version.{name}": str(version) for name, version in (environment.get("versions") or {}).items()}
    git = environment.get("git") or {}
    if git.get("commit"):
        tags |= {"mlflow.source.git.commit": str(git["commit"]), "git.dirty": str(bool(git.get("dirty"))).lower()}
    return _texts(tags)


def _params(record: Record) -> dict[str, str]:
    model = record.model
    params = {
        "model": model.name,
        "revision": model.revision,
        "dtype": model.dtype,
        "method": record.method,
        "label": record.label or record.method,
        "seed": str(record.seed),
        "recovery": "+".join(record.recovery) or "none",
        "budget": "none" if record.budget is None else f"{record.budget.centre:g}",
    }
    if record.budget is not None:
        params |= {"budget.window": f"{record.budget.window:g}", "budget.on": record.budget.on}
    params |= flatten(record.options, "options.")
    for stage, options in zip(record.recovery, record.recovery_options, strict=False):
        params |= flatten(options, f"recovery.{stage}.")
    return params | flatten(record.calibration or {}, "calibration.")


def _tags(record: Record) -> dict[str, str]:
    tags = {
        TRIAL_TAG: record.trial,
        "evenbits.status": record.status,
        "evenbits.suite": record.suite,
        "evenbits.distribution": record.distribution,
        **environment_tags(record.environment),
        **{f"fingerprint.{metric.name}": metric.fingerprint for metric in record.metrics},
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


def _texts(pairs: Mapping[str, str]) -> dict[str, str]:
    return {_name(name): text if len(text) <= _LONGEST else text[:_LONGEST] + "…" for name, text in pairs.items()}


def _name(name: str) -> str:
    """MLflow takes word characters, dashes, periods, spaces and slashes in names."""
    return _NOT_IN_NAMES.sub("_", name)


def _milliseconds(time: str) -> int | None:
    try:
        return round(datetime.fromisoformat(time).timestamp() * 1000)
    except ValueError:
        return None
