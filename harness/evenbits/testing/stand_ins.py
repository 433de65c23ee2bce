"""What stands in for plugins where a stage is tried: a method whose scales may be trained, and a made-up corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from evenbits import __version__
from evenbits.budget import BitBudget, choose, pinned
from evenbits.compressor import (
    Compressor,
    Estimate,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelShapes,
    Options,
    PackedLayer,
    Refusal,
    Role,
    Shared,
)
from evenbits.hookspecs import hookimpl
from evenbits.measure import Corpus, Text
from evenbits.plugins import PluginInfo, Registry, load_plugins
from evenbits.testing.names import CORPUS, METHOD
from evenbits.tiny import tiny_text


class RowOptions(Options):
    levels: int = Field(default=15, ge=3, le=255, description="of each row's grid, odd")


class Rows(LayerCompressor):
    """Each row rounded to a grid around zero: a byte a code, a float16 step a row, which may be trained."""

    def __init__(self, options: RowOptions) -> None:
        self.largest = options.levels // 2

    def compress(self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        step = (weight.abs().amax(1) / self.largest).clamp_min(1e-6).half()
        codes = (weight / step.float()[:, None]).round().clamp(-self.largest, self.largest).to(torch.int8)
        return PackedLayer({"codes": codes, "step": step}, {"codes": Role.CODE, "step": Role.SCALE})

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return packed.tensors["codes"].float() * packed.tensors["step"].float()[:, None]

    def tunable(self, packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
        return {"step": packed.tensors["step"]}


def _predict(options: RowOptions, shapes: ModelShapes) -> Estimate:
    scales = sum(2 * layer.out_features for layer in shapes.layers)
    return Estimate(8.0, 8.0 + 8 * scales / shapes.weights, {Role.CODE: shapes.weights, Role.SCALE: scales})


def _fit(budget: BitBudget, shapes: ModelShapes, fixed: Mapping[str, Any]) -> RowOptions | Refusal:
    return choose(budget, shapes, [pinned(RowOptions, fixed)], _predict)


ROWS = Compressor(METHOD, "rows rounded to a grid, for tests", "", RowOptions, Rows, _predict, _fit)


class TextOptions(Options):
    words: int = Field(default=600, ge=1, description="how many, in documents of a hundred")


def _read(options: TextOptions) -> Text:
    words = tiny_text(options.words).split()
    documents = [" ".join(words[start : start + 100]) for start in range(0, len(words), 100)]
    return Text(documents, " ", {"corpus": CORPUS, "words": options.words})


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    return [ROWS]


@hookimpl
def provide_corpora() -> Sequence[Corpus]:
    return [Corpus(CORPUS, "made-up sentences, for tests", TextOptions, _read, location=())]


def with_stand_ins() -> Registry:
    """What is installed, and these."""
    import evenbits.testing.stand_ins as this

    registry = load_plugins()
    registry.manager.register(this, this.__name__)
    hooks = ("provide_compressors", "provide_corpora")
    registry.plugins.append(PluginInfo(this.__name__, this.__name__, "evenbits", __version__, "ok", hooks))
    return registry
