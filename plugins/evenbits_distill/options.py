"""Options of end-to-end tuning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from evenbits.compressor import Options


class DistillOptions(Options):
    """What is trained, towards what, and how."""

    loss: Literal["kl", "next-token", "mix"] = Field(
        default="kl",
        description="kl: KL(dense || model) at every position; next-token: cross entropy of the text, which needs no "
        "dense model and fits the text's domain; mix: both, by next_token_share",
    )
    next_token_share: float = Field(default=0.5, gt=0, lt=1, description="with loss = mix: weight of the text's part")
    temperature: float = Field(default=1.0, gt=0, description="of both distributions in the KL, scaled by its square")
    tunables: tuple[str, ...] = Field(
        default=("*",),
        description='which packed tensors to train, as patterns over "LAYER/TENSOR" and "shared/TENSOR", e.g. '
        '"*/codebook*"; none: an empty list',
    )
    tune_rest: Literal["none", "norms", "all-but-embeddings"] = Field(
        default="norms", description="which tensors outside the linear layers train too; the rest counts biases in"
    )
    lr: float = Field(default=0.02, gt=0, description="Adam's step; with relative, in root mean squares of the tensor")
    relative: bool = Field(
        default=True, description="steps are in units of each tensor's root mean square, so that one lr suits them all"
    )
    rest_factor: float = Field(default=1.0, gt=0, description="factor of lr for the tensors of tune_rest")
    lr_factors: dict[str, float] = Field(
        default={}, description='factors of lr by pattern over the names of packed tensors, e.g. {"*/codebook*" = 0.3}'
    )
    epochs: int = Field(default=8, ge=1, description="passes over the calibration windows")
    batch_size: int = Field(default=4, ge=1, description="windows per step")
    micro_batch: int | None = Field(
        default=None, ge=1, description="windows per forward pass, to save memory; none: the whole batch at once"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="how lr falls, to zero")
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps over which lr rises from zero")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Adam's decay rates")
    max_grad_norm: float | None = Field(
        default=0.1, gt=0, description="longest gradient over all tensors, in the units of lr; none: any length"
    )
    validation: float = Field(
        default=0.125, ge=0, lt=1, description="share of the windows held out; 0: none, and nothing guards the result"
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="best: the epoch of least loss on the held-out windows; last: the last one. Either way the untuned "
        "state is kept where the held-out loss did not fall",
    )
    cache_mib: int = Field(
        default=1024,
        ge=0,
        description="the dense model's log-probabilities are kept in float16, 2 bytes x tokens x vocabulary, up to "
        "this many MiB, else computed anew at every step",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        if not all(factor > 0 for factor in self.lr_factors.values()):
            raise ValueError("lr_factors must be positive: leave a tensor out through tunables")
        if self.keep == "best" and self.validation == 0:
            raise ValueError('keep = "best" needs held-out windows: set validation, or keep = "last"')
        return self
