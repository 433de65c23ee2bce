"""What `evenbits plan` estimates hours from where a results folder has none: harness/evenbits/measured_costs.json.

    python tests/benchmarks/effort.py --data DIR     # DIR: the papers' task sets as local files, as for zero_shot.py

Gathers what other benchmarks measured (results/bench/compressors.json: one layer, by method; block7b.json: PocketLLM on
a block), and measures here: floating-point operations a second in matmuls as long texts have them, and what the items
of the papers' task sets come to in bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from block7b import PAPER_EPOCHS, RECIPES
from torch.nn import functional

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.plugins import load_plugins

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "harness" / "evenbits" / "measured_costs.json"
WIDTH, TOKENS = 2048, 256
BLOCK = (4 * 4096 * 4096 + 3 * 4096 * 11008, 7)  # weights and layers of a block of Llama-2-7B
REMARKS = {"awq, clip and rounding": "without its search over scales", "aqlm 2x8 g8, 4 rounds": "without tuning blocks"}
SETS = {
    "winogrande": "winogrande.validation.jsonl",
    "piqa": "piqa.validation.jsonl",
    "hellaswag": "hellaswag.validation.jsonl",
    "arc_easy": "arc_easy.test.jsonl",
    "arc_challenge": "arc_challenge.test.jsonl",
    "openbookqa": "openbookqa.test.jsonl",
    "lambada_openai": "lambada_openai.test.jsonl",
}


NOT_READ = ("label", "answer", "answerKey", "id", "ind", "source_id", "split", "split_type", "ctx_a", "ctx_b")


def methods() -> list[dict[str, Any]]:
    """Seconds by method and layer, from the committed benchmarks."""
    bench = ROOT / "results" / "bench"
    layers = json.loads((bench / "compressors.json").read_text())
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in layers["layers"]:
        groups.setdefault(row["name"], []).append(row)
    found = [
        {
            "method": rows[0]["method"],
            "options": rows[0]["options"],
            "weights": sum(row["rows"] * row["columns"] for row in rows),
            "layers": len(rows),
            "seconds": sum(row["seconds"] for row in rows),
            # of the largest: small layers hold more beside their weights
            "memory": max(rows, key=lambda row: row["weight_bytes"])["peak_bytes"]
            / max(row["weight_bytes"] for row in rows),
            "threads": layers["environment"]["cores"],
            "remark": REMARKS.get(name, ""),
        }
        for name, rows in groups.items()
    ]
    block = json.loads((bench / "block7b.json").read_text())["recipes"]
    for recipe, run in block.items():
        times = PAPER_EPOCHS / run["epochs"] if recipe == "paper" else 1.0
        found.append(
            {
                "method": "pocketllm",
                "options": {name: value for name, value in RECIPES[recipe].items() if name != "epochs"},
                "weights": BLOCK[0],
                "layers": BLOCK[1],
                "seconds": run["cpu_seconds"] * times,
                "memory": (run["peak_bytes"] - run["before_bytes"]) / (4 * 4096 * 11008),
                "threads": 1,
                "remark": f"{run['epochs']} of {PAPER_EPOCHS} epochs, scaled" if times != 1 else "",
            }
        )
    for row in found:  # written out, to be compared with a trial's
        model = load_plugins().compressors[row["method"]].value.options
        row["options"] = model.model_validate(row["options"]).model_dump(mode="json")
    return [{key: _rounded(value) for key, value in row.items()} for row in found]


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def rate(once: Callable[[], Any], amount: float, seconds: float = 1.0) -> float:
    """`amount` a second of CPU time on one thread, the fastest run: others at work on the machine hardly count."""
    once()
    best, begun = float("inf"), time.process_time()
    while time.process_time() - begun < seconds:
        start = time.process_time()
        once()
        best = min(best, time.process_time() - start)
    return _rounded(amount / best)  # type: ignore[no-any-return]


@torch.no_grad()
def machine() -> dict[str, Any]:
    torch.set_num_threads(1)
    forward = {}
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        weight, rows = torch.randn(WIDTH, WIDTH).to(dtype), torch.randn(TOKENS, WIDTH).to(dtype)
        forward[name] = rate(partial(functional.linear, rows, weight), 2.0 * TOKENS * WIDTH * WIDTH)
    return {"flops_per_core_second": forward}


def text_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(text_bytes(item) for name, item in value.items() if name not in NOT_READ)
    if isinstance(value, list):
        return sum(text_bytes(item) for item in value)
    return len(value.encode()) if isinstance(value, str) else 0


def items(data: Path) -> dict[str, dict[str, int]]:
    """Items and bytes of all that is read of them: context once and every choice. WinoGrande has two contexts."""
    found = {}
    for name, file in SETS.items():
        rows = [json.loads(line) for line in (data / file).read_text().splitlines() if line.strip()]
        found[name] = {
            "items": len(rows),
            "bytes": sum(text_bytes(row) for row in rows) * (2 if name == "winogrande" else 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task sets")
    arguments = parser.parse_args()
    environment = describe_environment()
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": environment["processor"],
        "cores": environment["cores"],
        **machine(),
        # as evenbits_perplexity.counts has them; by the size of the model's vocabulary
        "texts": {"wikitext2": {"bytes": 1_296_370, "tokens": {"32000": 341_468, "50257": 287_644, "151936": 299_078}}},
        "tasks": items(arguments.data),
        "methods": methods(),
    }
    write_atomically(OUT, (json.dumps(row, indent=1) + "\n").encode())
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
