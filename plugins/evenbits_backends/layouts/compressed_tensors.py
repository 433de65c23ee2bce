"""compressed-tensors' layouts of integer weights: "pack-quantized", and int8 as it is ("naive-quantized").

    weight_packed      (out, words(in)) int32       code + 2^(bits-1), input i from bit i * bits on
    weight_scale       (out, groups) | (out, 1) | (1,), a float
    weight_shape       (2,) int64                   (out, in)
    weight_zero_point  (words(out), groups) int32   only where asymmetric; + 2^(bits-1), packed along the outputs
    weight_g_idx       (in,) int32                  only where inputs were reordered into groups

W[o, i] = (code - zero) * scale, codes and zero points in -2^(bits-1) .. 2^(bits-1) - 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid
from evenbits_backends.layouts.gptq import require_shapes, words

if TYPE_CHECKING:
    from torch import Tensor

PACKED, NAIVE = "pack-quantized", ("naive-quantized", "int-quantized")
FORMATS = (PACKED, *NAIVE)
STRATEGIES = ("tensor", "channel", "group")
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


class CompressedTensors:
    name = "compressed_tensors"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """schemes: of which layers (by name, "re:" pattern or class), bits, group (0: a row, -1: the whole matrix), and
        where they are so: naive (int8 as it is), asymmetric, indexed (a g_idx per input)."""
        if config.get("quant_method") != "compressed-tensors":
            return None
        for key, what in (("kv_cache_scheme", "a quantized cache"), ("transform_config", "rotations")):
            if config.get(key):
                raise TrialFailed(f"compressed_tensors: {what} ({key}) cannot be evaluated; what can: weights alone")
        sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise TrialFailed(f"compressed_tensors: sparse weights ({sparsity}) cannot be read; what can: dense ones")
        groups = (config.get("config_groups") or {}).values()
        if not groups:
            raise TrialFailed("compressed_tensors: no config_groups, so nothing says how its layers are stored")
        return {"schemes": [_scheme(group, config.get("format", PACKED)) for group in groups]}

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        scheme = _of(shape, facts) or facts["schemes"][0]
        if not scheme.get("naive"):
            roles = {"weight_packed": Role.CODE, "weight_scale": Role.SCALE, "weight_shape": Role.META}
        else:
            roles = {"weight": Role.CODE, "weight_scale": Role.SCALE}
        if scheme.get("asymmetric"):
            roles["weight_zero_point"] = Role.ZERO
        if scheme.get("indexed"):
            roles["weight_g_idx"] = Role.META
        return roles

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        """With scales in the layer's dtype, as where the model was loaded in that."""
        scheme = _of(shape, facts) or facts["schemes"][0]
        rows, columns, bits = shape.out_features, shape.in_features, scheme["bits"]
        scales, groups = _scales(shape, scheme)
        packed = not scheme.get("naive")
        found = {
            Role.CODE: 4 * rows * words(columns, bits) if packed else rows * columns,
            Role.SCALE: WIDTHS[shape.dtype] * scales,
            Role.META: (16 if packed else 0) + (4 * columns if scheme.get("indexed") else 0),
        }
        if scheme.get("asymmetric"):
            found[Role.ZERO] = 4 * words(rows, bits) * groups if packed and scheme["group"] >= 0 else scales
        return {role: count for role, count in found.items() if count}

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        scheme = _of(shape, facts)
        if scheme is None:
            raise TrialFailed(f"{shape.name}: stored quantized, but no target of the config is this layer")
        if not scheme.get("naive"):
            return _decode_packed(tensors, shape, scheme)
        require_shapes(tensors, {"weight": (shape.out_features, shape.in_features)}, shape)
        return _dequantise(tensors["weight"].float(), tensors, tensors.get("weight_zero_point"), shape, scheme)

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        scheme = _of(shape, facts) or facts["schemes"][0]
        # one scale for all is coarser than one a row: no plain rounding by rows says how much it may lose
        return None if scheme["group"] < 0 else Grid(scheme["bits"], scheme["group"])


def _scheme(group: Mapping[str, Any], form: str) -> dict[str, Any]:
    """One of config_groups as a fact. Raises TrialFailed for what cannot be decoded, or would not be evaluated."""
    weights = group.get("weights")
    if weights is None:
        raise TrialFailed("compressed_tensors: a group without weights cannot be read")
    if group.get("input_activations") or group.get("output_activations"):
        raise TrialFailed(
            "compressed_tensors: its activations are quantized too, which cannot be evaluated; what can: weights alone"
        )
    form = group.get("format") or form
    strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "channel")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if form not in FORMATS or kind != "int":
        raise TrialFailed(f"compressed_tensors: {form} of {kind} cannot be read; what can: {', '.join(FORMATS)} of int")
    if strategy not in STRATEGIES or not 1 <= bits <= 8:
        raise TrialFailed(
            f"compressed_tensors: {bits} bits by {strategy} cannot be read; what can: 1 to 8 by {', '.join(STRATEGIES)}"
        )
    size = {"group": weights.get("group_size"), "channel": 0, "tensor": -1}[strategy]
    if not isinstance(size, int) or (strategy == "group" and size < 1):
        raise TrialFailed(f"compressed_tensors: groups of {size!r} inputs cannot be read; what can: a number from 1 on")
    targets = list(group.get("targets") or [])
    for target in targets:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    flags = {
        "naive": form != PACKED,
        "asymmetric": not weights.get("symmetric", True),
        "indexed": weights.get("actorder") in ("group", "dynamic", True),
    }
    return {
        "targets": targets,
        "bits": bits,
        "group": size,
        **{name: True for name, is_so in flags.items() if is_so},  # what is not said is not so: every byte is billed
    }


def _of(shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scheme of a layer: by its name, else by a pattern, else by its class; None where it has none."""
    for rank in (_by_name, _by_pattern, _by_class):
        for scheme in facts["schemes"]:
            if any(rank(shape.name, target) for target in scheme["targets"]):
                return dict(scheme)
    return None


def _by_name(name: str, target: str) -> bool:
    return name == target


def _by_pattern(name: str, target: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None


def _by_class(name: str, target: str) -> bool:
    return target == "Linear"


def _scales(shape: LayerShape, scheme: Mapping[str, Any]) -> tuple[int, int]:
    """Number of scales, and of groups of a row."""
    groups = -(-shape.in_features // scheme["group"]) if scheme["group"] > 0 else 1
    return (1, 1) if scheme["group"] < 0 else (shape.out_features * groups, groups)


def _decode_packed(tensors: Mapping[str, Tensor], shape: LayerShape, scheme: Mapping[str, Any]) -> Tensor:
    from evenbits_backends.packing import unpack, unpack_padded

    rows, columns, bits = shape.out_features, shape.in_features, scheme["bits"]
    stored = tuple(tensors["weight_shape"].tolist()) if "weight_shape" in tensors else None
    if stored != (rows, columns):
        raise TrialFailed(f"{shape.name}: weight_shape is {stored}, not {(rows, columns)}")
    # in older files no code crosses into another word; that differs at 3, 5, 6 and 7 bits, and the width tells
    padded = -(-columns // (32 // bits))
    narrow = tensors["weight_packed"].shape[-1] != padded or padded == words(columns, bits)
    require_shapes(tensors, {"weight_packed": (rows, words(columns, bits) if narrow else padded)}, shape)
    open_ = unpack if narrow else unpack_padded
    half = 2 ** (bits - 1)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and scheme["group"] >= 0:
        count = words(rows, bits) if narrow else -(-rows // (32 // bits))
        require_shapes({"weight_zero_point": zeros}, {"weight_zero_point": (count, _scales(shape, scheme)[1])}, shape)
        zeros = open_(zeros.T.contiguous(), bits, rows).T.float() - half
    codes = open_(tensors["weight_packed"], bits, columns).float() - half
    return _dequantise(codes, tensors, zeros, shape, scheme)


def _dequantise(
    codes: Tensor, tensors: Mapping[str, Tensor], zeros: Tensor | None, shape: LayerShape, scheme: Mapping[str, Any]
) -> Tensor:
    """(out, in) float32. codes (out, in) float32, changed in place; zeros (out, groups) or one number."""
    import torch

    if "weight_scale" not in tensors or (scheme.get("asymmetric") and zeros is None):
        raise TrialFailed(f"{shape.name}: no weight_scale or no weight_zero_point in the checkpoint")
    scale, (count, groups) = tensors["weight_scale"].float(), _scales(shape, scheme)
    if scale.numel() != count or (zeros is not None and zeros.numel() != count):
        raise TrialFailed(f"{shape.name}: {scale.numel()} scales, not {count} as the config says")
    across = (1, 1) if scheme["group"] < 0 else (shape.out_features, groups)
    if scheme.get("indexed"):
        require_shapes(tensors, {"weight_g_idx": (shape.in_features,)}, shape)
        index = tensors["weight_g_idx"].long()
        if not bool(((index >= 0) & (index < groups)).all()):
            raise TrialFailed(f"{shape.name}: weight_g_idx points past its {groups} groups; its file is damaged")
    else:
        index = torch.arange(shape.in_features, device=codes.device) // (scheme["group"] or shape.in_features)
        index = index.clamp(min=0, max=groups - 1) if scheme["group"] > 0 else torch.zeros_like(index)
    if zeros is not None and scheme.get("asymmetric"):
        codes -= zeros.float().reshape(across)[:, index]
    codes *= scale.reshape(across)[:, index]
    return codes


LAYOUT = CompressedTensors()
