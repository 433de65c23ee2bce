"""Options, needs and fit of GPTQ (arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from evenbits import integer
from evenbits.budget import BitBudget
from evenbits.compressor import LayerShape, ModelShapes, Needs, Refusal


class GptqOptions(integer.IntegerOptions):
    """Columns are rounded one after another; what a column loses, the later ones make up for."""

    act_order: bool = Field(default=False, description="round the columns with the largest inputs first")
    static_groups: bool = Field(
        default=False,
        description="fit all grids on the dense weights; with act_order, saves the group index",
    )
    damping: float = Field(default=0.01, ge=0, description="share of the mean diagonal added to the second moment")
    block_size: int = Field(default=128, ge=1, description="columns per lazy update; changes speed, not the result")
    sequential: bool = Field(default=True, description="statistics through the blocks already compressed")
    true_sequential: bool = Field(
        default=True, description="with sequential: also inside a block, in the order qkv, o, gate and up, down"
    )

    def has_group_index(self, layer: LayerShape) -> bool:
        groups = integer.group_count(layer.in_features, self.group_size)
        return self.act_order and not self.static_groups and groups > 1


def needs(options: GptqOptions) -> Needs:
    return Needs(
        "second_moment",
        sequential=options.sequential,
        within_block=options.sequential and options.true_sequential,
    )


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> GptqOptions | Refusal:
    """The widths and groups of least expected distortion inside the budget."""
    return integer.fit(GptqOptions, budget, shapes, fixed)
