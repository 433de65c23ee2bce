"""GPTQ: rounding with error feedback through the second moment of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor, Compressor
    from evenbits_gptq.options import GptqOptions


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    from evenbits.compressor import Compressor
    from evenbits.integer import predict
    from evenbits_gptq.options import GptqOptions, fit, needs

    return [
        Compressor(
            name="gptq",
            summary="second-order rounding on even levels, per row or group",
            paper="arXiv:2210.17323",
            options=GptqOptions,
            make=_make,
            predict=predict,
            fit=fit,
            needs=needs,
        )
    ]


def _make(options: GptqOptions) -> AnyCompressor:
    from evenbits_gptq.compressor import GptqCompressor

    return GptqCompressor(options)
