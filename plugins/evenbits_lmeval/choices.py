"""The score of every choice of every item, kept beside the record, so that any metric can be made from it later.

A compressed numpy archive of some 10 bytes a choice. Imports numpy alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_GOLD = -1  # several right answers, or nothing to choose from


@dataclass(frozen=True)
class ChoiceScores:
    """n items, m choices of all items one after another.

    item: (n,) S16, the first 16 hex digits of the sha256 of its content (lm-eval's `doc_hash`)
    gold: (n,) int16, the right choice, or NO_GOLD
    choices: (n,) int16, how many it has; 1 where a text is scored by itself (LAMBADA), whose acc is `greedy`
    log_likelihood: (m,) float32 or float64, nats, summed over the continuation's tokens
    greedy: (m,) bool, whether greedy decoding would write it
    tokens, context_tokens: (m,) int32, of the continuation and of what stands before it
    cut_tokens: (m,) int32, how many of these were lost on the left for want of context
    characters, utf8_bytes: (m,) int32, of the choice's text, without the space before it
    """

    item: NDArray[Any]
    gold: NDArray[Any]
    choices: NDArray[Any]
    log_likelihood: NDArray[Any]
    greedy: NDArray[Any]
    tokens: NDArray[Any]
    context_tokens: NDArray[Any]
    cut_tokens: NDArray[Any]
    characters: NDArray[Any]
    utf8_bytes: NDArray[Any]

    def chosen(self, per: Sequence[float] | NDArray[Any] | None = None) -> NDArray[np.int64]:
        """(n,) the choice of highest log-likelihood, or of highest log-likelihood per `per` (m,); the first of ties."""
        scores = self.log_likelihood if per is None else self.log_likelihood / np.asarray(per, dtype=np.float64)
        parts = np.split(scores, np.cumsum(self.choices)[:-1])
        return np.array([int(part.argmax()) for part in parts], dtype=np.int64)

    def acc(self) -> NDArray[np.float64]:
        """(n,) 0 or 1: lm-eval's `acc`."""
        return self._right(self.chosen())

    def acc_norm(self) -> NDArray[np.float64]:
        """(n,) 0 or 1: lm-eval's `acc_norm`, by characters (in Python's sense, not bytes)."""
        return self._right(self.chosen(self.characters))

    def acc_bytes(self) -> NDArray[np.float64]:
        """(n,) 0 or 1: normalised by the bytes of the choice in UTF-8."""
        return self._right(self.chosen(self.utf8_bytes))

    def _right(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        if (self.gold == NO_GOLD).any():
            raise ValueError("not every item has one right choice among several")
        return np.asarray(chosen == self.gold, dtype=np.float64)

    def to_bytes(self) -> bytes:
        """The same bytes for the same scores."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{each.name: getattr(self, each.name) for each in fields(self)})
        return buffer.getvalue()


def read_choices(data: bytes) -> ChoiceScores:
    """What `ChoiceScores.to_bytes` wrote: the content of a `choices-TASK.npz` beside a record."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return ChoiceScores(**{each.name: archive[each.name] for each in fields(ChoiceScores)})
