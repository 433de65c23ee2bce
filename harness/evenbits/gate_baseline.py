"""The baseline of a suite: one JSON file with a snapshot of a run, and the log of why it was changed.

Committed under results/baselines, so it is small, and written so that a change of one row is a change of one line.
Reading it needs no plugin.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evenbits.errors import ArtifactError, SuiteError
from evenbits.files import write_atomically
from evenbits.gate_snapshot import SCHEMA, NightRun, Snapshot, Update


def read_baseline(path: Path) -> Snapshot:
    """Raises ArtifactError, in one line, for what is no baseline, is damaged, or is newer than this version."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}); `evenbits gate {path} --suite SUITE --update REASON` makes one"
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not a baseline: {error}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path}: not a baseline (no schema_version)")
    if version > SCHEMA:
        raise ArtifactError(f"{path}: schema {version} is newer than this evenbits knows ({SCHEMA}); upgrade evenbits")
    try:
        found = Snapshot.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: {where}: {first['msg']}; restore the file") from None
    if not found.rows:
        raise ArtifactError(f"{path}: a baseline without rows; restore the file")
    for row in found.rows:
        per_seed = row.trials, row.artifacts, row.made_with, row.bits, row.linear_bytes, row.model_bytes
        pairs = [(row.seeds, one) for one in per_seed] + [(one.seeds, one.values) for one in row.metrics]
        if not all(seeds and len(seeds) == len(of_seeds) for seeds, of_seeds in pairs):
            raise ArtifactError(f"{path}: {row.place}: not one entry a seed; restore the file")
        for metric in row.metrics:
            if metric.protocol not in found.protocols or (metric.design or "") not in {"", *found.designs}:
                raise ArtifactError(f"{path}: {row.place}: {metric.name}: its protocol is not in the file; restore it")
            if metric.items is not None:
                metric.items.array()
    return found


def update_baseline(
    path: Path,
    before: Snapshot | None,
    run: NightRun,
    reason: str,
    accepted: Sequence[str] = (),
    now: datetime | None = None,
) -> Snapshot:
    """Write the run as the new baseline, with a line in the log that the one before hands on.

    Raises SuiteError for an empty reason, an incomplete run, one with nothing in it, and one with fewer seeds than
    the baseline before: these are the noise scale that every night is judged by.
    """
    if not reason.strip():
        raise SuiteError("--update: say why the baseline changes, in a few words")
    if run.incomplete:
        first = run.incomplete[0]
        name = first.place or f"trial {first.trial}"
        raise SuiteError(
            f"--update: the run is incomplete, {len(run.incomplete)} without numbers: {name} {first.status}"
            f" ({first.reason}); run the suite again"
        )
    if not run.snapshot.rows:
        raise SuiteError("--update: nothing was measured in this run")
    kept, given = (sorted(_seeds(one)) for one in (before or run.snapshot, run.snapshot))
    if len(given) < len(kept):
        wanted = " ".join(f"--seed {seed}" for seed in kept)
        raise SuiteError(
            f"--update: the run has {len(given)} seed(s), the baseline {len(kept)}, which are the noise scale of every"
            f" night: run the suite with {wanted}"
        )
    commits = [git["commit"] for made in run.snapshot.environments.values() if (git := made.get("git"))]
    update = Update(
        reason=" ".join(reason.split()),
        date=(now or datetime.now(UTC)).date().isoformat(),
        commit=commits[-1] if commits else None,
        accepted=tuple(accepted),
    )
    written = run.snapshot.model_copy(update={"updates": (*(before.updates if before else ()), update)})
    write_snapshot(path, written)
    return written


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """The same snapshot gives the same bytes."""
    write_atomically(path, _written(snapshot).encode())


def _seeds(snapshot: Snapshot) -> set[int]:
    return {seed for row in snapshot.rows for seed in row.seeds}


def _written(snapshot: Snapshot) -> str:
    """JSON of one line a row and a table's entry: a small file whose changes can still be read."""
    data = json.loads(snapshot.model_dump_json())
    parts = []
    for key, value in data.items():
        if key == "updates" or not isinstance(value, dict | list):
            text = json.dumps(value, indent=1 if value and key == "updates" else None, ensure_ascii=False)
        elif isinstance(value, dict):
            lines = [f"{json.dumps(name)}: {_compact(value[name])}" for name in sorted(value)]
            text = "{\n" + ",\n".join(lines) + "\n}"
        else:
            text = "[\n" + ",\n".join(_compact(one) for one in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
