"""How a matrix is cut in sub-vectors, and which of them are normalised together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Norm

Axis = Literal["in", "out"]


def cut(weight: Tensor, axis: Axis, d: int) -> Tensor:
    """(out, in) -> (lines, chunks, d): each line in sub-vectors of d neighbours, the last one padded with zeros.

    axis "in": a line is a row, and its neighbours lie along the inputs; "out": a line is a column, one input's.
    """
    lines = weight if axis == "in" else weight.t()
    count, length = lines.shape
    chunks = -(-length // d)
    return functional.pad(lines, (0, chunks * d - length)).reshape(count, chunks, d)


def join(vectors: Tensor, axis: Axis, out_features: int, in_features: int) -> Tensor:
    """(lines, chunks, d) -> (out, in): undoes `cut`, differentiably; what was padding is dropped."""
    length = in_features if axis == "in" else out_features
    lines = vectors.flatten(1)[:, :length]
    return lines if axis == "in" else lines.t()


def order(vectors: Tensor, norm: Norm) -> Tensor:
    """(lines, chunks, ...) -> (groups, per_group, ...): the sub-vectors, or anything by sub-vector such as indices.

    "row": a group is a line. "code": as the released code reads its array, chunk by chunk and line by line within a
    chunk, as many neighbours in that order as a line has chunks; so a group is of many lines at one place.
    "layernorm", "none": each sub-vector alone.
    """
    lines, chunks = vectors.shape[:2]
    if norm == "row":
        return vectors
    if norm == "code":
        return vectors.transpose(0, 1).reshape(lines, chunks, *vectors.shape[2:])
    return vectors.reshape(lines * chunks, 1, *vectors.shape[2:])


def restore_order(groups: Tensor, norm: Norm, lines: int, chunks: int) -> Tensor:
    """(groups, per_group, ...) -> (lines, chunks, ...): undoes `order`, differentiably."""
    rest = groups.shape[2:]
    if norm == "code":
        return groups.reshape(chunks, lines, *rest).transpose(0, 1)
    return groups.reshape(lines, chunks, *rest)
