"""What perplexity costs with one block of the model in memory, beside the model held whole: peak memory and seconds.

    python tests/benchmarks/streaming.py --out results/bench

Random Llamas of 8 and 24 blocks, dense and as an artifact of 4 bits; each measurement is a process of its own, twice:
memory = "model" and memory = "block". Refuses to write a table in which the two figures differ. Writes streaming.json
and streaming.md, with what the same would take of a Llama of 7B parameters. Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evenbits.compressor import ModelShapes
from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.shapes import LLAMA2_7B, WIDTHS


@dataclass(frozen=True)
class Size:
    """A random Llama and how it is measured: `windows` of `context` tokens, `batch` at a time."""

    blocks: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    dtype: str
    context: int
    batch: int
    windows: int


SMALL = [Size(blocks, 512, 1408, 8192, 8, "float32", 256, 1, 12) for blocks in (8, 24)]
# blocks and tables of Llama-2-7B, but two blocks in place of 32
WIDE = [Size(2, 4096, 11008, 32000, 32, "bfloat16", 256, 1, 2)]


def build(folder: Path, size: Size) -> None:
    """A random model with the tokenizer of tiny models, and round-to-nearest at 4 bits of it."""
    import transformers

    from evenbits.models import guarded_randomness, torch_dtype
    from evenbits.plugins import load_plugins
    from evenbits.testing import compress_model, tiny_model, tiny_text

    base = tiny_model(folder / "dense")
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=size.context, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with guarded_randomness(0):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch_dtype(size.dtype))
    model.save_pretrained(base)
    del model
    rtn = load_plugins().compressors["rtn"].value
    options = rtn.options.model_validate({"bits": 4, "group_size": 128})
    compress_model(rtn, options, base, folder / "rtn", dtype=size.dtype)
    (folder / "text.txt").write_text(tiny_text(size.context * size.windows))
    (folder / "size.json").write_text(json.dumps(asdict(size)))


def resident(what: str) -> int:
    """Bytes of this process. VmHWM and not ru_maxrss: that one would begin with what the parent held."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(folder: Path, stored: str, memory: str) -> dict[str, Any]:
    """In a child: the figure, the seconds, and the peak above what the imports take."""
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401

    from evenbits.plugins import load_plugins
    from evenbits.subject import MeasuredModel

    size = Size(**json.loads((folder / "size.json").read_text()))
    registry = load_plugins()
    evaluator = registry.find("evaluators", "perplexity", "evaluator").value
    corpus = {"name": "text", "path": str(folder / "text.txt")}
    options = {"corpus": corpus, "context": size.context, "batch_size": size.batch, "memory": memory}
    made = evaluator.make(evaluator.options.model_validate(options))
    artifact = stored != "dense"
    subject = MeasuredModel(registry, folder / stored, artifact, size.dtype, torch.device("cpu"), 0, {})
    assert subject.tokenizer is not None
    before, begun, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
    found = made.evaluate(subject)[0]
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - worked,
        "peak_bytes": resident("VmHWM") - before,
        "imported_bytes": before,
        "perplexity": found.value,
        "losses": [float(item) for item in found.items],
        "facts": dict(subject.facts),
    }


def measure_all(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build(folder, size)
            for stored in ("dense", "rtn"):
                stored_bytes = sum(path.stat().st_size for path in (folder / stored).rglob("*.safetensors"))
                pair = []
                for memory in ("model", "block"):
                    command = [sys.executable, __file__, "--child", str(folder), stored, memory]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{stored}, {memory}: {done.stderr[-2000:]}")
                    found = json.loads(done.stdout.splitlines()[-1])
                    pair.append(found)
                    rows.append(
                        {**asdict(size), "stored": stored, "file_bytes": stored_bytes, "memory": memory, **found}
                    )
                whole, streamed = pair
                if whole["losses"] != streamed["losses"] or whole["facts"] != streamed["facts"]:
                    raise SystemExit(f"{size}, {stored}: the streamed figure differs")
    for row in rows:
        del row["losses"], row["facts"]
    return rows


def bill(shapes: ModelShapes, hidden: int, vocabulary: int, windows: int, context: int) -> dict[str, int]:
    """Bytes at the model's dtype: what streaming holds, part by part, against the whole model's weights.

    No process was measured: this is arithmetic on shapes. What a block computes with is of one window.
    """
    width = WIDTHS[shapes.layers[0].dtype]
    block = [layer for layer in shapes.layers if layer.block == 0]
    widest = max(layer.out_features for layer in block)
    return {
        "whole": shapes.stored_bytes,
        "block": width * sum(layer.weights for layer in block),
        "table": width * vocabulary * hidden,
        "one window": width * context * (6 * hidden + 3 * widest),
        "its logits": context * vocabulary * width,
        "hidden states": width * windows * context * hidden,
    }


def table(rows: list[dict[str, Any]], environment: Mapping[str, Any], date: str, *, wide: bool) -> str:
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    mib = 2**20
    lines = [
        f"# Perplexity with one block in memory\n\n{date}, commit {git['commit'][:12]}"
        f"{' (modified)' if git['dirty'] else ''}, {environment['processor']}, {environment['cores']} cores.\n"
        f"Written by `python tests/benchmarks/streaming.py{' --wide' if wide else ''} --out results/bench`.\n",
        "Random Llamas, one window at a time. Peak: above what the imports take. In each pair the losses of the "
        "windows are the same, bit for bit.\n",
        "| blocks x hidden | dtype | stored | files, MiB | memory | peak, MiB | seconds | of the CPU | perplexity |\n"
        "|---|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['blocks']} x {row['hidden']} | {row['dtype']} | {row['stored']} | {row['file_bytes'] / mib:.0f} | "
            f"{row['memory']} | {row['peak_bytes'] / mib:.0f} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
            f"{row['perplexity']:.4f} |"
        )
    parts = bill(LLAMA2_7B, 4096, 32000, 166, 2048)
    held = max(parts["block"] + parts["one window"], parts["table"] + parts["its logits"])
    lines.append(
        "\nLlama-2-7B at float16 on WikiText-2 (166 windows of 2048, one at a time), by arithmetic, GiB: "
        + ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items())
        + f". Streamed, the largest step of the dense model holds {held / 2**30:.2f}; the hidden states are more than "
        "1 GiB and so wait in a temporary file. An artifact takes what its method needs to decode the largest layer on "
        "top: for round-to-nearest, the difference of the streamed peaks of rtn and dense in a row of that width.\n"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wide", action="store_true", help="blocks as wide as Llama-2-7B's too: minutes, 3 GB of disk")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "STORED", "MEMORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, stored, memory = arguments.child
        print(json.dumps(measure(Path(folder), stored, memory)))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    rows = measure_all(SMALL + (WIDE if arguments.wide else []))
    environment = describe_environment()
    date = datetime.now(UTC).date().isoformat()
    text = table(rows, environment, date, wide=arguments.wide)
    written = {
        "date": date,
        "environment": environment,
        "rows": rows,
        "llama2_7b_bytes": bill(LLAMA2_7B, 4096, 32000, 166, 2048),
    }
    write_atomically(arguments.out / "streaming.json", json.dumps(written, indent=1).encode())
    write_atomically(arguments.out / "streaming.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
