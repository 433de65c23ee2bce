"""A results folder with all that the page can show: two models, two budgets, a recovery stage, failures, texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.harness.trials import MODEL, TWO, Trials, accuracy, cost, perplexity

from evenbits.record import Bits, BudgetFacts, Failure, LayerFacts, SampleFacts

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
CLOSING = "</script><script>document.title='owned'</script>\u2028<!--"
THREE = BudgetFacts(centre=3.0, window=0.05)
WHERE: dict[str, Any] = {
    "versions": {"evenbits": "0.1.0", "torch": "2.13.0"}, "python": "3.11.7", "memory_bytes": 8_000_000_000,
    "git": {"commit": "c" * 40, "dirty": True},
}  # fmt: skip
PROMPTS = {"Once upon": " a time there was a cat.", "The dog": " ran home."}
KINDS = ("self_attn.q_proj", "mlp.down_proj")


def make_trials(root: Path, *, suite: str = "tests") -> Trials:
    """Seven rows of "small" and two of "other"; rtn is named HOSTILE, and writes CLOSING."""
    trials = Trials(root, suite)
    base = np.linspace(0.4, 0.6, 40)
    right = np.r_[np.ones(30), np.zeros(10)]

    def add(method: str, worse: float, linear: float = 2.0, **facts: Any) -> None:
        texts = facts.pop("texts", PROMPTS)
        trials.add(
            method, perplexity(base + worse), accuracy(right), cost("latency_ms", 4.0 + worse, "ms", volatile=True),
            linear=linear, samples=samples(texts), environment=WHERE, seconds={"compress": 1.5, "evaluate": 200.0},
            peaks={"compress": 1_500_000}, finished="2026-01-02T03:04:05+00:00",
            layers=() if method == "dense" else layers(worse),
            **{"predicted": Bits(index=linear, paper=linear, linear=linear, model=linear), **facts},
        )  # fmt: skip

    add("dense", 0.0)
    add("gptq", 0.10, options={"bits": 2, "group_size": 64}, seed=0, trial="gptq0")
    add("gptq", 0.11, options={"bits": 2, "group_size": 64}, seed=1, trial="gptq1", remarks=("slow disk",))
    add("rtn", 0.30, label=HOSTILE, options={"note": CLOSING}, texts={"Once upon": " a time " + CLOSING, "The dog": ""})
    add("nf4", 0.05, linear=2.04, budget=TWO)
    add("kmeans", 5.0, linear=2.03)
    add("gptq", 0.04, linear=3.0, budget=THREE, options={"bits": 3})
    add("gptq", 0.02, recovery=("distill",), recovery_options=({"steps": 10},))
    add("awq", 0.2, linear=2.3125, within_budget=False)  # a tie: three digits are 2.312, where halves go to even
    trials.add("vptq", status="skipped", ledger=None, reason="no setting within 2 ±0.05")
    broken = Failure(kind="error", stage="compress", message=f"bad {HOSTILE}", traceback="Traceback: line 1")
    trials.add("aqlm", status="failed", ledger=None, failure=broken)
    other = MODEL.model_copy(update={"name": "other", "revision": "sha256:2"})
    add("dense", 0.2, model=other)
    add("gptq", 0.4, model=other, options={"bits": 2})
    return trials


def samples(texts: dict[str, str]) -> tuple[SampleFacts, ...]:
    details = {"new_tokens": 8, "tokens": 5, "stopped": "length", "mean_logprob": -0.5}
    return tuple(SampleFacts(source="samples", prompt=p, text=t, details=details) for p, t in texts.items())


def layers(error: float, blocks: int = 3) -> tuple[LayerFacts, ...]:
    return tuple(
        LayerFacts(
            name=f"model.layers.{block}.{kind}", bits=2.0625, error=error * (block + 1), calibrated_error=error / 9
        )
        for block in range(blocks)
        for kind in KINDS
    )
