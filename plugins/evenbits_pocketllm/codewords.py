"""How codewords stand in for latents while training, and how they follow them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Replace(Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, codewords: Tensor) -> Tensor:
        return codewords.view_as(codewords)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def replace(latents: Tensor, codewords: Tensor) -> Tensor:
    """The codewords, exactly; their gradient goes unchanged to the latents, of the same shape (straight through)."""
    found: Tensor = _Replace.apply(latents, codewords)  # type: ignore[no-untyped-call]
    return found


def codebook_gradient(latents: Tensor, codebook: Tensor, codes: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Gradient of weight * mean((codeword - latent)^2), averaged over each codeword's members: (K, latent).

    latents (n, latent) are held; codes (n,). What the members send to their codeword is averaged, not summed, as in
    the released code of PocketLLM; a codeword without members gets zero. Also returns the number of members, (K,).
    """
    counts = torch.bincount(codes, minlength=len(codebook))
    sums = torch.zeros_like(codebook).index_add_(0, codes, latents)
    gradient = (codebook - sums / counts.clamp_min(1)[:, None]) * (2 * weight / latents.numel())
    return torch.where((counts > 0)[:, None], gradient, 0.0), counts


def means(latents: Tensor, codebook: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Each codeword at the mean of its members, (K, latent), and their number (K,); one without members stays.

    Sums are in float64.
    """
    counts = torch.bincount(codes, minlength=len(codebook))
    sums = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, codes, latents.double())
    moved = (sums / counts.clamp_min(1)[:, None]).float()
    return torch.where((counts > 0)[:, None], moved, codebook), counts


def revive(codebook: Tensor, counts: Tensor, latents: Tensor, distances: Tensor) -> Tensor:
    """Move codewords without members, in place, to the latents farthest from their codewords.

    counts (K,), latents (n, latent), distances (n,). Returns the indices of those moved, at most n.
    """
    empty = torch.nonzero(counts == 0)[:, 0]
    worst = torch.topk(distances, min(len(empty), len(distances)))
    places = worst.indices[worst.values > 0]
    empty = empty[: len(places)]
    codebook[empty] = latents[places]
    return empty
