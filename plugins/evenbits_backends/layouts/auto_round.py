"""AutoRound's own format: GPTQ's tensors without an index of columns, or AWQ's, by the packing that the config names.

"auto_round:auto_gptq" (symmetric) stores zero points one too low; "auto_round" (asymmetric) as they are, and so does
"auto_round:gptqmodel".
Source: github.com/intel/auto-round 0.16; arXiv:2309.05516 for the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evenbits.compressor import LayerShape, Role
from evenbits.errors import TrialFailed
from evenbits_backends.layout import Grid, Layout, layout

if TYPE_CHECKING:
    from torch import Tensor

# -> what a stored zero point lacks
PACKINGS = {"auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
AWQ = ("auto_round:auto_awq", "auto_round:awq")
BITS = (2, 3, 4, 8)


class AutoRound:
    name = "auto_round"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """bits, group (0: a whole row), zero_offset and g_idx as GPTQ's layout takes them; or AWQ's facts, and awq."""
        if config.get("quant_method") not in ("auto-round", "auto_round"):
            return None
        packing = config.get("packing_format", "auto_round:auto_gptq")
        bits, group = config.get("bits"), config.get("group_size") or 0
        plain = config.get("data_type", "int") == "int" and (config.get("act_bits") or 16) >= 16
        if not plain or (packing not in PACKINGS and packing not in AWQ) or bits not in BITS:
            raise TrialFailed(
                f"auto-round: {bits} bits of {config.get('data_type', 'int')} packed as {packing!r} cannot be read; "
                f"what can: weights of {', '.join(map(str, BITS))} bits as {', '.join((*PACKINGS, *AWQ))}"
            )
        if packing in AWQ:
            found = layout("awq").facts({**config, "quant_method": "awq", "version": "gemm", "zero_point": True})
            return None if found is None else {**found, "awq": True}
        return {"bits": bits, "group": max(0, group), "zero_offset": PACKINGS[packing], "g_idx": False}

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        return _as(facts).roles(shape, facts)

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        return _as(facts).role_bytes(shape, facts)

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        return _as(facts).decode(tensors, shape, facts)

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        return _as(facts).grid(shape, facts)


def _as(facts: Mapping[str, Any]) -> Layout:
    return layout("awq" if facts.get("awq") else "gptq")


LAYOUT = AutoRound()
