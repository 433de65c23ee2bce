"""Profiler "hardware": bytes on disk, latency of prefill and decode, memory peaks."""

from __future__ import annotations

from collections.abc import Sequence

from evenbits.hookspecs import hookimpl
from evenbits.measure import Profiler, ProfilerStage
from evenbits_hardware.options import HardwareOptions


def _make(options: HardwareOptions) -> ProfilerStage:
    from evenbits_hardware.profiler import HardwareProfiler

    return HardwareProfiler(options)


@hookimpl
def provide_profilers() -> Sequence[Profiler]:
    return (
        Profiler(
            name="hardware",
            summary="bytes on disk, prefill and decode latency, memory peaks of load, compression and inference",
            options=HardwareOptions,
            make=_make,
        ),
    )
