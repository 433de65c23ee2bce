"""Indices of a matrix's sub-vectors, with or without feeding each column's error to the later ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evenbits.maths.hessian import dead_columns, inverse_factor, revive

# (lines, chunks, d) and weights (lines, chunks, d) -> indices (lines, chunks), and what they decode to
Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_LAZY = 128  # columns per lazy update, as in GPTQ: changes speed, not the result


def feed_back(
    weight: Tensor, scale: Tensor, moment: Tensor, search: Search, d: int, *, damping: float, act_order: bool, name: str
) -> Tensor:
    """Indices (in, chunks) of the columns of `weight`, each column searched with all corrections made so far.

    weight: (out, in) float32; scale: (out,) float32, as stored; moment: (in, in) second moment of the inputs.
    A column's entries are divided by the row scales and cut along the outputs in sub-vectors of d, padded with zeros;
    the search weighs entries by the square of their row's scale, so that it minimises the error of the weights.
    The feedback is GPTQ's (arXiv:2210.17323, algorithm 1). Raises TrialFailed, naming the layer, for a second moment
    that no damping makes positive definite.
    """
    rows, columns = weight.shape
    chunks = -(-rows // d)
    weight = weight.masked_fill(dead_columns(moment).to(weight.device), 0.0)
    moment = revive(moment.to(weight.device))
    diagonal = torch.diagonal(moment)
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(columns, device=weight.device)
    )
    upper = inverse_factor(moment[order][:, order], damping, name).upper.float()
    pivots: list[float] = torch.diagonal(upper).tolist()
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    importance = padded(scale.square(), chunks * d).reshape(1, chunks, d)
    work = weight.t()[order].contiguous()
    indices = torch.empty((columns, chunks), dtype=torch.int64, device=weight.device)
    places: list[int] = order.tolist()
    for start in range(0, columns, _LAZY):
        stop = min(start + _LAZY, columns)
        errors = work.new_empty((stop - start, rows))
        for i in range(start, stop):
            column = padded(work[i] * inverse, chunks * d).reshape(1, chunks, d)
            found, decoded = search(column, importance)
            indices[places[i]] = found[0]
            error = torch.sub(work[i], decoded.reshape(-1)[:rows] * scale, out=errors[i - start])
            error.div_(pivots[i])
            if i + 1 < stop:
                work[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return indices


def padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]))


def least_squares_scale(weight: Tensor, pattern: Tensor, moment: Tensor | None) -> Tensor:
    """(out,) float32: the factor of each row of `pattern` that brings it nearest to `weight`, not below zero.

    Nearest under the second moment (in, in) of the inputs where one is given: r = w M p / p M p. Zero for a zero row.
    """
    wide, pattern = weight.double(), pattern.double()
    seen = pattern if moment is None else pattern @ moment.double().to(pattern.device)
    norm = (seen * pattern).sum(1)
    return ((wide * seen).sum(1) / torch.where(norm > 0, norm, 1.0)).clamp_min(0.0).float()
