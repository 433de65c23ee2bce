"""How the layers of a rescaled checkpoint (AWQ) were stored: read from what takes it back in the operations before.

A layer whose inputs a norm writes has its columns multiplied by what the norm's gain was divided by; one whose inputs
another layer writes, by what that layer's rows were divided by. A column that nothing takes back is then an error of
the weight, as it is one of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evenbits.compressor import Fold, LayerShape
from evenbits.errors import TrialFailed
from evenbits.maths.hessian import relative_error

# what writes the inputs of each kind of layer: a norm of the block, or another layer
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA: Mapping[str, str] = {
    **dict.fromkeys(_QKV, "input_layernorm"),
    "self_attn.o_proj": "self_attn.v_proj",
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    "mlp.down_proj": "mlp.up_proj",
}
WRITERS: Mapping[str, Mapping[str, str]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA)
OFFSET = {"gemma": 1.0}  # what a norm adds to its stored weight to have its gain

ROUNDED = 0.01  # how far off a scale may be that is known: what takes it back is rounded to its dtype

Norm = Callable[[str], tuple[Tensor, Tensor]]  # its weight in the dense model and in the checkpoint, by full name


class Rescaling:
    """Of one checkpoint; its layers have to come in the order in which their inputs become known.

    model_type: of the dense model's config, one of WRITERS. head_dim: width of a head of values.
    """

    def __init__(self, model_type: str, head_dim: int | None, norm: Norm) -> None:
        self._writers, self._offset = WRITERS[model_type], OFFSET.get(model_type, 0.0)
        self._head_dim, self._norm = head_dim, norm
        # of layers whose rows other layers read: what their rows were multiplied by, and how far off that may be
        self._rows: dict[str, Tensor] = {}
        self._doubt: dict[str, float] = {}

    def fold(self, shape: LayerShape, weight: Tensor, restored: Tensor) -> Fold | None:
        """weight, restored: (out, in). None for a layer that is not of a block; 1 where nothing was rescaled.

        Rows, where another layer reads them, are the least squares' between what is stored and the weight.
        """
        if shape.kind not in self._writers:
            return None
        columns = self._columns(shape).to(weight.device)
        if shape.kind not in self._writers.values():
            return Fold(None, columns)
        rows = fitted_rows(weight * columns, restored)
        error = relative_error(weight * columns * rows[:, None], restored)
        self._rows[shape.name] = rows
        # by chance, five standard deviations of a row's fit, and by rounding that shrinks what it rounds
        self._doubt[shape.name] = ROUNDED + 5 * math.sqrt(error / shape.in_features) + error
        return Fold(rows, columns)

    def fold_dense(self, shape: LayerShape, weight: Tensor, restored: Tensor) -> Fold | None:
        """As `fold`, of a layer stored unrounded. Behind another layer, whose rows are only fitted, it tells its scales
        itself, and they must be those that are taken back.

        Raises TrialFailed where they are not.
        """
        expected = self.fold(shape, weight, restored)
        if expected is None or expected.columns is None or self._writer(shape) not in self._rows:
            return expected
        found = fitted_rows(weight.T, restored.T)
        told = weight.any(0)  # a column of zeros bears any scale
        apart = float(((found / expected.columns - 1).abs() * told).amax())
        if not apart <= self._doubt[self._writer(shape)]:
            raise TrialFailed(
                f"{shape.name}: a column of what is left dense is multiplied by another scale than "
                f"{self._writer(shape)} takes back, {apart:.0%} off"
            )
        return Fold(None, found)

    def takes_back(self, name: str) -> bool:
        """Whether it is the gain of a norm that layers were checked against."""
        norms = set(self._writers.values()) - set(self._writers)
        return name.endswith(tuple(f".{norm}.weight" for norm in norms))

    def bias(self, name: str, ours: Tensor) -> tuple[Tensor, float] | None:
        """Of a layer whose rows were multiplied: its bias as that has to be stored, and how far off it may be."""
        layer = name.removesuffix(".bias")
        return None if layer == name or layer not in self._rows else (ours * self._rows[layer], self._doubt[layer])

    def _writer(self, shape: LayerShape) -> str:
        return shape.name.removesuffix(shape.kind) + self._writers[shape.kind]

    def _columns(self, shape: LayerShape) -> Tensor:
        """(in,): the inverse of what the writer's outputs were multiplied by."""
        writer = self._writer(shape)
        if (rows := self._rows.get(writer)) is not None:
            return 1 / self._spread(rows, shape)
        ours, theirs = self._norm(f"{writer}.weight")
        ours, theirs = ours.float() + self._offset, theirs.float() + self._offset
        if not bool((torch.isfinite(theirs) & ((theirs == 0) == (ours == 0))).all()):
            raise TrialFailed(f"{writer}: its gain is not finite, or nothing where the base model's is something")
        return torch.where(theirs == ours, torch.ones_like(ours), ours / theirs)

    def _spread(self, rows: Tensor, shape: LayerShape) -> Tensor:
        """(in,): of values, which the queries of a group of heads read together."""
        if len(rows) == shape.in_features:
            return rows
        width, readers = self._head_dim or len(rows), shape.in_features // len(rows)
        if readers * len(rows) != shape.in_features or len(rows) % width:
            raise TrialFailed(
                f"{shape.name}: reads {shape.in_features} channels, which {len(rows)} values in heads of {width} do "
                "not explain"
            )
        return rows.view(-1, width).repeat_interleave(readers, dim=0).flatten()


def fitted_rows(weight: Tensor, restored: Tensor) -> Tensor:
    """(out,): what each row of `weight` was multiplied by, by least squares; 1 where that is nothing or negative."""
    rows = (restored * weight).sum(1) / weight.square().sum(1).clamp_min(1e-30)
    return torch.where(rows > 0, rows, torch.ones_like(rows))


def fitted(weight: Tensor, restored: Tensor) -> Fold:
    """By least squares alone, columns first and then rows: for a model whose operations before are not known here.

    The errors that follow are a little below the true ones (one fitted number a column and a row). A whole row or
    column stored at a wrong scale is not seen through this; wrong values, orders and groups are.
    """
    columns = fitted_rows(weight.T, restored.T)
    return Fold(fitted_rows(weight * columns, restored), columns)
