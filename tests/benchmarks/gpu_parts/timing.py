"""Seconds a call: medians of device events, versions taking turns; on a CPU of the clock. And CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gpu_parts.part import Setting

Run = Callable[[], object]
_MOST, _LEAST = 60, 5  # turns


@dataclass(frozen=True)
class Timing:
    """Of one call: the median, and the quartiles around it."""

    seconds: float
    low: float
    high: float
    turns: int


def interleaved(setting: Setting, runs: Mapping[str, Run], calls: int = 1, seconds: float = 0.25) -> dict[str, Timing]:
    """Time versions by turns, so that clocks and heat meet all alike.

    runs: each makes `calls` calls. seconds: what each version may take altogether, warm-up and the least number of
    turns (5) not counted. Small runs take one turn.
    """
    turns = dict.fromkeys(runs, 1)
    if not setting.small:
        for run in runs.values():
            run()  # compiles, tunes, allocates
        warm = {name: min(_once(setting, run) for _ in range(2)) for name, run in runs.items()}
        turns = {name: max(_LEAST, min(_MOST, int(seconds / max(warm[name], 1e-7)))) for name in runs}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(turns.values(), default=0)):
        for name, run in runs.items():
            if turn < turns[name]:
                found[name].append(_once(setting, run) / calls)
    return {name: _of(times) for name, times in found.items()}


def alone(setting: Setting, run: Run, calls: int = 1, seconds: float = 0.25) -> Timing:
    return interleaved(setting, {"": run}, calls, seconds)[""]


def captured(setting: Setting, run: Run) -> tuple[Run | None, str]:
    """The run as a CUDA graph's replay; None and the reason where it cannot be captured. Warm it up first."""
    if not setting.cuda:
        return None, "no CUDA graphs on a CPU"
    try:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:  # a host round trip inside, for instance; the context survives it
        return None, f"not captured: {str(error).splitlines()[0][:120]}"
    return graph.replay, ""


def _once(setting: Setting, run: Run) -> float:
    """Seconds of one turn."""
    if not setting.cuda:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _of(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, low, high, len(times))
