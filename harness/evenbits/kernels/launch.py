"""What a Triton kernel is known by: its few named configurations, the shapes it must compile for, and which runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

import torch


@dataclass(frozen=True)
class Config:
    """A tile choice with a name. tiles: the kernel's constexpr arguments that it decides."""

    name: str
    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Case:
    """One specialisation to compile ahead of time: types as Triton writes them ("*fp16", "i32"), and constants.

    configs: names of the configurations that may run it; () for all. aligned: which pointers and integers are
    multiples of 16, () for every pointer.
    """

    name: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    configs: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A jitted function, its configurations, and the cases that tests compile for sm_80 and sm_90."""

    name: str
    function: Any
    configs: tuple[Config, ...]
    cases: tuple[Case, ...] = ()

    def config(self, name: str) -> Config:
        """Raises ValueError, naming those there are."""
        for config in self.configs:
            if config.name == name:
                return config
        raise ValueError(f"kernel {self.name} has no configuration {name!r}: {', '.join(c.name for c in self.configs)}")


Backend = Literal["auto", "triton", "numba", "torch"]


@dataclass(frozen=True)
class Choice:
    """What computes a layer, and why. config: of a Triton kernel, "" for others or before the first call.
    decibels: of what is only near the stored weight, squares of that over the error's; None where it is that weight."""

    kernel: str  # e.g. "triton-integer-gemv", "numba-integer", "torch-tiles"
    reason: str
    config: str = ""
    decibels: float | None = None


class PackedModule(Protocol):
    """What a compressor's `linear` returns, beside being an nn.Module of inputs (..., in) -> (..., out)."""

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        ...

    def choice(self, rows: int) -> Choice:
        """What computes a call with so many rows (batch times tokens)."""
        ...


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1, read when it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _importable() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'evenbits[kernels]'"
    return None


def _compiler() -> str | None:
    """Triton compiles the road from Python to the driver by a C compiler, and raises at the first launch without."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton finds no C compiler (gcc or clang, or the variable CC)"


def triton_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel can run on this device; None where one can. On the CPU only the interpreter can."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are compiled and tested for NVIDIA's GPUs, not for ROCm"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "compute capability below 8.0"
        return _importable() or (None if interpreted() else _compiler())
    if device.type == "cpu" and interpreted():
        return _importable()
    return f"Triton does not run on {device.type}"


@dataclass
class Tuner:
    """Times each configuration once per key on a GPU and keeps the fastest; the first one everywhere else, and where
    torch is told to be deterministic: configurations of a kernel differ in the order of float32 sums.

    times: milliseconds by key and configuration name, for reports.
    """

    times: dict[Hashable, dict[str, float]] = field(default_factory=dict)
    _best: dict[Hashable, Config] = field(default_factory=dict)

    def choose(
        self, key: Hashable, configs: Sequence[Config], run: Callable[[Config], object], device: torch.device
    ) -> Config:
        """run: launches with a configuration, on buffers that may be written again and again.

        A configuration that the GPU has too few resources for is left out. Raises RuntimeError when none is left.
        """
        if device.type != "cuda" or len(configs) == 1 or torch.are_deterministic_algorithms_enabled():
            return configs[0]
        if key in self._best:
            return self._best[key]
        if torch.cuda.is_current_stream_capturing():
            return configs[0]  # not kept: while a graph is captured nothing can be timed
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        found: dict[str, float] = {}
        for config in configs:
            try:
                found[config.name] = float(
                    do_bench(lambda config=config: run(config), warmup=5, rep=25, return_mode="median")
                )
            except OutOfResources:
                continue
        if not found:
            raise RuntimeError(
                f"no configuration of {len(configs)} fits this GPU: {', '.join(c.name for c in configs)}"
            )
        self.times[key] = found
        fastest = min(found, key=lambda name: found[name])
        self._best[key] = next(config for config in configs if config.name == fastest)
        return self._best[key]


TUNER = Tuner()
