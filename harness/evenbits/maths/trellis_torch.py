"""`evenbits.maths.trellis` in torch: on the GPU, where numba is missing, and the oracle of the numba kernel.

All sequences of a chunk go through a step together. The sums are those of `trellis_cpu`, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

RENORM = 64  # as in trellis_cpu: the costs are equal bit by bit only if both subtract at the same steps


class TorchTrellis:
    """The passes over one chunk of sequences.

    targets (n, T, d); roots of the weights (1 or n, 1 or T, 1 or d); table (d, states); float32, one device.
    """

    def __init__(self, targets: Tensor, roots: Tensor, table: Tensor, bits: int) -> None:
        self.targets, self.table, self.bits = targets, table, bits
        self.roots = roots.expand(targets.shape[0], targets.shape[1], targets.shape[2])
        self.count, self.length = targets.shape[0], targets.shape[1]
        self.groups = table.shape[1] >> bits

    def search(self, window: int, passes: int) -> Tensor | None:
        """Symbols int64 (n, T), or None when a cost is not finite."""
        seam, group = 0, self._guess(window)
        symbols = torch.empty(0)
        for number in range(passes):
            if number:
                seam = self.length // 2 if number % 2 else 0
                group = torch.zeros_like(group)
                for behind in range((15 + self.bits) // self.bits):
                    group |= symbols[:, (seam - 1 - behind) % self.length] << (behind * self.bits)
                group &= self.groups - 1
            cost, back = self._closed(seam, group)
            if not bool(torch.isfinite(cost).all()):
                return None
            symbols = self._trace(back, seam, group)
        return symbols

    def search_exhaustive(self) -> Tensor | None:
        """As `search`, from every group at the seam; the lowest of the best groups wins."""
        least = self.targets.new_full((self.count,), torch.inf, dtype=torch.float64)
        chosen = torch.zeros_like(least, dtype=torch.int64)
        for number in range(self.groups):
            cost, _ = self._closed(0, torch.full_like(chosen, number))
            better = cost < least
            least, chosen = torch.where(better, cost, least), torch.where(better, number, chosen)
        if not bool(torch.isfinite(least).all()):
            return None
        _, back = self._closed(0, chosen)
        return self._trace(back, 0, chosen)

    def _forward(self, best: Tensor, first: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Costs of the groups (n, groups) after the steps, what has been taken from them (n,), and the survivors."""
        d = self.table.shape[0]
        back = torch.empty((steps, self.count, self.groups), dtype=torch.uint8, device=best.device)
        taken = torch.zeros(self.count, dtype=torch.float64, device=best.device)
        for step in range(steps):
            position = (first + step) % self.length
            costs = best.repeat_interleave(1 << self.bits, dim=1)  # (n, states)
            for k in range(0, d, 2):
                error = self._error(position, k)
                costs = costs + (error + self._error(position, k + 1) if k + 1 < d else error)
            best, survivor = costs.view(self.count, 1 << self.bits, self.groups).min(dim=1)  # ties: the first
            back[step] = survivor
            if step % RENORM == RENORM - 1:
                common = best[:, :1]
                taken += common[:, 0]
                best = best - common
        return best, taken, back

    def _error(self, position: int, k: int) -> Tensor:
        root = self.roots[:, position, k, None]
        return (root * self.table[k] - root * self.targets[:, position, k, None]).square()

    def _guess(self, window: int) -> Tensor:
        """The group between the last and the first position on the best path through `window` steps on either side."""
        best, _, back = self._forward(self.targets.new_zeros((self.count, self.groups)), -window, 2 * window)
        group = best.argmin(dim=1)
        for step in range(2 * window - 1, window - 1, -1):
            group = self._state(back[step], group) >> self.bits
        circle = self.length * self.bits
        if (1 << min(circle, 16)) < self.groups:
            stream = group & ((1 << circle) - 1)
            group = torch.zeros_like(group)
            for shift in range(0, 16, circle):
                group |= stream << shift
            group &= self.groups - 1
        return group

    def _state(self, survivor: Tensor, group: Tensor) -> Tensor:
        return survivor.gather(1, group[:, None])[:, 0].long() * self.groups + group

    def _closed(self, seam: int, group: Tensor) -> tuple[Tensor, Tensor]:
        best = self.targets.new_full((self.count, self.groups), torch.inf)
        best.scatter_(1, group[:, None], 0.0)
        best, taken, back = self._forward(best, seam, self.length)
        return taken + best.gather(1, group[:, None])[:, 0], back

    def _trace(self, back: Tensor, seam: int, group: Tensor) -> Tensor:
        symbols = torch.empty((self.count, self.length), dtype=torch.int64, device=group.device)
        for step in range(self.length - 1, -1, -1):
            state = self._state(back[step], group)
            symbols[:, (seam + step) % self.length] = state & ((1 << self.bits) - 1)
            group = state >> self.bits
        return symbols
