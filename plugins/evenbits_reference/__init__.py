"""The embedded reference: a small Llama, the closed world it was trained on, and five families of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evenbits.hookspecs import hookimpl
from evenbits.measure import Corpus

FOLDER = Path(__file__).resolve().parent


@hookimpl
def provide_models() -> Mapping[str, Path]:
    return {"reference": FOLDER / "model"}


@hookimpl
def provide_corpora() -> Sequence[Corpus]:
    from evenbits_reference.corpus import read_reference
    from evenbits_reference.options import ReferenceOptions

    return [
        Corpus(
            name="reference",
            summary="texts of the reference model's closed world, told as they are asked for",
            options=ReferenceOptions,
            read=read_reference,
        )
    ]
