"""Exports opened by the libraries whose formats they are, where their environments are made (`evenbits env create`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.harness.exported import REGISTRY, TOKENS, logits, make_artifact

from evenbits import load
from evenbits.environment_files import find_environment
from evenbits.environments import find
from evenbits.errors import SuiteError
from evenbits.export import export

COMPRESSED = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(torch.arange(1, 24)[None]).logits.clone()}, sys.argv[2])
"""
GPTQ = """
import os, sys, torch
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
with torch.no_grad():
    save_file({"logits": model(torch.arange(1, 24)[None]).logits.float().clone()}, sys.argv[2])
"""


def library_logits(environment: str, code: str, folder: Path) -> torch.Tensor:
    try:
        made = find(find_environment("evenbits_backends", environment))
    except SuiteError as error:
        pytest.skip(str(error))
    if made is None:
        pytest.skip(f"environment {environment!r} is not made here: evenbits env create {environment}")
    assert torch.equal(TOKENS, torch.arange(1, 24)[None])
    out = folder.with_name(f"{folder.name}-logits")
    done = subprocess.run(
        [made.python, "-c", code, folder, out], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: torch.Tensor = load_file(out)["logits"]
    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_computes_the_same_bits(tmp_path: Path, symmetric: bool) -> None:
    options = {"bits": 3 if symmetric else 4, "group_size": 64, "symmetric": symmetric}
    source = make_artifact(tmp_path, "rtn", options, dtype="float16" if symmetric else "float32")
    done = export(source, "compressed-tensors", tmp_path / "out", REGISTRY)
    assert torch.equal(library_logits("llmcompressor", COMPRESSED, done.folder), logits(load(source)))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_gptqmodel_computes_nearly_the_same(tmp_path: Path, method: str) -> None:
    options = {"bits": 3, "group_size": 32} if method == "rtn" else {"bits": 4, "group_size": 32, "act_order": True}
    source = make_artifact(tmp_path, method, options)
    done = export(source, "gptq", tmp_path / "out", REGISTRY)
    expected = logits(load(source))
    found = library_logits("gptqmodel", GPTQ, done.folder)
    # it computes in float16 or bfloat16 alone
    assert float((found - expected).norm() / expected.norm()) < 0.01
