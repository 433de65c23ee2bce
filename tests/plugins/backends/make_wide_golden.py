"""Makes golden/wide/: what bitsandbytes, HQQ, torchao and AutoRound store of two layers of a random model.

    python tests/plugins/backends/make_wide_golden.py --python bitsandbytes=PATH --python hqq=PATH ...

PATH is the interpreter of the environment that environments/NAME.txt declares. One layer has 64 columns and one 96, of
which bitsandbytes' blocks of 64 are no whole number. Each is made by the plugin's own worker; of its checkpoint the
config and these two layers are kept, and beside them the outputs of the library's own layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evenbits.shapes import read_inventory
from evenbits.testing import tiny_model, tiny_tokens
from evenbits_backends.adapter import WORKERS
from evenbits_backends.methods import descriptors

GOLDEN = Path(__file__).parent / "golden" / "wide"
PROBE_ROWS = 4
KEPT = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
MADE = {
    "bitsandbytes-nf4": ("bitsandbytes", {}),
    "bitsandbytes-double": ("bitsandbytes", {"type": "fp4", "double_quant": True}),
    "hqq-2": ("hqq", {"bits": 2, "group_size": 32}),
    "hqq-3": ("hqq", {"bits": 3, "group_size": 32}),
    "torchao-int8": ("torchao", {}),
    "torchao-intx3": ("torchao", {"kernel": "intx", "bits": 3, "group_size": 32, "symmetric": False}),
    "autoround-2": ("autoround", {"bits": 2, "group_size": 32, "iters": 2}),
    "autoround-asymmetric": ("autoround", {"bits": 2, "group_size": 32, "iters": 0, "symmetric": False}),
}


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
    probes = {f"probe/{w}": torch.randn(PROBE_ROWS, w, generator=torch.Generator().manual_seed(w)) for w in (64, 96)}
    tokens = tiny_tokens(model, samples=8, length=32)
    save_file({**probes, "tokens": tokens}, folder / "tensors.safetensors")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, WORKERS / f"{library}.py", folder], env=env, check=True)
    kept = GOLDEN / name
    kept.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "output" / "config.json").read_text())["quantization_config"]
    (kept / "config.json").write_text(json.dumps({"quantization_config": config}, indent=1, sort_keys=True) + "\n")
    stored = {n: t for file in (folder / "output").glob("*.safetensors") for n, t in load_file(file).items()}
    save_file({n: t for n, t in stored.items() if n.startswith(KEPT)}, kept / "model.safetensors")
    outputs = load_file(folder / "probes.safetensors")
    save_file({**{n: outputs[n] for n in KEPT}, **probes}, kept / "outputs.safetensors")
    facts = json.loads((folder / "result.json").read_text())
    (kept / "made.json").write_text(json.dumps({"options": given, **facts}, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--only", action="append", choices=sorted(MADE))
    arguments = parser.parse_args()
    pythons = dict(given.split("=", 1) for given in arguments.python)
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model(
            Path(scratch) / "model", "llama", seed=9, blocks=1, hidden=64, intermediate=96, dtype="float16"
        )
        GOLDEN.mkdir(parents=True, exist_ok=True)
        dense = load_file(model / "model.safetensors")
        save_file({name: dense[f"{name}.weight"] for name in KEPT}, GOLDEN / "dense.safetensors")
        for name in arguments.only or MADE:
            if MADE[name][0] in pythons:
                make(name, pythons[MADE[name][0]], model, Path(scratch))
                print(name, "made", flush=True)


if __name__ == "__main__":
    main()
