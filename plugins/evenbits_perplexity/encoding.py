"""A document as tokens, and which bytes and words of it each token stands for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from evenbits.sampling import encode

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Encoded:
    """ids: the tokens of one text. bytes_before, words_before: (tokens + 1,) int64, how many UTF-8 bytes of the text
    belong to the tokens before the i-th, and how many words begin in them; None for a tokenizer without offsets.

    The text is shared out without gap or overlap: a token has the characters from where the tokens before it end to
    where it ends itself, so whitespace that the tokenizer drops belongs to the next token (at the end to the last),
    and a character that is split over several tokens to the first of them. A word, a run of characters that are not
    whitespace, belongs to the token that holds its first character, even where it goes on behind it.
    """

    ids: list[int]
    bytes_before: IntArray | None = None
    words_before: IntArray | None = None


def encode_located(tokenizer: Any, text: str, *, special: bool) -> Encoded:
    """Tokenise a whole text; `special`: let the tokenizer add what it adds by itself (BOS)."""
    if not getattr(tokenizer, "is_fast", False):
        return Encoded(encode(tokenizer, text, special=special))
    found = tokenizer(text, add_special_tokens=special, verbose=False, return_offsets_mapping=True)
    ends = [0, *(end for _, end in found["offset_mapping"])]
    reach: IntArray = np.maximum.accumulate(np.array(ends, dtype=np.int64))  # (tokens + 1,); a special token ends at 0
    if reach[-1]:
        reach[reach == reach[-1]] = len(text)
    bytes_at, words_at = _counts_at(text)
    return Encoded(list(found["input_ids"]), bytes_at[reach], words_at[reach])


def _counts_at(text: str) -> tuple[IntArray, IntArray]:
    """Before each character, and at the end: UTF-8 bytes, and words that have begun. Both (characters + 1,) int64."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    kinds, index = np.unique(points, return_inverse=True)
    space = np.array([chr(kind).isspace() for kind in kinds], dtype=bool)[index]
    begins = ~space & np.concatenate([[True], space[:-1]])[: len(space)]
    return _before(widths), _before(begins)


def _before(counts: Any) -> IntArray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
