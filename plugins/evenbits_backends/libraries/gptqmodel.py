"""GPTQModel: GPTQ on any device, AWQ where there is CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import layout_estimate
from evenbits_backends.integers import expected_distortion, fit_rounding, paper_bits

if TYPE_CHECKING:
    from typing import Self

    from evenbits.compressor import AnyCompressor

GROUPS = (1024, 512, 256, 128, 64, 32, 16)


class GptqModelOptions(Options):
    """Even levels, float16 scales, zero points also where they are all alike, and an int32 index of every column."""

    method: Literal["gptq", "awq"] = Field(
        default="gptq", description="error feedback, or rescaled columns (CUDA only)"
    )
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits per code; awq: 4")
    group_size: Literal[16, 32, 64, 128, 256, 512, 1024] | None = Field(
        default=128, description="columns per scale, the last group may be short; none: one scale per row"
    )
    symmetric: bool = Field(default=True, description="levels around zero; zero points are stored all the same")
    desc_act: bool = Field(default=False, description="gptq: round the columns with the largest inputs first")
    act_group_aware: bool = Field(
        default=True, description="gptq: order groups, and columns within them, by their inputs; needs a group_size"
    )
    damping: float = Field(
        default=0.05, gt=0, lt=1, description="gptq: share of the mean diagonal added to the second moment"
    )
    mse: float = Field(
        default=0.0, ge=0, description="gptq: power of the error that shrunken ranges are chosen by; 0: no search"
    )

    @model_validator(mode="before")
    @classmethod
    def _order(cls, given: Any) -> Any:
        """act_group_aware is on unless it cannot be, as in the library."""
        if not isinstance(given, Mapping) or "act_group_aware" in given:
            return given
        if given.get("desc_act") or given.get("group_size", 128) is None or given.get("method") == "awq":
            return {**given, "act_group_aware": False}
        return given

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.act_group_aware and (self.desc_act or self.group_size is None):
            raise ValueError("act_group_aware needs a group_size and desc_act = false; give act_group_aware = false")
        if self.method == "awq" and (self.bits != 4 or self.desc_act or self.act_group_aware or self.symmetric):
            raise ValueError("awq is 4 bits with zero points and no order; give bits = 4, symmetric = false")
        return self

    def shown(self) -> tuple[str, ...]:
        own = ("desc_act", "act_group_aware", "damping", "mse") if self.method == "gptq" else ()
        return ("method", "bits", "group_size", "symmetric", *own)


def predict(options: GptqModelOptions, shapes: ModelShapes) -> Estimate:
    """Exact: whole words of codes and zero points, scales, and 4 bytes of index a column (not for awq)."""
    facts: dict[str, Any] = {"group": options.group_size or 0}
    if options.method == "gptq":
        facts |= {"bits": options.bits, "zero_offset": 1}
    return layout_estimate(options.method, facts, shapes, options.bits, paper_bits(options, shapes))


def objection(options: GptqModelOptions, layer: LayerShape) -> str | None:
    rows, columns, group = layer.out_features, layer.in_features, options.group_size
    if options.bits == 3 and (rows % 32 or columns % 32):
        return (
            f"GPTQModel packs 3 bits only into whole blocks of 32, and {layer.kind} is {rows} x {columns}; "
            "what can: 2, 4 or 8 bits"
        )
    if options.method == "awq" and (rows % 8 or columns % (group or columns)):
        return f"GPTQModel's awq needs rows by 8 and columns by the group, and {layer.kind} is {rows} x {columns}"
    return None


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> GptqModelOptions | Refusal:
    """The widths and groups of least expected distortion inside the budget."""
    choices: dict[str, Any] = {"bits": (2, 3, 4, 8), "group_size": (None, *GROUPS), "symmetric": (True, False)}
    if fixed.get("method") == "awq":
        choices |= {"bits": (4,), "symmetric": (False,)}
        fixed = {"bits": 4, "symmetric": False, **fixed}
    elif "act_group_aware" not in fixed:
        # a whole row has no groups to order: tried without, where nobody asked for it
        found = [
            fit_rounding(
                GptqModelOptions, budget, shapes, {**fixed, "act_group_aware": aware}, predict,
                {**choices, "group_size": groups}, objection,
            )
            for aware, groups in ((True, GROUPS), (False, (None,)))
            if not (aware and (fixed.get("desc_act") or fixed.get("group_size", 1) is None))
        ]  # fmt: skip
        fits = [options for options in found if not isinstance(options, Refusal)]
        return min(fits, key=lambda options: expected_distortion(options, shapes)) if fits else found[0]
    return fit_rounding(GptqModelOptions, budget, shapes, fixed, predict, choices, objection)


def needs(options: GptqModelOptions) -> Needs:
    return Needs("tokens", device="cuda" if options.method == "awq" else "any", environment="gptqmodel")


def make(options: GptqModelOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    claim = Claim(f"GPTQModel's {options.method}", calibrated=True, rescales=options.method == "awq")
    return Adapter("gptqmodel", options, claim, objection)


def descriptor() -> Compressor:
    return Compressor(
        name="gptqmodel",
        summary="GPTQModel 7.6.0: GPTQ, or AWQ where there is CUDA",
        paper="arXiv:2210.17323",
        options=GptqModelOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=needs,
    )
