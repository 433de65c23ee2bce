"""How many tokens an evaluator will read, from its options alone; None where only a run can tell.

Known for the papers' protocols and task sets (see tests/benchmarks/effort.py for where the counts come from).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evenbits.footprint import measured_costs
from evenbits.plan import Stage

CONTEXT = 2048  # of a model whose config is not at hand
ALIKE = 0.01  # vocabularies are padded: sizes within this share are one tokenizer's
CROPS = {"c4": 256, "c4-new": 256}  # windows, by protocol


def bytes_per_token() -> float:
    """Of English text under a vocabulary of 32,000: WikiText-2's."""
    text = measured_costs()["texts"]["wikitext2"]
    return float(text["bytes"] / text["tokens"]["32000"])


def tokens_of(stage: Stage, vocabulary: int | None, positions: int | None) -> int | None:
    """vocabulary: of the model, where it is known. positions: the model's context, where that is."""
    if stage.name == "perplexity":
        return _perplexity(stage.options, vocabulary, positions)
    if stage.name == "lm-eval":
        return _tasks(stage.options)
    return None


def _perplexity(options: Mapping[str, Any], vocabulary: int | None, positions: int | None) -> int | None:
    context = options.get("context") or positions or CONTEXT
    if options.get("max_windows"):
        return int(options["max_windows"] * context)
    if options.get("protocol") in CROPS:
        return int(CROPS[options["protocol"]] * context)
    if options.get("windows") == "sampled":
        return int(options["samples"] * context)
    corpus = options.get("corpus") or {}
    if corpus.get("name") == "wikitext2" and corpus.get("split", "test") == "test" and not corpus.get("documents"):
        text = measured_costs()["texts"]["wikitext2"]
        for size, count in text["tokens"].items():
            if vocabulary is not None and abs(vocabulary - int(size)) <= ALIKE * int(size):
                return int(count)
        return round(float(text["bytes"]) / bytes_per_token())
    return None


def _tasks(options: Mapping[str, Any]) -> int | None:
    """Context once and every choice, as the tree scorer reads them."""
    if options.get("folder") is not None or options.get("few_shot"):
        return None
    known = measured_costs()["tasks"]
    names = [name for task in options["tasks"] for name in (FIVE if task == "papers-five" else (task,))]
    if any(name not in known for name in names):
        return None
    total = 0.0
    for name in names:
        count = min(options.get("limit") or known[name]["items"], known[name]["items"])
        total += known[name]["bytes"] * count / known[name]["items"]
    return round(total / bytes_per_token())


FIVE = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
