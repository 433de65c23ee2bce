"""Exact search of the best symbol stream over a bit-shift trellis: trellis-coded quantisation (arXiv 2406.11235, 3).

The state of a step is the last `state_bits` bits of the stream, a table of 2^state_bits vectors gives what a state
decodes to, and each step spends `symbol_bits` bits. Streams are circular: the first states look back at the last
symbols, so a stream of T symbols is T * symbol_bits bits and no more.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_STATE_BITS = 16
MAX_SYMBOL_BITS = 8  # a survivor is one byte
SURVIVOR_BYTES = 1 << 30
EXHAUSTIVE_GROUPS = 256
# in times the steps that a state remembers. Measured on Gaussian numbers at 2 bits, exhaustive search as the reference:
# 256 steps of 8 state bits lose 0.2 % with a window of 4 memories, 0.03 % with 8, 0.004 % with 12, nothing with 24
WINDOW_MEMORIES = 16


def states(symbols: Tensor, symbol_bits: int, state_bits: int) -> Tensor:
    """The state of each step, int64 (n, T), on the device of the symbols.

    symbols: (n, T), any integer dtype. Bits m * symbol_bits and up of state t are symbol (t - m) mod T, cut to
    `state_bits` bits; a stream shorter than the window repeats in it.
    Raises ValueError for symbols outside [0, 2**symbol_bits), or bits outside 1 <= symbol_bits <= 8, state_bits <= 16.
    """
    _check_bits(symbol_bits, state_bits)
    if symbols.ndim != 2 or not symbols.shape[1] or symbols.is_floating_point():
        raise ValueError(f"symbols are integers (n, T > 0), not {symbols.dtype} of shape {tuple(symbols.shape)}")
    symbols = symbols.long()
    if bool((symbols >> symbol_bits).any()):
        raise ValueError(f"symbols of {symbol_bits} bits lie in [0, {1 << symbol_bits})")
    window = symbols.clone()
    for behind in range(1, -(-state_bits // symbol_bits)):
        window |= symbols.roll(behind, dims=1) << (behind * symbol_bits)
    return window & ((1 << state_bits) - 1)


class Trellis:
    """A table and its search, kept between searches with what they need of memory; not for two threads at once."""

    def __init__(self, table: Tensor, symbol_bits: int) -> None:
        """table: (2**state_bits, d), computed in float32 on its device; may be replaced by one of the same shape.

        Raises ValueError unless 1 <= symbol_bits <= 8, symbol_bits <= state_bits <= 16 and the table is finite.
        """
        rows = table.shape[0] if table.ndim == 2 else 0
        self.symbol_bits = symbol_bits
        self.state_bits = rows.bit_length() - 1
        if table.ndim != 2 or not table.shape[1] or rows != 1 << max(self.state_bits, 0):
            raise ValueError(f"a trellis' table is (2**state_bits, d > 0), not {tuple(table.shape)}")
        _check_bits(symbol_bits, self.state_bits)
        self._shape = table.shape
        self._scratch: dict[str, Any] = {}
        self.table = table

    @property
    def table(self) -> Tensor:
        """float32 (2**state_bits, d)."""
        return self._table

    @table.setter
    def table(self, table: Tensor) -> None:
        if table.shape != self._shape:
            raise ValueError(f"this trellis' table is {tuple(self._shape)}, not {tuple(table.shape)}")
        table = table.detach().float().clone()  # what is searched is what was checked
        if not bool(torch.isfinite(table).all()):
            raise ValueError("a trellis' table is finite")
        self._table = table
        self._one = torch.ones((1, 1, 1), device=table.device)
        self._columns = self._table.t().contiguous()  # (d, states)

    @property
    def groups(self) -> int:
        """Number of sets of states that have the same successors, 2**(state_bits - symbol_bits)."""
        return 1 << (self.state_bits - self.symbol_bits)

    def states(self, symbols: Tensor) -> Tensor:
        """See `evenbits.maths.trellis.states`."""
        return states(symbols, self.symbol_bits, self.state_bits)

    def decode(self, symbols: Tensor) -> Tensor:
        """What symbols (n, T) stand for: float32 (n, T, d)."""
        return self._table[self.states(symbols)]

    def search(
        self, sequences: Tensor, weights: Tensor | None = None, *, passes: int = 1, exhaustive: bool = False
    ) -> Tensor:
        """Symbols int64 (n, T) of least sum_t w_t |x_t - table[s_t]|^2, found by the Viterbi algorithm in float32.

        sequences: (n, T, d), on the table's device. weights: not negative; (T,) or (n, T) by step, or (1 or n, T, d)
        by number.
        The group of states at the seam of the circle is read from the best open path through a window on either side
        of it; the path round the circle is optimal among those through that group. Each further pass takes the path's
        own group at the opposite side for the seam, and can only improve. `exhaustive` tries all groups, at the time
        of all these passes, and is the exact optimum; for up to 256 groups.
        Ties go to the state of the lower number. CPU (numba) and torch sum alike, so that they agree in every symbol.
        Raises ValueError for shapes that do not match, a negative weight, values that are not finite (or whose squares
        are not in float32), or more than 1 GiB of survivors (T * groups bytes).
        """
        if sequences.ndim != 3 or sequences.shape[2] != self._shape[1] or not sequences.shape[1]:
            raise ValueError(f"sequences are (n, T > 0, d = {self._shape[1]}), not {tuple(sequences.shape)}")
        if sequences.device != self._table.device:
            raise ValueError(f"the sequences are on {sequences.device}, the table on {self._table.device}")
        if passes < 1:
            raise ValueError(f"a search takes at least one pass, not {passes}")
        if exhaustive and self.groups > EXHAUSTIVE_GROUPS:
            raise ValueError(f"an exhaustive search is for up to {EXHAUSTIVE_GROUPS} groups, not {self.groups}")
        length = sequences.shape[1]
        memory = -(-self.state_bits // self.symbol_bits)
        window = min(WINDOW_MEMORIES * memory, max(length, 2 * memory))
        rows = max(length, 2 * window)
        if rows * self.groups > SURVIVOR_BYTES:
            raise ValueError(
                f"{rows} steps of {self.groups} groups are {rows * self.groups:,} bytes of survivors, "
                f"more than {SURVIVOR_BYTES:,}: cut the sequence, or use fewer state bits"
            )
        targets = sequences.detach().float().contiguous()
        roots = self._roots(targets, weights)
        if targets.device.type == "cpu" and _numba_is_here():
            symbols = self._search_cpu(targets, roots, window, passes, exhaustive, rows)
        else:
            symbols = self._search_torch(targets, roots, window, passes, exhaustive, rows)
        if symbols is None:
            raise ValueError("a trellis search needs finite sequences and weights, and errors of finite squares")
        return symbols

    def _roots(self, targets: Tensor, weights: Tensor | None) -> Tensor:
        count, length, d = targets.shape
        if weights is None:
            return self._one
        given = weights.detach().float()
        full = given[None, :, None] if given.ndim == 1 else given[:, :, None] if given.ndim == 2 else given
        if full.ndim != 3 or full.shape[0] not in (1, count) or full.shape[1] != length or full.shape[2] not in (1, d):
            raise ValueError(
                f"weights of sequences {tuple(targets.shape)} are (T,), (n, T) or (n, T, d), not {tuple(weights.shape)}"
            )
        if bool((full < 0).any()):
            raise ValueError("a trellis search's weights are not negative")
        return full.sqrt().contiguous()

    def _search_cpu(
        self, targets: Tensor, roots: Tensor, window: int, passes: int, exhaustive: bool, rows: int
    ) -> Tensor | None:
        from evenbits.maths import trellis_cpu

        back = self._scratch.get("back")
        if back is None or back.shape[0] < rows:
            back = self._scratch["back"] = torch.empty((rows, self.groups), dtype=torch.uint8).numpy()
            count = self._shape[0]
            self._scratch["rest"] = [torch.empty(size).numpy() for size in (self.groups, count, max(count // 2, 1))]
        symbols = torch.empty(targets.shape[:2], dtype=torch.int64)
        given = targets.numpy(), roots.numpy(), self._columns.numpy(), self.symbol_bits
        scratch = back, *self._scratch["rest"]
        if exhaustive:
            finite = trellis_cpu.search_exhaustive(*given, symbols.numpy(), *scratch)
        else:
            finite = trellis_cpu.search(*given, window, passes, symbols.numpy(), *scratch)
        return symbols if finite else None

    def _search_torch(
        self, targets: Tensor, roots: Tensor, window: int, passes: int, exhaustive: bool, rows: int
    ) -> Tensor | None:
        from evenbits.maths.trellis_torch import TorchTrellis

        found = []
        # survivors, and about six arrays of a float32 for each state
        chunk = max(1, SURVIVOR_BYTES // (rows * self.groups + 24 * self._shape[0]))
        for start in range(0, targets.shape[0], chunk):
            part = slice(start, start + chunk)
            engine = TorchTrellis(
                targets[part], roots if roots.shape[0] == 1 else roots[part], self._columns, self.symbol_bits
            )
            symbols = engine.search_exhaustive() if exhaustive else engine.search(window, passes)
            if symbols is None:
                return None
            found.append(symbols)
        return torch.cat(found) if found else torch.empty(targets.shape[:2], dtype=torch.int64, device=targets.device)


def _check_bits(symbol_bits: int, state_bits: int) -> None:
    if not 1 <= symbol_bits <= MAX_SYMBOL_BITS or not symbol_bits <= state_bits <= MAX_STATE_BITS:
        raise ValueError(
            f"a trellis has 1 to {MAX_SYMBOL_BITS} bits a symbol, and as many to {MAX_STATE_BITS} bits a state, "
            f"not {symbol_bits} and {state_bits}"
        )


@cache
def _numba_is_here() -> bool:
    return importlib.util.find_spec("numba") is not None
