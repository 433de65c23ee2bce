"""What a library's checkpoint will cost, from its layout. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from evenbits.compressor import Estimate, LayerShape, ModelShapes, Role, meta_bytes
from evenbits_backends.layout import layout

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


def evaluated_dtype(shapes: ModelShapes, shape: LayerShape) -> str:
    """What the model is evaluated in: the dtype that a worker loads it in."""
    return shapes.dtype or shape.dtype


def layout_estimate(
    name: str,
    facts: Mapping[str, Any],
    shapes: ModelShapes,
    index_bits: float,
    paper_bits: float,
    dense: Collection[LayerShape] = (),
) -> Estimate:
    """Every layer as the layout `name` stores it under `facts`, and the facts themselves, which the artifact keeps.

    dense: layers that the library leaves as they are; billed at the dtype they are evaluated in.
    """
    count: Counter[Role] = Counter({Role.META: meta_bytes({"layout": name, **facts})})
    for shape in shapes.layers:
        if shape in dense:
            count[Role.DENSE] += shape.weights * WIDTHS[evaluated_dtype(shapes, shape)]
        else:
            count.update(layout(name).role_bytes(shape, facts))
    return Estimate(index_bits, paper_bits, dict(count))
