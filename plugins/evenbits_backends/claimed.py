"""How many bits a weight a checkpoint says it takes: in its name, else in its config. Imports no torch.

Names as the authors of the formats give them: "...-AQLM-2Bit-1x16-hf", "...-v8-k65536-256-woft", "...-GPTQ-Int4",
"...-4bit-128g", "...quantized.w4a16". What such a number leaves out (scales, codebooks, layers left dense) is the gap
to what its files take.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# the hub's cache keeps a repository as models--OWNER--NAME/snapshots/COMMIT
_CACHED = re.compile(r"models--(?:.+?)--([^/]+)/snapshots/[0-9a-f]+/?$")
_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_EDGE = r"(?<![A-Za-z0-9.])"
_VPTQ = re.compile(_EDGE + r"v(\d+)-k(\d+)-(\d+)(?![0-9])", re.IGNORECASE)
_AQLM = re.compile(_EDGE + r"(\d{1,2})x(\d{1,2})(?:g(\d+)|-g(\d+))(?![0-9])", re.IGNORECASE)
_SPELT = (
    re.compile(_EDGE + _NUMBER + r"-?bits?(?![A-Za-z])", re.IGNORECASE),
    re.compile(_EDGE + _NUMBER + r"bpw(?![A-Za-z])", re.IGNORECASE),
    re.compile(r"(?<![A-Za-z0-9])w(\d{1,2})(?:a\d{1,2}|g\d+)", re.IGNORECASE),
    re.compile(r"(?<![A-Za-z])(?:mx|nv)?(?:int|fp|nf)-?(\d{1,2})(?![0-9.])", re.IGNORECASE),
)
_TORCHAO = re.compile(r'(?:"u?int|Int)(\d)(?=["A-Z])')  # "int4" as a dtype, Int8WeightOnlyConfig
_CONFIG = ("bits", "w_bit", "nbits", "num_bits", "weight_bits")


def bits_in_name(name: str) -> float | None:
    """`name`: a hub id or a path's last part, or the path of a snapshot in the hub's cache. None where it says none."""
    bits = _bits(name)
    return bits if bits is not None and 0 < bits <= 32 else None  # "64bit" is a machine


def _bits(name: str) -> float | None:
    cached = _CACHED.search(name)
    name = cached[1] if cached else name.rstrip("/").rsplit("/", 1)[-1]
    for pattern in _SPELT[:2]:
        if found := pattern.search(name):
            return float(found[1])
    if found := _VPTQ.search(name):
        length, words, residual = (int(part) for part in found.groups())
        if length and words:
            return (math.log2(words) + (math.log2(residual) if residual else 0.0)) / length
    if found := _AQLM.search(name):
        books, width, *groups = (int(part) if part else 0 for part in found.groups())
        if any(groups):
            return books * width / max(groups)
    for pattern in _SPELT[2:]:
        if found := pattern.search(name):
            return float(found[1])
    return None


def bits_in_config(quantization: Mapping[str, Any]) -> float | None:
    """What a quantization_config says of its weights: the first width it names; vectors by their indices."""
    if quantization.get("quant_method") == "aqlm" and "nbits_per_codebook" in quantization:
        group = quantization.get("in_group_size", 8) * quantization.get("out_group_size", 1)
        return float(quantization.get("num_codebooks", 1) * quantization["nbits_per_codebook"] / group)
    if quantization.get("quant_method") == "vptq":
        return _vptq(quantization)
    if quantization.get("quant_method") == "torchao":
        found = _TORCHAO.search(json.dumps(quantization.get("quant_type")))
        return float(found[1]) if found else None
    if quantization.get("load_in_4bit"):
        return 4.0
    if quantization.get("load_in_8bit"):
        return 8.0
    return _first(quantization)


def _vptq(quantization: Mapping[str, Any]) -> float | None:
    """Of the indices of the main codebooks, averaged over the layers' weights where the config tells their shapes."""
    total = weights = 0.0
    for given in dict(quantization.get("config_for_layers") or {}).values():
        length, words, residual = (given[key][1] for key in ("vector_lens", "num_centroids", "num_res_centroids"))
        bits = (math.log2(words) + (math.log2(residual) if residual > 0 else 0.0)) / length
        count = max(1, given.get("in_features", 1) * given.get("out_features", 1))
        total, weights = total + bits * count, weights + count
    return total / weights if weights else None


def _first(tree: Any) -> float | None:
    """The first width, tables inside tables (compressed-tensors keeps it in a group's "weights")."""
    if not isinstance(tree, Mapping):
        return None
    for key in _CONFIG:
        if isinstance(tree.get(key), int | float) and not isinstance(tree.get(key), bool):
            return float(tree[key])
    inner = [tree[key] for key in ("weights", "weight_quant_params", "config_groups", "quant_config") if key in tree]
    inner += [value for key, value in tree.items() if key.startswith("group_")]
    return next((bits for bits in map(_first, inner) if bits is not None), None)
