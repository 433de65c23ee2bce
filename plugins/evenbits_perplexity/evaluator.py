"""Perplexity as GPTQ and its successors measure it (arXiv:2210.17323, section 4), with every convention recorded.

Where BOS stands moves the number as much as four-bit quantisation does, so nothing here is left implicit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, Subject
from evenbits.sampling import tokenizer_identity
from evenbits_perplexity.options import PerplexityOptions
from evenbits_perplexity.windows import cut_windows

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
RESAMPLES = 1000
LARGEST_LOSS = 709.0  # exp of more is infinite in float64, which no record can hold


class PerplexityEvaluator:
    def __init__(self, options: PerplexityOptions) -> None:
        self.options = options

    def evaluate(self, subject: Subject) -> Sequence[Measurement]:
        """One measurement, "perplexity".

        items: per window, the loss in nats per token (float64). Under windows = documents, whose windows differ in
        length, each is weighted by its share of the predictions, so that the plain mean of the items is always the
        loss of which the perplexity is the exp.
        low, high: 95 % percentile bootstrap over windows, 1000 resamples, fixed seed.
        Raises TrialFailed when the text is shorter than a window, or at the first window whose loss is not finite.
        """
        options = self.options
        text = subject.corpus(options.corpus)
        context = options.context or _model_context(subject.model)
        windows, tokens = cut_windows(text, subject.tokenizer, context, options)
        sums = _window_losses(
            subject.model, windows, options.batch_size, subject.device, subject.progress(len(windows), "perplexity")
        )
        counts = np.array([len(window) - 1 for window in windows], dtype=np.float64)
        predictions = int(counts.sum())
        loss = float(sums.sum() / predictions)
        low, high = bootstrap_interval(sums, counts)
        if high > LARGEST_LOSS:
            raise TrialFailed(f"perplexity overflows a float: mean loss {loss:.1f} nats/token")
        sizes = {"tokens": tokens, "windows": len(windows), "predictions": predictions}
        fingerprint = {
            **subject.facts,
            "metric": "perplexity",
            "corpus": dict(text.identity),
            "tokenizer": tokenizer_identity(subject.tokenizer),
            "bos": options.bos,
            "context": context,
            "windows_rule": options.windows,
            "loss_dtype": "float32 per token, float64 sums",
            **sizes,
        }
        if options.windows == "sampled":
            fingerprint["sampling"] = {"rule": text.sampling, "seed": 0}
        details = {"loss": loss, "loss_unit": "nats/token", "batch_size": options.batch_size, **sizes}
        return [
            Measurement(
                name="perplexity",
                value=math.exp(loss),
                unit="perplexity",
                better="lower",
                low=math.exp(low),
                high=math.exp(high),
                fingerprint=fingerprint,
                details=details,
                items=sums * (len(windows) / predictions),
            )
        ]


def _model_context(model: Any) -> int:
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(context, int):
        raise TrialFailed("the model's config has no max_position_embeddings: give context")
    return context


@torch.no_grad()
def _window_losses(
    model: torch.nn.Module,
    windows: Sequence[Sequence[int]],
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> FloatArray:
    """Sum of the next-token losses of each window, in nats: float64 (windows,)."""
    model.eval()
    sums = np.zeros(len(windows))
    order = sorted(range(len(windows)), key=lambda index: len(windows[index]))  # like lengths together: less padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = len(windows[indices[-1]])
        # padding stands on the right, where a causal model's earlier positions cannot see it
        batch = torch.tensor([[*windows[i], *[0] * (longest - len(windows[i]))] for i in indices], device=device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row, index in enumerate(indices):
            last = len(windows[index]) - 1
            # one row at a time: float32 logits of a whole batch would take gigabytes at real vocabularies
            losses = functional.cross_entropy(logits[row, :last].float(), batch[row, 1 : last + 1], reduction="none")
            sums[index] = losses.double().sum().item()
        progress(len(indices))
    bad = np.flatnonzero(~np.isfinite(sums))
    if bad.size:
        raise TrialFailed(f"loss is not finite in window {bad[0]} ({bad.size} of {len(windows)} windows)")
    return sums


def bootstrap_interval(sums: FloatArray, counts: FloatArray, share: float = 0.95) -> tuple[float, float]:
    """Percentile interval of sum(sums) / sum(counts) when windows are drawn again with replacement; fixed seed."""
    draw = np.random.default_rng(0)
    windows = len(sums)
    times = draw.multinomial(windows, np.full(windows, 1 / windows), size=RESAMPLES)  # how often each is drawn
    means = (times @ sums) / (times @ counts)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
