"""Codes packed into int32 words, as GPTQ's, AWQ's and compressed-tensors' files have them. Imports torch."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
_AT_A_TIME = 1 << 22  # codes unpacked at once: on the way each takes 8 bytes, and there are several of it


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """(rows, words) int32 -> (rows, count) uint8: code i lies in the bits i * bits and up of its row.

    A code may begin in one word and end in the next (3 bits: the codes 10 and 21 of every 32).
    """
    begin = torch.arange(count, device=packed.device) * bits
    word, shift = begin // WORD, begin % WORD
    following = (word + 1).clamp(max=packed.shape[1] - 1)  # past the end no code crosses
    crosses = WORD % bits != 0
    codes = torch.empty(packed.shape[0], count, dtype=torch.uint8, device=packed.device)
    rows = max(1, _AT_A_TIME // max(1, count))
    for start in range(0, packed.shape[0], rows):
        part = packed[start : start + rows].to(torch.int64) & 0xFFFFFFFF
        found = part[:, word] >> shift
        if crosses:
            found |= part[:, following] << (WORD - shift)
        codes[start : start + rows] = (found & (2**bits - 1)).to(torch.uint8)
    return codes


def unpack_padded(packed: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack`, where no code crosses into another word: 32 // bits of them a word, the bits left over unused."""
    per_word = WORD // bits
    index = torch.arange(count, device=packed.device)
    shifted = packed[:, index // per_word] >> (index % per_word * bits).to(torch.int32)
    codes: Tensor = (shifted & (2**bits - 1)).to(torch.uint8)
    return codes
