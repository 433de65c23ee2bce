"""What an export into another library's format needs of it: which layers it can hold, and how it writes one.

Codes, scales and zero points are carried over as they are; nothing is quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from evenbits.maths.bitpack import pack
from evenbits.maths.uniform import OnGrid

WORD = 32  # bits of the int32 that both formats pack codes into


@dataclass(frozen=True)
class Held:
    """How one layer is held: what a format's config says of it.

    groups: of a row. size: columns of a group. ordered: whether groups are not runs of neighbouring columns.
    """

    name: str
    bits: int
    size: int
    groups: int
    symmetric: bool
    ordered: bool


class PackedFormat(Protocol):
    name: str
    transposed: bool  # whether it can hold GPT-2's Conv1D, whose weight stands (in, out) in a model

    def refusal(self, found: OnGrid) -> str | None:
        """Why it cannot hold this layer, as the end of a sentence on the layer; None where it can."""
        ...

    def tensors(self, found: OnGrid) -> dict[str, Tensor]:
        """What it stores for the layer, by the end of the tensor's name."""
        ...

    def read_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a reader computes (codes - zero) * scale in, for a model of this dtype."""
        ...

    def config(self, held: Sequence[Held], dense: Sequence[str]) -> Mapping[str, Any]:
        """The quantization_config. dense: modules that hold ordinary weights, all of those it may take for linear.

        Raises ArtifactError where the layers together are more than it can say.
        """
        ...


def held(name: str, found: OnGrid) -> Held:
    grid = found.grid
    symmetric = bool((grid.zero == 1 << (grid.bits - 1)).all())
    return Held(name, grid.bits, found.group_size, grid.scale.shape[1], symmetric, not found.neighbours)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 (rows, ceil(columns * bits / 32)): each row of codes (rows, columns) as one stream of bits, the least
    significant first; the unused high bits of the last word are zero."""
    rows, columns = codes.shape
    padded = functional.pad(codes.to(torch.int32), (0, -columns % WORD))  # so that every row begins at a word
    words = pack(padded, bits).view(torch.int32).view(rows, -1)
    return words[:, : -(-columns * bits // WORD)].contiguous()
