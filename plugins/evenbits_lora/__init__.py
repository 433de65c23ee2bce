"""LoRA after any compressor, and on the dense model, through PEFT (LoRA: arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evenbits.compressor import Needs, Recovery
from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits_lora.stage import LoraStage


def _make(options: Any) -> LoraStage:
    from evenbits_lora.stage import LoraStage

    return LoraStage(options)


@hookimpl
def provide_recoveries() -> Sequence[Recovery]:
    from evenbits_lora.options import LoraOptions, dense, predict

    return [
        Recovery(
            name="lora",
            summary="low-rank adapters trained beside the frozen compressed weights; stored apart, or merged",
            paper="LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314",
            options=LoraOptions,
            make=_make,
            predict=predict,
            needs=Needs(gradients=True),
            dense=dense,
            libraries=("peft",),
        )
    ]
