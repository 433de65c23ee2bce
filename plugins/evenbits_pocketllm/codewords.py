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
    # not bincount: its result has a length that the host must know first
    counts = torch.zeros(len(codebook), dtype=torch.int64, device=codes.device)
    counts.index_add_(0, codes, torch.ones_like(codes))
    sums = member_sums(latents, codes, len(codebook))
    gradient = (codebook - sums / counts.clamp_min(1)[:, None]) * (2 * weight / latents.numel())
    return gradient.masked_fill_((counts == 0)[:, None], 0.0), counts


def member_sums(latents: Tensor, codes: Tensor, codewords: int) -> Tensor:
    """(codewords, latent) float32: of the latents (n, latent) of each codeword, the same in each run."""
    if latents.device.type == "cpu":  # one after the other
        return torch.zeros(codewords, latents.shape[1]).index_add_(0, codes, latents)
    return whole_sums(latents, codes, codewords).float()


def whole_sums(latents: Tensor, codes: Tensor, codewords: int) -> Tensor:
    """`member_sums` in float64, on whole numbers, which come out alike in whatever order a GPU adds them up.

    Latents become multiples of 2^-B of a power of two above the largest, B such that n of them fit in 63 bits: 47 for
    16,384. The sums are as near as that. Where a latent is not finite no sum is.
    """
    bits = 62 - max(1, latents.shape[0]).bit_length()
    limit = torch.linalg.vector_norm(latents, torch.inf)
    # in float64, whose powers of two reach beyond all that a float32 needs, and where a GPU's exp2 is near enough
    exponent = (bits - torch.frexp(limit).exponent).double()
    whole = (latents.double() * torch.exp2(exponent)).long()
    sums = torch.zeros(codewords, latents.shape[1], dtype=torch.int64, device=latents.device)
    sums.index_add_(0, codes, whole)
    found: Tensor = sums.double() * (torch.exp2(-exponent) + (limit - limit))
    return found


def means(latents: Tensor, codebook: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Each codeword at the mean of its members, (K, latent), and their number (K,); one without members stays.

    Sums are in float64.
    """
    counts = torch.bincount(codes, minlength=len(codebook))
    if latents.device.type == "cpu":
        sums = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, codes, latents.double())
    else:
        sums = whole_sums(latents, codes, len(codebook))
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
