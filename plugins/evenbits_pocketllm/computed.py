"""Codewords that are computed from their index, so that a codebook of any size costs no bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# odd multipliers, from the fractional part of the golden ratio and of square roots of primes
_MULTIPLIERS = (0x9E3779B1, 0x6A09E667, 0xBB67AE85)
_STEP = 2.0**-10  # latents are rounded to it, so that no machine's inverse normal differs


@cache
def computed_codewords(bits: int, numbers: int) -> Tensor:
    """(2^bits, numbers) float32: the quantiles of a standard normal, in another fixed order in each column.

    The order is a bijective hash of the index, so every column takes each of the 2^bits mid-quantiles once: neighbours
    in a window of indices (which share all but their last bits) come out unrelated, from some six bits on.
    Do not change the result in place.
    """
    count = 1 << bits
    index = torch.arange(count, dtype=torch.int64)
    columns = []
    for column in range(numbers):
        mixed = index
        for turn, multiplier in enumerate(_MULTIPLIERS):
            odd = (multiplier + 2 * (7919 * column + 104_729 * turn)) | 1
            mixed = (mixed * odd + 0x1234567 * (column + 1)) & (count - 1)
            mixed = mixed ^ (mixed >> max(1, bits // 2))
        quantile = torch.special.ndtri((mixed.double() + 0.5) / count)
        columns.append(((quantile / _STEP).round() * _STEP).float())
    return torch.stack(columns, 1)


def symbol_windows(bits: int, index_bits: int, symbols: int) -> Tensor:
    """(2^bits, symbols) int64: the latest indices in each state of a window, the newest first.

    Bits of older indices that the window no longer holds are zero.
    """
    state = torch.arange(1 << bits, dtype=torch.int64)
    mask = (1 << index_bits) - 1
    return torch.stack([(state >> (index_bits * age)) & mask for age in range(symbols)], 1)
