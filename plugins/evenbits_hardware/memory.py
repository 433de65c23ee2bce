"""Peaks of memory over a stretch of code: resident memory of this process, and what torch allocated on a GPU.

Linux keeps the high-water mark of resident memory and lets a process reset it, which costs nothing and misses
nothing. Where the reset is refused (other systems, some sandboxes) a thread samples, which can miss a short peak:
the meter's name is part of every fingerprint, so the two are never put in one column.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

from evenbits_hardware.nvml import Board, BoardPeak

ALLOCATOR = "torch.cuda.max_memory_allocated"
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SAMPLE_SECONDS = 0.002
# the kernel batches its per-thread page counts, so mark and current size may differ by this much just after a reset
SLACK_BYTES = 4 << 20


def read_status(field: str) -> int:
    """Bytes of a kB field (VmHWM, VmRSS) of /proc/self/status. Raises OSError or KeyError where there is none."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def reset_high_water() -> bool:
    """Set VmHWM back to the current resident size; False where the system refuses, or agrees and does not do it."""
    try:
        CLEAR_REFS.write_text("5")
        return read_status("VmHWM") <= read_status("VmRSS") + SLACK_BYTES
    except (OSError, KeyError):
        return False


def release_freed() -> None:
    """Give freed memory back to the system: else it hides the growth of what is allocated next."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim  # glibc only
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


class HostPeak:
    """Context manager: `peak` is the highest resident size in bytes of this process inside the block."""

    def __init__(self) -> None:
        self.baseline = 0
        self.peak = 0
        self.meter = ""
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        release_freed()
        self.baseline = psutil.Process().memory_info().rss
        if reset_high_water():
            self.meter = "VmHWM"
        else:
            self.meter = f"RSS sampled every {SAMPLE_SECONDS * 1000:g} ms"
            self.peak = self.baseline
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, process.memory_info().rss)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is None:
            self.peak = max(self.baseline, read_status("VmHWM"))
        else:
            self._stop.set()
            self._sampler.join()
            self.peak = max(self.peak, psutil.Process().memory_info().rss)


class DevicePeak:
    """Context manager: host memory as in `HostPeak`; on CUDA what torch's allocator held at most, and with a `board`
    what NVML counts, which sees libraries and the context too.

    value: peak bytes on the device where the model lives. baseline: bytes held there on entry.
    """

    def __init__(self, device: torch.device, board: Board | None = None) -> None:
        self.device = device
        self.host = HostPeak()
        self.nvml = None if board is None else BoardPeak(board)
        self.baseline = 0
        self.value = 0

    @property
    def meter(self) -> str:
        return ALLOCATOR if self.device.type == "cuda" else self.host.meter

    def __enter__(self) -> Self:
        self.host.__enter__()
        self.baseline = self.host.baseline
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # NVML counts what torch keeps of an earlier stretch: it would hide this one's
            torch.cuda.reset_peak_memory_stats(self.device)
            self.baseline = torch.cuda.memory_allocated(self.device)
        if self.nvml is not None:
            self.nvml.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.nvml is not None:
            self.nvml.__exit__(kind, error, trace)
        self.host.__exit__(kind, error, trace)
        self.value = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.host.peak


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Keep what the process holds already out of the garbage collections inside the block.

    `release_freed` collects before each measurement; going through all that torch and transformers have brought takes
    a quarter of a second each time. Garbage among it stays as it is, in the baseline and in the peak alike.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
