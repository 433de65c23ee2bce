"""NormalFloat-4, QLoRA's storage type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor, Compressor
    from evenbits_nf4.options import Nf4Options


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    from evenbits.compressor import Compressor
    from evenbits_nf4.options import Nf4Options, fit, predict

    return [
        Compressor(
            name="nf4",
            summary="16 levels at Gaussian quantiles, scaled by block",
            paper="arXiv:2305.14314",
            options=Nf4Options,
            make=_make,
            predict=predict,
            fit=fit,
        )
    ]


def _make(options: Nf4Options) -> AnyCompressor:
    from evenbits_nf4.compressor import Nf4Compressor

    return Nf4Compressor(options)
