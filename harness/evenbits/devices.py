"""Which CUDA devices are here, without torch: a plan says so before anything heavy is imported."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class CudaDevice:
    name: str
    memory_bytes: int


@cache
def cuda_devices() -> tuple[CudaDevice, ...]:
    """Those that the installed torch can use, in the driver's order (CUDA_VISIBLE_DEVICES counts); () where none."""
    return _by_driver() if _torch_has_cuda() else ()


def _torch_has_cuda() -> bool:
    """Whether torch was built for CUDA, from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def _by_driver() -> tuple[CudaDevice, ...]:
    """By CUDA's driver API (cuda.h): cuInit, cuDeviceGetCount, cuDeviceGetName, cuDeviceTotalMem_v2."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        if (
            driver.cuDeviceGet(ctypes.byref(device), index) == 0
            and driver.cuDeviceGetName(name, len(name), device) == 0
            and driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0
        ):
            found.append(CudaDevice(name.value.decode(errors="replace"), memory.value))
    return tuple(found)
