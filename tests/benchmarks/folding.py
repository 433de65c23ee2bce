"""What folding PocketLLM's decoders into one table costs: the weights in dB and the model's perplexity, by recipe.

    python tests/benchmarks/folding.py --out results/bench

Compresses the reference model by each recipe, then decodes it exactly and by every kind of folded table. The weights
measured are those that `PocketLinear` computes with. Writes folding.json (every layer's figures) and folding.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.artifact import Artifact
from evenbits.compressor import PackedLayer, Refusal, Shared
from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.maths.hessian import relative_error
from evenbits.measure import Text
from evenbits.models import load_tokenizer, open_model, read_weight
from evenbits.sampling import sample_windows
from evenbits.shapes import Inventory, read_inventory
from evenbits.testing import compress_model
from evenbits_perplexity.evaluator import PerplexityEvaluator
from evenbits_perplexity.options import PerplexityOptions
from evenbits_pocketllm import provide_compressors, scales
from evenbits_pocketllm.compressor import PocketCompressor
from evenbits_pocketllm.folding import Folded, decibels, fold
from evenbits_pocketllm.groups import PackedCodes, exact_table, load_decoder
from evenbits_pocketllm.linear import PocketLinear
from evenbits_reference import FOLDER
from evenbits_reference.corpus import read_reference
from evenbits_reference.options import ReferenceOptions

# trained for seconds on matrices of 12 to 98 thousand weights, where the papers' settings would take a few steps
SMALL: dict[str, Any] = {
    "d": 2, "codebook_size": 256, "batch": 512, "learning_rate": 8e-3, "schedule": "cosine", "revive": True,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "evenbits, 2 bits": {"recipe": "evenbits"},
    "paper": {"recipe": "paper", **SMALL},
    "paper along the inputs": {"recipe": "paper", **SMALL, "axis": "in"},
    "code": {"recipe": "code", **SMALL},
    "code without affine": {"recipe": "code", **SMALL, "affine": False},
    # over two numbers it would leave their signs alone
    "layernorm, d = 4": {"recipe": "paper", **SMALL, "d": 4, "rln": "layernorm"},
}
FOLDS: tuple[tuple[Any, Any], ...] = tuple(
    (how, rescale) for how in ("mean", "fitted") for rescale in ("none", "gain", "gain and offset", "by number")
)
CALIBRATION, LENGTH, CONTEXT = 32, 256, 256


@dataclass
class Opened:
    """What the evaluator of perplexity needs to know of a model."""

    model: nn.Module
    tokenizer: Any
    text: Text
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        return self.text

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        return lambda steps: None


def measure_perplexity(subject: Opened) -> float:
    options = PerplexityOptions(corpus={"name": "reference"}, context=CONTEXT, windows="documents", batch_size=32)
    (found,) = PerplexityEvaluator(options).evaluate(subject)
    return found.value


@dataclass
class Decoded:
    """One layer under one way of decoding; `linear` None, and the reason, where there is no such way."""

    linear: PocketLinear | Refusal
    seconds: float


def decode_layer(
    compressor: PocketCompressor, packed: PackedLayer, shape: Any, shared: Shared | None, how: Any, rescale: Any
) -> Decoded:
    """how: "exact", or that of `fold`."""
    settings = compressor.options.of(shape)
    assert settings is not None
    coder = compressor._coder(settings, packed, shape, shared)
    begun = time.perf_counter()
    folded: Folded | Refusal | None = None
    if how != "exact" and exact_table(settings, shape, coder, torch.device("cpu")) is None:
        rows = scales.read(packed.tensors, settings.scale_bits, shape.out_features) if settings.row_scales else None
        codes = PackedCodes(packed.tensors["codes"], settings, shape)
        folded = fold(load_decoder(codes, coder), how, rescale, rows)
        if isinstance(folded, Refusal):
            return Decoded(folded, time.perf_counter() - begun)
    assert not isinstance(folded, Refusal)
    linear = PocketLinear(packed, shape, settings, coder, folded=folded)
    return Decoded(linear, time.perf_counter() - begun)


def weight_of(linear: PocketLinear) -> Tensor:
    """(out, in): what the layer makes of unit vectors."""
    return linear(torch.eye(linear.layer.in_features)).t()  # type: ignore[no-any-return]


def ways() -> Iterator[tuple[str, Any, Any]]:
    yield "exact", "exact", "none"
    for how, rescale in FOLDS:
        yield f"{how}, {rescale}" if rescale != "none" else how, how, rescale


def measure(
    name: str, options: Mapping[str, Any], subject: Opened, base: Path, tokens: Tensor, inventory: Inventory
) -> dict[str, Any]:
    (descriptor,) = provide_compressors()
    settings = descriptor.options.model_validate(options)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        compress_model(descriptor, settings, base, Path(folder) / "artifact", tokens=tokens)
        seconds = time.perf_counter() - begun
        artifact = Artifact(Path(folder) / "artifact")
        layers = [(stored.shape, packed) for stored, packed in artifact.packed()]
        shared = artifact.shared
        compressor = descriptor.make(settings)
        assert isinstance(compressor, PocketCompressor)
        dense = {layer.name: read_weight(tensor, inventory.architecture) for layer, tensor in inventory.layers}
        exact: dict[str, Tensor] = {}
        rows: dict[str, Any] = {}
        for way, how, rescale in ways():
            row: dict[str, Any] = {"layers": {}, "load_seconds": 0.0, "held_bytes": 0}
            signal = noise = 0.0
            for shape, packed in layers:
                decoded = decode_layer(compressor, packed, shape, shared, how, rescale)
                if isinstance(decoded.linear, Refusal):
                    row = {"refused": decoded.linear.reason}
                    break
                row["load_seconds"] += decoded.seconds
                row["held_bytes"] += decoded.linear.held_bytes
                weight = weight_of(decoded.linear)
                if how == "exact":
                    exact[shape.name] = weight
                    restored = compressor.restore(packed, shape, shared)
                    if not torch.allclose(weight, restored, rtol=1e-3, atol=1e-5):
                        raise SystemExit(f"{name}: {shape.name}: the packed layer is not the restored weight")
                square = float(exact[shape.name].double().square().sum())
                difference = float((exact[shape.name] - weight).double().square().sum())
                signal, noise = signal + square, noise + difference
                row["layers"][shape.name] = {
                    "sqnr_db": finite(round(decibels(square, difference), 3)),
                    "error": round(relative_error(dense[shape.name], weight), 6),
                }
                subject.model.get_submodule(shape.name).weight.copy_(weight)  # type: ignore[operator]
            if "refused" not in row:
                row["sqnr_db"] = finite(decibels(signal, noise))
                row["perplexity"] = measure_perplexity(subject)
            rows[way] = row
        forward = time_forward(compressor, layers, shared, subject, tokens)
    return {"options": dict(options), "compress_seconds": seconds, "ways": rows, "forward": forward}


def finite(value: float) -> float | None:
    """None stands for no difference at all: JSON has no infinity."""
    return value if math.isfinite(value) else None


def time_forward(
    compressor: PocketCompressor, layers: Any, shared: Shared | None, subject: Opened, tokens: Tensor
) -> dict[str, float]:
    """Seconds of a forward pass over eight windows: dense weights, packed layers decoded exactly, and folded."""
    model = subject.model
    before = {shape.name: model.get_submodule(shape.name) for shape, _ in layers}
    found = {}
    for way, how, rescale in (("dense", "", ""), ("exact", "exact", ""), ("folded", "fitted", "by number")):
        if how:
            for shape, packed in layers:
                place(model, shape.name, decode_layer(compressor, packed, shape, shared, how, rescale).linear)
        timings = []
        for _ in range(6):
            begun = time.perf_counter()
            model(input_ids=tokens[:8], use_cache=False)
            timings.append(time.perf_counter() - begun)
        found[way] = statistics.median(timings[1:])
    for name, module in before.items():
        place(model, name, module)
    return found


def place(model: nn.Module, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def render(result: dict[str, Any]) -> str:
    facts = result["environment"]
    commit = (facts["git"] or {}).get("commit", "no git")[:12]
    lines = [
        "# Folding PocketLLM's decoders into one table",
        "",
        f"{result['date']}, commit {commit}{' (modified)' if (facts['git'] or {}).get('dirty') else ''}, "
        f"{facts['processor']}, {facts['cores']} cores.",
        "Written by `python tests/benchmarks/folding.py --out results/bench`.",
        "",
        f"The reference model, float32; perplexity of {result['documents']} test documents, dense "
        f"{result['dense']:.4f}. Paper and code: one codebook and decoder a matrix, K = 256 and d = 2 where nothing "
        f"else is said, trained for {result['epochs']} epochs in batches of 512 at a rate of 8e-3 that ends as a "
        "cosine, with revival: far shorter than the papers, since what counts here is what folding adds to each.",
        "",
        "dB: squares of the exactly decoded weights over those of the difference, all layers together, and of the "
        "layer where it is least. Mean: the decoder with the mean of all groups' statistics; fitted: the least-squares "
        "table. Gain and offset are one a group, or, by number, one for each of a group's d numbers; computed at load "
        "and stored nowhere. Error: mean over layers of the squared error over the squared weights.",
        "",
        "| recipe | decoding | dB | worst layer | perplexity | over exact | error | seconds to load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, recipe in result["recipes"].items():
        exact = recipe["ways"]["exact"]
        for way, row in recipe["ways"].items():
            if "refused" in row:
                if way == "mean":
                    lines.append(f"| {name} | {way}, all | refused: {row['refused']} | | | | | |")
                continue
            if way != "exact" and row["sqnr_db"] is None:
                continue  # said once, below
            measured = list(row["layers"].values())
            worst = min((layer["sqnr_db"] for layer in measured if layer["sqnr_db"] is not None), default=None)
            error = sum(layer["error"] for layer in measured) / len(measured)
            change = row["perplexity"] / exact["perplexity"] - 1
            lines.append(
                f"| {name} | {way} | {decibel(row['sqnr_db'])} | {decibel(worst)} | {row['perplexity']:.4f} | "
                f"{'' if way == 'exact' else f'{100 * change:+.2f} %'} | {error:.4f} | {row['load_seconds']:.2f} |"
            )
    tables = [name for name, recipe in result["recipes"].items() if recipe["ways"]["fitted"].get("sqnr_db", 0) is None]
    if tables:
        lines += ["", f"Exact as a table, so that there is nothing to fold: {', '.join(tables)}."]
    lines += [
        "",
        f"A forward pass over {result['tokens']:,} tokens on one thread, in seconds, median of five, packed weights "
        "decoded anew in it:",
        "",
        "| recipe | dense weights | packed, exact | packed, folded by number |",
        "|---|---|---|---|",
    ]
    for name, recipe in result["recipes"].items():
        timed = recipe["forward"]
        lines.append(f"| {name} | {timed['dense']:.2f} | {timed['exact']:.2f} | {timed['folded']:.2f} |")
    return "\n".join(lines) + "\n"


def decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for folding.json and folding.md")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=12, help="of paper and code")
    parser.add_argument("--documents", type=int, default=200, help="test documents for perplexity")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = FOLDER / "model"
    tokenizer = load_tokenizer(base)
    text = read_reference(ReferenceOptions(split="test", documents=arguments.documents))
    train = read_reference(ReferenceOptions(split="train", documents=400))
    tokens = torch.tensor(sample_windows(train, tokenizer, CALIBRATION, LENGTH, seed=0))
    subject = Opened(open_model(base, "float32", "cpu"), tokenizer, text)
    inventory = read_inventory(base)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "documents": arguments.documents,
        "epochs": arguments.epochs,
        "tokens": tokens[:8].numel(),
        "dense": measure_perplexity(subject),
        "recipes": {},
    }
    for name in arguments.recipes:
        options = RECIPES[name] if "evenbits" in name else {**RECIPES[name], "epochs": arguments.epochs}
        result["recipes"][name] = measure(name, options, subject, base, tokens, inventory)
        print(name, f"{result['recipes'][name]['compress_seconds']:.0f} s to compress", flush=True)
    write_atomically(arguments.out / "folding.json", (json.dumps(result) + "\n").encode())
    rendered = render(result)
    write_atomically(arguments.out / "folding.md", rendered.encode())
    print(rendered)


if __name__ == "__main__":
    main()
