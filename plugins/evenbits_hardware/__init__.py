"""Profilers "hardware" (bytes on disk, latency and throughput, memory peaks) and "energy" (joules per token)."""

from __future__ import annotations

from collections.abc import Sequence

from evenbits.hookspecs import hookimpl
from evenbits.measure import Profiler, ProfilerStage
from evenbits_hardware.options import EnergyOptions, HardwareOptions


def _make_hardware(options: HardwareOptions) -> ProfilerStage:
    from evenbits_hardware.profiler import HardwareProfiler

    return HardwareProfiler(options)


def _make_energy(options: EnergyOptions) -> ProfilerStage:
    from evenbits_hardware.energy import EnergyProfiler

    return EnergyProfiler(options)


@hookimpl
def provide_profilers() -> Sequence[Profiler]:
    return (
        Profiler(
            name="hardware",
            summary="bytes on disk, latency and throughput of prefill and decode, memory peaks of load, compression "
            "and inference",
            options=HardwareOptions,
            make=_make_hardware,
        ),
        Profiler(
            name="energy",
            summary="joules per token of prefill and decode, by NVML, RAPL or an estimate of codecarbon's",
            options=EnergyOptions,
            make=_make_energy,
        ),
    )
