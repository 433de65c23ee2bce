"""Multiple-choice tasks through EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evenbits.hookspecs import hookimpl
from evenbits.measure import Evaluator

if TYPE_CHECKING:
    from evenbits_lmeval.evaluator import LmEvalEvaluator


def _make(options: Any) -> LmEvalEvaluator:
    from evenbits_lmeval.evaluator import LmEvalEvaluator

    return LmEvalEvaluator(options)


@hookimpl
def provide_evaluators() -> Sequence[Evaluator]:
    from evenbits_lmeval.options import LmEvalOptions, task_files

    return [
        Evaluator(
            name="lm-eval",
            summary="accuracy on lm-eval tasks: a folder of YAML tasks, or the hub's by name",
            options=LmEvalOptions,
            make=_make,
            files=task_files,
            preload=("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks", "datasets"),
        )
    ]
