"""One step of PocketLLM's training, on tensors of fixed address and shape.

Nothing in a step is read by the host and no shape depends on values, so that a CUDA graph can hold it
(`evenbits_pocketllm.captured`); elsewhere the same function runs kernel by kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits.kernels.nearest import Codebook, fits
from evenbits.maths.nearest import nearest
from evenbits_pocketllm.codewords import codebook_gradient, replace
from evenbits_pocketllm.network import Network, decode, encode
from evenbits_pocketllm.unit import unit_refusal

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Settings

# Adam's, as torch has them by default
FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Met:
    """What revival wants to know of a step: latents (n, latent) and their squared distances (n,) to the codewords."""

    latents: Tensor
    distances: Tensor

    def clone(self) -> Met:
        return Met(self.latents.clone(), self.distances.clone())


class Step:
    """Parameters of a training, Adam's moments, and what an epoch adds up; calling it takes a step.

    All tensors stay where they are: they are only ever written in place.
    """

    def __init__(
        self, encoder: Tensor, decoder: Tensor, codebook: Tensor, network: Network | None, settings: Settings
    ) -> None:
        """encoder, decoder: flat float32, of no length without a network; codebook (K, latent) float32. All are kept,
        and changed."""
        self.encoder, self.decoder, self.codebook = encoder, decoder, codebook
        self.network, self.settings = network, settings
        # why units are not Triton's; None where they are
        self.refusal = "there are none" if network is None else self._refuse(network)
        self._fused = self.refusal is None
        # `nearest` would make one each time; None where it needs none
        self._table = searched(codebook)
        self._learned = [part for part in (encoder, decoder, codebook) if part.numel()]
        self._first = [torch.zeros_like(part) for part in self._learned]
        self._second = [torch.zeros_like(part) for part in self._learned]
        self.squared_error = torch.zeros((), dtype=torch.float64, device=codebook.device)
        self.counts = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)  # codes, by codeword

    def __call__(self, vectors: Tensor, rates: Tensor) -> Met | None:
        """vectors (groups, per_group, d); rates (2,), a row of `adam_rates`. Returns what revival needs, or None."""
        settings, codebook = self.settings, self.codebook
        # new leaves each time: autograd remembers of a leaf on which stream it was first met
        encoder, decoder = (part.detach().requires_grad_() for part in (self.encoder, self.decoder))
        with torch.enable_grad():
            latents = vectors if self.network is None else encode(vectors, encoder, self.network, self._fused)
            flat = latents.detach().flatten(0, 1)
            codes = self._nearest(flat)
            codewords = codebook[codes]
            if self.network is None:
                error = (codewords.view_as(vectors) - vectors).square().mean()
                gradients = []
            else:
                passed = replace(latents, codewords.view_as(latents))
                error = (decode(passed, decoder, self.network, self._fused) - vectors).square().mean()
                gradients = list(torch.autograd.grad(loss(error, settings), (encoder, decoder)))
        gradient, counts = codebook_gradient(flat, codebook, codes, settings.vq_weight)
        self._adam([*gradients, gradient], rates)
        self.squared_error += error.detach().double() * vectors.numel()
        if not settings.revive:
            return None
        self.counts += counts
        return Met(flat, (flat - codewords).square().sum(1))

    def _nearest(self, latents: Tensor) -> Tensor:
        return find(latents, self.codebook, self._table)

    def _refuse(self, network: Network) -> str | None:
        device = self.codebook.device
        if device.type != "cuda":  # Triton's interpreter would do, a thousand times as slowly
            return f"Triton's units are for CUDA devices, not {device.type}"
        return unit_refusal(max(network.inputs, network.outputs), network.hidden, network.outputs, device)

    def _adam(self, gradients: list[Tensor], rates: Tensor) -> None:
        """torch.optim.Adam's step, to the bit on the CPU, but for its scalars, which are read on the device."""
        torch._foreach_lerp_(self._first, gradients, 1 - FIRST)
        torch._foreach_mul_(self._second, SECOND)
        torch._foreach_addcmul_(self._second, gradients, gradients, value=1 - SECOND)
        below = torch._foreach_sqrt(self._second)
        torch._foreach_div_(below, rates[1])
        torch._foreach_add_(below, EPSILON)
        change = torch._foreach_mul(self._first, rates[0])
        torch._foreach_div_(change, below)
        torch._foreach_add_(self._learned, change)

    def forget(self, codewords: Tensor) -> None:
        """Adam's moments of some codewords, by their indices: they start again."""
        for moments in (self._first, self._second):
            moments[-1][codewords] = 0

    def start_epoch(self) -> None:
        self.squared_error.zero_()
        self.counts.zero_()

    def copy(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder, decoder and codebook as they now stand."""
        return self.encoder.clone(), self.decoder.clone(), self.codebook.clone()


def loss(squared_error: Tensor, settings: Settings) -> Tensor:
    """What is descended: the root of the mean squared error, or the mean squared error itself."""
    # the root has no slope at zero
    return torch.sqrt(squared_error.clamp_min(1e-30)) if settings.loss == "rmse" else squared_error


def learning_rate(settings: Settings, passed: float) -> float:
    """Adam's rate after so many epochs, the present one counted in part."""
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** (int(passed) // 15)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * passed / settings.epochs))
    return settings.learning_rate


def adam_rates(settings: Settings, epoch: int, steps: int) -> Tensor:
    """(steps, 2) float32 on the CPU, for each step of an epoch, counted from 0: minus the rate over the first moment's
    bias, and the root of the second moment's bias."""
    rows = []
    for step in range(steps):
        taken = epoch * steps + step + 1
        rate = learning_rate(settings, epoch + step / steps)
        rows.append((-rate / (1 - FIRST**taken), (1 - SECOND**taken) ** 0.5))
    return torch.tensor(rows, dtype=torch.float32)


def searched(codebook: Tensor) -> Codebook | None:
    """What a GPU's search keeps between steps; None where `maths.nearest` searches."""
    on_gpu = codebook.device.type == "cuda" and codebook.shape[1] > 1 and fits(codebook)
    return Codebook(codebook) if on_gpu else None


def find(latents: Tensor, codebook: Tensor, table: Codebook | None) -> Tensor:
    """int64 (n,): the codewords (K, latent), as they are now, nearest to latents (n, latent)."""
    if table is None:
        return nearest(latents, codebook)
    table.update(codebook)
    return table.search(latents)
