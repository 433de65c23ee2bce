"""Starts a part's processes, watches them, starts them again past an item that crashed or hung, keeps their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpu_parts.part import Ceilings, Part, Row, Setting

CHILD = (sys.executable, str(Path(__file__).resolve().parents[1] / "gpu.py"), "--child")
_LINGER = 5.0  # seconds past its deadline that a part's last item may take
_POLL, _KEEP = 0.2, 3.0  # seconds between looks at the processes, and between writings


@dataclass
class Result:
    """status: "done" (every item ran), "partial" (time was out before some), "failed" (some items did not run)."""

    part: str
    status: str = "failed"
    seconds: float = 0.0
    rows: dict[str, list[Row]] = field(default_factory=dict)  # by item
    failures: dict[str, str] = field(default_factory=dict)  # item, or process, to its last line
    left_out: list[str] = field(default_factory=list)
    clocks: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> list[Row]:
        return [row for rows in self.rows.values() for row in rows]


def read(path: Path, made_with: Mapping[str, Any]) -> dict[str, Result]:
    """What an earlier run left, where it was made with the same. Else nothing, and the file is set aside."""
    try:
        found = json.loads(path.read_text())
        if found["made_with"] == dict(made_with):
            return {name: Result(**result) for name, result in found["parts"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        pass
    aside = path.with_name(f"{path.stem}-before{path.suffix}")
    path.replace(aside)
    print(f"{path}: of other sources or another machine; it is {aside.name} now", flush=True)
    return {}


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def dumped(state: Mapping[str, Any]) -> str:
    """JSON with each row of the parts in a line of its own."""
    marked: list[str] = []

    def mark(row: Any) -> str:
        marked.append(json.dumps(row))
        return f"@row {len(marked) - 1}@"

    parts = {
        name: part | {"rows": {item: [mark(row) for row in rows] for item, rows in part["rows"].items()}}
        for name, part in state["parts"].items()
    }
    lines = json.dumps(dict(state) | {"parts": parts}, indent=1).splitlines()
    for place, line in enumerate(lines):
        head, _, rest = line.partition('"@row ')
        if rest:
            number, _, tail = rest.partition('@"')
            lines[place] = head + marked[int(number)] + tail
    return "\n".join([*lines, ""])


@dataclass
class _Shard:
    """A process on its share of the items; restarted past items that took the one before it down."""

    number: int
    folder: Path
    told: dict[str, Any]
    result: Result
    item_seconds: float
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    state: Path = Path()
    starts: int = 0
    at: str | None = None
    since: float = 0.0

    def start(self, deadline: float) -> None:
        self.starts += 1
        base = f"{self.number}.{self.starts}"
        self.state = self.folder / f"{base}.json"
        self.at = None
        told = self.told | {
            "shard": self.number, "skip": [*self.result.rows, *self.result.failures], "state": str(self.state),
            "seconds": deadline - time.monotonic(),
        }  # fmt: skip
        asked = self.folder / f"{base}.told"
        asked.write_text(json.dumps(told))
        with asked.open("rb") as reads, (self.folder / f"{base}.err").open("wb") as errors:
            self.process = subprocess.Popen(self.command, stdin=reads, stderr=errors)

    def poll(self, kill_at: float) -> bool:
        """Whether the process is still at it. One that is past its time, or hung in an item, is killed."""
        assert self.process is not None
        now = time.monotonic()
        status = self.process.poll()
        if status is None:
            at = (self.seen() or {}).get("at")
            if at != self.at:
                self.at, self.since = at, now
            hung = at is not None and now - self.since > self.item_seconds
            if now < kill_at and not hung:
                return True
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
                self.process.wait(10)
            self._take(f"no end after {now - self.since:.0f} s; killed" if hung else None)
            return False
        self._take(f"exit status {status}: {self._last_line()}")
        return False

    def _take(self, ended: str | None) -> None:
        """Move what the process found into the result; `ended` is the failure of the item it was at, None where only
        time was out."""
        seen = self.seen()
        if seen is None:  # it never came as far as its first item
            if ended is not None:
                self.result.failures[f"process {self.number}"] = ended
            return
        self.result.rows |= seen["rows"]
        self.result.failures |= seen["failures"]
        if seen["at"] is not None and ended is not None:
            self.result.failures[seen["at"]] = ended

    @property
    def through(self) -> bool:
        """Nothing of this shard remains, or a restart would only fail again."""
        seen = self.seen()
        return seen is None or bool(seen["finished"])

    def seen(self) -> dict[str, Any] | None:
        """What the process has written down so far."""
        try:
            found: dict[str, Any] = json.loads(self.state.read_text())
        except (OSError, ValueError):
            return None
        return found

    def _last_line(self) -> str:
        said = (self.folder / f"{self.number}.{self.starts}.err").read_text(errors="replace").strip().splitlines()
        return said[-1][:300] if said else "nothing on standard error"


def run_part(
    part: Part,
    before: Result | None,
    ceilings: Ceilings,
    seconds: float,
    device: str,
    small: bool,
    keep: Callable[[Result], None] = lambda result: None,
    command: Sequence[str] = CHILD,
) -> Result:
    """Run what `before` lacks of a part within `seconds`; items that failed before are tried again.

    keep: called every few seconds with all that was found so far. command: a process that passes what it reads on
    standard input to `child.main`.
    """
    begun = time.monotonic()
    deadline = begun + seconds
    result = Result(part.name, rows=dict(before.rows) if before else {})
    names = [item.name for item in part.items(Setting(torch.device(device), small, deadline, ceilings))]

    def told(running: Sequence[_Shard]) -> Result:
        """The result as it stands, what processes have found but not handed over among it."""
        found = replace(result, rows=dict(result.rows), failures=dict(result.failures))
        for seen in filter(None, (shard.seen() for shard in running)):
            found.rows |= seen["rows"]
            found.failures |= seen["failures"]
        found.left_out = [name for name in names if name not in found.rows and name not in found.failures]
        found.status = "failed" if found.failures else "partial" if found.left_out else "done"
        found.seconds = time.monotonic() - begun + (before.seconds if before else 0.0)
        return found

    count = max(1, min(part.shards, os.cpu_count() or 1, len(names)))
    asked = {"part": part.name, "device": device, "small": small, "ceilings": asdict(ceilings), "shards": count}
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as folder:
        running = [_Shard(number, Path(folder), asked, result, part.item_seconds, command) for number in range(count)]
        for shard in running:
            shard.start(deadline)
        kept = begun
        while running:
            time.sleep(_POLL)
            for shard in list(running):
                if shard.poll(deadline + _LINGER):
                    continue
                if shard.through or time.monotonic() >= deadline:
                    running.remove(shard)
                else:
                    shard.start(deadline)
            if time.monotonic() - kept > _KEEP:
                keep(told(running))
                kept = time.monotonic()
    return told([])
