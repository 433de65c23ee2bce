"""bitsandbytes: NF4 and FP4, by transformers' own loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evenbits.budget import BitBudget, choose, pinned
from evenbits.compressor import Compressor, Estimate, ModelShapes, Needs, Options, Refusal
from evenbits_backends.cost import evaluated_dtype, layout_estimate

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor


class BitsandbytesOptions(Options):
    """Sixteen levels times the largest magnitude of 64 weights; the block is not a choice in transformers."""

    type: Literal["nf4", "fp4"] = Field(default="nf4", description="levels: Gaussian quantiles, or a 4-bit float's")
    double_quant: bool = Field(
        default=False, description="scales in 8 bits; each matrix then stores a table of 1 KiB for them"
    )


def predict(options: BitsandbytesOptions, shapes: ModelShapes) -> Estimate:
    """Exact; with double_quant to within a few bytes a layer, since the mean of the scales is stored as text.

    Paper bits as in arXiv:2305.14314: 4 + 32/64, or 4 + 8/64 + 32/(64 * 256).
    """
    dtype = evaluated_dtype(shapes, shapes.layers[0])
    facts = {"type": options.type, "double": options.double_quant, "dtype": dtype}
    return layout_estimate("bitsandbytes", facts, shapes, 4.0, 4 + (8 + 32 / 256 if options.double_quant else 32) / 64)


def fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> BitsandbytesOptions | Refusal:
    """NF4 before FP4, exact scales before quantized ones. There is nothing outside about 4 to 6 bits."""
    base = pinned(BitsandbytesOptions, fixed)
    candidates = [
        base.model_copy(update={"type": kind, "double_quant": double})
        for kind in ([base.type] if "type" in fixed else ["nf4", "fp4"])
        for double in ([base.double_quant] if "double_quant" in fixed else [False, True])
    ]
    return choose(budget, shapes, candidates, predict, lambda o: (o.type == "nf4", not o.double_quant))


def make(options: BitsandbytesOptions) -> AnyCompressor:
    from evenbits_backends.adapter import Adapter
    from evenbits_backends.trust import Claim

    return Adapter("bitsandbytes", options, Claim("bitsandbytes"))


def descriptor() -> Compressor:
    return Compressor(
        name="bitsandbytes",
        summary="bitsandbytes 0.50.2: NF4 or FP4, blocks of 64; some CPUs compute wrong with it, which is caught",
        paper="arXiv:2305.14314",
        options=BitsandbytesOptions,
        make=make,
        predict=predict,
        fit=fit,
        needs=Needs(environment="bitsandbytes"),
    )
