"""compressed-tensors, its format "pack-quantized": weight_packed, weight_scale, weight_zero_point and weight_shape.

Codes and zero points stand as signed numbers, 2^(b-1) less, packed with 2^(b-1) added, so their bits are ours. Codes
are packed along a row; zero points, stored unless symmetric, down the rows of a group. Widths that do not divide 32
run on across words, as compressed-tensors 0.19 has it. Source: compressed-tensors 0.19.0,
compressors/pack_quantized and quantization/quant_args.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evenbits.export_formats import Held, pack_words
from evenbits.maths.uniform import OnGrid

VERSION = "0.19.0"  # of the library whose format this is


class CompressedTensors:
    name = "compressed-tensors"
    transposed = False

    def refusal(self, found: OnGrid) -> str | None:
        if not found.neighbours:
            return "its groups are not runs of neighbouring columns (act_order), which compressed-tensors cannot say"
        if found.grid.scale.shape[1] > 1 and found.codes.shape[1] % found.group_size:
            return (
                f"its {found.codes.shape[1]} columns are no multiple of the group size {found.group_size}, and "
                "compressed-tensors has no short groups"
            )
        return None

    def tensors(self, found: OnGrid) -> dict[str, Tensor]:
        grid = found.grid
        tensors = {
            "weight_packed": pack_words(found.codes, grid.bits),
            "weight_scale": grid.scale,
            "weight_shape": torch.tensor(found.codes.shape, dtype=torch.int64),
        }
        if not bool((grid.zero == 1 << (grid.bits - 1)).all()):
            tensors["weight_zero_point"] = pack_words(grid.zero.T, grid.bits).T.contiguous()
        return tensors

    def read_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def config(self, held: Sequence[Held], dense: Sequence[str]) -> Mapping[str, Any]:
        schemes: dict[tuple[int, int | None, bool], list[str]] = {}
        for layer in held:
            schemes.setdefault((layer.bits, layer.size if layer.groups > 1 else None, layer.symmetric), []).append(
                layer.name
            )
        groups = {}
        for index, ((bits, size, symmetric), names) in enumerate(schemes.items()):
            groups[f"group_{index}"] = {
                # by class where all are alike: programs that fuse layers find them more easily than by name
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                    "strategy": "channel" if size is None else "group", "group_size": size,
                },
                "input_activations": None,
                "output_activations": None,
            }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": list(dense), "kv_cache_scheme": None, "version": VERSION,
        }  # fmt: skip
