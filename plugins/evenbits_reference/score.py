"""Score a model on the items and texts of the world: `python -m evenbits_reference.score [FOLDER]`.

Small and apart from lm-eval, so that training, tests and the model card need nothing else; the two agree.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenbits_reference.documents import tell
from evenbits_reference.families import FAMILIES
from evenbits_reference.groups import Item
from evenbits_reference.world import Split

ROWS = 64  # sequences at a time


@torch.no_grad()
def log_likelihoods(model: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[float]:
    """For each (context, continuation) the continuation's log-likelihood in nats, tokenised together."""
    encoded = [
        (len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"])
        for context, continuation in texts
    ]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][1]))
    found = [0.0] * len(encoded)
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        longest = max(len(encoded[index][1]) for index in chosen)
        rows = torch.zeros(len(chosen), longest, dtype=torch.int64)
        for row, index in enumerate(chosen):
            rows[row, : len(encoded[index][1])] = torch.tensor(encoded[index][1])
        scores = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        for row, index in enumerate(chosen):
            first, ids = encoded[index]
            found[index] = sum(float(scores[row, at - 1, ids[at]]) for at in range(first, len(ids)))
    return found


def candidates(item: Item) -> list[tuple[str, str]]:
    """What is compared: the choices as continuations, or with a blank what follows each choice."""
    if "_" in item.context:
        before, _, after = item.context.partition("_")
        return [(before + choice, after) for choice in item.choices]
    return [(item.context, f" {choice}") for choice in item.choices]


def right(model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> list[bool]:
    """For each item whether the likeliest choice is the answer."""
    scores = iter(log_likelihoods(model, tokenizer, [pair for item in items for pair in candidates(item)]))
    found = []
    for item in items:
        values = [next(scores) for _ in item.choices]
        found.append(values.index(max(values)) == item.answer)
    return found


@torch.no_grad()
def losses(model: nn.Module, tokenizer: Any, split: Split, documents: int, seed: int = 0) -> Mapping[str, float]:
    """Nats per token over whole texts, each after its <s>: the model's, and the generator's for its own choices."""
    told = [tell(split, seed, index) for index in range(documents)]
    scores = log_likelihoods(model, tokenizer, [("", document.text) for document in told])
    tokens = sum(len(tokenizer(document.text)["input_ids"]) - 1 for document in told)
    return {
        "tokens": tokens,
        "loss": -sum(scores) / tokens,
        "perplexity": math.exp(-sum(scores) / tokens),
        "generator_loss": sum(document.nats for document in told) / tokens,
        "generator_perplexity": math.exp(sum(document.nats for document in told) / tokens),
    }


def measure(folder: Path, documents: int = 2000) -> dict[str, Any]:
    """All figures of the model card, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures: dict[str, Any] = {split: losses(model, tokenizer, split, documents) for split in ("validation", "test")}
    for name, make in FAMILIES.items():
        found = right(model, tokenizer, make())
        figures[name] = {"items": len(found), "accuracy": sum(found) / len(found)}
    return figures


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model"
    print(json.dumps(measure(folder), indent=1))


if __name__ == "__main__":
    main()
