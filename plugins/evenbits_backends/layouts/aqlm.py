"""AQLM's layout (arXiv:2401.06118; the aqlm package): a group of weights is a sum of codewords, times a row's scale.

codes (out / out_group, in / in_group, codebooks) int8 or int16, codebooks (codebooks, 2^bits, out_group, in_group) and
scales (out / out_group, 1, 1, 1) in the model's dtype. Codes wrap: -1 is the last codeword.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid

if TYPE_CHECKING:
    from torch import Tensor

HALF = 2  # bytes of a codeword's entry and of a scale in published checkpoints
NUMBERS = ("nbits_per_codebook", "num_codebooks", "in_group_size", "out_group_size")


class AqlmLayout:
    name = "aqlm"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("quant_method") != "aqlm":
            return None
        found = {"nbits_per_codebook": 16, "num_codebooks": 1, "in_group_size": 8, "out_group_size": 1}
        found |= {name: config[name] for name in NUMBERS if name in config}
        wrong = [name for name in NUMBERS if not isinstance(found[name], int) or found[name] < 1]
        if wrong:
            raise TrialFailed(f"aqlm: {wrong[0]} = {found[wrong[0]]!r} in its config; a number from 1 on can be read")
        if found["nbits_per_codebook"] > 16:
            raise TrialFailed(f"aqlm: codes of {found['nbits_per_codebook']} bits; up to 16 can be read")
        return found

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        return {"codes": Role.CODE, "codebooks": Role.CODEBOOK, "scales": Role.SCALE}

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        sizes = self._shapes(shape, facts)
        width = 1 if facts["nbits_per_codebook"] <= 8 else 2
        rows, groups, books = sizes["codes"]
        _, words, high, wide = sizes["codebooks"]
        return {
            Role.CODE: rows * groups * books * width,
            Role.CODEBOOK: books * words * high * wide * HALF,
            Role.SCALE: rows * HALF,
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        import torch

        for name, size in self._shapes(shape, facts).items():
            if tuple(tensors[name].shape) != size:
                raise TrialFailed(
                    f"{shape.name}.{name}: {tuple(tensors[name].shape)} in the checkpoint, {size} for a layer of "
                    f"{shape.out_features} x {shape.in_features}"
                )
        codes = tensors["codes"].to(torch.int64) % 2 ** facts["nbits_per_codebook"]
        weight = torch.zeros((), dtype=torch.float32, device=codes.device)
        for book in range(facts["num_codebooks"]):
            words = tensors["codebooks"][book].to(torch.float32)  # (words, out_group, in_group)
            weight = weight + words[codes[:, :, book]]  # (rows, groups, out_group, in_group)
        weight = weight * tensors["scales"].to(torch.float32)
        return weight.transpose(1, 2).reshape(shape.out_features, shape.in_features)

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return None

    def _shapes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        high, wide, books = facts["out_group_size"], facts["in_group_size"], facts["num_codebooks"]
        if shape.out_features % high or shape.in_features % wide:
            raise TrialFailed(
                f"{shape.name}: a layer of {shape.out_features} x {shape.in_features} has no groups of {high} x {wide}"
            )
        rows, groups = shape.out_features // high, shape.in_features // wide
        return {
            "codes": (rows, groups, books),
            "codebooks": (books, 2 ** facts["nbits_per_codebook"], high, wide),
            "scales": (rows, 1, 1, 1),
        }


LAYOUT = AqlmLayout()
