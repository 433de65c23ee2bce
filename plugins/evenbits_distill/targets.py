"""The losses, and what the dense model says about the calibration windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evenbits_distill.options import DistillOptions

LEAST = -1e4  # log-probability of what is impossible: float16 holds it, and 0 x (-inf) is avoided


class DenseTargets:
    """log p of the dense model's next token for windows of `tokens`, at the temperature of the options.

    Kept in float16 where all of them fit the limit: as log-probabilities, not logits, since those near 0 are the ones
    that weigh and are the ones held most exactly. Else computed at each call, with the dense model kept open.
    """

    def __init__(self, open_dense: Callable[[], Any], tokens: Tensor, options: DistillOptions, batch: int) -> None:
        self._tokens = tokens
        self._temperature = options.temperature
        self._dense = open_dense()
        self._kept: Tensor | None = None
        vocabulary = int(self._dense.config.get_text_config().vocab_size)
        self.cached = 2 * tokens.numel() * vocabulary <= options.cache_mib * 2**20
        if self.cached:
            self._kept = torch.empty(*tokens.shape, vocabulary, dtype=torch.float16, device=tokens.device)
            for start in range(0, len(tokens), batch):
                rows = torch.arange(start, min(start + batch, len(tokens)), device=tokens.device)
                self._kept[rows] = self._compute(rows).half()
            self._dense = None

    @torch.no_grad()
    def _compute(self, rows: Tensor) -> Tensor:
        logits = self._dense(input_ids=self._tokens[rows], use_cache=False).logits.float()
        return functional.log_softmax(logits / self._temperature, dim=-1).clamp_min(LEAST)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: (batch,) indices -> (batch, length, vocabulary) float32."""
        return self._compute(rows) if self._kept is None else self._kept[rows].float()


class Loss:
    """Mean loss in nats per token of a batch of windows."""

    def __init__(self, model: Any, tokens: Tensor, options: DistillOptions, targets: DenseTargets | None) -> None:
        self._model = model
        self._tokens = tokens
        self._options = options
        self._targets = targets

    def __call__(self, rows: Tensor) -> Tensor:
        tokens = self._tokens[rows]
        logits = self._model(input_ids=tokens, use_cache=False).logits.float()
        share = {"kl": 0.0, "next-token": 1.0, "mix": self._options.next_token_share}[self._options.loss]
        loss: Tensor = logits.new_zeros(())
        if self._targets is not None:
            loss = (1 - share) * divergence(self._targets(rows), logits, self._options.temperature)
        if share:
            loss = loss + share * functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss


def divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || model) in nats, mean over positions; target: log-probabilities at temperature T.

    The factor keeps the gradient's size whatever the temperature (Hinton et al., arXiv:1503.02531, section 2).
    """
    found = functional.log_softmax(logits / temperature, dim=-1)
    each: Tensor = (target.exp() * (target - found)).sum(-1)
    mean: Tensor = each.mean()
    return mean * temperature**2
