"""Tasks of EleutherAI's lm-evaluation-harness: its own by name, a folder's, or the papers' sets from local files."""

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
            summary="accuracy on lm-eval tasks: the hub's by name, a folder of YAML tasks, or local data files",
            options=LmEvalOptions,
            make=_make,
            files=task_files,
            location=("data", "folder"),
            libraries=("lm-eval", "datasets"),
            preload=("lm_eval.models.huggingface", "lm_eval.tasks", "datasets"),
        )
    ]
