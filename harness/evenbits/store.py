"""A results folder: where records, artifacts and caches lie, its schema, and its lock.

evenbits.json        schema of the folder
artifacts/KEY/       shared by all suites that use the folder
cache/               digests of files, second moments
runs/SUITE/plan.json the trials of the latest run, in order
runs/SUITE/TRIAL/    record.json, items-*.npy, log.txt
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evenbits.errors import ArtifactError, SuiteError
from evenbits.files import write_atomically
from evenbits.manifest import MANIFEST
from evenbits.record import Record, read_record

SCHEMA = 1
TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Results:
    """The root of a results folder."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def run_folder(self, suite: str) -> Path:
        return self.root / "runs" / suite

    def trial_folder(self, suite: str, trial: str) -> Path:
        return self.run_folder(suite) / trial

    def check_schema(self, *, create: bool = False) -> None:
        """Raises ArtifactError for a folder that a newer evenbits wrote. `create` marks a new one."""
        path = self.root / "evenbits.json"
        if path.is_file():
            try:
                found = int(json.loads(path.read_text())["schema"])
            except (ValueError, KeyError, TypeError):
                raise ArtifactError(f'{path}: damaged; it should hold {{"schema": {SCHEMA}}}') from None
            if found > SCHEMA:
                raise ArtifactError(
                    f"{self.root}: results of schema {found}, newer than this evenbits knows ({SCHEMA}); "
                    "upgrade evenbits, or give another folder by --results"
                )
        elif create:
            write_atomically(path, json.dumps({"schema": SCHEMA}).encode() + b"\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder alone. Raises ArtifactError naming the process that has it; the lock dies with it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            opened = (self.root / ".lock").open("a+")
        except OSError as error:
            raise ArtifactError(f"{self.root}: no results folder can be here ({error.strerror})") from None
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ArtifactError(
                    f"{self.root} is in use by {owner}; wait for it, or give another folder by --results"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    # -- plan and records ---------------------------------------------------------------------------------------

    def write_plan(self, suite: str, order: Sequence[str], artifacts: Sequence[str] = ()) -> None:
        """`artifacts`: keys that the trials make or use, so that none is cleaned away before its record is written."""
        text = json.dumps({"suite": suite, "trials": list(order), "artifacts": sorted(set(artifacts))}, indent=1)
        write_atomically(self.run_folder(suite) / "plan.json", text.encode())

    def planned(self, suite: str) -> list[str]:
        """Ids of the latest run's trials. Raises SuiteError when there was none."""
        path = self.run_folder(suite) / "plan.json"
        try:
            return list(json.loads(path.read_text())["trials"])
        except OSError:
            raise SuiteError(f"{path}: no run of suite {suite!r} here; `evenbits run` makes one") from None
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{path}: damaged; run the suite again, its records are kept") from None

    def _planned_artifacts(self, suite: str) -> list[str]:
        path = self.run_folder(suite) / "plan.json"
        return list(json.loads(path.read_text()).get("artifacts", []))

    def record(self, suite: str, trial: str) -> Record | None:
        """The record of a trial; None when it has none yet. Raises ArtifactError for a damaged or newer one."""
        path = self.trial_folder(suite, trial) / "record.json"
        return read_record(path) if path.is_file() else None

    def records(self, suite: str) -> tuple[list[Record], dict[str, Path]]:
        """Records of the latest run in the plan's order, and each one's folder by trial."""
        self.check_schema()
        records = [record for trial in self.planned(suite) if (record := self.record(suite, trial)) is not None]
        return records, {record.trial: self.trial_folder(suite, record.trial) for record in records}

    def suites(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("runs/*/plan.json"))

    def has_artifact(self, key: str) -> bool:
        return (self.artifacts / key / MANIFEST).is_file()

    # -- cleaning -----------------------------------------------------------------------------------------------

    def leftovers(self) -> list[Path]:
        """What killed writers left: temporary folders and files."""
        # nothing else inside an artifact: a base model's own hidden files are listed in its manifest
        patterns = (
            ".evenbits.json.*", f"artifacts/{TEMPORARY}*", "artifacts/*/.cost.json.*", "cache/**/.*.*",
            "runs/*/.plan.json.*", "runs/*/*/.*.*",
        )  # fmt: skip
        return sorted(path for pattern in patterns for path in self.root.glob(pattern))

    def remove_unfinished(self, key: str) -> None:
        """Remove what a writer of this artifact left when it died. Call only once it is dead."""
        for path in self.artifacts.glob(f"{TEMPORARY}{key}-*"):
            remove(path)

    def remove_leftovers(self) -> int:
        """Call only under the lock. Returns how many there were."""
        found = self.leftovers()
        for path in found:
            remove(path)
        return len(found)

    def stale(self) -> list[Path]:
        """Trial folders outside each suite's latest plan, and artifacts that no latest plan uses."""
        found: list[Path] = []
        used: set[str] = set()
        for suite in self.suites():
            planned = self.planned(suite)
            trials = {
                path.parent for name in ("record.json", "log.txt") for path in self.run_folder(suite).glob(f"*/{name}")
            }
            found += [folder for folder in trials if folder.name not in planned]
            used.update(self._planned_artifacts(suite))
        if self.artifacts.is_dir():
            found += [path for path in self.artifacts.iterdir() if path.name not in used]
        return sorted(found)


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
