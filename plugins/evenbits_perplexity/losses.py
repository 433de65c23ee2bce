"""Next-token losses of windows, from the whole model or from one block of it at a time.

One piece of code for both: the same batches, the same loss, so that the figure is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from evenbits.errors import TrialFailed
from evenbits.streaming import check_batches
from evenbits_perplexity.windows import Window

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
CHUNK_BYTES = 1 << 26  # of float32 logits at a time: a row of 2048 x 128k would be 1 GiB


def order_batches(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Indices of the windows of each batch: like lengths together, for less padding."""
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].tokens))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_inputs(windows: Sequence[Window], batch: Sequence[int], context: int) -> Tensor:
    """(windows, longest) int64: the first `context` tokens of each window.

    Padding stands on the right, where a causal model's earlier positions cannot see it.
    """
    rows = [windows[index].tokens[:context] for index in batch]
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


@torch.no_grad()
def model_logits(model: torch.nn.Module, inputs: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """(batch, tokens, vocabulary) of each batch, by the whole model.

    Raises TrialFailed for tokens or positions that it does not have.
    """
    model.eval()
    if hasattr(model, "get_input_embeddings"):
        check_batches(model, inputs)
    for batch in inputs:
        yield model(input_ids=batch.to(device), use_cache=False).logits


@torch.no_grad()
def sum_losses(
    windows: Sequence[Window],
    batches: Sequence[Sequence[int]],
    logits: Iterable[Tensor],
    progress: Callable[[int], None],
) -> tuple[FloatArray, str]:
    """Sum of the losses of each window's predicted tokens, in nats: float64 (windows,); and the dtype of the logits.

    logits: one (batch, tokens, vocabulary) tensor for each of `batches`, in order.
    Raises TrialFailed at the first window whose loss is not finite, or when a batch has no logits.
    """
    sums = np.zeros(len(windows))
    dtype = ""
    done = 0
    for batch, found in zip(batches, logits, strict=False):
        dtype = str(found.dtype).removeprefix("torch.")
        for row, index in enumerate(batch):
            window = windows[index]
            last = len(window.tokens) - 1
            targets = torch.tensor(window.tokens[last + 1 - window.predicted :], device=found.device)
            sums[index] = _row_loss(found[row, last - window.predicted : last], targets)
        progress(len(batch))
        done += 1
    if done != len(batches):
        raise TrialFailed(f"logits of {done} of {len(batches)} batches came")
    bad = np.flatnonzero(~np.isfinite(sums))
    if bad.size:
        raise TrialFailed(f"loss is not finite in window {bad[0]} ({bad.size} of {len(windows)} windows)")
    return sums, dtype


def _row_loss(logits: Tensor, targets: Tensor) -> float:
    """Sum over positions, in nats; logits (positions, vocabulary) of any float dtype, targets (positions,) int64."""
    if logits.shape[0] != targets.shape[0]:
        raise TrialFailed(f"logits of {logits.shape[0]} positions for {targets.shape[0]} predicted tokens")
    step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    total = 0.0
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        losses = functional.cross_entropy(logits[part].float(), targets[part], reduction="none")
        total += losses.double().sum().item()
    return total
