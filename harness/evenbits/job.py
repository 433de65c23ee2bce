"""What is sent to a child process and what it sends back. Imports no torch, so that the parent need not."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evenbits.plan import Trial
from evenbits.record import LayerFacts, Ledger, MetricFacts, SampleFacts


@dataclass(frozen=True)
class Job:
    """One stage of one trial."""

    stage: Literal["compress", "evaluate", "profile"]
    trial: Trial
    artifacts: Path
    cache: Path
    compress_peak_bytes: int | None = None
    compress_device_peak_bytes: int | None = None
    compress_seconds: float | None = None

    @property
    def artifact_folder(self) -> Path | None:
        return None if self.trial.artifact is None else self.artifacts / self.trial.artifact


@dataclass
class StageResult:
    """What a stage found.

    peak_bytes: of a worker that it ran beside itself, until the child adds its own. device_peak_bytes: by torch's
    allocator on the GPU it ran on, if any. made_with: libraries of another program by version. items: file name ->
    the bytes of a .npy file; attachments: file name -> bytes.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int | None = None
    ledger: Ledger | None = None
    layers: tuple[LayerFacts, ...] = ()
    metrics: list[MetricFacts] = field(default_factory=list)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: dict[str, bytes] = field(default_factory=dict)
    attachments: dict[str, bytes] = field(default_factory=dict)
    samples: list[SampleFacts] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    made_with: dict[str, str] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in self.items.items()}
