"""torchao: weight-only integers. Below 8 bits it rounds to fewer levels and still stores a byte a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from evenbits.budget import BitBudget, choose, pinned
from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import evaluated_dtype, layout_estimate
from evenbits_backends.integers import first_objection, paper_bits

if TYPE_CHECKING:
    from typing import Self

    from evenbits.compressor import AnyCompressor

GROUPS = (None, 256, 128, 64, 32)


class TorchaoOptions(Options):
    """Round to nearest. `intx` simulates fewer bits: its codes take 8 bits on disk and in memory, and are billed so."""

    kernel: Literal["int8", "intx"] = Field(
        default="int8", description="Int8WeightOnlyConfig, or IntxWeightOnlyConfig, which keeps codes unpacked in int8"
    )
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(default=8, description="levels are 2^bits; int8: 8")
    group_size: Literal[32, 64, 128, 256] | None = Field(
        default=None, description="columns per scale, intx only; none: one scale per row"
    )
    symmetric: bool = Field(default=True, description="levels around zero; intx may have them anywhere")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.kernel == "int8" and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ValueError('int8 is 8 bits, symmetric, a scale per row; give kernel = "intx" for anything else')
        return self


def objection(options: TorchaoOptions, shape: LayerShape) -> str | None:
    if options.group_size and shape.in_features % options.group_size:
        return f"{shape.name}: its {shape.in_features} columns are not whole groups of {options.group_size}"
    return None


def predict(options: TorchaoOptions, shapes: ModelShapes) -> Estimate:
    """Exact: a byte a weight, a scale in the model's dtype and a zero point of a byte per group."""
    dtype = evaluated_dtype(shapes, shapes.layers[0])
    facts = {"bits": options.bits, "group": options.group_size or 0, "dtype": dtype}
    return layout_estimate("torchao", facts, shapes, float(options.bits), paper_bits(options, shapes))


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> TorchaoOptions | Refusal:
    """Always 8 levels of bits, since fewer save nothing; then the smallest groups inside the budget."""
    base = pinned(TorchaoOptions, fixed)
    widest = max(layer.in_features for layer in shapes.layers)
    groups = [group for group in GROUPS if group is None or group < widest]
    candidates = [base] if "kernel" in fixed or base.kernel == "int8" else []
    if "kernel" not in fixed or base.kernel == "intx":
        given = {**base.model_dump(), "kernel": "intx"}
        candidates += [
            TorchaoOptions.model_validate({**given, "group_size": group})
            for group in ([base.group_size] if "group_size" in fixed else groups)
        ]
    taken = [options for options in candidates if first_objection(options, shapes, objection) is None]
    if not taken:
        return Refusal(first_objection(candidates[0], shapes, objection) or "no setting is valid with what is pinned")
    return choose(budget, shapes, taken, predict, lambda o: (-(o.group_size or widest), o.kernel == "int8"))


def make(options: TorchaoOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    return Adapter("torchao", options, Claim("torchao"), objection)


def descriptor() -> Compressor:
    return Compressor(
        name="torchao",
        summary="torchao 0.18: int8 weights; intx below 8 bits is a simulation that still stores a byte a weight",
        paper="arXiv:2507.16099",
        options=TorchaoOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=Needs(environment="torchao"),
    )
