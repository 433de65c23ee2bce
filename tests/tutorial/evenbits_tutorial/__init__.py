"""A compressor, an evaluator and a profiler. Hooks only: what is heavy is imported when it is made."""

from __future__ import annotations

from collections.abc import Sequence

from evenbits.compressor import Compressor, LayerCompressor
from evenbits.hookspecs import hookimpl
from evenbits.measure import Evaluator, EvaluatorStage, Profiler, ProfilerStage

from evenbits_tutorial.measure_options import LoadTimeOptions, NextTokenOptions
from evenbits_tutorial.options import PowersOptions, fit, predict


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    summary = "powers of two and a scale per row"
    return [Compressor("powers", summary, "arXiv:1603.01025", PowersOptions, _powers, predict, fit)]


@hookimpl
def provide_evaluators() -> Sequence[Evaluator]:
    summary = "share of a text's tokens that are among the k likeliest"
    return [Evaluator("next-token", summary, NextTokenOptions, _next_token, corpora=lambda options: [options.corpus])]


@hookimpl
def provide_profilers() -> Sequence[Profiler]:
    return [Profiler("load-time", "seconds to open the stored model", LoadTimeOptions, _load_time)]


def _powers(options: PowersOptions) -> LayerCompressor:
    from evenbits_tutorial.compressor import PowersCompressor

    return PowersCompressor(options)


def _next_token(options: NextTokenOptions) -> EvaluatorStage:
    from evenbits_tutorial.evaluator import NextToken

    return NextToken(options)


def _load_time(options: LoadTimeOptions) -> ProfilerStage:
    from evenbits_tutorial.profiler import LoadTime

    return LoadTime(options)
