"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, in a process that does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="pip install 'evenbits[kernels]' for the Triton kernels")

# configurations that are known to spill, and why they are kept; everything else must stay in registers
SPILLS: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def compiled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the command of results/bench says of each kernel, configuration, case and architecture."""
    out = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(out / "cache")
    command = [sys.executable, str(root / "tests/kernels/compile.py"), "--brief", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert (out / "kernels.json").is_file(), done.stderr
    rows: list[dict[str, Any]] = json.loads((out / "kernels.json").read_text())["kernels"]
    return rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_compile_for_both_architectures(compiled: list[dict[str, Any]]) -> None:
    failed = [
        f"{row['kernel']} {row['case']} {row['config']} sm_{row['arch']}: {row['error']}"
        for row in compiled
        if row["error"] is not None
    ]
    assert not failed, "\n".join(failed)
    assert {row["arch"] for row in compiled} == {80, 90}
    assert {"nearest", "integer", "codebook", "pocket"} <= {row["kernel"].split("-")[0] for row in compiled}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_kernel_spills_but_those_known_to(compiled: list[dict[str, Any]]) -> None:
    spilling = {
        (row["kernel"], row["config"]): row["spilled_bytes"]
        for row in compiled
        if row["spilled_bytes"] and (row["kernel"], row["config"]) not in SPILLS
    }
    assert not spilling, f"bytes spilled by kernel and configuration: {spilling}"


def test_each_configuration_has_a_name_of_its_own(root: Path) -> None:
    """Names are what reports and `choice` show; they must tell tile choices apart."""
    import importlib

    sys.path.insert(0, str(root / "tests/kernels"))
    try:
        script = importlib.import_module("compile")  # beside this file
    finally:
        sys.path.pop(0)
    for module in script.modules():
        for kernel in importlib.import_module(module).KERNELS:
            names = [config.name for config in kernel.configs]
            assert len(set(names)) == len(names) <= 5, f"{kernel.name}: {names}"
            assert kernel.cases, f"{kernel.name}: nothing is compiled for it"
