"""bitsandbytes 4-bit (NF4, FP4), as transformers saves it: codes and one largest magnitude a block of the flat matrix.

Source: arXiv:2305.14314, section 3 (NF4, double quantization). Tables, block sizes and offsets are read from the file.
LLM.int8() is another format, which is not read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid

if TYPE_CHECKING:
    from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256  # weights to a scale, scales to a scale of scales: transformers offers no others
TYPES = ("nf4", "fp4")
OFFSET_CHARACTERS = 20  # of the mean of the scales as JSON; 18 to 20 for most matrices, it depends on the data


class Bitsandbytes:
    name = "bitsandbytes"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """type, double (scales quantized too), dtype (which the file's JSON repeats for every layer)."""
        method = config.get("quant_method")
        if method != "bitsandbytes" and not (method is None and ("load_in_4bit" in config or "load_in_8bit" in config)):
            return None
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if not config.get("load_in_4bit") or kind not in TYPES:
            asked = kind if config.get("load_in_4bit") else "8-bit (LLM.int8)"
            raise TrialFailed(f"bitsandbytes: {asked} weights cannot be read; what can: 4-bit {' and '.join(TYPES)}")
        if (storage := config.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
            raise TrialFailed(f"bitsandbytes: codes kept as {storage} cannot be read; save them as uint8")
        dtype = str(config.get("bnb_4bit_compute_dtype") or "float32")
        return {"type": kind, "double": bool(config.get("bnb_4bit_use_double_quant")), "dtype": dtype}

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        roles = {
            "weight": Role.CODE,  # (weights / 2, 1) uint8: the first of two in the high half
            "weight.absmax": Role.SCALE,  # (blocks,) float32, or uint8 codes of nested_quant_map
            "weight.quant_map": Role.CODEBOOK,  # (16,) float32
            f"weight.quant_state.bitsandbytes__{facts['type']}": Role.META,  # JSON as uint8
        }
        if facts["double"]:
            roles |= {"weight.nested_absmax": Role.SCALE, "weight.nested_quant_map": Role.CODEBOOK}
        return roles

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        """With double quantization to within a few bytes a layer: one number stands in the JSON with all its digits."""
        blocks = -(-shape.weights // BLOCK)
        state = {
            "quant_type": facts["type"],
            "blocksize": BLOCK,
            "dtype": facts["dtype"],
            "shape": [shape.out_features, shape.in_features],
        }
        scale, codebook, meta = 4 * blocks, 4 * 16, len(json.dumps(state))
        if facts["double"]:
            scale = blocks + 4 * -(-blocks // NESTED_BLOCK)
            codebook += 4 * 256
            nested = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
            meta += len(json.dumps(nested)) - 1 + OFFSET_CHARACTERS - 1  # ", " stands for two braces and a digit
        return {Role.CODE: (shape.weights + 1) // 2, Role.SCALE: scale, Role.CODEBOOK: codebook, Role.META: meta}

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        import torch

        state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{facts['type']}"].cpu().tolist()))
        packed = tensors["weight"].reshape(-1)
        stored = tuple(state["shape"])
        if stored != (shape.out_features, shape.in_features) or packed.numel() != (shape.weights + 1) // 2:
            raise TrialFailed(f"{shape.name}: {packed.numel()} bytes of codes for a weight of {stored}")
        absmax = tensors["weight.absmax"]
        if facts["double"]:
            coarse = _blocks(tensors["weight.nested_quant_map"].float()[absmax.long()], state["nested_blocksize"])
            nested = (coarse * tensors["weight.nested_absmax"].float()[:, None]).reshape(-1)[: absmax.numel()]
            absmax = nested + state["nested_offset"]
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: shape.weights].long()
        values = _blocks(tensors["weight.quant_map"].float()[codes], state["blocksize"])
        if len(values) != absmax.numel():
            raise TrialFailed(f"{shape.name}: {absmax.numel()} scales for {len(values)} blocks")
        weight = (values * absmax.float()[:, None]).reshape(-1)[: shape.weights]
        return weight.view(shape.out_features, shape.in_features)

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return Grid(4, BLOCK)  # sixteen values to a block, though not evenly spaced


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (ceil(n / size), size), the last block filled up with zeros."""
    import torch

    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


LAYOUT = Bitsandbytes()
