"""Layouts: how other people's libraries store a quantized linear layer, and what decodes it here, in plain torch.

A layout is a module of `layouts/` with an object LAYOUT; adding one there and to LAYOUTS is all. Nothing is repacked:
the tensors are stored and billed as the library's file has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from evenbits.compressor import LayerShape, Role
from evenbits.errors import ArtifactError, TrialFailed

if TYPE_CHECKING:
    from torch import Tensor

# in the order in which a quantization_config is offered to them
LAYOUTS = ("gptq", "awq", "auto_round", "compressed_tensors", "bitsandbytes", "hqq", "torchao", "aqlm", "vptq")


class Grid(NamedTuple):
    """What a layer's values are rounded to: 2^bits values a group of so many inputs (0: a whole row)."""

    bits: int
    group: int


class Layout(Protocol):
    """facts: small JSON facts read from a checkpoint's quantization_config; all that decoding needs beside tensors."""

    name: str

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """None where `config` (a quantization_config) is of another layout. Raises TrialFailed for one of this layout
        that cannot be decoded, with what it asks for and what could be read instead."""
        ...

    def roles(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[str, Role]:
        """Tensors of a layer by the end of their name ("qweight" of "model.layers.0.mlp.up_proj.qweight") with the
        role each is billed under; all that the library writes for the layer, also what decoding does not need."""
        ...

    def role_bytes(self, shape: LayerShape, facts: Mapping[str, Any]) -> dict[Role, int]:
        """What `roles` of a layer of this shape will take on disk, exactly, before anything runs."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], shape: LayerShape, facts: Mapping[str, Any]) -> Tensor:
        """(out, in) float32. Raises TrialFailed where the tensors' shapes are not those of the layer."""
        ...

    def grid(self, shape: LayerShape, facts: Mapping[str, Any]) -> Grid | None:
        """What plain rounding of so many bits would be, or None for what is no scalar grid (vectors)."""
        ...


@cache
def layout(name: str) -> Layout:
    """Raises ArtifactError for a layout that this version does not know."""
    if name not in LAYOUTS:
        raise ArtifactError(f"layout {name!r} is not known here; known: {', '.join(LAYOUTS)}")
    found: Layout = import_module(f"evenbits_backends.layouts.{name}").LAYOUT
    return found


def recognise(config: Mapping[str, Any], where: str) -> tuple[Layout, dict[str, Any]]:
    """The layout of a quantization_config with its facts. Raises TrialFailed where none fits, or one is malformed."""
    for name in LAYOUTS:
        try:
            facts = layout(name).facts(config)
        except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
            raise TrialFailed(f"{where}: its quantization_config is no {name} one that can be read ({error})") from None
        if facts is not None:
            return layout(name), facts
    method = config.get("quant_method", "none")
    raise TrialFailed(f"{where}: quantization method {method!r} cannot be read; what can: {', '.join(LAYOUTS)}")
