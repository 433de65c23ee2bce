"""Hidden states that wait between two blocks of a model, in memory or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from evenbits.errors import TrialFailed

HELD_BYTES = 1 << 30  # of all batches together; more than this waits in a file


class HiddenStates:
    """One tensor (B, T, width) a batch, replaced from block to block: in memory up to `held_bytes` in all, else in a
    file in the system's temporary folder, which is gone when closed, or with the process. Where that folder lies in
    memory (tmpfs), point TMPDIR to a disk.

    Plain reads and writes in place of a mapped file: pages of a mapping would count as resident memory.
    """

    def __init__(self, sizes: Sequence[torch.Size], device: torch.device, held_bytes: int = HELD_BYTES) -> None:
        """sizes: (B, T) by batch. device: where they are wanted; they wait on the CPU."""
        self._sizes, self._device, self._limit = sizes, device, held_bytes
        self._before = [0, *accumulate(size.numel() for size in sizes)]  # tokens of the batches before each
        self._held: dict[int, Tensor] = {}
        self._file: Any = None  # its class differs by system
        self._width, self._dtype = 0, torch.float32

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    @property
    def in_file(self) -> bool:
        return self._file is not None

    def __setitem__(self, index: int, states: Tensor) -> None:
        if not self._width:
            self._width, self._dtype = states.shape[-1], states.dtype
            if self._place(len(self._sizes)) > self._limit:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        states = states.detach().cpu().contiguous()
        if self._file is None:
            self._held[index] = states
        else:
            self._file.seek(self._place(index))
            self._file.write(_bytes_of(states))

    def __getitem__(self, index: int) -> Tensor:
        if self._file is None:
            return self._held[index].to(self._device)
        states = torch.empty(*self._sizes[index], self._width, dtype=self._dtype)
        self._file.seek(self._place(index))
        read = self._file.readinto(_bytes_of(states))
        if read != states.nbytes:
            raise TrialFailed(f"the temporary file of hidden states ends early ({read} of {states.nbytes} bytes)")
        return states.to(self._device)

    def _place(self, index: int) -> int:
        """Bytes of the batches before."""
        return self._before[index] * self._width * self._dtype.itemsize


def _bytes_of(states: Tensor) -> memoryview:
    """The memory of a contiguous tensor itself."""
    found: memoryview = states.view(torch.uint8).flatten().numpy().data
    return found
