"""What a compressor stored becomes a layer's weight again, and a failure there one that names the layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from evenbits.compressor import Fold, LayerCompressor, LayerShape, PackedLayer, Role, Shared
from evenbits.errors import EvenbitsError, TrialFailed


@contextmanager
def named_failure(layer: str) -> Iterator[None]:
    """A plugin's own exceptions become TrialFailed with the layer's name, their cause kept."""
    try:
        yield
    except (EvenbitsError, MemoryError):
        raise
    except Exception as error:
        raise TrialFailed(f"{layer}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def restore_layer(compressor: LayerCompressor, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
    """(out, in) float32 from packed tensors alone. Raises TrialFailed for a wrong shape or non-finite weights."""
    if set(packed.roles.values()) == {Role.DENSE} and set(packed.tensors) == {"weight"}:
        restored = packed.tensors["weight"].to(torch.float32)
    else:
        restored = compressor.restore(packed, layer, shared)
    if tuple(restored.shape) != (layer.out_features, layer.in_features):
        raise TrialFailed(
            f"{layer.name}: restored to {tuple(restored.shape)}, expected {(layer.out_features, layer.in_features)}"
        )
    if not all_finite(restored):
        raise TrialFailed(f"{layer.name}: the restored weight is not finite")
    return restored


def unfolded(restored: Tensor, fold: Fold) -> Tensor:
    """(out, in): what the stored weight stands for."""
    if fold.rows is not None:
        restored = restored / fold.rows.float()[:, None]
    return restored if fold.columns is None else restored / fold.columns.float()


def all_finite(weight: Tensor) -> bool:
    """Without the copies that torch.isfinite makes: extremes are NaN where any entry is."""
    low, high = torch.aminmax(weight.detach())
    return math.isfinite(low) and math.isfinite(high)
