"""What token sequences share at their front: sorted so that neighbours share most; cut into rows, each one tree.

A row holds consecutive sequences of the sorted list. A token position that several of them have in common is one node
of the row; a node's ancestors stand before it, its depth is its position in the sequence. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Prefixes:
    """Distinct sequences in lexicographic order."""

    sequences: list[Array]  # int32 tokens each
    shared: Array  # (n,) int64: tokens at the front in common with the sequence before; 0 for the first
    index: Array  # (given,) int64: where each given sequence stands in `sequences`

    @property
    def lengths(self) -> Array:
        return np.fromiter((len(sequence) for sequence in self.sequences), np.int64, len(self.sequences))

    @property
    def nodes(self) -> int:
        """Tokens to encode if all sequences made one tree."""
        return int(self.lengths.sum() - self.shared.sum())


@dataclass(frozen=True)
class Row:
    """Consecutive sequences first..last-1 of the sorted list as one tree of `size` nodes."""

    first: int
    last: int
    size: int


@dataclass(frozen=True)
class Layout:
    """A row's nodes in the order in which they are encoded."""

    tokens: Array  # (size,) int32
    depths: Array  # (size,) int64: position of the node in its sequences
    paths: list[Array]  # for each sequence of the row, the nodes of its tokens from the front, (length,) int64
    starts: Array  # (sequences,) int64: where the nodes of its own begin

    def allow(self, mask: Array) -> None:
        """Set mask[node, other] = True where the node may see the other: its ancestors and itself.

        mask: (size, size) bool, all False before.
        """
        for path, start in zip(self.paths, self.starts.tolist(), strict=True):
            stop = start + len(path) - int(self.depths[start])  # distinct and sorted: each has nodes of its own
            mask[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
            above = path[: len(path) - (stop - start)]
            mask[start:stop, above] = True


def sort_prefixes(sequences: Sequence[Sequence[int] | Array]) -> Prefixes:
    """Sort sequences (each of 1 or more ids, 0 <= id < 2^31), duplicates once, and count what neighbours share."""
    keys = [np.asarray(sequence, dtype=">u4").tobytes() for sequence in sequences]  # big-endian: bytes sort as ids do
    ordered = sorted(set(keys))
    place = {key: at for at, key in enumerate(ordered)}
    arrays = [np.frombuffer(key, dtype=">u4").astype(np.int32) for key in ordered]
    shared = np.zeros(len(arrays), dtype=np.int64)
    for at in range(1, len(arrays)):
        shared[at] = _common(arrays[at - 1], arrays[at])
    index = np.fromiter((place[key] for key in keys), np.int64, len(keys))
    return Prefixes(arrays, shared, index)


def _common(one: Array, other: Array) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    at = int(differs.argmax())
    return at if differs[at] else length


def cut_rows(prefixes: Prefixes, longest: int, fixed: float, quadratic: float) -> list[Row]:
    """Cut the sorted sequences into rows of at most `longest` nodes at the least cost.

    A cut encodes twice what it splits. A row of s nodes costs fixed + s + quadratic s^2, in tokens' worth of the
    linear layers. A sequence longer than `longest` has a row of its own. Exact: dynamic programming over the cuts.
    """
    count = len(prefixes.sequences)
    shared = prefixes.shared
    grown = np.concatenate([[0], np.cumsum(prefixes.lengths - shared)])  # nodes of sequences before each
    best = np.zeros(count + 1)
    origin = np.zeros(count + 1, dtype=np.int64)
    low = 0
    for end in range(1, count + 1):
        while low < end - 1 and grown[end] - grown[low] > longest:
            low += 1
        sizes = (shared[low:end] + grown[end] - grown[low:end]).astype(np.float64)
        costs = best[low:end] + fixed + sizes * (1 + quadratic * sizes)
        costs[:-1][sizes[:-1] > longest] = np.inf
        pick = int(costs.argmin())
        best[end], origin[end] = costs[pick], low + pick
    rows: list[Row] = []
    end = count
    while end:
        first = int(origin[end])
        rows.append(Row(first, end, int(shared[first] + grown[end] - grown[first])))
        end = first
    return rows[::-1]


def lay_out(prefixes: Prefixes, row: Row) -> Layout:
    """The nodes of a row: each sequence adds those that the one before does not have."""
    tokens, depths, paths, starts = [], [], [], []
    used = 0
    path = np.zeros(0, dtype=np.int64)
    for at in range(row.first, row.last):
        sequence = prefixes.sequences[at]
        kept = 0 if at == row.first else int(prefixes.shared[at])
        own = len(sequence) - kept
        path = np.concatenate([path[:kept], np.arange(used, used + own)])
        tokens.append(sequence[kept:])
        depths.append(np.arange(kept, len(sequence)))
        paths.append(path)
        starts.append(used)
        used += own
    return Layout(np.concatenate(tokens), np.concatenate(depths), paths, np.array(starts, dtype=np.int64))
