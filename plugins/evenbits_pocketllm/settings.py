"""The options as a plain class, for machines that have torch and no pydantic. Imports nothing of either.

Training and decoding read settings by attribute, so that both kinds do. A test holds the fields and defaults equal.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from evenbits_pocketllm.recipes import RECIPES

if TYPE_CHECKING:
    from evenbits_pocketllm.options import PocketOptions

    Settings: TypeAlias = "PocketOptions | PlainSettings"

Recipe = Literal["evenbits", "paper", "code"]
Norm = Literal["row", "code", "layernorm", "none"]


@dataclass(frozen=True)
class PlainSettings:
    """Those of `PocketOptions` that training and decoding of one layer read; what they mean stands there.

    Nothing is checked: combinations that PocketOptions refuses fail where they are used.
    """

    axis: Literal["in", "out"] = "in"
    d: int = 4
    codebook_size: int = 256
    state_bits: int | None = None
    codebook: Literal["learned", "computed"] = "learned"
    latent: int | None = None
    symbols: int = 0
    symbol_latent: int = 2
    decoder: Literal["mlp", "none"] = "mlp"
    hidden: int = 16
    units: int = 3
    rln: Norm = "none"
    affine: bool = False
    codebook_bits: Literal[8, 16] = 16
    row_scales: bool = False
    scale_bits: Literal[4, 5, 6, 8, 16] = 16
    loss: Literal["rmse", "mse"] = "rmse"
    vq_weight: float = 0.5
    init: Literal["normal", "uniform", "kmeans"] = "normal"
    learning_rate: float = 1.6e-2
    schedule: Literal["step", "cosine", "constant"] = "step"
    epochs: int = 50
    batch: int = 16384
    shuffle: bool = False
    revive: bool = False
    closing_kmeans: int = 0

    @property
    def index_bits(self) -> int:
        return self.codebook_size.bit_length() - 1

    @property
    def window_bits(self) -> int:
        return self.state_bits or self.index_bits

    @property
    def windowed(self) -> bool:
        return self.window_bits > self.index_bits


def recipe(name: Recipe, **changes: Any) -> PlainSettings:
    """A recipe's values, with changes. Raises TypeError for a name that is no field."""
    known = {field.name for field in fields(PlainSettings)}
    own = {key: value for key, value in RECIPES[name].items() if key in known}
    return PlainSettings(**{**own, **changes})
