"""lm-eval's accuracies against log-likelihoods summed by hand, and what bad tasks get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evenbits.errors import SuiteError
from evenbits.models import load_tokenizer, open_model
from evenbits.plugins import load_plugins
from evenbits.subject import MeasuredModel
from evenbits.tiny import tiny_model
from evenbits_lmeval.evaluator import LmEvalEvaluator
from evenbits_lmeval.options import LmEvalOptions, task_files, task_folder

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROWS: list[dict[str, Any]] = [
    {"context": "the red dog saw", "choices": ["the cat", "a small tree house"], "answer": 0},
    {"context": "a quiet bird found", "choices": ["a river", "the story again"], "answer": 1},
    {"context": "two happy cat likes", "choices": ["the old river", "a dog"], "answer": 0},
    {"context": "then the friend gave", "choices": ["a story", "the small house", "one bird"], "answer": 2},
    {"context": "here the old tree", "choices": ["made a story", "took"], "answer": 1},
]
pytestmark = [
    # lm-eval and what it brings along: not ours to mend, no effect on scores
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lmeval")
    tiny_model(root / "model")
    tasks = root / "tasks"
    tasks.mkdir()
    data = tasks / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tasks / "tiny.yaml").write_text(TASK.format(data=data))
    return root


def subject(folder: Path) -> MeasuredModel:
    return MeasuredModel(
        registry=load_plugins(),
        folder=folder / "model",
        artifact=False,
        dtype="float32",
        device=torch.device("cpu"),
        seed=0,
        base_facts={"model": "tiny"},
    )


def by_hand(folder: Path, row: dict[str, Any]) -> list[float]:
    """Log-likelihood of each choice after the context and a space, BOS where the tokenizer puts it."""
    model = open_model(folder / "model", "float32", "cpu")
    tokenizer = load_tokenizer(folder / "model")
    found = []
    for choice in row["choices"]:
        context = tokenizer(row["context"])["input_ids"]
        whole = tokenizer(f"{row['context']} {choice}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
    return found


def test_accuracy_is_that_of_summed_log_likelihoods(folder: Path) -> None:
    options = LmEvalOptions(tasks=("tiny_choice",), folder=str(folder / "tasks"), batch_size=2, mean="mean_acc")
    found = {m.name: m for m in LmEvalEvaluator(options).evaluate(subject(folder))}
    assert set(found) == {"tiny_choice_acc", "tiny_choice_acc_norm", "mean_acc"}
    expected, normalised = [], []
    for row in ROWS:
        scores = by_hand(folder, row)
        lengths = [len(choice) for choice in row["choices"]]
        expected.append(float(np.argmax(scores) == row["answer"]))
        normalised.append(float(np.argmax(np.divide(scores, lengths)) == row["answer"]))
    acc = found["tiny_choice_acc"]
    assert acc.items is not None
    assert acc.items.tolist() == expected
    assert acc.value == pytest.approx(np.mean(expected))
    assert found["tiny_choice_acc_norm"].value == pytest.approx(np.mean(normalised))
    assert found["mean_acc"].value == pytest.approx(acc.value)
    assert acc.better == "higher"
    assert acc.fingerprint["items"] == len(ROWS)
    assert acc.fingerprint["few_shot"] == 0


def test_the_mean_weights_tasks_not_items(folder: Path) -> None:
    options = LmEvalOptions(tasks=("tiny_choice",), mean="mean_acc")
    evaluator = LmEvalEvaluator(options)
    from evenbits_lmeval.evaluator import _accuracy

    long, short = np.ones(30), np.zeros(10)
    mean = evaluator._mean([_accuracy("a_acc", long, {}), _accuracy("b_acc", short, {})])
    assert mean.value == pytest.approx(0.5)
    assert mean.items is not None
    assert len(mean.items) == 40


def test_unknown_tasks_and_folders_are_one_line(folder: Path) -> None:
    options = LmEvalOptions(tasks=("tiny_chioce",), folder=str(folder / "tasks"))
    with pytest.raises(SuiteError, match=r"no task tiny_chioce in .*there are: tiny_choice"):
        LmEvalEvaluator(options).evaluate(subject(folder))
    with pytest.raises(SuiteError, match="no folder of tasks at"):
        task_folder(LmEvalOptions(tasks=("x",), folder=str(folder / "none")))
    with pytest.raises(SuiteError, match="no installed package 'no_such_package'"):
        task_folder(LmEvalOptions(tasks=("x",), folder="package:no_such_package/tasks"))


def test_the_plan_knows_the_files(folder: Path) -> None:
    options = LmEvalOptions(tasks=("tiny_choice",), folder=str(folder / "tasks"))
    assert [path.name for path in task_files(options)] == ["rows.jsonl", "tiny.yaml"]
    assert task_folder(LmEvalOptions(tasks=("x",), folder="package:evenbits_lmeval")) is not None
