"""The numba kernel of `evenbits.maths.trellis`: one sequence at a time, one step after the other, states in vectors.

A state s = u * groups + j is reached from, and gives, groups: states of equal low bits j have the same successors
j * 2^bits + symbol. So a step is three passes over contiguous arrays: the least cost of each group goes to its
successors, each adds its error, and each group takes the least of its 2^bits states. The loops are plain and without
slices or signed offsets, because only then does LLVM make vectors of them (ten times faster on AVX-512).
Sums are rounded as written (no contraction to fused products): the result is that of `trellis_torch`, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])

RENORM = 64  # steps between subtractions of a common amount from all costs, that float32 stay fine in long sequences


def _compiled(function: F) -> F:
    return cast(F, numba.njit(function, cache=True, nogil=True, error_model="numpy"))


@_compiled
def _spread2(source: Floats, target: Floats, count: int) -> None:
    for j in range(count):
        cost = source[j]
        target[2 * j] = cost
        target[2 * j + 1] = cost


@_compiled
def _spread4(source: Floats, target: Floats, count: int) -> None:
    for j in range(count):
        cost = source[j]
        target[4 * j] = cost
        target[4 * j + 1] = cost
        target[4 * j + 2] = cost
        target[4 * j + 3] = cost


@_compiled
def _spread(best: Floats, costs: Floats, half: Floats, bits: int) -> None:
    """costs[j * 2^bits + i] = best[j]; `half` is scratch."""
    groups = best.shape[0]
    if bits == 1:
        _spread2(best, costs, groups)
    elif bits == 2:
        _spread4(best, costs, groups)
    elif bits == 3:
        _spread4(best, half, groups)
        _spread2(half, costs, 4 * groups)
    elif bits == 4:
        _spread4(best, half, groups)
        _spread4(half, costs, 4 * groups)
    else:
        for j in range(groups):
            costs[j << bits : (j + 1) << bits] = best[j]


@_compiled
def _add_one(costs: Floats, table: Floats, k: int, root: float, target: float) -> None:
    for s in range(costs.shape[0]):
        error = root * table[k, s] - target
        costs[s] += error * error


@_compiled
def _add_two(costs: Floats, table: Floats, k: int, root: float, target: float, root2: float, target2: float) -> None:
    after = k + 1
    for s in range(costs.shape[0]):
        error = root * table[k, s] - target
        error2 = root2 * table[after, s] - target2
        costs[s] += error * error + error2 * error2


@_compiled
def _least_of_two(costs: Floats, best: Floats, back: Bytes, step: int) -> None:
    groups = best.shape[0]
    for j in range(groups):
        cost0 = costs[j]
        cost1 = costs[groups + j]
        second = cost1 < cost0
        best[j] = cost1 if second else cost0
        back[step, j] = np.uint8(1) if second else np.uint8(0)


@_compiled
def _least_of_four(costs: Floats, best: Floats, back: Bytes, step: int) -> None:
    groups = best.shape[0]
    for j in range(groups):
        cost0 = costs[j]
        cost1 = costs[groups + j]
        cost2 = costs[2 * groups + j]
        cost3 = costs[3 * groups + j]
        odd = cost1 < cost0
        low = cost1 if odd else cost0
        from_low = np.int32(1) if odd else np.int32(0)
        odd = cost3 < cost2
        high = cost3 if odd else cost2
        from_high = np.int32(3) if odd else np.int32(2)
        upper = high < low
        best[j] = high if upper else low
        back[step, j] = np.uint8(from_high if upper else from_low)


@_compiled
def _four_more(costs: Floats, best: Floats, back: Bytes, step: int, first: np.int32) -> None:
    groups = np.uintp(best.shape[0])
    start = np.uintp(first) * groups
    for signed in range(best.shape[0]):
        j = np.uintp(signed)
        cost0 = costs[start + j]
        cost1 = costs[start + groups + j]
        cost2 = costs[start + groups + groups + j]
        cost3 = costs[start + groups + groups + groups + j]
        odd = cost1 < cost0
        low = cost1 if odd else cost0
        from_low = np.int32(1) if odd else np.int32(0)
        odd = cost3 < cost2
        high = cost3 if odd else cost2
        from_high = np.int32(3) if odd else np.int32(2)
        upper = high < low
        low = high if upper else low
        from_low = (from_high if upper else from_low) + first
        lower = low < best[j]
        best[j] = low if lower else best[j]
        back[step, j] = np.uint8(from_low if lower else np.int32(back[step, j]))


@_compiled
def _forward(
    targets: Floats, roots: Floats, row: int, table: Floats, bits: int, first: int, steps: int,
    back: Bytes, best: Floats, costs: Floats, half: Floats,
) -> float:  # fmt: skip
    """`steps` steps from position `first` on, circularly; `best` goes from the costs of the groups before to after.

    back[step, j] names the state j + groups * back of step `step` that group j comes from. Returns what has been
    taken from all costs.
    """
    length = targets.shape[1]
    d = table.shape[0]
    root_row = min(row, roots.shape[0] - 1)
    root_last = roots.shape[2] - 1
    taken = 0.0
    position = first
    for step in range(steps):
        root_at = min(position, roots.shape[1] - 1)
        _spread(best, costs, half, bits)
        for k in range(0, d - 1, 2):
            root = roots[root_row, root_at, min(k, root_last)]
            root2 = roots[root_row, root_at, min(k + 1, root_last)]
            target = root * targets[row, position, k]
            target2 = root2 * targets[row, position, k + 1]
            _add_two(costs, table, k, root, target, root2, target2)
        if d % 2:
            root = roots[root_row, root_at, root_last]
            _add_one(costs, table, d - 1, root, root * targets[row, position, d - 1])
        if bits == 1:
            _least_of_two(costs, best, back, step)
        else:
            _least_of_four(costs, best, back, step)
            for u in range(4, 1 << bits, 4):
                _four_more(costs, best, back, step, np.int32(u))
        if step % RENORM == RENORM - 1:
            common = best[0]
            taken += common
            for j in range(best.shape[0]):
                best[j] -= common
        position = position + 1 if position + 1 < length else 0
    return taken


@_compiled
def _group_before(back: Bytes, bits: int, group: int, steps: int, before: int) -> int:
    """The group that the survivor of `group` after `steps` steps was in before step `before`."""
    groups = back.shape[1]
    for step in range(steps - 1, before - 1, -1):
        group = (np.int64(back[step, group]) * groups + group) >> bits
    return group


@_compiled
def _guess(
    targets: Floats, roots: Floats, row: int, table: Floats, bits: int, seam: int, window: int,
    back: Bytes, best: Floats, costs: Floats, half: Floats,
) -> int:  # fmt: skip
    """The group between positions seam - 1 and seam on the best path through the `window` steps on either side."""
    length = targets.shape[1]
    groups = best.shape[0]
    best[:] = 0
    _forward(targets, roots, row, table, bits, (seam - window) % length, 2 * window, back, best, costs, half)
    group = _group_before(back, bits, int(np.argmin(best)), 2 * window, window)
    circle = length * bits
    if (1 << min(circle, 16)) < groups:  # only a group that repeats the whole stream can be both before and after it
        stream = group & ((1 << circle) - 1)
        group = 0
        for shift in range(0, 16, circle):
            group |= stream << shift
        group &= groups - 1
    return group


@_compiled
def _closed(
    targets: Floats, roots: Floats, row: int, table: Floats, bits: int, seam: int, group: int,
    back: Bytes, best: Floats, costs: Floats, half: Floats,
) -> float:  # fmt: skip
    """Cost of the best path round the circle from `seam` that begins and ends in `group`."""
    best[:] = np.inf
    best[group] = 0
    taken = _forward(targets, roots, row, table, bits, seam, targets.shape[1], back, best, costs, half)
    return taken + float(best[group])


@_compiled
def _trace(back: Bytes, bits: int, group: int, seam: int, symbols: Integers, row: int) -> None:
    length = symbols.shape[1]
    groups = back.shape[1]
    for step in range(length - 1, -1, -1):
        state = np.int64(back[step, group]) * groups + group
        symbols[row, (seam + step) % length] = state & ((1 << bits) - 1)
        group = state >> bits


@_compiled
def search(
    targets: Floats, roots: Floats, table: Floats, bits: int, window: int, passes: int, symbols: Integers,
    back: Bytes, best: Floats, costs: Floats, half: Floats,
) -> bool:  # fmt: skip
    """Fill `symbols` (n, T); False when a cost is not finite. All arrays are C-contiguous.

    targets (n, T, d); roots of the weights (1 or n, 1 or T, 1 or d); table (d, states). Scratch: back (at least T and
    2 * window, groups), best (groups,), costs (states,), half (states / 2,).
    """
    length = targets.shape[1]
    groups = best.shape[0]
    for row in range(targets.shape[0]):
        seam = 0
        group = _guess(targets, roots, row, table, bits, seam, window, back, best, costs, half)
        for number in range(passes):
            if number:
                seam = length // 2 if number % 2 else 0
                group = 0
                for behind in range((15 + bits) // bits):
                    group |= symbols[row, (seam - 1 - behind) % length] << (behind * bits)
                group &= groups - 1
            cost = _closed(targets, roots, row, table, bits, seam, group, back, best, costs, half)
            if not np.isfinite(cost):
                return False
            _trace(back, bits, group, seam, symbols, row)
    return True


@_compiled
def search_exhaustive(
    targets: Floats, roots: Floats, table: Floats, bits: int, symbols: Integers,
    back: Bytes, best: Floats, costs: Floats, half: Floats,
) -> bool:  # fmt: skip
    """As `search`, from every group at the seam; the lowest of the best groups wins."""
    for row in range(targets.shape[0]):
        least = np.inf
        chosen = 0
        for group in range(best.shape[0]):
            cost = _closed(targets, roots, row, table, bits, 0, group, back, best, costs, half)
            if cost < least:
                least = cost
                chosen = group
        if not np.isfinite(least):
            return False
        _closed(targets, roots, row, table, bits, 0, chosen, back, best, costs, half)
        _trace(back, bits, chosen, 0, symbols, row)
    return True
