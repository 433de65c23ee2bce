"""The model that a plan is made for: its shapes by the headers of its files, or by the outline a suite gives."""

from __future__ import annotations

from dataclasses import dataclass

from evenbits.compressor import LayerShape, ModelShapes
from evenbits.errors import SuiteError
from evenbits.record import ModelFacts
from evenbits.shapes import WIDTHS, Inventory, read_inventory
from evenbits.sources import ModelSource
from evenbits.suite_spec import ModelOutline


@dataclass(frozen=True)
class PlannedModel:
    """A model with its shapes at the dtype it is evaluated in."""

    source: ModelSource
    dtype: str
    shapes: ModelShapes
    facts: ModelFacts


def plan_model(source: ModelSource, dtype: str, outline: ModelOutline | None = None) -> PlannedModel:
    """Read the headers, or the outline where the files are not there; `dtype` "auto" keeps the stored one.

    Raises SuiteError where outline and files differ.
    """
    described: Inventory | ModelOutline
    if source.present:
        described = read_inventory(source.folder)
        if outline is not None:
            check_outline(source, outline.shapes(), described.shapes())
    else:
        assert outline is not None, "a model without files is only found where it has an outline"
        described = outline
    evaluated = described.dtype if dtype == "auto" else dtype
    shapes = described.shapes(evaluated)
    width = WIDTHS[evaluated]
    facts = ModelFacts(
        name=source.name,
        revision=source.revision,
        dtype=evaluated,
        parameters=shapes.parameters,
        linear_weights=shapes.weights,
        stored_bits=8 * WIDTHS[described.dtype],
        linear_bytes=shapes.weights * width,
        model_bytes=shapes.weights * width + shapes.rest_bytes,
    )
    return PlannedModel(source, evaluated, shapes, facts)


def check_outline(source: ModelSource, outline: ModelShapes, files: ModelShapes) -> None:
    """Raises SuiteError, naming the first layer or the count that differs."""
    said = f"model {source.name}: its outline does not describe its files: "
    layers = {layer.name: layer for layer in files.layers}
    for layer in outline.layers:
        found = layers.pop(layer.name, None)
        if found != layer:
            theirs = "not there" if found is None else _told(found)
            raise SuiteError(f"{said}{layer.name} is {_told(layer)} in the outline, {theirs} in the files; correct it")
    if layers:
        raise SuiteError(f"{said}the files have {len(layers)} linear layers more, first {min(layers)}; correct it")
    if outline.parameters != files.parameters:
        counts = f"{outline.parameters:,} parameters in the outline, {files.parameters:,} in the files"
        raise SuiteError(f"{said}{counts}; see vocab_size, tie_word_embeddings and qk_norm")


def _told(layer: LayerShape) -> str:
    bias = " with a bias" if layer.bias else ""
    return f"{layer.out_features} x {layer.in_features} {layer.dtype}{bias}"
