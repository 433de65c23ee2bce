"""Meters of energy by name, and which of them to take.

A counter measures, power that is sampled misses what happens between two samples, and an estimate knows only a model of
the processor and its load: kind, name and scope of the meter stand in every fingerprint, so that figures of two kinds
are never put in one column.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from evenbits_hardware.absent import NoMeter
from evenbits_hardware.estimate import Codecarbon
from evenbits_hardware.nvml import Board
from evenbits_hardware.options import AUTO
from evenbits_hardware.rapl import packages

POWER_SECONDS = 0.02


class Meter(Protocol):
    """Joules over a stretch.

    kind    "counter" | "sampled power" | "estimate"
    scope   what it meters, which is more than the model: a board, a package, a machine
    period  seconds between its updates; None where these show in the reading itself
    facts   versions, for the fingerprint
    parts   of what the last stretch came to, where the meter tells
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def scope(self) -> str: ...

    @property
    def period(self) -> float | None: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def parts(self) -> Mapping[str, float]: ...

    def begin(self) -> None: ...

    def look(self) -> float | None:
        """Joules since `begin`; None where only `end` knows. Raises NoMeter when the meter stops answering."""
        ...

    def end(self) -> float:
        """Joules since `begin`."""
        ...


@dataclass
class CounterMeter:
    """One or more counters that only rise, and begin anew after `wraps` joules (None: never)."""

    name: str
    scope: str
    facts: Mapping[str, Any]
    counters: Sequence[tuple[Callable[[], float], float | None]]
    kind: Literal["counter"] = "counter"
    period: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    _last: list[float] = field(default_factory=list)
    _total: float = 0.0

    def begin(self) -> None:
        self._last = [read() for read, _ in self.counters]
        self._total = 0.0

    def look(self) -> float:
        for index, (read, wraps) in enumerate(self.counters):
            now = read()
            if now < self._last[index]:
                if wraps is None:
                    raise NoMeter(f"the counter of {self.name} fell from {self._last[index]:g} to {now:g} J")
                self._total += wraps
            self._total += now - self._last[index]
            self._last[index] = now
        return self._total

    def end(self) -> float:
        return self.look()


class PowerMeter:
    """A power sensor read by a thread and summed by the trapezoid rule."""

    kind = "sampled power"
    period: float | None = 0.1  # how often boards without a counter renew the figure

    def __init__(self, name: str, scope: str, facts: Mapping[str, Any], watts: Callable[[], float]) -> None:
        self.name, self.scope, self.facts, self._watts = name, scope, facts, watts
        self.parts: Mapping[str, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None
        self._failed: NoMeter | None = None
        self._at = self._power = self._joules = 0.0

    def begin(self) -> None:
        self._joules, self._failed = 0.0, None
        self._at, self._power = time.perf_counter(), self._watts()
        self._stop.clear()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while self._failed is None and not self._stop.wait(POWER_SECONDS):
            self._add()

    def _add(self) -> None:
        with self._lock:
            try:
                power, now = self._watts(), time.perf_counter()
            except NoMeter as error:
                self._failed = error
                return
            self._joules += (now - self._at) * (power + self._power) / 2
            self._at, self._power = now, power

    def look(self) -> float:
        self._add()
        if self._failed is not None:
            raise self._failed
        return self._joules

    def end(self) -> float:
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
        return self.look()


def _nvml(device: torch.device) -> Meter:
    board = Board(device)
    board.joules()
    return CounterMeter("nvml", "the GPU's board", {"driver": board.driver}, [(board.joules, None)])


def _nvml_power(device: torch.device) -> Meter:
    board = Board(device)
    board.watts()
    return PowerMeter("nvml-power", "the GPU's board", {"driver": board.driver}, board.watts)


def _rapl(device: torch.device) -> Meter:
    found = packages()
    scope = f"processor packages: {', '.join(package.name for package in found)}"
    return CounterMeter("rapl", scope, {}, [(package.joules, package.wraps) for package in found])


def _codecarbon(device: torch.device) -> Meter:
    return Codecarbon()


OPENERS: Mapping[str, Callable[[torch.device], Meter]] = {
    "nvml": _nvml,
    "nvml-power": _nvml_power,
    "rapl": _rapl,
    "codecarbon": _codecarbon,
}
# the processor's counter would see a GPU's host alone, so it is not taken for one unless asked for
BEST_FIRST: Mapping[str, tuple[str, ...]] = {
    "cuda": ("nvml", "nvml-power", "codecarbon"),
    "cpu": ("rapl", "codecarbon"),
}


def open_meter(name: str, device: torch.device) -> Meter:
    """The meter called `name`, or the best there is for "auto". Raises NoMeter saying why not, for each tried."""
    if name != AUTO:
        return OPENERS[name](device)
    reasons = []
    for candidate in BEST_FIRST[device.type]:
        try:
            return OPENERS[candidate](device)
        except NoMeter as error:
            reasons.append(f"{candidate}: {error}")
    raise NoMeter("; ".join(reasons))
