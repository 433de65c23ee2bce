"""Scores tasks with lm-eval's own prompts and log-likelihoods, and keeps every item's result."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from evenbits.errors import MissingExtra, SuiteError, TrialFailed
from evenbits.measure import Measurement, Subject
from evenbits.sampling import tokenizer_identity
from evenbits.statistics import bootstrap_interval
from evenbits_lmeval.options import LmEvalOptions, task_folder

METRICS = ("acc", "acc_norm")
BOS = {"tokenizer": None, "always": True, "none": False}


class LmEvalEvaluator:
    def __init__(self, options: LmEvalOptions) -> None:
        self.options = options

    def evaluate(self, subject: Subject) -> Sequence[Measurement]:
        """One measurement "TASK_acc" (and "TASK_acc_norm") a task, higher is better, in shares of 1.

        items: 0 or 1 for each item in the task's order. low, high: 95 % percentile bootstrap over items.
        Raises SuiteError for unknown tasks, TrialFailed when a task yields no accuracy, MissingExtra without lm-eval.
        """
        results = self._run(subject)
        measurements: list[Measurement] = []
        for task in self.options.tasks:
            samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
            protocol = self._protocol(subject, results, task, samples)
            found = [metric for metric in METRICS if metric in samples[0]]
            if not found:
                raise TrialFailed(f"lm-eval: task {task!r} has no accuracy; its metrics: {samples[0]['metrics']}")
            for metric in found:
                items = np.array([float(sample[metric]) for sample in samples])
                measurements.append(_accuracy(f"{task}_{metric}", items, {**protocol, "metric": metric}))
        if self.options.mean is not None:
            return [self._mean(measurements), *measurements]  # what papers compare comes first
        return measurements

    def _run(self, subject: Subject) -> Any:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtra("lm-eval", "lmeval") from error
        folder = task_folder(self.options)
        manager = TaskManager(
            include_path=None if folder is None else str(folder.resolve()), include_defaults=folder is None
        )
        unknown = [task for task in self.options.tasks if task not in manager.all_tasks]
        if unknown:
            known = ", ".join(sorted(manager.all_tasks)[:12]) or "none"
            raise SuiteError(f"lm-eval: no task {', '.join(unknown)} in {folder or 'lm-eval'}; there are: {known}")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model = HFLM(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            batch_size=self.options.batch_size,
            max_length=self.options.max_length,
            device=str(subject.device),
            add_bos_token=BOS[self.options.bos],
        )
        return simple_evaluate(
            model=model,
            tasks=list(self.options.tasks),
            task_manager=manager,
            limit=self.options.limit,
            bootstrap_iters=0,
            log_samples=True,
        )

    def _protocol(
        self, subject: Subject, results: Any, task: str, samples: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        items = hashlib.sha256("".join(str(sample["doc_hash"]) for sample in samples).encode()).hexdigest()
        prompts = hashlib.sha256("".join(str(sample["prompt_hash"]) for sample in samples).encode()).hexdigest()
        return {
            **subject.facts,
            "task": task,
            "task_version": str(results["versions"].get(task)),
            "items": len(samples),
            "items_sha256": items[:16],
            "prompts_sha256": prompts[:16],
            "few_shot": int(results["n-shot"].get(task, 0)),
            "bos": self.options.bos,
            "max_length": self.options.max_length,
            "tokenizer": tokenizer_identity(subject.tokenizer),
            "lm_eval": version("lm-eval"),
            "scorer": "HFLM",
        }

    def _mean(self, measurements: Sequence[Measurement]) -> Measurement:
        """Plain mean of the tasks' `acc`, as papers print it; its items are all items, each weighted by its task."""
        accuracies = [measurement for measurement in measurements if measurement.name.endswith("_acc")]
        parts = [m.items * (1 / (len(m.items) * len(accuracies))) for m in accuracies if m.items is not None]
        items = np.concatenate(parts)
        items = items * len(items)  # so that their plain mean is the mean of the tasks
        name = str(self.options.mean)
        protocol = {"tasks": [dict(measurement.fingerprint) for measurement in accuracies], "metric": "mean of acc"}
        return _accuracy(name, items, protocol)


def _accuracy(name: str, items: np.ndarray[Any, Any], protocol: Mapping[str, Any]) -> Measurement:
    low, high = bootstrap_interval(items, "mean")
    return Measurement(
        name=name,
        value=float(items.mean()),
        unit="accuracy",
        better="higher",
        low=low,
        high=high,
        fingerprint=protocol,
        details={"items": len(items)},
        items=items,
    )
