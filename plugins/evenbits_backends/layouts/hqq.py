"""HQQ's own safetensors (`save_to_safetensors`): codes of groups of the flat matrix, and every setting as a tensor.

W_q       (groups / p, group) uint8, p codes a byte: the first of them of the first p-th of the groups, in the high
          bits; 3 bits: (ceil(groups / 10), group) int32, ten codes a word, its two highest bits empty
scale, zero  (groups, 1) in the dtype the model computes in; W = (code - zero) * scale
Source: github.com/mobiusml/hqq 0.2.8; axis 1 only, which is its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid

if TYPE_CHECKING:
    from torch import Tensor

# bits -> (the packing's name, the stored dtype, its bytes, codes in it)
PACKINGS = {
    8: ("8bit_u8", "uint8", 1, 1),
    4: ("4bit_u8", "uint8", 1, 2),
    3: ("3bit_32", "int32", 4, 10),
    2: ("2bit_u8", "uint8", 1, 4),
    1: ("1bit_u8", "uint8", 1, 8),
}
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
# settings that the library stores with every layer: name -> bytes, where these are always the same
SETTINGS = {
    "axis": 4, "channel_wise": 1, "encoded_state_dict": 1, "group_size": 4, "nbits": 4, "offload_meta": 1,
    "optimize": 1, "quant_scale": 1, "quant_zero": 1, "round_zero": 1, "shape": 16, "stores_quant_config": 1,
    "view_as_float": 1,
}  # fmt: skip
NAMED = ("compute_dtype", "packing", "unpack_view_dtype")  # and these as text


class Hqq:
    name = "hqq"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """bits, group (0: a whole row), dtype of scales and zero points."""
        if config.get("quant_method") != "hqq":
            return None
        chosen = (config.get("quant_config") or {}).get("weight_quant_params") or {}
        bits, axis, dtype = chosen.get("nbits"), chosen.get("axis"), config.get("compute_dtype")
        if bits not in PACKINGS or axis != 1 or dtype not in WIDTHS:
            raise TrialFailed(
                f"hqq: nbits {bits!r} with axis {axis!r} computed in {dtype!r} cannot be read; what can: "
                f"nbits {', '.join(map(str, sorted(PACKINGS)))} with axis 1 in {', '.join(WIDTHS)}"
            )
        return {"bits": bits, "group": chosen.get("group_size") or 0, "dtype": dtype}

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        roles = {"W_q": Role.CODE, "scale": Role.SCALE, "zero": Role.ZERO}
        return roles | dict.fromkeys((*SETTINGS, *NAMED), Role.META)

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        packing, view, width, held = PACKINGS[facts["bits"]]
        group = facts["group"] or shape.in_features
        groups = shape.weights // group
        text = sum(map(len, (f"torch.{facts['dtype']}", packing, f"torch.{view}")))
        return {
            Role.CODE: -(-groups // held) * group * width,
            Role.SCALE: groups * WIDTHS[facts["dtype"]],
            Role.ZERO: groups * WIDTHS[facts["dtype"]],
            Role.META: sum(SETTINGS.values()) + text,
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        import torch

        bits = facts["bits"]
        group = facts["group"] or shape.in_features
        groups, held = shape.weights // group, PACKINGS[bits][3]
        packed = tensors["W_q"]
        if tuple(packed.shape) != (-(-groups // held), group) or shape.weights % group:
            raise TrialFailed(f"{shape.name}: W_q has the shape {tuple(packed.shape)}, for {groups} groups of {group}")
        shifts = [bits * (held - 1 - part) for part in range(held)]
        codes = torch.cat([(packed >> shift) & (2**bits - 1) for shift in shifts])[:groups]
        weight = (codes.float() - tensors["zero"].float()) * tensors["scale"].float()
        return weight.view(shape.out_features, shape.in_features)

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return Grid(facts["bits"], facts["group"])


LAYOUT = Hqq()
