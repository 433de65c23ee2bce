"""One decoder block of Llama-2-7B's shapes, compressed as a stream: seconds, and memory at most.

    python tests/benchmarks/block7b.py --out results/bench [--epochs 1]

Random float16 weights in safetensors (deviation 0.02), data-free, one process a recipe. The paper's recipe at d = 8 and
K = 2^15 trains 50 epochs; the benchmark runs `--epochs` of them and scales that share of the time, which is nearly all
of it. Ours runs whole. Writes block7b.json and block7b.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.plugins import load_plugins

BLOCKS = 32
PAPER_EPOCHS = 50
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper", "d": 8, "codebook_size": 1 << 15, "row_scales": True},
    "evenbits": {"recipe": "evenbits", "feedback": False},
}


def write_block(folder: Path) -> None:
    """A Llama of one block, with a small vocabulary: what is measured are its seven matrices."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, vocab_size=64,
        torch_dtype="float16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    sizes = {f"self_attn.{x}_proj": (4096, 4096) for x in "qkvo"}
    sizes |= {"mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}
    tensors = {
        f"model.layers.0.{name}.weight": (0.02 * torch.randn(*size, generator=generator)).half()
        for name, size in sizes.items()
    }
    for name in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(4096, dtype=torch.float16)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.zeros(64, 4096, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def compress(settings: dict[str, Any], model: str, folder: str) -> dict[str, Any]:
    """In a process of its own, so that its peak is its own."""
    from evenbits.testing import compress_model

    descriptor = load_plugins().compressors["pocketllm"].value
    options: Any = descriptor.options.model_validate(settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wall, cpu = time.perf_counter(), time.process_time()
    manifest = compress_model(descriptor, options, Path(model), Path(folder), dtype="float16")
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "before_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "error": sum(layer.error for layer in manifest.layers) / len(manifest.layers),
        "epochs": options.epochs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1, help="of the paper's fifty")
    arguments = parser.parse_args()
    RECIPES["paper"]["epochs"] = arguments.epochs
    spawn = multiprocessing.get_context("spawn")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "block"
        model.mkdir()
        write_block(model)
        for recipe, settings in RECIPES.items():
            with spawn.Pool(1) as pool:
                found[recipe] = pool.apply(compress, (settings, str(model), str(Path(name) / recipe)))
            print(recipe, found[recipe], flush=True)
    environment = describe_environment()
    date = datetime.now(UTC).date().isoformat()
    lines = [
        "| recipe | wall s | CPU s | memory at most | a whole block | 32 blocks |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for recipe, run in found.items():
        times = PAPER_EPOCHS / run["epochs"] if recipe == "paper" else 1.0
        block = run["cpu_seconds"] * times
        lines.append(
            f"| {recipe} | {run['seconds']:.0f} | {run['cpu_seconds']:.0f} | {run['peak_bytes'] / 2**30:.2f} GiB | "
            f"{block / 3600:.2f} CPU hours | {BLOCKS * block / 3600:.1f} CPU hours |"
        )
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    text = (
        f"# A block of Llama-2-7B's shapes\n\n{date}, commit {git['commit'][:12]}"
        f"{' (modified)' if git['dirty'] else ''}, {environment['processor']}, {torch.get_num_threads()} threads.\n"
        "Written by `python tests/benchmarks/block7b.py --out results/bench`. Seven matrices, 202 million weights,\n"
        f"data-free; paper: d = 8, K = 2^15, row scales, {arguments.epochs} of {PAPER_EPOCHS} epochs run, the time "
        "scaled to all;\n"
        "evenbits: 2 bits, without error feedback (there are no inputs), whole.\n\n" + "\n".join(lines) + "\n"
    )
    row = {"date": date, "environment": environment, "recipes": found}
    write_atomically(arguments.out / "block7b.json", json.dumps(row, indent=1).encode())
    write_atomically(arguments.out / "block7b.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
