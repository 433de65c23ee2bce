"""What a result was obtained with: versions, git state, hardware. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "evenbits",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "faiss-cpu",
    "numba",
    "triton",
)


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def describe_environment() -> dict[str, Any]:
    """JSON facts; git describes the evenbits checkout that runs, None where it is not one."""
    import psutil

    here = Path(__file__).parent
    commit = _git("rev-parse", "HEAD", folder=here)
    return {
        "versions": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "git": None
        if commit is None
        else {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", folder=here))},
    }
