"""End-to-end tuning of what an artifact leaves tunable (scales, codebooks, decoders, norms), codes as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits.compressor import ModelShapes, Recovery, RecoveryStage, Role
    from evenbits_distill.options import DistillOptions


@hookimpl
def provide_recoveries() -> Sequence[Recovery]:
    from evenbits.compressor import Needs, Recovery
    from evenbits_distill.options import DistillOptions

    return [
        Recovery(
            name="distill",
            summary="tunes scales, codebooks, decoders and norms towards the dense model's logits; codes stay",
            paper="arXiv:2401.06118",
            options=DistillOptions,
            make=_make,
            predict=_predict,
            needs=Needs(gradients=True),
        )
    ]


def _predict(options: DistillOptions, shapes: ModelShapes) -> Mapping[Role, int]:
    """Every tensor keeps its shape and dtype: no bytes are added."""
    return {}


def _make(options: DistillOptions) -> RecoveryStage:
    from evenbits_distill.stage import DistillStage

    return DistillStage(options)
