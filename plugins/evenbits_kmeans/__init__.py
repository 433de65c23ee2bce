"""Plain vector quantisation with k-means: what a cleverer codebook must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor, Compressor
    from evenbits_kmeans.options import KmeansOptions


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    from evenbits.compressor import Compressor
    from evenbits_kmeans.options import KmeansOptions, fit, predict

    return [
        Compressor(
            name="kmeans",
            summary="plain vector quantisation: k-means codebooks per matrix, per kind or one for all, row scales",
            paper="Gersho and Gray 1992, chapters 10 and 11; as a baseline in arXiv:2511.17637",
            options=KmeansOptions,
            make=_make,
            predict=predict,
            fit=fit,
            stochastic=True,
        )
    ]


def _make(options: KmeansOptions) -> AnyCompressor:
    from evenbits_kmeans.compressor import KmeansCompressor

    return KmeansCompressor(options)
