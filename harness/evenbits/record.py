"""The one source of truth about a trial: `record.json`, with per-item scores beside it.

Everything else (MLflow, tables, plots) mirrors records and can be rebuilt from them. A record reads without
the plugin that made it. Written whole or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evenbits.errors import ArtifactError
from evenbits.files import write_atomically

__all__ = [
    "SCHEMA", "Bits", "BudgetFacts", "Failure", "LayerFacts", "Ledger", "MetricFacts", "ModelFacts", "Record",
    "SampleFacts", "Status", "read_items", "read_record", "write_atomically", "write_record",
]  # fmt: skip

SCHEMA = 1

Status = Literal["done", "failed", "skipped"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(_Frozen):
    """name: as the suite calls it; revision: commit, or "sha256:..." of a local folder's weights and config."""

    name: str
    revision: str
    dtype: str
    parameters: int
    linear_weights: int
    stored_bits: int = Field(description="bits of the dtype that most of the checkpoint's weights have")
    linear_bytes: int = Field(description="dense bytes of the linear layers at the evaluated dtype")
    model_bytes: int = Field(description="dense bytes of the whole model at the evaluated dtype, no file headers")


class BudgetFacts(_Frozen):
    centre: float
    window: float
    on: Literal["linear", "model"] = "linear"


class Bits(_Frozen):
    """The four bit numbers: index, paper and linear per linear weight, model per parameter."""

    index: float
    paper: float
    linear: float
    model: float


class Ledger(_Frozen):
    """Bytes on disk by role, and what they come to."""

    bits: Bits
    roles: dict[str, int] = Field(description="payload bytes of the linear layers by role, shared parts once")
    linear_bytes: int
    rest_bytes: int = Field(description="payload bytes outside the linear layers")
    model_bytes: int = Field(description="size of all tensor files, headers too")
    ratios: dict[str, float] = Field(description="linear/model against fp32 and against the stored dtype")
    compressed_weights: int = Field(description="linear weights that are not left dense")
    left_dense: tuple[str, ...] = ()


class LayerFacts(_Frozen):
    """Per layer: bits by its own bytes (shared parts and adapters not included), relative squared error of the weights
    (None where that is not known any more), and where statistics were at hand the calibrated error
    tr(E H E^T) / tr(W H W^T)."""

    name: str
    bits: float
    error: float | None
    calibrated_error: float | None = None
    meta: dict[str, Any] = Field(default={}, description="what the method noted of it, e.g. a damping it had to raise")


class MetricFacts(_Frozen):
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str
    better: Literal["lower", "higher"]
    source: str = Field(description="evaluator or profiler that measured it")
    fingerprint: str = Field(description="key into the record's fingerprints")
    details: dict[str, Any] = {}
    items: str | None = Field(default=None, description="file beside the record with the per-item values")
    attachments: tuple[str, ...] = Field(default=(), description="further files beside the record")
    volatile: bool = False


class SampleFacts(_Frozen):
    """What the model wrote after a prompt."""

    source: str = Field(description="evaluator that asked for it")
    prompt: str
    text: str
    details: dict[str, Any] = {}


class Failure(_Frozen):
    """kind: error | signal | timeout | memory; `signal` is the name, e.g. SIGKILL."""

    kind: Literal["error", "signal", "timeout", "memory"]
    stage: str
    message: str
    signal: str | None = None
    traceback: str | None = None


class Record(_Frozen):
    """What one trial came to."""

    schema_version: int = SCHEMA
    trial: str = Field(description="content hash of everything that determines the result")
    artifact: str | None = Field(description="content hash of the compress stage; None for the dense model")
    chain: tuple[str, ...] = Field(default=(), description="artifacts that led to it, one a recovery stage")
    suite: str
    model: ModelFacts
    method: str = Field(description='"dense" for the uncompressed model')
    distribution: str = ""
    label: str = Field(default="", description="the suite's name for this entry; the method's where it gives none")
    options: dict[str, Any] = {}
    shown: tuple[str, ...] = Field(default=(), description="the options that a table shows; all where there are none")
    budget: BudgetFacts | None = None
    within_budget: bool | None = None
    seed: int = 0
    recovery: tuple[str, ...] = ()
    recovery_options: tuple[dict[str, Any], ...] = ()
    calibration: dict[str, Any] | None = None
    status: Status
    reason: str | None = Field(default=None, description="why skipped")
    failure: Failure | None = None
    predicted: Bits | None = None
    ledger: Ledger | None = None
    layers: tuple[LayerFacts, ...] = ()
    metrics: tuple[MetricFacts, ...] = ()
    fingerprints: dict[str, dict[str, Any]] = {}
    samples: tuple[SampleFacts, ...] = ()
    made_with: dict[str, str] = Field(default={}, description="another program's libraries that compressed, by version")
    remarks: tuple[str, ...] = Field(default=(), description="what could not be measured, and why")
    seconds: dict[str, float] = Field(default={}, description="wall seconds by stage")
    peaks: dict[str, int] = Field(default={}, description="peak bytes by stage")
    environment: dict[str, Any] = Field(default={}, description="versions, git state, hardware")
    started: str = ""
    finished: str = ""

    def metric(self, name: str) -> MetricFacts | None:
        return next((m for m in self.metrics if m.name == name), None)

    def comparable(self) -> dict[str, Any]:
        """The record without what differs from run to run: times, memory, energy, environment."""
        data = self.model_dump(mode="json", exclude={"seconds", "peaks", "environment", "started", "finished"})
        data["metrics"] = [m for m in data["metrics"] if not m["volatile"]]
        kept = {m["fingerprint"] for m in data["metrics"]}
        data["fingerprints"] = {k: v for k, v in data["fingerprints"].items() if k in kept}
        return data


def write_record(
    folder: Path,
    record: Record,
    items: Mapping[str, np.ndarray[Any, Any]] | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> Path:
    """Write what stands beside it first, then record.json: a record that exists is whole. Returns the record's path."""
    for name, data in (attachments or {}).items():
        write_atomically(folder / name, data)
    for name, values in (items or {}).items():
        with tempfile.SpooledTemporaryFile() as buffer:
            np.save(buffer, values, allow_pickle=False)
            buffer.seek(0)
            write_atomically(folder / name, buffer.read())
    path = folder / "record.json"
    write_atomically(path, (record.model_dump_json(indent=1) + "\n").encode())
    return path


def read_record(path: Path) -> Record:
    """Raises ArtifactError for a damaged file or a schema newer than this version knows."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable record ({error}); remove it and run again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path}: not a record (no schema_version); remove it and run again")
    if version > SCHEMA:
        raise ArtifactError(f"{path}: schema {version} is newer than this evenbits knows ({SCHEMA}); upgrade evenbits")
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}; remove it and run again") from None


def read_items(folder: Path, metric: MetricFacts) -> np.ndarray[Any, Any] | None:
    """The per-item values of a metric, or None where it keeps none."""
    if metric.items is None:
        return None
    values: np.ndarray[Any, Any] = np.load(folder / metric.items, allow_pickle=False)
    return values
