"""Corpora: local text files, and the data sets that the papers calibrate and test on."""

from __future__ import annotations

from collections.abc import Sequence

from evenbits.hookspecs import hookimpl
from evenbits.measure import Corpus


@hookimpl
def provide_corpora() -> Sequence[Corpus]:
    from evenbits_corpora import options
    from evenbits_corpora.hub import SOURCES, hub_files, read_hub
    from evenbits_corpora.texts import read_text, text_files

    corpora = [
        Corpus(
            name="text",
            summary="local text or JSON-lines files, split into documents",
            options=options.TextOptions,
            read=read_text,
            files=text_files,
        )
    ]
    for source in SOURCES:
        corpora.append(
            Corpus(
                name=source.name,
                summary=source.summary,
                options=source.options,
                read=read_hub(source),
                files=hub_files(source),
            )
        )
    return corpora
