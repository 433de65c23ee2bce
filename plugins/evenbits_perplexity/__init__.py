"""Perplexity with its protocol in the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evenbits.hookspecs import hookimpl
from evenbits.measure import Evaluator

if TYPE_CHECKING:
    from evenbits_perplexity.evaluator import PerplexityEvaluator


def _make(options: Any) -> PerplexityEvaluator:
    from evenbits_perplexity.evaluator import PerplexityEvaluator

    return PerplexityEvaluator(options)


@hookimpl
def provide_evaluators() -> Sequence[Evaluator]:
    from evenbits_perplexity.options import PerplexityOptions

    return [
        Evaluator(
            name="perplexity",
            summary="exp of the mean next-token loss over windows of a text",
            options=PerplexityOptions,
            make=_make,
            corpora=lambda options: tuple(c for c in (options.corpus, options.units_of) if c is not None),
        )
    ]
