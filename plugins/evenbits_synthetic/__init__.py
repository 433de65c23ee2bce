"""A model whose weights are random numbers of a known law, and how far a compressor moves them: no download."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evenbits.hookspecs import hookimpl
from evenbits.measure import Corpus, Evaluator

if TYPE_CHECKING:
    from evenbits_synthetic.evaluator import DistortionEvaluator


def _make(options: Any) -> DistortionEvaluator:
    from evenbits_synthetic.evaluator import DistortionEvaluator

    return DistortionEvaluator(options)


@hookimpl
def provide_models() -> Mapping[str, os.PathLike[str]]:
    """The folder is written when a run or a plan first asks for its path."""
    from evenbits_synthetic.folder import GaussianFolder

    return {"gaussian": GaussianFolder()}


@hookimpl
def provide_corpora() -> Sequence[Corpus]:
    from evenbits_synthetic.options import WordsOptions
    from evenbits_synthetic.words import read_words

    return [
        Corpus(
            name="random-words",
            summary="independent words of the gaussian model's vocabulary, each as likely as the others",
            options=WordsOptions,
            read=read_words,
        )
    ]


@hookimpl
def provide_evaluators() -> Sequence[Evaluator]:
    from evenbits_synthetic.options import DistortionOptions

    return [
        Evaluator(
            name="distortion",
            summary="squared error of the gaussian model's linear weights over their own squares",
            options=DistortionOptions,
            make=_make,
            libraries=("scipy",),
        )
    ]
