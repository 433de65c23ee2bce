"""Other people's libraries as methods, each in an environment of its own, and checkpoints that somebody published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    from evenbits.compressor import Compressor


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    from evenbits_backends.methods import descriptors

    return descriptors()
