"""Accuracy of the next token: easier to read than a perplexity, and blind to how sure the model is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from evenbits.errors import TrialFailed
from evenbits.measure import Finding, Measurement, Subject
from evenbits.sampling import encode, tokenizer_identity
from evenbits.statistics import bootstrap_interval

from evenbits_tutorial.measure_options import NextTokenOptions

BATCH = 8  # windows


class NextToken:
    def __init__(self, options: NextTokenOptions) -> None:
        self.options = options

    @torch.no_grad()
    def evaluate(self, subject: Subject) -> Sequence[Finding]:
        """items: the share of hits in each window, so that two trials are compared window by window."""
        text, context, k = subject.corpus(self.options.corpus), self.options.context, self.options.k
        ids = torch.tensor(encode(subject.tokenizer, text.joined()))
        windows = ids[: len(ids) // context * context].view(-1, context)
        if len(windows) < 2:
            raise TrialFailed(f"next-token: {len(ids)} tokens are not two windows of {context}; give a longer text")
        tick = subject.progress(len(windows), "next-token")
        shares: list[float] = []
        for batch in torch.split(windows.to(subject.device), BATCH):
            logits, right = subject.model(input_ids=batch).logits[:, :-1], batch[:, 1:, None]
            if not bool(torch.isfinite(logits).all()):  # no NaN is larger than another: all would be hits
                raise TrialFailed("next-token: logits are not finite")
            ahead = (logits > logits.gather(2, right)).sum(2)
            shares += (ahead < k).double().mean(1).tolist()
            tick(len(batch))
        items = np.array(shares)
        low, high = bootstrap_interval(items)
        protocol = {"corpus": text.identity, "tokenizer": tokenizer_identity(subject.tokenizer), "context": context}
        fingerprint = {**subject.facts, **protocol, "k": k, "windows": len(windows)}
        name = f"top{k}_accuracy"
        return [Measurement(name, float(items.mean()), "share", "higher", low, high, fingerprint, items=items)]
