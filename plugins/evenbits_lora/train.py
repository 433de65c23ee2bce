"""The training loop: batches, learning rate, loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenbits.errors import TrialFailed
from evenbits_lora.options import LoraOptions


def train(
    model: nn.Module,
    layers: Sequence[nn.Module],
    tokens: Tensor,
    teacher: nn.Module | None,
    options: LoraOptions,
    generator: torch.Generator,
) -> list[float]:
    """AdamW on what of `layers` wants gradients; returns the mean loss of the updates of each epoch, in nats a token.

    tokens: (samples, length); teacher: the dense model for loss = "distill". Raises TrialFailed for a loss that is
    not finite.
    """
    parameters = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=options.lr, betas=(0.9, options.beta2), weight_decay=options.weight_decay
    )
    # gradients that pass through float16 activations would round to zero
    half = next(model.parameters()).dtype == torch.float16
    scaler = torch.amp.GradScaler(tokens.device.type, enabled=half)
    total = options.epochs * math.ceil(len(tokens) / options.batch_size)
    step, means = 0, []
    for epoch in range(options.epochs):
        losses = []
        order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
        for start in range(0, len(tokens), options.batch_size):
            for group in optimiser.param_groups:
                group["lr"] = options.lr * rate(options, step, total)
            optimiser.zero_grad()
            batch = tokens[order[start : start + options.batch_size]]
            losses.append(_gradients(model, batch, teacher, options, scaler))
            if not math.isfinite(losses[-1]):
                raise TrialFailed(f"lora: the loss is {losses[-1]} at update {step + 1} of {total}; lower lr")
            scaler.unscale_(optimiser)
            if options.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            scaler.step(optimiser)
            scaler.update()
            step += 1
        means.append(sum(losses) / len(losses))
        # what a child prints is the trial's log
        print(f"lora: epoch {epoch + 1} of {options.epochs}, {step} of {total} updates: {options.loss} {means[-1]:.4f}")
    return means


def rate(options: LoraOptions, step: int, total: int) -> float:
    """The share of `lr` at update `step` (from 0) of `total`, the warm-up first. No update is made at 0."""
    warm = math.ceil(options.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / (total - warm)
    if options.schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1.0


def _gradients(model: nn.Module, batch: Tensor, teacher: nn.Module | None, options: LoraOptions, scaler: Any) -> float:
    """Add up the gradients of the batch's mean loss, a micro-batch at a time; returns that loss."""
    found, size = 0.0, options.micro_batch_size or len(batch)
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        loss = batch_loss(model, part, teacher) * (len(part) / len(batch))
        scaler.scale(loss).backward()
        found += float(loss.detach())
    return found


def batch_loss(model: nn.Module, batch: Tensor, teacher: nn.Module | None = None) -> Tensor:
    """Mean nats a token: cross-entropy of each next token, or KL(teacher || model) where there is a teacher."""
    logits = model(input_ids=batch, use_cache=False).logits.float()
    if teacher is None:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(input_ids=batch, use_cache=False).logits.float(), dim=-1)
    given = functional.log_softmax(logits, dim=-1)
    return functional.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
