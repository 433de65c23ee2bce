"""GPTQ's layout, version 1, as AutoGPTQ and GPTQModel read it: qweight, qzeros, scales and g_idx.

qweight (in * b / 32, out): codes packed down the columns of the transposed weight (in, out); qzeros (groups,
out * b / 32): zero points less one, packed along; scales (groups, out) float16; g_idx (in,): the group of each column.
Widths: 2, 3, 4, 8; at 3 bits 32 codes fill three words, in one stream of bits.
Source: AutoGPTQ 0.7.1, nn_modules/qlinear; GPTQModel 7.6.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evenbits import __version__
from evenbits.errors import ArtifactError
from evenbits.export_formats import WORD, Held, pack_words
from evenbits.maths.uniform import OnGrid

WIDTHS = (2, 3, 4, 8)


class Gptq:
    name = "gptq"
    transposed = True

    def refusal(self, found: OnGrid) -> str | None:
        bits = found.grid.bits
        if bits not in WIDTHS:
            return f"it has codes of {bits} bits, and GPTQ's layout holds {', '.join(map(str, WIDTHS))}"
        unit = WORD if bits == 3 else WORD // bits
        rows, columns = found.codes.shape
        if rows % unit or columns % unit:
            return f"it is {rows} by {columns}, and GPTQ's layout packs {unit} codes of {bits} bits together"
        zeros = int((found.grid.zero == 0).sum())
        if zeros:
            return (
                f"{zeros} of its {found.grid.zero.numel()} groups have zero point 0, and GPTQ's layout stores zero "
                "points less one"
            )
        if not bool(torch.isfinite(found.grid.scale.half()).all()):
            return "its scales leave the range of float16, which GPTQ's layout stores them in"
        return None

    def tensors(self, found: OnGrid) -> dict[str, Tensor]:
        grid = found.grid
        return {
            "qweight": pack_words(found.codes, grid.bits).T.contiguous(),
            "qzeros": pack_words(grid.zero.T - 1, grid.bits),
            "scales": grid.scale.T.to(torch.float16).contiguous(),
            "g_idx": found.group.to(torch.int32),
        }

    def read_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def config(self, held: Sequence[Held], dense: Sequence[str]) -> Mapping[str, Any]:
        sizes = {layer.size for layer in held if layer.groups > 1}
        widths = {layer.bits for layer in held}
        if len(sizes) > 1 or len(widths) > 1:
            raise ArtifactError(
                f"layers of {sorted(widths)} bits in groups of {sorted(sizes)}: GPTQ's layout has one width and one "
                "group size; --format dense holds any"
            )
        config = {
            "quant_method": "gptq", "checkpoint_format": "gptq", "bits": widths.pop(), "lm_head": False,
            "group_size": sizes.pop() if sizes else -1, "desc_act": any(layer.ordered for layer in held),
            "sym": all(layer.symmetric for layer in held), "true_sequential": True,
            "meta": {"quantizer": [f"evenbits:{__version__}"]},
        }  # fmt: skip
        if dense:
            config["dynamic"] = {f"-:^{name.replace('.', r'[.]')}$": {} for name in dense}
        return config
