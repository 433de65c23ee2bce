"""CUDA without torch: a driver and a torch built for it, or there is none."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evenbits import devices
from evenbits.devices import CudaDevice, cuda_devices


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    cuda_devices.cache_clear()
    yield
    cuda_devices.cache_clear()


class Driver:
    """libcuda with two devices, as its header declares the calls."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 10 + device.value
        return 0


@pytest.mark.parametrize(("line", "found"), [
    ("cuda: Optional[str] = '12.8'", (CudaDevice("GPU 0", 10), CudaDevice("GPU 1", 11))),
    ("cuda: Optional[str] = None", ()),
])  # fmt: skip
def test_a_driver_and_a_torch_built_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: tuple[CudaDevice, ...]
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2'\n{line}\n")
    monkeypatch.setattr(devices, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert cuda_devices() == found


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert cuda_devices() == ()
