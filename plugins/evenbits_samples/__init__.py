"""What a model writes after a prompt, by greedy decoding: to look at beside the dense model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evenbits.hookspecs import hookimpl
from evenbits.measure import Evaluator

if TYPE_CHECKING:
    from evenbits_samples.evaluator import SamplesEvaluator


def _make(options: Any) -> SamplesEvaluator:
    from evenbits_samples.evaluator import SamplesEvaluator

    return SamplesEvaluator(options)


def _corpora(options: Any) -> Sequence[Mapping[str, Any]]:
    return () if options.corpus is None else (options.corpus,)


@hookimpl
def provide_evaluators() -> Sequence[Evaluator]:
    from evenbits_samples.options import SamplesOptions

    return [
        Evaluator(
            name="samples",
            summary="sample continuations of prompts, greedy, for the report to show beside the dense model's",
            options=SamplesOptions,
            make=_make,
            corpora=_corpora,
        )
    ]
