"""AWQ's layout "GEMM": 4-bit codes packed along the outputs, in an order of their own, and zero points alike.

    qweight  (in, out / 8) int32       a word holds the outputs 0 2 4 6 1 3 5 7 of eight, lowest bits first
    qzeros   (groups, out / 8) int32   the same
    scales   (groups, out) float16

W[o, i] = (code - zero) * scale. Source: arXiv:2306.00978 for the method; the files' format is AutoAWQ's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid
from evenbits_backends.layouts.gptq import require_shapes

if TYPE_CHECKING:
    from torch import Tensor

BITS, PER_WORD = 4, 8
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight outputs lies


class Awq:
    name = "awq"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """group: inputs to a group, 0 for a whole row."""
        method = config.get("quant_method")
        # a quant_config.json of AutoAWQ's own loading names no method
        if method != "awq" and not (method is None and "w_bit" in config):
            return None
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise TrialFailed(f"awq: version {version!r} cannot be read; what can: gemm")
        bits = config.get("bits", config.get("w_bit"))
        if bits != BITS:
            raise TrialFailed(f"awq: {bits} bits cannot be read; what can: {BITS}")
        if not config.get("zero_point", True):
            raise TrialFailed("awq: a checkpoint without zero points cannot be read; what can: zero_point true")
        return {"group": max(0, config.get("group_size", config.get("q_group_size", 128)) or 0)}

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        return {"qweight": Role.CODE, "qzeros": Role.ZERO, "scales": Role.SCALE}

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        groups = shape.in_features // (facts["group"] or shape.in_features)
        words = shape.out_features // PER_WORD
        return {
            Role.CODE: 4 * shape.in_features * words,
            Role.ZERO: 4 * groups * words,
            Role.SCALE: 2 * groups * shape.out_features,
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        return decode_awq(tensors, shape, facts["group"])

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return Grid(BITS, facts["group"])


def decode_awq(tensors: Mapping[str, Tensor], shape: LayerShape, group: int) -> Tensor:
    """(out, in) float32 from qweight, qzeros and scales. group: inputs to a group, 0 for all.

    Raises TrialFailed where a tensor's shape is not that of the layer.
    """
    rows, columns = shape.out_features, shape.in_features
    size = group or columns
    if rows % PER_WORD or columns % size:
        raise TrialFailed(f"{shape.name}: ({rows}, {columns}) does not fit words of {PER_WORD} and groups of {size}")
    groups, words = columns // size, rows // PER_WORD
    require_shapes(tensors, {"qweight": (columns, words), "qzeros": (groups, words), "scales": (groups, rows)}, shape)
    weight = _codes(tensors["qweight"]).view(groups, size, rows) - _codes(tensors["qzeros"])[:, None]
    weight *= tensors["scales"].float()[:, None]
    return weight.view(columns, rows).T.contiguous()


def _codes(packed: Tensor) -> Tensor:
    """(n, words) int32 -> (n, 8 words) float32 in the outputs' order."""
    import torch

    shifts = 4 * torch.tensor(PLACE, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts) & 0xF).flatten(1).float()


LAYOUT = Awq()
