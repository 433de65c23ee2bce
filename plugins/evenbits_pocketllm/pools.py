"""Groups of sub-vectors to train on: those of equal length together, cut in steps of whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits.errors import TrialFailed

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Settings

_AT_ONCE = 1 << 16  # sub-vectors that pass the networks together where nothing is trained


def pooled(matrices: Sequence[Tensor], options: Settings) -> dict[int, Tensor]:
    """The groups of all matrices by their length: (groups, per_group, d) float32 for each per_group.

    Raises TrialFailed for vectors that are not finite, and for affine gains over groups of unlike length.
    """
    pools: dict[int, list[Tensor]] = {}
    for vectors in matrices:
        if vectors.ndim != 3 or vectors.shape[2] != options.d or not vectors.numel():
            raise ValueError(f"vectors (groups, per_group, {options.d}) are needed, not {tuple(vectors.shape)}")
        if not bool(torch.isfinite(vectors).all()):
            raise TrialFailed("sub-vectors that are not finite")
        pools.setdefault(vectors.shape[1], []).append(vectors.detach().float())
    if not pools:
        raise ValueError("no sub-vectors")
    if options.affine and options.rln != "layernorm" and len(pools) > 1:
        lengths = ", ".join(map(str, sorted(pools)))
        raise TrialFailed(f"affine gains belong to places of a group: groups of {lengths} sub-vectors share none")
    return {length: parts[0] if len(parts) == 1 else torch.cat(parts) for length, parts in pools.items()}


def by_matrix(codes: Tensor, matrices: Sequence[Tensor], pools: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """Codes (n,), pool by pool -> (groups, per_group) of each matrix, in the order of the matrices."""
    rest: dict[int, Tensor] = {}
    for length, pool in pools.items():
        count = pool.shape[0] * length
        rest[length], codes = codes[:count].view(-1, length), codes[count:]
    found = []
    for vectors in matrices:
        groups, length = vectors.shape[:2]
        found.append(rest[length][:groups])
        rest[length] = rest[length][groups:]
    return tuple(found)


def steps_of(pool: Tensor, options: Settings) -> int:
    """Steps of an epoch: the number that brings whole groups a step nearest to the batch asked for."""
    return min(pool.shape[0], max(1, round(pool.shape[0] * pool.shape[1] / options.batch)))


def batches(pool: Tensor, options: Settings, generator: torch.Generator) -> Sequence[Tensor | slice]:
    """The groups of each step of an epoch: every group once, steps differing by one group at most."""
    groups, steps = pool.shape[0], steps_of(pool, options)
    borders = [groups * step // steps for step in range(steps + 1)]
    slices = [slice(first, last) for first, last in pairwise(borders)]
    if not options.shuffle:
        return slices
    drawn = torch.randperm(groups, generator=generator).to(pool.device)
    return [drawn[part] for part in slices]


def pieces(pool: Tensor) -> list[Tensor]:
    """A pool in parts small enough to pass the networks at once."""
    step = max(1, _AT_ONCE // pool.shape[1])
    return [pool[first : first + step] for first in range(0, pool.shape[0], step)]
