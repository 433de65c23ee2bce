"""GPTQ's layout, as AutoGPTQ and GPTQModel write it: codes packed along the inputs, zero points along the outputs.

    qweight  (words(in), out) int32     code i of a column from bit i * bits on
    qzeros   (groups, words(out)) int32
    scales   (groups, out) float16
    g_idx    (in,) int32                the group of each input, also where groups are runs of neighbours

W[o, i] = (code - zero) * scale. In files of the first format (checkpoint_format "gptq") each zero point is stored one
too low; "gptq_v2" stores it as it is. Source: arXiv:2210.17323 for the method; the files' format is the libraries' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
OFFSETS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


class Gptq:
    name = "gptq"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """bits, group (0: a whole row), zero_offset; dynamic: GPTQModel's exceptions for some layers, by pattern."""
        method = config.get("quant_method")
        # a quantize_config.json of AutoGPTQ's first years names no method
        if method != "gptq" and not (method is None and "bits" in config and "desc_act" in config):
            return None
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if form not in OFFSETS or config.get("is_marlin_format"):
            raise TrialFailed(f"gptq: checkpoint format {form!r} cannot be read; what can: {', '.join(OFFSETS)}")
        if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise TrialFailed(f"gptq: codes packed into {config['pack_dtype']} cannot be read; pack them into int32")
        facts = {
            "bits": config.get("bits"),
            "group": max(0, config.get("group_size") or 0),
            "zero_offset": OFFSETS[form],
        }
        dynamic = {
            pattern: {
                "bits": found.get("bits", facts["bits"]),
                "group": max(0, found.get("group_size", facts["group"])),
            }
            for pattern, found in (config.get("dynamic") or {}).items()
            if not pattern.startswith("-")  # these layers are left dense, as the file shows
        }
        for pattern in dynamic:
            re.compile(pattern.removeprefix("+:"))
        for bits in {facts["bits"], *(found["bits"] for found in dynamic.values())}:
            if bits not in BITS:
                raise TrialFailed(f"gptq: {bits} bits cannot be read; what can: {', '.join(map(str, BITS))}")
        return {**facts, "dynamic": dynamic} if dynamic else facts

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        roles = {"qweight": Role.CODE, "qzeros": Role.ZERO, "scales": Role.SCALE}
        return {**roles, "g_idx": Role.META} if facts.get("g_idx", True) else roles

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        bits, group = self._of(shape, facts)
        groups = -(-shape.in_features // group)
        found = {
            Role.CODE: 4 * words(shape.in_features, bits) * shape.out_features,
            Role.ZERO: 4 * groups * words(shape.out_features, bits),
            Role.SCALE: 2 * groups * shape.out_features,
        }
        return {**found, Role.META: 4 * shape.in_features} if facts.get("g_idx", True) else found

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        bits, group = self._of(shape, facts)
        return decode_gptq(tensors, shape, bits, group, facts["zero_offset"])

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return Grid(*self._of(shape, facts))

    def _of(self, shape: LayerShape, facts: Mapping[str, Any]) -> tuple[int, int]:
        """Bits and the inputs of a group of this layer: the first pattern that its name begins with, or the rule."""
        found: Mapping[str, Any] = facts
        for pattern, exception in facts.get("dynamic", {}).items():
            if re.match(pattern.removeprefix("+:"), shape.name):
                found = exception
                break
        return found["bits"], found["group"] or shape.in_features


def decode_gptq(tensors: Mapping[str, Tensor], shape: LayerShape, bits: int, group: int, zero_offset: int) -> Tensor:
    """(out, in) float32 from qweight, qzeros, scales and, where it is there, g_idx.

    group: inputs to a group, 0 for all. zero_offset: 1 where zero points are stored one too low, else 0.
    Raises TrialFailed where a tensor's shape is not that of the layer, or g_idx points past the groups.
    """
    import torch

    from evenbits_backends.packing import unpack

    rows, columns = shape.out_features, shape.in_features
    groups = -(-columns // (group or columns))
    expected = {
        "qweight": (words(columns, bits), rows),
        "qzeros": (groups, words(rows, bits)),
        "scales": (groups, rows),
    }
    require_shapes(tensors, expected, shape)
    codes = unpack(tensors["qweight"].T.contiguous(), bits, columns)
    zeros = _zeros(tensors["qzeros"], bits, rows, zero_offset)
    if "g_idx" in tensors:
        require_shapes(tensors, {"g_idx": (columns,)}, shape)
        index = tensors["g_idx"].long()
        if not bool(((index >= 0) & (index < groups)).all()):
            raise TrialFailed(f"{shape.name}: g_idx points past its {groups} groups; its file is damaged")
    else:
        index = torch.arange(columns, device=codes.device) // (group or columns)
    weight = codes.float()
    weight -= zeros.T[:, index]
    weight *= tensors["scales"].float().T[:, index]
    return weight


def _zeros(packed: Tensor, bits: int, count: int, offset: int) -> Tensor:
    """(groups, count) float32, -1 stored as 0 included.

    Where 32 is a multiple of the bits, GPTQModel subtracts 1 from all zero points of a word at once, so that a 0
    borrows from its neighbour; adding to the word takes that back, where adding to each zero point would not.
    """
    import torch

    from evenbits_backends.packing import WORD, unpack

    if offset and WORD % bits == 0:
        ones = sum(1 << at for at in range(0, WORD, bits))
        wide = (packed.to(torch.int64) + ones) & 0xFFFFFFFF
        return unpack(wide, bits, count).float()
    zeros = unpack(packed, bits, count).to(torch.int16) + offset
    zeros &= 2**bits - 1
    return zeros.float()


def words(count: int, bits: int) -> int:
    """int32 words that `count` codes fill, none of their bits wasted."""
    return -(-count * bits // 32)


def require_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], shape: LayerShape) -> None:
    """Raises TrialFailed naming the first tensor that is not there or has another shape."""
    for name, size in expected.items():
        if name not in tensors:
            raise TrialFailed(f"{shape.name}: no {name} in the checkpoint")
        if tuple(tensors[name].shape) != size:
            raise TrialFailed(
                f"{shape.name}: {name} has the shape {tuple(tensors[name].shape)}, not {size} as the config says"
            )


LAYOUT = Gptq()
