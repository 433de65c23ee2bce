"""Round to nearest on a uniform grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor, Compressor
    from evenbits_rtn.options import RtnOptions


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    from evenbits.compressor import Compressor
    from evenbits.integer import predict
    from evenbits_rtn.options import RtnOptions, fit

    return [
        Compressor(
            name="rtn",
            summary="round to nearest on even levels, per row or group",
            paper="the baseline of arXiv:2210.17323",
            options=RtnOptions,
            make=_make,
            predict=predict,
            fit=fit,
        )
    ]


def _make(options: RtnOptions) -> AnyCompressor:
    from evenbits_rtn.compressor import RtnCompressor

    return RtnCompressor(options)
