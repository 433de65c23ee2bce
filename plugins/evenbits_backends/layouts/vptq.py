"""VPTQ's layout (arXiv:2409.17066; the vptq package): vectors along the outputs, a codebook per group of inputs.

What a layer is made of stands in the config, layer by layer. With G groups of g inputs after s outlier inputs, v values
a vector and V = ceil(out / v) vectors an input:

    centroids.weight (G, K v), res_centroids.weight (G, R v)   added up; R 0: no residual
    indices (G, V, ceil(g (log2 K + log2 R) / 32)) int32       each input's index, the residual's above it, lowest bit
                                                               first; rows padded to 32 bits; or unpacked, 16 bits each
    outlier_centroids.weight (1, k u), outlier_indices (1, ceil(out / u), s)   the inputs that come first
    perm (in) 16 bits: which input each column stands for; weight_scale, weight_bias (in): weight = decoded scale + bias

Unlike the vptq package 0.0.5, which keeps only log2 K bits of a residual index, all its bits are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid

if TYPE_CHECKING:
    from torch import Tensor

HALF = 2  # bytes of all floats in published checkpoints
ROLES = {
    "indices": Role.CODE,
    "res_indices": Role.CODE,
    "outlier_indices": Role.CODE,
    "centroids.weight": Role.CODEBOOK,
    "res_centroids.weight": Role.CODEBOOK,
    "outlier_centroids.weight": Role.CODEBOOK,
    "perm": Role.MASK,
    "weight_scale": Role.SCALE,
    "weight_bias": Role.ZERO,
}


class VptqLayout:
    """facts: settings: those that occur, the most frequent first; layers: which of them, where not the first;
    kinds: the same by the last part of a layer's name, for configs that share them so."""

    name = "vptq"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("quant_method") != "vptq":
            return None
        layers = {name: _setting(name, given) for name, given in dict(config.get("config_for_layers") or {}).items()}
        kinds = {name: _setting(name, given) for name, given in dict(config.get("shared_layer_config") or {}).items()}
        if not layers and not kinds:
            raise TrialFailed("vptq: its config says nothing of any layer (config_for_layers)")
        counted = Counter(_key(setting) for setting in [*layers.values(), *kinds.values()])
        order = [key for key, _ in counted.most_common()]
        found: dict[str, Any] = {"settings": [dict(key) for key in order]}
        for title, settings in (("layers", layers), ("kinds", kinds)):
            places = {name: order.index(_key(setting)) for name, setting in settings.items()}
            if kept := {name: place for name, place in places.items() if place}:
                found[title] = kept
        return found

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        setting = _of(shape, facts)
        return {name: ROLES[name] for name in _shapes(shape, setting)}

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        setting = _of(shape, facts)
        packed = setting["packed"]
        widths = {"indices": 4 if packed else 2, "perm": 2 if packed else 8}
        counted: dict[Role, int] = {}
        for name, size in _shapes(shape, setting).items():
            counted[ROLES[name]] = counted.get(ROLES[name], 0) + math.prod(size) * widths.get(name, HALF)
        return counted

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        import torch

        setting = _of(shape, facts)
        for name, size in _shapes(shape, setting).items():
            if tuple(tensors[name].shape) != size:
                raise TrialFailed(
                    f"{shape.name}.{name}: {tuple(tensors[name].shape)} in the checkpoint, {size} for a layer of "
                    f"{shape.out_features} x {shape.in_features}"
                )
        main, residual = _indices(tensors, setting, _group_size(shape, setting))
        weight = _looked_up(main, tensors["centroids.weight"], setting["vector_len"])
        if residual is not None:
            weight = weight + _looked_up(residual, tensors["res_centroids.weight"], setting["vector_len"])
        weight = weight[: shape.out_features]
        if setting["outlier_size"]:
            length = setting["outlier_vector_len"]
            first = _looked_up(_unsigned(tensors["outlier_indices"]), tensors["outlier_centroids.weight"], length)
            weight = torch.cat([first[: shape.out_features], weight], dim=1)
        if setting["perm"]:
            places = _unsigned(tensors["perm"])
            if not torch.equal(places.sort().values, torch.arange(len(places), device=places.device)):
                raise TrialFailed(f"{shape.name}.perm: is no permutation of its {shape.in_features} inputs")
            weight = torch.empty_like(weight).index_copy_(1, places, weight)
        if setting["norm"]:
            weight = weight * tensors["weight_scale"].to(weight) + tensors["weight_bias"].to(weight)
        return weight

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return None


def _setting(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What decoding needs of a layer's entry; numbers that follow from its shape are left out."""
    try:
        outlier_length, length = given["vector_lens"]
        outlier_words, words = given["num_centroids"]
        outlier_residual, residual = given["num_res_centroids"]
        outliers = given["outlier_size"] if outlier_length > 1 and outlier_words > 0 else 0
        setting = {
            "vector_len": length,
            "centroids": words,
            "res_centroids": max(0, residual),
            "groups": given.get("group_num", 1),
            "outlier_vector_len": outlier_length if outliers else 0,
            "outlier_centroids": outlier_words if outliers else 0,
            "outlier_size": outliers,
            "norm": bool(given.get("enable_norm", True)),
            "perm": bool(given.get("enable_perm", True)),
            "packed": bool(given.get("is_indice_packed", True)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise TrialFailed(f"vptq: {name}: its entry in config_for_layers cannot be read ({error!r})") from None
    for key, number in setting.items():
        least = 1 if key in ("vector_len", "centroids", "groups") else 0
        if not isinstance(number, int) or number < least:
            raise TrialFailed(f"vptq: {name}: {key} {number!r} cannot be read; a number from {least} on can")
    for key, fine in (
        ("vector_quant_dim", given.get("vector_quant_dim", "out") == "out"),
        ("norm_dim", given.get("norm_dim", 0) in (0, None)),
        ("num_res_centroids", outlier_residual <= 0),
    ):
        if not fine:
            raise TrialFailed(f"vptq: {name}: {key} = {given[key]!r} cannot be read; vectors along the outputs, scales "
                              "of inputs and outliers without residuals can")  # fmt: skip
    for count in (words, setting["res_centroids"]):
        if setting["packed"] and count & (count - 1):
            raise TrialFailed(f"vptq: {name}: packed indices of {count} centroids; powers of two can be read")
    return setting


def _key(setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(setting.items())


def _of(shape: LayerShape, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    place = facts.get("kinds", {}).get(shape.name.rsplit(".", 1)[-1], 0)
    found: Mapping[str, Any] = facts["settings"][facts.get("layers", {}).get(shape.name, place)]
    return found


def _group_size(shape: LayerShape, setting: Mapping[str, Any]) -> int:
    inside = shape.in_features - setting["outlier_size"]
    if inside <= 0 or inside % setting["groups"]:
        raise TrialFailed(f"{shape.name}: {inside} inputs have no {setting['groups']} groups of one size")
    return int(inside // setting["groups"])


def _bits(setting: Mapping[str, Any]) -> tuple[int, int]:
    residual = setting["res_centroids"]
    return int(math.log2(setting["centroids"])), int(math.log2(residual)) if residual else 0


def _shapes(shape: LayerShape, setting: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    groups, length, inside = setting["groups"], setting["vector_len"], _group_size(shape, setting)
    vectors = -(-shape.out_features // length)
    words = -(-inside * sum(_bits(setting)) // 32) if setting["packed"] else inside
    found: dict[str, tuple[int, ...]] = {
        "indices": (groups, vectors, words),
        "centroids.weight": (groups, setting["centroids"] * length),
    }
    if setting["res_centroids"]:
        found["res_centroids.weight"] = (groups, setting["res_centroids"] * length)
        if not setting["packed"]:
            found["res_indices"] = (groups, vectors, inside)
    if setting["outlier_size"]:
        wide = setting["outlier_vector_len"]
        found["outlier_indices"] = (1, -(-shape.out_features // wide), setting["outlier_size"])
        found["outlier_centroids.weight"] = (1, setting["outlier_centroids"] * wide)
    if setting["perm"]:
        found["perm"] = (shape.in_features,)
    if setting["norm"]:
        found |= {"weight_scale": (shape.in_features,), "weight_bias": (shape.in_features,)}
    return found


def _unsigned(indices: Tensor) -> Tensor:
    """int64 of 16-bit numbers kept in int16 or in float16's bits; wider ones as they are."""
    import torch

    if indices.element_size() > 2:
        return indices.to(torch.int64)
    return indices.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def _indices(tensors: Mapping[str, Tensor], setting: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor | None]:
    """(G, V, g) of the main codebook and of the residual one."""
    import torch

    if not setting["packed"]:
        residual = _unsigned(tensors["res_indices"]) if setting["res_centroids"] else None
        return _unsigned(tensors["indices"]), residual
    low, high = _bits(setting)
    words = torch.nn.functional.pad(tensors["indices"].to(torch.int64) & 0xFFFFFFFF, (0, 1))
    begin = torch.arange(count, device=words.device) * (low + high)
    word, offset = begin // 32, begin % 32
    both = ((words[..., word] | words[..., word + 1] << 32) >> offset) & ((1 << (low + high)) - 1)
    return both & ((1 << low) - 1), both >> low if high else None


def _looked_up(indices: Tensor, centroids: Tensor, length: int) -> Tensor:
    """indices (G, V, g), centroids (G, K length) -> (V length, G g) float32."""
    import torch

    groups, vectors, inside = indices.shape
    books = centroids.to(torch.float32).reshape(groups, -1, length)
    found = torch.stack([book[index] for book, index in zip(books, indices, strict=True)])  # (G, V, g, length)
    return found.permute(1, 3, 0, 2).reshape(vectors * length, groups * inside)


LAYOUT = VptqLayout()
