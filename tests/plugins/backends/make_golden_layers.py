"""Makes golden/aqlm_layers.safetensors and golden/vptq_layers.safetensors: layers with random codes, and what the
packages' own layers give for random inputs.

    python make_golden_layers.py aqlm    where aqlm[cpu]==1.1.7 is installed, with torch
    python make_golden_layers.py vptq    where vptq==0.0.5.post1 is; neither needs evenbits
"""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROWS = 3
# out, in, codebooks, bits, in_group, out_group
AQLM = {
    "2x8g8": (24, 40, 2, 8, 8, 1),
    "3x5g4": (12, 20, 3, 5, 4, 1),
    "2x6g4o2": (16, 24, 2, 6, 4, 2),
    "1x10g8": (24, 40, 1, 10, 8, 1),
}
PLAIN: dict[str, Any] = {
    "group_num": 1, "outlier_size": 0, "indices_as_float": False, "enable_norm": True, "enable_perm": True,
    "is_indice_packed": True, "num_res_centroids": [-1, -1],
}  # fmt: skip
# the last is without a residual: with one, the package's layer of unpacked indices cannot be made
VPTQ: dict[str, tuple[int, int, dict[str, Any]]] = {
    "v8-k64-16": (26, 24, {"vector_lens": [-1, 8], "num_centroids": [-1, 64], "num_res_centroids": [-1, 16]}),
    "v4-k256-0": (24, 20, {"vector_lens": [-1, 4], "num_centroids": [-1, 256], "enable_norm": False,
                           "enable_perm": False}),
    "v4-k32-32-groups-outliers": (22, 28, {"group_num": 3, "outlier_size": 4, "vector_lens": [2, 4],
                                           "num_centroids": [16, 32], "num_res_centroids": [-1, 32]}),
    "shuffled": (16, 300, {"vector_lens": [-1, 4], "num_centroids": [-1, 8], "enable_norm": False}),
    "unpacked": (16, 12, {"vector_lens": [-1, 4], "num_centroids": [-1, 64], "is_indice_packed": False,
                          "enable_perm": False}),
}  # fmt: skip


def half(generator: torch.Generator, *size: int) -> torch.Tensor:
    """Numbers that half precision holds, in float32."""
    return torch.randn(*size, generator=generator).half().float()


def aqlm_layer(name: str, generator: torch.Generator) -> tuple[Any, dict[str, Any]]:
    rows, columns, books, bits, wide, high = AQLM[name]
    layer = import_module("aqlm").QuantizedLinear(columns, rows, wide, high, books, bits, bias=False)
    layer.codebooks.data, layer.scales.data = (half(generator, *t.shape) for t in (layer.codebooks, layer.scales))
    codes = torch.randint(0, 2**bits, layer.codes.shape, generator=generator)
    layer.codes.data = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(layer.codes.dtype)
    told = {"nbits_per_codebook": bits, "num_codebooks": books, "in_group_size": wide, "out_group_size": high}
    return layer, {"out": rows, "in": columns, "config": {"quant_method": "aqlm", **told}}


def vptq_layer(name: str, generator: torch.Generator) -> tuple[Any, dict[str, Any]]:
    rows, columns, given = VPTQ[name]
    told = {**PLAIN, **given}
    size = (columns - told["outlier_size"]) // told["group_num"]
    layer = import_module("vptq").VQuantLinear(
        columns, rows, group_size=size, device="cpu", enable_proxy_error=False, **told
    )
    words, residual = told["num_centroids"][1], told["num_res_centroids"][1]
    shape = (told["group_num"], -(-rows // told["vector_lens"][1]), size)
    main = torch.randint(0, words, shape, generator=generator).to(torch.uint16)
    other = torch.randint(0, residual, shape, generator=generator).to(torch.uint16) if residual > 0 else None
    for part in (layer.centroids, layer.res_centroids, layer.outlier_centroids):
        if part is not None:
            part.weight.data = half(generator, *part.weight.shape)
    if told["is_indice_packed"]:
        bits = [int(math.log2(count)) if count > 0 else 0 for count in (words, residual)]
        layer.indices.data = import_module("vptq.utils.pack").pack_index(main, bits[0], other, bits[1])
    else:
        layer.indices.data = main.view(torch.int16)
    if told["outlier_size"]:
        places = torch.randint(0, told["num_centroids"][0], layer.outlier_indices.shape, generator=generator)
        layer.outlier_indices.data = places.to(torch.int16)
    if told["enable_perm"]:
        layer.perm.data = torch.randperm(columns, generator=generator).to(torch.int16)
    if told["enable_norm"]:
        layer.weight_scale.data, layer.weight_bias.data = half(generator, columns), half(generator, columns)
    entry = {**told, "group_size": size, "in_features": columns, "out_features": rows, "bias": None}
    return layer, {
        "out": rows, "in": columns, "config": {"quant_method": "vptq", "config_for_layers": {name: entry}},
    }  # fmt: skip


@torch.no_grad()
def main(which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for name in AQLM if which == "aqlm" else VPTQ:
        layer, facts[name] = (aqlm_layer if which == "aqlm" else vptq_layer)(name, generator)
        for part, tensor in layer.state_dict().items():  # first: aqlm's forward turns its codes round
            stored = tensor.half() if tensor.is_floating_point() else tensor
            tensors[f"{name}.{part}"] = stored.contiguous().clone()
        inputs = torch.randn(ROWS, facts[name]["in"], generator=generator)
        tensors |= {f"{name}.inputs": inputs, f"{name}.outputs": layer(inputs).contiguous()}
    file = Path(__file__).parent / "golden" / f"{which}_layers.safetensors"
    save_file(tensors, file, metadata={"facts": json.dumps(facts), "made_with": f"{which} {version(which)}"})


if __name__ == "__main__":
    main(sys.argv[1])
