"""What the bench is made of: parts, their items, and what an item is told of device, sizes, ceilings and time."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

Row = dict[str, Any]


@dataclass(frozen=True)
class Ceilings:
    """Rates measured by the part "machine", bytes or operations a second; None where it did not get to them."""

    copy: float | None = None  # bytes read and written
    read: float | None = None
    float16: float | None = None
    bfloat16: float | None = None
    tf32: float | None = None
    float32: float | None = None

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Ceilings:
        """From the rows of the part "machine"."""
        known = {field.name for field in fields(cls)}
        return cls(**{row["kind"]: row["rate"] for row in rows if row.get("kind") in known})

    def floor(self, moved_bytes: float, operations: float, kind: str) -> tuple[float | None, str]:
        """Seconds that neither bytes nor operations can beat, and which of the two it is that says so."""
        rate = getattr(self, kind)
        times = {
            "bytes": moved_bytes / self.copy if self.copy else None,
            "operations": operations / rate if rate else None,
        }
        known = {name: seconds for name, seconds in times.items() if seconds is not None}
        if not known:
            return None, ""
        limit = max(known, key=lambda name: known[name])
        return known[limit], limit


@dataclass(frozen=True)
class Setting:
    device: torch.device
    small: bool  # tiny shapes and one repeat: a run that shows that everything runs, and measures nothing
    deadline: float  # of time.monotonic(); no item begins after it
    ceilings: Ceilings = Ceilings()
    seed: int = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> Literal["auto", "triton"]:
        """Of packed modules: what they choose, but on a CPU Triton's interpreter, which they never do."""
        return "auto" if self.cuda else "triton"

    @property
    def l2_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.cuda else 1 << 14

    def remaining(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1000 * self.seed + seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator(seed), device=self.device)
        return drawn.to(dtype)


@dataclass(frozen=True)
class Column:
    """key: of the rows. shown: a format for numbers; "" for words."""

    key: str
    heading: str
    shown: str = ""


@dataclass(frozen=True)
class Item:
    """The least that is run, restarted or left out by itself. name: unique in its part, and the same in every run."""

    name: str
    run: Callable[[], Sequence[Row]]


@dataclass(frozen=True)
class Part:
    """items: lists without working; work belongs into `Item.run`. shards: processes that share the items at once, for
    parts that measure no time. item_seconds: after so long an item counts as hung."""

    name: str
    title: str
    note: str  # Markdown, above the table
    seconds: float  # budget, imports and compilation included
    columns: Sequence[Column]
    items: Callable[[Setting], Iterable[Item]]
    shards: int = 1
    item_seconds: float = 60.0


def load(name: str) -> Part:
    """The part of this name; imports its module, and with it what the part needs."""
    found = importlib.import_module(f"gpu_parts.{name}").PART
    assert isinstance(found, Part)
    return found
