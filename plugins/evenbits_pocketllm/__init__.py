"""PocketLLM (arXiv:2511.17637): meta-networks, codebooks in latent space; the paper's recipe, the code's, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

try:
    from evenbits.hookspecs import hookimpl
except ModuleNotFoundError as error:
    # the kernels' modules are also used on machines without pluggy, where nothing is registered
    if error.name != "pluggy":
        raise

    def hookimpl(function):  # type: ignore[no-untyped-def,misc]
        return function


if TYPE_CHECKING:
    from evenbits.compressor import AnyCompressor, Compressor
    from evenbits_pocketllm.options import PocketOptions


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    from evenbits.compressor import Compressor
    from evenbits_pocketllm.cost import predict
    from evenbits_pocketllm.fitting import fit
    from evenbits_pocketllm.options import PocketOptions, needs

    return [
        Compressor(
            name="pocketllm",
            summary="indices into a latent codebook and a small decoder network; recipes: evenbits, paper, code",
            paper="arXiv:2511.17637",
            options=PocketOptions,
            make=_make,
            predict=predict,
            fit=fit,
            needs=needs,
            stochastic=True,
        )
    ]


def _make(options: PocketOptions) -> AnyCompressor:
    from evenbits_pocketllm.compressor import PocketCompressor

    return PocketCompressor(options)
