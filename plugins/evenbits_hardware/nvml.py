"""The board's own meters through NVIDIA's management library (package nvidia-ml-py, module `pynvml`).

Source: NVML API reference, sections "Device Queries" (total energy in millijoules since the driver was loaded, Volta
and later; power in milliwatts; memory of the board and of its processes in bytes).
"""

from __future__ import annotations

import importlib
import os
import threading
from types import TracebackType
from typing import Any, Self

import torch

from evenbits.errors import MissingExtra
from evenbits_hardware.absent import NoMeter

SAMPLE_SECONDS = 0.005


class Board:
    """The GPU on which the model runs. Raises NoMeter where NVML does not know it."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise NoMeter(f"NVML meters NVIDIA GPUs, and the model runs on {device.type}")
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            raise NoMeter(str(MissingExtra("nvidia-ml-py", "energy"))) from None
        try:
            self._nvml.nvmlInit()
            self._handle = self._find(str(torch.cuda.get_device_properties(device).uuid))
        except self._nvml.NVMLError as error:
            raise NoMeter(f"NVML: {error}") from None
        torch.cuda.synchronize(device)  # a process that holds nothing there yet is in no list
        self.tells_own = self._own_bytes() is not None

    def _find(self, uuid: str) -> Any:
        """By UUID: NVML's order of boards is not CUDA's, and CUDA_VISIBLE_DEVICES does not concern it."""
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            if _text(self._nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-") == uuid.removeprefix("GPU-"):
                return handle
        raise NoMeter(f"NVML: no board has the UUID {uuid} of the device (a MIG slice has no meter of its own)")

    @property
    def driver(self) -> str:
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def joules(self) -> float:
        """Of the whole board since the driver was loaded. Raises NoMeter before Volta."""
        return self._read("nvmlDeviceGetTotalEnergyConsumption") / 1000

    def watts(self) -> float:
        """Of the whole board. Raises NoMeter where it has no sensor."""
        return self._read("nvmlDeviceGetPowerUsage") / 1000

    def _read(self, function: str) -> float:
        try:
            return float(getattr(self._nvml, function)(self._handle))
        except self._nvml.NVMLError as error:
            raise NoMeter(f"NVML: {function}: {error}") from None

    def held_bytes(self) -> int:
        """Memory of this process on the board where NVML tells it, else what is in use there, whoever holds it.

        Raises NoMeter where NVML refuses.
        """
        if not self.tells_own:
            try:
                return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            except self._nvml.NVMLError as error:
                raise NoMeter(f"NVML: nvmlDeviceGetMemoryInfo: {error}") from None
        own = self._own_bytes()
        if own is None:
            raise NoMeter("NVML lost sight of this process's memory")
        return own

    def _own_bytes(self) -> int | None:
        """None where NVML does not tell; in a container it knows this process by another id."""
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        found = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return None if not found or found[0] is None else int(found[0])


class BoardPeak:
    """Context manager: `peak` bytes that NVML saw while a thread looked; a peak between two looks is missed.

    failed: why there is no peak, where NVML stopped answering.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self.baseline = self.peak = 0
        self.failed: str | None = None
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    @property
    def meter(self) -> str:
        what = "memory of the process" if self._board.tells_own else "memory in use on the board"
        return f"NVML {what}, sampled every {SAMPLE_SECONDS * 1000:g} ms"

    def _look(self) -> int:
        try:
            held = self._board.held_bytes()
        except NoMeter as error:
            self.failed = str(error)
            held = 0
        self.peak = max(self.peak, held)
        return held

    def _sample(self) -> None:
        while self.failed is None and not self._stop.wait(SAMPLE_SECONDS):
            self._look()

    def __enter__(self) -> Self:
        self.baseline = self._look()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._sampler.join()
        self._look()


def _text(value: str | bytes) -> str:
    """Older versions of the package give bytes."""
    return value.decode() if isinstance(value, bytes) else value
