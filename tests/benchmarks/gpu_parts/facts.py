"""What a run was made with: commit, sources, machine, versions and clocks; "unknown" rather than missing."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_SOURCES = (
    "harness/evenbits/kernels",
    "harness/evenbits/maths",
    "plugins/evenbits_pocketllm",
    "tests/benchmarks/gpu_parts",
)
_ASKED = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def _said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    return _said("git", "rev-parse", "HEAD") or "unknown"


def source_digest() -> str:
    """SHA-256 over what is measured and what measures; tells modified trees of one commit apart, also without git."""
    digest = hashlib.sha256()
    paths = [ROOT / "tests/benchmarks/gpu.py"]
    for folder in _SOURCES:
        paths += sorted((ROOT / folder).rglob("*.py"))
    for path in paths:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def smi() -> dict[str, str]:
    """Name, driver, clocks in MHz, watts and degrees as nvidia-smi has them now; nothing where it does not answer."""
    said = _said("nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits")
    if not said:
        return {}
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(_ASKED.split(","), values, strict=False))


def machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "device": device,
        "gpu": "none",
        "driver": smi().get("driver_version", "unknown"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cores": os.cpu_count(),
    }
    for name in ("triton", "transformers", "numpy"):
        found[name] = _version(name)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": int(properties.L2_cache_size),
            "memory_bytes": int(properties.total_memory),
        }
    return found


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def paths() -> list[str]:
    """What must stand on sys.path: evenbits need not be installed."""
    return [str(ROOT / "harness"), str(ROOT / "plugins"), str(ROOT / "tests" / "benchmarks")]


def add_paths() -> None:
    sys.path[:0] = [path for path in paths() if path not in sys.path]
