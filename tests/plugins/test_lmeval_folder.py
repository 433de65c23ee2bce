"""A user's folder of YAML tasks: what the plan says of it, odd tasks, and what belongs to their protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Finding, Measurement
from evenbits.plan import make_plan
from evenbits.plugins import load_plugins
from evenbits.statistics import bootstrap_interval
from evenbits.subject import MeasuredModel
from evenbits.suite import read_suite
from evenbits.tiny import tiny_model
from evenbits_lmeval.evaluator import LmEvalEvaluator
from evenbits_lmeval.options import LmEvalOptions, task_files, task_folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = [
    # lm-eval and what it brings along: not ours to mend, no effect on scores
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FUNCTIONS = """
import json
from pathlib import Path

import numpy as np

def read(file="rows.jsonl", **_):
    from datasets import Dataset, DatasetDict
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))

def read_mixed(**_):
    return read("mixed.jsonl")

def numpy_label(row): return np.int64(row["answer"])
def one_in_a_list(row): return [row["answer"]]
def texts_in_a_list(row): return [row["choices"][row["answer"]]]
def none_in_a_list(row): return [] if row["answer"] else [0]
def now_and_then_a_list(row): return [1] if row["answer"] else 0
def reverse(row): return row["choices"][::-1]
def own(row, results): return {"acc": float(results[0][0] > results[1][0])}
def raising(row, results): raise KeyError("boom")
def mean(items): return 0.25
"""
BASE = {
    "custom_dataset": "!function own.read",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": "[{metric: acc}]",
}
ROWS = [
    {"context": "the red dog saw", "choices": ["the cat", "a small tree house"], "answer": 0},
    {"context": "a quiet bird found", "choices": ["a river", "the story again"], "answer": 1},
    {"context": "two happy cat likes", "choices": ["the old river", "a dog"], "answer": 0},
]


def write_rows(path: Path, rows: Sequence[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(folder: Path, name: str, **settings: str | None) -> Path:
    config = {key: value for key, value in {**BASE, **settings}.items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {"task": name, **config}.items()))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_rows(tasks / "rows.jsonl")
    (tasks / "own.py").write_text(FUNCTIONS)
    return tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MeasuredModel:
    path = tmp_path_factory.mktemp("folder") / "model"
    tiny_model(path)
    return MeasuredModel(
        registry=load_plugins(), folder=path, artifact=False, dtype="float32", device=torch.device("cpu"), seed=0,
        base_facts={"model": "tiny"},
    )  # fmt: skip


def options(folder: Path, *tasks: str, **others: Any) -> LmEvalOptions:
    return LmEvalOptions.model_validate({"tasks": tasks, "folder": str(folder), **others})


def evaluate(folder: Path, model: MeasuredModel, *tasks: str, **others: Any) -> dict[str, Measurement]:
    found: Sequence[Finding] = LmEvalEvaluator(options(folder, *tasks, **others)).evaluate(model)
    return {each.name: each for each in found if isinstance(each, Measurement)}


# -- what the plan says --------------------------------------------------------------------------------------


def test_a_data_file_that_is_not_there_is_known_to_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    local = {"custom_dataset": None, "dataset_path": "json"}
    write_task(folder, "relative", **local, dataset_kwargs="{data_files: {test: rows.jsonl}}")
    with pytest.raises(SuiteError, match=r"relative\.yaml: no data file rows\.jsonl; lm-eval looks for it where"):
        task_files(options(folder, "relative"))
    write_rows(folder.parent / "rows.jsonl")
    assert task_files(options(folder, "relative"))[-1] == Path("rows.jsonl")
    gone = folder / "gone.jsonl"
    write_task(folder, "absolute", **local, dataset_kwargs=f"{{data_files: [{folder / 'rows.jsonl'}, {gone}]}}")
    with pytest.raises(SuiteError, match=r"absolute\.yaml: no data file .*gone\.jsonl$"):
        task_files(options(folder, "absolute"))
    # a broken task that nobody asked for is no matter; a group that holds it is
    assert task_files(options(folder, "relative"))
    (folder / "all.yaml").write_text("group: all\ntask: [relative, {group: inner, task: [absolute]}]\n")
    with pytest.raises(SuiteError, match=r"absolute\.yaml: no data file"):
        task_files(options(folder, "all"))
    # files outside the folder are data, too: broken rows are named, patterns are looked up
    (folder.parent / "rows.jsonl").write_text("{broken\n")
    with pytest.raises(SuiteError, match=r"rows\.jsonl, row 1: not JSON"):
        task_files(options(folder, "relative"))
    write_task(folder, "pattern", **local, dataset_kwargs=f"{{data_files: {folder}/r*.jsonl}}")
    assert folder / "rows.jsonl" in task_files(options(folder, "pattern"))


def test_names_that_the_plan_refuses(folder: Path) -> None:
    write_task(folder, "plain", tag="some")
    assert task_files(options(folder, "some"))
    with pytest.raises(SuiteError, match=r'no task plian in .*; did you mean "plain"\?; there are: plain, some'):
        task_files(options(folder, "plian"))
    (folder / "broken.yaml").write_text("task: broken\n  indented: [\n")
    with pytest.raises(SuiteError, match=r"no task broken in .*not to be read: .*broken\.yaml \(") as error:
        task_files(options(folder, "broken"))
    assert "\n" not in str(error.value)
    (folder / "loop.yaml").write_text("group: loop\ntask: [plain, loop]\n")
    with pytest.raises(SuiteError, match="the group loop is a member of itself"):
        task_files(options(folder, "loop"))
    write_task(folder, "other").rename(folder / "twin.yaml")
    (folder / "twin.yaml").write_text((folder / "plain.yaml").read_text())
    with pytest.raises(SuiteError, match=r"plain is described twice: in .*plain\.yaml and in .*twin\.yaml"):
        task_files(options(folder, "plain"))
    with pytest.raises(SuiteError, match=r"no installed package 'no\.such'"):
        task_folder(LmEvalOptions(tasks=("x",), folder="package:no.such/tasks"))


SUITE = """
name = "ids"
model = {{ path = "{model}", name = "tiny" }}
budgets = [{{ centre = 4.5, window = 0.6 }}]
methods = ["rtn"]
[[evaluators]]
name = "lm-eval"
options = {options}
"""


def test_a_trial_is_known_by_what_its_files_say_and_not_by_where_they_lie(folder: Path, tmp_path: Path) -> None:
    import shutil

    tiny_model(tmp_path / "model")
    registry = load_plugins()

    def ids(table: str) -> list[str]:
        suite = tmp_path / "suite.toml"
        suite.write_text(SUITE.format(model=tmp_path / "model", options=table))
        return [trial.id for trial in make_plan(read_suite(suite, registry), registry).trials]

    def of_folder(path: Path) -> list[str]:
        return ids(f'{{ tasks = ["plain"], folder = "{path}" }}')

    (tmp_path / "shared.yaml").write_text("metric_list: [{metric: acc}]\n")
    write_task(folder, "plain", metric_list=None, include="../shared.yaml")
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    first = of_folder(folder)
    assert len(first) == 2
    assert of_folder(moved) == first
    seen = [first]
    for file in (moved / "plain.yaml", moved / "own.py", moved / "rows.jsonl", tmp_path / "shared.yaml"):
        file.write_text(
            file.read_text().replace("acc", "acc_norm").replace("dog", "cat") + "\n" * (file.suffix != ".jsonl")
        )
        seen.append(of_folder(moved))
        assert seen[-1] not in seen[:-1]

    def of_data(path: Path) -> list[str]:
        return ids(f'{{ tasks = ["piqa"], data = "{path}", rows = "any" }}')

    row = {"goal": "cut paper", "sol1": "use scissors", "sol2": "use soup", "label": 0}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "piqa.validation.jsonl", [row])
    assert of_data(tmp_path / "one") == of_data(tmp_path / "two")
    write_rows(tmp_path / "two" / "piqa.validation.jsonl", [{**row, "label": 1}])
    assert of_data(tmp_path / "one") != of_data(tmp_path / "two")


# -- odd tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"doc_to_target": "!function own.texts_in_a_list"}, r"row 1: the labels are \['the cat'\], expected numbers"),
        ({"doc_to_target": "!function own.none_in_a_list"}, "row 2: no choice is right"),
        ({"doc_to_target": "!function own.now_and_then_a_list"}, r"row 2: the label is \[1\], a list, and the first"),
        ({"custom_dataset": "!function own.read_mixed"}, "row 2: there are no choices"),
        ({"unsafe_code": "true"}, "odd runs code that the model writes"),
        ({"doc_to_image": "context"}, "odd asks about images or sound"),
    ],
)
def test_what_cannot_be_scored_is_refused_before(
    settings: dict[str, str], said: str, folder: Path, model: MeasuredModel
) -> None:
    write_rows(folder / "mixed.jsonl", [ROWS[0], {**ROWS[1], "choices": []}])
    write_task(folder, "odd", **settings)
    with pytest.raises(SuiteError, match=said):
        evaluate(folder, model, "odd")


def test_labels_from_functions(folder: Path, model: MeasuredModel) -> None:
    write_task(folder, "plain")
    write_task(folder, "numpy", doc_to_target="!function own.numpy_label")
    write_task(folder, "listed", doc_to_target="!function own.one_in_a_list")
    write_task(folder, "reversed", doc_to_choice="!function own.reverse")
    # what its own function makes of a target is its own affair
    write_task(folder, "free", doc_to_target="context", process_results="!function own.own")
    found = evaluate(folder, model, "plain", "numpy", "listed", "reversed", "free")
    plain, reverse = found["plain_acc"].items, found["reversed_acc"].items
    assert plain is not None
    assert reverse is not None
    for name in ("numpy", "listed"):
        items = found[f"{name}_acc"].items
        assert items is not None
        assert items.tolist() == plain.tolist()
    assert (plain + reverse).tolist() == [1.0, 1.0, 1.0]
    assert "free_acc" in found


def test_a_failing_function_of_a_task_is_one_line(folder: Path, model: MeasuredModel) -> None:
    write_task(folder, "raising", process_results="!function own.raising")
    with pytest.raises(TrialFailed, match=r"task raising, row 1: no metric can be made of the answers \(KeyError"):
        evaluate(folder, model, "raising")


def test_metrics_that_are_no_mean_have_no_items(folder: Path, model: MeasuredModel) -> None:
    from evenbits_lmeval.choices import read_choices

    write_task(folder, "f1", metric_list="[{metric: f1}]")
    write_task(folder, "brier", metric_list="[{metric: acc}, {metric: brier_score}]")
    write_task(folder, "named", metric_list="[{metric: acc, aggregation: !function own.mean}]")
    found = evaluate(folder, model, "f1", "brier", "named")
    f1 = found["f1_f1"]
    kept = read_choices(f1.attachments["choices-f1.npz"])
    gold, chosen = kept.gold == 1, kept.chosen() == 1
    assert f1.value == pytest.approx(2 * (gold & chosen).sum() / max(1, gold.sum() + chosen.sum()))
    assert (f1.items, f1.low, f1.better, f1.details["items"]) == (None, None, "higher", 3)
    assert (found["brier_brier_score"].better, found["brier_brier_score"].items) == ("lower", None)
    # a function that is called mean, and is none
    assert found["named_acc"].value == 0.25
    assert found["named_acc"].items is None


def test_two_filters_have_no_one_accuracy_for_a_mean(folder: Path, model: MeasuredModel) -> None:
    each = "{{name: {}, filter: [{{function: take_first}}]}}"
    write_task(folder, "two", filter_list=f"[{each.format('a')}, {each.format('b')}]")
    assert set(evaluate(folder, model, "two")) == {"two_acc_a", "two_acc_b"}
    with pytest.raises(SuiteError, match="'m' is a mean of accuracies, and two has several, by filters"):
        evaluate(folder, model, "two", mean="m")


def test_rolling_documents_are_drawn_with_their_words(folder: Path, model: MeasuredModel) -> None:
    write_rows(folder / "rows.jsonl", [{"text": "the cat"}, {"text": "a quiet bird found the story again"}])
    kept = dict.fromkeys(("doc_to_choice",))
    settings = {"output_type": "loglikelihood_rolling", "doc_to_text": '""', "doc_to_target": "text"}
    write_task(folder, "rolled", **kept, **settings, metric_list="[{metric: word_perplexity}, {metric: bits_per_byte}]")
    found = evaluate(folder, model, "rolled")
    words, size = found["rolled_word_perplexity"], found["rolled_bits_per_byte"]
    assert words.details["weights"] == [2, 7]
    assert size.details["weights"] == [7, 34]
    assert words.items is not None
    assert (words.low, words.high) == bootstrap_interval(words.items, "exp-mean", weights=[2, 7])
    assert words.value == pytest.approx(np.exp(words.items.mean()))


# -- protocols -----------------------------------------------------------------------------------------------


def test_how_answers_are_judged_is_part_of_the_protocol(folder: Path, model: MeasuredModel) -> None:
    written = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": '"{{choices[0]}}"'}

    def scoring(**settings: str | None) -> tuple[Any, dict[str, Any]]:
        write_task(folder, "same", **settings)
        (found,) = evaluate(folder, model, "same").values()
        fields = dict(found.fingerprint)
        return fields.pop("scoring"), fields

    plain, fields = scoring()
    assert plain == {"aggregation": "mean"}
    own, other = scoring(process_results="!function own.own")
    assert own["process_results"].startswith("own sha256:")
    assert other == fields
    (folder / "own.py").write_text((folder / "own.py").read_text() + "# changed\n")
    assert scoring(process_results="!function own.own")[0] != own
    metric = "[{metric: exact_match, ignore_case: %s}]"
    kwargs = "{until: ['.'], max_gen_toks: 2}"
    strict, fields = scoring(**written, generation_kwargs=kwargs, metric_list=metric % "false")
    loose, other = scoring(**written, generation_kwargs=kwargs, metric_list=metric % "true")
    assert (strict["ignore_case"], loose["ignore_case"]) == (False, True)
    assert other == fields
    filters = "[{name: x, filter: [{function: regex, regex_pattern: '(a)'}, {function: take_first}]}]"
    filtered, _ = scoring(**written, generation_kwargs=kwargs, metric_list=metric % "true", filter_list=filters)
    assert filtered["filter"][0] == {"function": "regex", "regex_pattern": "(a)"}
    # how long it may write is part of what is asked
    longer = scoring(**written, generation_kwargs="{until: ['.'], max_gen_toks: 3}", metric_list=metric % "true")[1]
    assert longer["items_sha256"] != other["items_sha256"]


def test_the_same_items_are_one_protocol_whether_their_number_was_known(folder: Path, model: MeasuredModel) -> None:
    write_task(folder, "piqa")
    with pytest.raises(SuiteError, match="task piqa: 3 rows, piqa has 1838"):
        evaluate(folder, model, "piqa")
    found = evaluate(folder, model, "piqa", rows="any")["piqa_acc"]
    assert "rows" not in found.fingerprint
    assert found.fingerprint["items"] == 3
