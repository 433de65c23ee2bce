"""torchao's weight-only integers, as transformers saves them with torchao's own flattening.

_weight_qdata       (out, in) int8: one byte a weight whatever the bits, which torchao says is for export only
_weight_scale       (out, groups) in the model's dtype
_weight_zero_point  (out, groups) int8; W = (code - zero) * scale
Source: torchao 0.18, IntxUnpackedToInt8Tensor and Int8Tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
READ = "Int8WeightOnlyConfig by rows, IntxWeightOnlyConfig by rows or groups"


class Torchao:
    name = "torchao"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """bits, group (0: a whole row), dtype of the scales (float32 where none is said: only predictions need it)."""
        if config.get("quant_method") != "torchao":
            return None
        kind = config.get("quant_type") or {}
        kind = kind.get("default", kind) if isinstance(kind, Mapping) else {"_type": kind}
        data = kind.get("_data") or {}
        granularity = data.get("granularity") or {}
        shape, settings = granularity.get("_type"), granularity.get("_data") or {}
        if kind.get("_type") == "Int8WeightOnlyConfig" and shape == "PerRow":
            return {"bits": 8, "group": 0, "dtype": config.get("scale_dtype", "float32")}
        packing = (data.get("intx_packing_format") or {}).get("_data", "UNPACKED_TO_INT8")
        if kind.get("_type") != "IntxWeightOnlyConfig" or packing != "UNPACKED_TO_INT8":
            raise TrialFailed(f"torchao: {kind.get('_type')} by {shape} cannot be read; what can: {READ}")
        if shape not in ("PerGroup", "PerAxis") or settings.get("axis", 0) != 0:
            raise TrialFailed(f"torchao: IntxWeightOnlyConfig by {shape} cannot be read; what can: {READ}")
        bits = int(str((data.get("weight_dtype") or {}).get("_data", "int8")).removeprefix("int"))
        dtype = (data.get("scale_dtype") or {}).get("_data") or config.get("scale_dtype", "float32")
        return {"bits": bits, "group": settings.get("group_size", 0), "dtype": dtype}

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        return {"_weight_qdata": Role.CODE, "_weight_scale": Role.SCALE, "_weight_zero_point": Role.ZERO}

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        groups = shape.weights // (facts["group"] or shape.in_features)
        return {Role.CODE: shape.weights, Role.SCALE: groups * WIDTHS[facts["dtype"]], Role.ZERO: groups}

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        codes, scale = tensors["_weight_qdata"], tensors["_weight_scale"]
        group = facts["group"] or shape.in_features
        if tuple(codes.shape) != (shape.out_features, shape.in_features):
            raise TrialFailed(f"{shape.name}: codes of {tuple(codes.shape)} are not those of the layer")
        if tuple(scale.shape) != (shape.out_features, shape.in_features // group) or shape.in_features % group:
            raise TrialFailed(f"{shape.name}: scales of {tuple(scale.shape)} do not go with groups of {group}")
        grouped = codes.float().view(shape.out_features, -1, group)
        weight = (grouped - tensors["_weight_zero_point"].float()[..., None]) * scale.float()[..., None]
        return weight.reshape(shape.out_features, shape.in_features)

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return Grid(facts["bits"], facts["group"])


LAYOUT = Torchao()
