"""What every test relies on: no network, one thread, the measurement data where it is."""

from __future__ import annotations

import os
import signal

# a shell starts what runs in the background with Ctrl-C ignored, and so would every process that a test stops by it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# before anything imports huggingface_hub, mlflow or OpenMP: each reads its variable once, at import
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "1"
# Triton kernels run in its interpreter, on CPU tensors; tests/kernels/compile.py compiles them in a process of its own
os.environ["TRITON_INTERPRET"] = "1"
# sums in a fixed order whatever the machine, and no spinning threads on tensors this small
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = ["tutorial"]  # a project of its own: test_own_plugins.py installs it and runs its tests


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real small models, text and tasks; it is not part of the repository."""
    folder = Path(os.environ.get("EVENBITS_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not (folder / "models").is_dir():
        pytest.skip(f"no measurement data at {folder}: set EVENBITS_DATA to the folder that holds models/ and text/")
    return folder
