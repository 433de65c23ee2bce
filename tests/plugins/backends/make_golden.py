"""Makes the golden checkpoints of golden/: what the real libraries store of one small random block, and their outputs.

    python tests/plugins/backends/make_golden.py --python gptqmodel=PATH --python llmcompressor=PATH ...

PATH is the interpreter of the environment that environments/NAME.txt declares. Each is made by the plugin's own worker
on a seeded random model; of its checkpoint the config and the block's tensors are kept, not the embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evenbits.shapes import read_inventory
from evenbits.testing import tiny_model, tiny_tokens
from evenbits_backends.adapter import WORKERS
from evenbits_backends.methods import descriptors

GOLDEN = Path(__file__).parent / "golden"
DENSE = GOLDEN / "dense"  # the model that all are made of
PROBE_ROWS = 2
MADE = {
    "gptqmodel-4": ("gptqmodel", {"bits": 4, "group_size": 32}),
    "gptqmodel-3": ("gptqmodel", {"bits": 3, "group_size": 32, "symmetric": False, "desc_act": True}),
    "llmcompressor-rtn": ("llmcompressor", {"algorithm": "rtn", "bits": 4, "group_size": 16}),
    "llmcompressor-gptq": ("llmcompressor", {"algorithm": "gptq", "bits": 3, "group_size": 32, "damping": 0.5}),
    "llmcompressor-awq": ("llmcompressor", {"algorithm": "awq", "group_size": 32, "symmetric": False}),
    "autoawq": ("autoawq", {"group_size": 32, "clip": False}),
}


def make_model(folder: Path) -> Path:
    return tiny_model(folder, "llama", seed=9, blocks=1, hidden=64, intermediate=64, dtype="float16")


def make(name: str, python: str, model: Path, work: Path) -> None:
    library, given = MADE[name]
    options = next(one for one in descriptors() if one.name == library).options.model_validate(given)
    shapes = read_inventory(model).shapes("float32")
    folder = work / name
    (folder / "output").mkdir(parents=True)
    request = {
        "model": str(model), "dtype": "float32", "device": "cpu", "seed": 0, "options": options.model_dump(mode="json"),
        "layers": [layer.name for layer in shapes.layers],
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    probe = torch.randn(PROBE_ROWS, 64, generator=torch.Generator().manual_seed(64))
    tokens = tiny_tokens(model, samples=16, length=32)
    save_file({"probe/64": probe, "tokens": tokens}, folder / "tensors.safetensors")
    env = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, WORKERS / f"{library}.py", folder], env=env, check=True)
    kept = GOLDEN / name
    kept.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "output" / "config.json").read_text())["quantization_config"]
    config.pop("meta", None)  # names folders of the machine
    (kept / "config.json").write_text(json.dumps({"quantization_config": config}, indent=1, sort_keys=True) + "\n")
    stored = {n: t for file in (folder / "output").glob("*.safetensors") for n, t in load_file(file).items()}
    save_file({n: t for n, t in stored.items() if ".layers." in n}, kept / "model.safetensors")
    outputs = load_file(folder / "probes.safetensors")
    save_file({**outputs, "probe": probe}, kept / "outputs.safetensors")
    facts = json.loads((folder / "result.json").read_text())
    (kept / "made.json").write_text(json.dumps({"options": given, **facts}, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--only", action="append", choices=sorted(MADE))
    arguments = parser.parse_args()
    pythons = dict(given.split("=", 1) for given in arguments.python)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model")
        DENSE.mkdir(parents=True, exist_ok=True)
        for part in ("config.json", "model.safetensors"):
            shutil.copyfile(model / part, DENSE / part)
        for name in arguments.only or MADE:
            if MADE[name][0] in pythons:
                make(name, pythons[MADE[name][0]], model, Path(scratch))
                print(name, "made")


if __name__ == "__main__":
    main()
