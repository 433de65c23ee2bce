"""How fast packed layers are on this CPU against dense ones, and what they hold.

    python tests/benchmarks/packed.py --out results/bench

Layers of Llama-2-7B's shapes with random codes, by evenbits.kernels.cpu_integer and cpu_codebook, against torch's dense
product in float32 and bfloat16. A round computes each layer once, dense ones first, so that no weight is still in a
cache when its turn comes again; figures are medians over the rounds. Inputs are float32, and bfloat16 for dense
bfloat16. Then a whole random Llama of 57 million weights in linear layers, restored and packed, each in a process of
its own: memory and tokens per second. Writes packed.json and packed.md; some two minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.kernels import cpu_codebook, cpu_integer
from evenbits.kernels.weights import CodebookWeight, IntegerWeight, Stream

SHAPES = ((4096, 4096), (11008, 4096))  # (out, in)
ROUNDS = {1: 21, 4: 11, 16: 7, 256: 3}  # by number of inputs
COLUMNS = ("1 input", *(f"{count} inputs" for count in ROUNDS if count > 1))
DECODING = "decode"
# linear layers of Llama-2-7B: 32 blocks of four square ones, gate, up and down
MODEL_WEIGHTS = 32 * (4 * 4096 * 4096 + 3 * 11008 * 4096)
OUTSIDE_BYTES = 2 * 32000 * 4096 * 2  # embedding and head, in 16 bits

Layer = tuple[Callable[[Tensor], Tensor], int]  # and the bytes it holds


def random_bytes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)


def integer_layer(out: int, columns: int, bits: int, generator: torch.Generator) -> Layer:
    groups = columns // 128
    weight = IntegerWeight(
        random_bytes(out * columns * bits // 8, generator),
        (torch.rand(out, groups, generator=generator) / 100).half(),
        bits, out, columns, 128,
        torch.randint(1 << bits, (out, groups), generator=generator, dtype=torch.uint8),
    )  # fmt: skip
    assert weight.zero is not None
    prepared = cpu_integer.prepare(weight)
    held = weight.codes.numel() + 2 * weight.scale.numel() + weight.zero.numel() + prepared.extra_bytes
    return lambda rows: cpu_integer.multiply(prepared, rows), held


def level_layer(out: int, columns: int, generator: torch.Generator) -> Layer:
    levels = torch.randn(16, generator=generator).sort().values
    scale = torch.rand(out, columns // 64, generator=generator) / 100
    codes = random_bytes(out * columns // 2, generator)
    prepared = cpu_integer.prepare(IntegerWeight(codes, scale, 4, out, columns, 64, levels=levels))
    held = codes.numel() + 4 * scale.numel() + 4 * levels.numel() + prepared.extra_bytes
    return lambda rows: cpu_integer.multiply(prepared, rows), held


def codebook_layer(
    out: int, columns: int, generator: torch.Generator, *, d: int, bits: int, axis: Any = "in", streams: int = 1,
    window: int | None = None, row_scale: bool = True,
) -> Layer:  # fmt: skip
    length = columns if axis == "in" else out
    vectors = out * columns // length * -(-length // d)
    codes = random_bytes((vectors * streams * bits + 7) // 8, generator)
    # 16 bits as codebooks are stored; a table that a decoder computes is float32
    books = torch.randn(streams, 1 << (window or bits), d, generator=generator) / 100
    books = books if window or bits > 12 else books.half()
    parts = tuple(
        Stream(codes, books[i : i + 1], bits, stride=streams, offset=i, window=window) for i in range(streams)
    )
    scale = torch.rand(out, generator=generator) if row_scale else None
    prepared = cpu_codebook.prepare(CodebookWeight(parts, out, columns, d, axis, row_scale=scale))
    held = codes.numel() + books.numel() * books.element_size() + (4 * out if row_scale else 0) + prepared.extra_bytes
    return lambda rows: cpu_codebook.multiply(prepared, rows), held


def make_layers(out: int, columns: int) -> Iterator[tuple[str, Layer]]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(out, columns, generator=generator) / 100
    narrow = dense.to(torch.bfloat16)
    yield "dense float32", (lambda rows: rows @ dense.t(), 4 * dense.numel())
    yield "dense bfloat16", (lambda rows: rows.to(torch.bfloat16) @ narrow.t(), 2 * dense.numel())
    for bits in (2, 3, 4):
        yield f"integer, {bits} bits, groups of 128", integer_layer(out, columns, bits, generator)
    yield "levels (NF4), 4 bits, groups of 64", level_layer(out, columns, generator)
    yield "k-means, 2^8 x 4", codebook_layer(out, columns, generator, d=4, bits=8)
    yield "AQLM, 2 of 2^8 x 8", codebook_layer(out, columns, generator, d=8, bits=8, streams=2)
    folded: dict[str, Any] = {"d": 8, "bits": 15, "axis": "out", "row_scale": False}
    yield "PocketLLM folded, 2^15 x 8", codebook_layer(out, columns, generator, **folded)
    for window in (12, 16):
        layer = codebook_layer(out, columns, generator, d=1, bits=2, axis="out", window=window)
        yield f"PocketLLM's windows of {window} bits", layer


def seconds_of(function: Callable[[Tensor], Tensor], rows: Tensor, threads: int) -> float:
    """With one thread what that thread was running, which others on the machine do not add to; else by the clock."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begun = clock()
    function(rows)
    return clock() - begun


def measure_shape(out: int, columns: int, rounds: float) -> dict[str, Any]:
    """{layer: {"held_bytes", "seconds": {threads: {inputs or "decode": median}}}}."""
    layers = dict(make_layers(out, columns))
    found: dict[str, Any] = {
        name: {"held_bytes": held, "seconds": {1: {}, 2: {}}} for name, (_, held) in layers.items()
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for count in (0, *ROUNDS):
            rows = torch.randn(count, columns)
            # without inputs a packed layer decodes its weight and no more
            chosen = {name: one for name, one in layers.items() if count or not name.startswith("dense")}
            timings: dict[str, list[float]] = {name: [] for name in chosen}
            for number in range(1 + max(2, round(rounds * ROUNDS.get(count, 9)))):
                for name, (multiply, _) in chosen.items():
                    seconds = seconds_of(multiply, rows, threads)
                    if number:  # the first compiles, or reads what was compiled
                        timings[name].append(seconds)
            for name, times in timings.items():
                found[name]["seconds"][threads][count or DECODING] = statistics.median(times)
    return found


def measure_copy(threads: int) -> float:
    """Bytes per second, read and written together."""
    torch.set_num_threads(threads)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    times = [seconds_of(target.copy_, source, threads) for _ in range(8)]
    return 2 * source.numel() * 4 / statistics.median(times[1:])


# A whole model, in a child of its own


@dataclass(frozen=True)
class Case:
    method: str
    dtype: str
    weights: Literal["restored", "packed"]


CASES = (
    Case("rtn", "float32", "restored"), Case("rtn", "float32", "packed"), Case("nf4", "float32", "packed"),
    Case("rtn", "bfloat16", "restored"), Case("rtn", "bfloat16", "packed"),
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"rtn": {"bits": 4, "group_size": 128}, "nf4": {}}
BLOCKS, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 768, 2048, 4096
PROMPT, NEW = 256, 32


def build_models(folder: Path) -> None:
    import transformers

    from evenbits.models import guarded_randomness
    from evenbits.plugins import load_plugins
    from evenbits.testing import compress_model, tiny_model

    base = tiny_model(folder / "dense")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with guarded_randomness(0):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    del model
    for method, dtype in sorted({(case.method, case.dtype) for case in CASES}):
        descriptor = load_plugins().compressors[method].value
        options = descriptor.options.model_validate(OPTIONS[method])
        compress_model(descriptor, options, base, folder / f"{method}-{dtype}", dtype=dtype)


def resident(what: str) -> int:  # VmHWM and not ru_maxrss: that one would begin with what the parent held
    return 1024 * int(re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def measure_model(folder: Path, case: Case) -> dict[str, Any]:
    """In a child, on one thread: what opening and running takes above the imports."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import evenbits
    import evenbits.kernels.cpu_codebook
    import evenbits.testing.stored
    from evenbits.packed import kernels_of
    from evenbits.plugins import load_plugins

    load_plugins()
    torch.set_num_threads(1)
    begun, clear = resident("VmRSS"), Path("/proc/self/clear_refs")
    clear.write_text("5")  # the highest mark becomes what is in use now
    model = evenbits.load(folder / f"{case.method}-{case.dtype}", weights=case.weights)
    opened_peak, opened = resident("VmHWM") - begun, resident("VmRSS") - begun
    tokens = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        model(input_ids=tokens[:, :5])  # compiles, or reads what was compiled
        model(input_ids=tokens[:, :1])
        clear.write_text("5")
        clock = time.thread_time()
        found = model(input_ids=tokens, use_cache=True)
        seconds["prefill"] = time.thread_time() - clock
        first = found.logits[0, -1].float()
        clock = time.thread_time()
        for _ in range(NEW):
            token = found.logits[:, -1:].argmax(-1)
            found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
        seconds["decode"] = time.thread_time() - clock
    kernels = kernels_of(model)
    return {
        "opened_bytes": opened, "opening_peak_bytes": opened_peak, "running_peak_bytes": resident("VmHWM") - begun,
        "prefill_tokens_per_second": PROMPT / seconds["prefill"], "decode_tokens_per_second": NEW / seconds["decode"],
        "ran": None if kernels is None else kernels.facts({"decode": 1}), "logits": first.tolist(),
    }  # fmt: skip


def measure_models() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        build_models(Path(name))
        for case in CASES:
            command = [sys.executable, __file__, "--out", name, "--child", *asdict(case).values()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{case}: {done.stderr[-2000:]}")
            found.append({**asdict(case), **json.loads(done.stdout.splitlines()[-1])})
            print(f"{case} measured", flush=True)
    restored: dict[tuple[str, str], torch.Tensor] = {}
    for row in found:  # the restored model of a method and dtype stands before the packed one
        logits = torch.tensor(row.pop("logits"))
        expected = restored.setdefault((row["method"], row["dtype"]), logits)
        row["off"] = float((logits - expected).norm() / expected.norm())
        if not row["off"] < (1e-4 if row["dtype"] == "float32" else 0.05):
            raise SystemExit(f"{row['method']}, {row['dtype']}, {row['weights']}: logits {row['off']:.2g} off")
    return found


def render_models(rows: list[dict[str, Any]]) -> list[str]:
    weights = BLOCKS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    lines = [
        "## A whole small model, on one thread",
        "",
        f"A random Llama: {BLOCKS} blocks of width {HIDDEN}, {weights / 1e6:.0f} million weights in linear layers and "
        f"{2 * VOCABULARY * HIDDEN / 1e6:.1f} million in embedding and head, which stay dense. `evenbits.load` of one "
        "artifact, restored or packed, each in a process of its own; memory is what it grew by since its imports. Of "
        f"running packed, some 64 MB are numba's, whatever the model. {PROMPT} tokens, then {NEW} with a cache. Off: "
        "the relative distance of the prompt's last logits from the restored model's.",
        "",
        "| model | weights | MB opened | MB, peak opening | MB, peak running | prompt, tokens/s | decode, tokens/s "
        "| off | computed by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[f'{what}_bytes'] / 1e6:.0f}" for what in ("opened", "opening_peak", "running_peak"))
        rates = f"{row['prefill_tokens_per_second']:.0f} | {row['decode_tokens_per_second']:.1f}"
        off = f"{row['off']:.1e}" if row["off"] else ""
        ran = row["ran"]["phases"]["decode"]["ran"] if row["ran"] else []
        by = ", ".join(f"{one['kernel']} ({one['layers']} layers)" for one in ran) or "torch, dense"
        lines.append(f"| {row['method']}, {row['dtype']} | {row['weights']} | {sizes} | {rates} | {off} | {by} |")
    return [*lines, ""]


def render(result: dict[str, Any]) -> str:
    facts = result["environment"]
    commit = (facts["git"] or {}).get("commit", "no git")[:12]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# Packed layers on a CPU",
        "",
        f"{result['date']}, commit {commit}{' (modified)' if (facts['git'] or {}).get('dirty') else ''}, "
        f"{facts['processor']}, {facts['cores']} cores, {versions}. "
        "Written by `python tests/benchmarks/packed.py --out results/bench`.",
        "",
        f"Load average {result['load'][0]:.1f} before and {result['load'][1]:.1f} after: "
        f"{_quiet(result['load'], facts['cores'])} All took {result['seconds']:.0f} s. Times of one thread are what "
        "that thread ran; of two, by the clock, so these suffer most from others. Layers take turns, and ratios are of "
        "medians over the rounds. Layers are prepared once: books in float32 and tables made then count as held.",
        "",
        f"A copy moves {result['copy'][1] / 1e9:.1f} GB/s on one thread and {result['copy'][2] / 1e9:.1f} on two, read "
        "and written together. Bound: all that a layer holds, at that rate, over the time of dense float32 with one "
        "input: about what memory alone would allow.",
        "",
    ]
    for threads in (1, 2):
        for shape, layers in result["shapes"].items():
            lines += [
                f"## {shape}, {threads} thread{'s' if threads > 1 else ''}",
                "",
                "Time over that of dense float32 with as many inputs; in brackets over dense bfloat16's.",
                "",
                "| layer | MB held | bits a weight | " + " | ".join(COLUMNS)
                + " | bound, 1 input | decoded, 10^9 weights/s |",
                "|---|---|---|" + "---|" * (len(ROUNDS) + 2),
            ]  # fmt: skip
            lines += [_row(name, layers, threads, shape, result["copy"][threads]) for name in layers]
            lines.append("")
    lines += [
        "## Dense float32 and bfloat16, in milliseconds",
        "",
        "| shape | threads | layer | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(ROUNDS),
    ]
    for shape, layers in result["shapes"].items():
        for threads in (1, 2):
            for name in ("dense float32", "dense bfloat16"):
                times = layers[name]["seconds"][threads]
                cells = " | ".join(f"{1e3 * times[count]:.2f}" for count in ROUNDS)
                lines.append(f"| {shape} | {threads} | {name} | {cells} |")
    lines += [
        "",
        "## A whole Llama-2-7B",
        "",
        f"Its {MODEL_WEIGHTS / 1e9:.2f} billion weights of linear layers at the bytes that the larger shape holds, and "
        f"{OUTSIDE_BYTES / 1e9:.2f} GB of embedding and head in 16 bits; caches and activations come on top, in either "
        "case.",
        "",
        "| layer | GB |",
        "|---|---|",
    ]
    largest = max(result["shapes"], key=_weights)
    for name, row in result["shapes"][largest].items():
        total = row["held_bytes"] / _weights(largest) * MODEL_WEIGHTS + OUTSIDE_BYTES
        lines.append(f"| {name} | {total / 1e9:.2f} |")
    lines += ["", *render_models(result["models"])]
    return "\n".join(lines).rstrip() + "\n"


def _quiet(load: list[float], cores: int) -> str:
    busy = "the machine was busy with other things: ratios of two threads say little."
    return busy if load[0] >= cores / 2 else "the machine was quiet when this began."


def _weights(shape: str) -> int:
    out, columns = shape.split(" x ")
    return int(out) * int(columns)


def _row(name: str, layers: dict[str, Any], threads: int, shape: str, copy: float) -> str:
    row, weights = layers[name], _weights(shape)
    times, dense, narrow = (layers[which]["seconds"][threads] for which in (name, "dense float32", "dense bfloat16"))
    ratios = [f"{times[count] / dense[count]:.2f} ({times[count] / narrow[count]:.2f})" for count in ROUNDS]
    bound = row["held_bytes"] / copy / dense[1]
    rate = f"{weights / times[DECODING] / 1e9:.2f}" if DECODING in times else ""
    held = f"{row['held_bytes'] / 1e6:.1f} | {8 * row['held_bytes'] / weights:.2f}"
    return f"| {name} | {held} | {' | '.join(ratios)} | {bound:.2f} | {rate} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for packed.json and packed.md")
    parser.add_argument("--rounds", type=float, default=1.0, help="times the usual number of rounds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_model(arguments.out, Case(*arguments.child))))
        return
    begun = time.perf_counter()
    load = [os.getloadavg()[0]]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "versions": {name: version(name) for name in ("torch", "numba", "llvmlite")},
        "copy": {threads: measure_copy(threads) for threads in (1, 2)},
        "shapes": {},
    }
    for out, columns in SHAPES:
        result["shapes"][f"{out} x {columns}"] = measure_shape(out, columns, arguments.rounds)
        print(f"{out} x {columns} measured", flush=True)
    result["models"] = measure_models()
    result["seconds"] = time.perf_counter() - begun
    result["load"] = [*load, os.getloadavg()[0]]
    write_atomically(arguments.out / "packed.json", (json.dumps(result) + "\n").encode())
    rendered = render(result)
    write_atomically(arguments.out / "packed.md", rendered.encode())
    print(rendered)


if __name__ == "__main__":
    main()
