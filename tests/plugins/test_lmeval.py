"""lm-eval's accuracies against log-likelihoods summed by hand, and what bad tasks get."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Measurement, Remark
from evenbits.models import load_tokenizer, open_model
from evenbits.plugins import load_plugins
from evenbits.statistics import bootstrap_interval, statistic_of
from evenbits.subject import MeasuredModel
from evenbits.tiny import tiny_model
from evenbits_lmeval.choices import read_choices
from evenbits_lmeval.evaluator import LmEvalEvaluator
from evenbits_lmeval.metrics import Column, Part, mean_of
from evenbits_lmeval.options import FIVE, LmEvalOptions, task_files, task_folder

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


def measured(options: LmEvalOptions, folder: Path, model: MeasuredModel | None = None) -> dict[str, Measurement]:
    found = LmEvalEvaluator(options).evaluate(model or subject(folder))
    return {each.name: each for each in found if isinstance(each, Measurement)}


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
    found = measured(options, folder)
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


# -- metrics -------------------------------------------------------------------------------------------------


def test_lm_eval_itself_gives_the_same(folder: Path) -> None:
    """Accuracies and each choice's log-likelihood, with examples in front, by simple_evaluate."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = subject(folder)
    options = LmEvalOptions(tasks=("tiny_choice",), folder=str(folder / "tasks"), few_shot=2)
    ours = measured(options, folder, model)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1),
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        num_fewshot=2,
        bootstrap_iters=0,
    )
    assert theirs is not None
    for metric in ("acc", "acc_norm"):
        assert ours[f"tiny_choice_{metric}"].value == pytest.approx(theirs["results"]["tiny_choice"][f"{metric},none"])
    samples = theirs["samples"]["tiny_choice"]
    kept = read_choices(ours["tiny_choice_acc"].attachments["choices-tiny_choice.npz"])
    expected = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    assert kept.log_likelihood.tolist() == pytest.approx(expected, abs=1e-4)
    assert kept.item.astype(str).tolist() == [sample["doc_hash"][:16] for sample in samples]
    assert (ours["tiny_choice_acc"].fingerprint["few_shot"], ours["tiny_choice_acc"].fingerprint["few_shot_seed"]) == (
        2,
        1234,
    )


def real(data: Path) -> MeasuredModel:
    return MeasuredModel(
        registry=load_plugins(),
        folder=data / "models" / "stories260K",
        artifact=False,
        dtype="float32",
        device=torch.device("cpu"),
        seed=0,
        base_facts={"model": "stories260K"},
    )


def local(data: Path, *tasks: str, **others: Any) -> LmEvalOptions:
    return LmEvalOptions.model_validate({"tasks": tasks, "data": str(data / "tasks"), **others})


@pytest.fixture(scope="module")
def five(data: Path) -> dict[str, Measurement]:
    return measured(local(data, "papers-five", limit=8, mean="five", mean_norm="five_norm"), data, real(data))


def test_metrics_come_again_from_the_kept_choices(five: dict[str, Measurement]) -> None:
    for task in FIVE:
        acc = five[f"{task}_acc"]
        kept = read_choices(acc.attachments[f"choices-{task}.npz"])
        assert acc.items is not None
        assert kept.acc().tolist() == acc.items.tolist()
        if task != "winogrande":
            norm = five[f"{task}_acc_norm"]
            assert norm.items is not None
            assert kept.acc_norm().tolist() == norm.items.tolist()
        assert (kept.log_likelihood < 0).all()
        assert (kept.tokens > 0).all()
        assert (kept.utf8_bytes >= kept.characters).all()
        assert kept.to_bytes() == acc.attachments[f"choices-{task}.npz"]


def test_the_means_over_the_five(five: dict[str, Measurement]) -> None:
    assert list(five)[:2] == ["five", "five_norm"]  # what papers compare comes first
    assert five["five"].value == pytest.approx(np.mean([five[f"{task}_acc"].value for task in FIVE]))
    chosen = ["winogrande_acc", *(f"{task}_acc_norm" for task in FIVE[1:])]
    assert five["five_norm"].value == pytest.approx(np.mean([five[name].value for name in chosen]))
    mean = five["five"]
    assert mean.details["strata"] == [8] * 5
    assert mean.details["tasks"] == {task: five[f"{task}_acc"].value for task in FIVE}
    assert mean.items is not None
    assert (mean.low, mean.high) == bootstrap_interval(mean.items, strata=[8] * 5)
    assert set(mean.fingerprint["tasks"]) == set(FIVE)
    assert mean.fingerprint["model"] == "stories260K"  # common to all: said once
    assert "model" not in mean.fingerprint["tasks"]["piqa"]


def test_a_mean_weights_tasks_or_items() -> None:
    def part(name: str, items: list[float]) -> Part:
        return Part(name, Column("acc", np.array(items), "mean", True), (len(items),), {})

    parts = [part("a", [1.0] * 30), part("b", [0.0] * 10)]
    by_task, strata = mean_of(parts, "acc")
    assert by_task.value == pytest.approx(0.5)
    assert strata == (30, 10)
    assert len(by_task.items) == 40
    assert mean_of(parts, "acc", by_items=True)[0].value == pytest.approx(0.75)
    # a mean of means: the parts of a part stay strata of their own
    joint = Part("ab", by_task, strata, {})
    both, sizes = mean_of([joint, part("c", [1.0] * 5)], "acc")
    assert both.value == pytest.approx(0.75)
    assert sizes == (30, 10, 5)


def test_both_scorers_one_protocol_and_the_same_twice(data: Path, five: dict[str, Measurement]) -> None:
    model = real(data)
    by_hflm = measured(local(data, "papers-five", limit=8, mean="five", scorer="hflm"), data, model)
    assert by_hflm["five"].details["scorer"] == "hflm"
    assert five["five"].details["scorer"] == "tree"
    for task in FIVE:
        a, b = five[f"{task}_acc"], by_hflm[f"{task}_acc"]
        assert a.fingerprint == b.fingerprint
        assert a.items is not None
        assert b.items is not None
        assert a.items.tolist() == b.items.tolist()
        x, y = (read_choices(each.attachments[f"choices-{task}.npz"]) for each in (a, b))
        assert x.log_likelihood == pytest.approx(y.log_likelihood, abs=1e-4)
    again = measured(local(data, "piqa", limit=8), data, model)["piqa_acc"]
    assert again.attachments == five["piqa_acc"].attachments
    assert again.fingerprint == five["piqa_acc"].fingerprint
    # other items, another protocol
    assert measured(local(data, "piqa", limit=4), data, model)["piqa_acc"].fingerprint != again.fingerprint


def test_a_late_fallback_is_told_of_the_tasks_that_it_scored_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenbits_lmeval.packing import TreeForward

    scored, rooms = TreeForward.score, iter([True, False])

    def filling(forward: TreeForward, requests: Any) -> Any:
        if not next(rooms):
            raise RuntimeError("no room")
        return scored(forward, requests)

    monkeypatch.setattr(TreeForward, "score", filling)
    found = LmEvalEvaluator(local(data, "piqa", "winogrande", "arc_easy", limit=3, mean="all")).evaluate(real(data))
    figures = {each.name: each.details for each in found if isinstance(each, Measurement)}
    paths = {name: figures[f"{name}_acc"]["scorer"] for name in ("piqa", "winogrande", "arc_easy")}
    assert paths == {"piqa": "tree", "winogrande": "hflm", "arc_easy": "hflm"}
    assert figures["piqa_acc"]["scorer_reason"] is None
    assert "no room" in figures["all"]["scorer_reason"]
    (said,) = [each.text for each in found if isinstance(each, Remark) and "HFLM" in each.text]
    assert said.startswith("scored by lm-eval's own HFLM (winogrande, arc_easy): packed sequences fail")


@pytest.mark.parametrize(("dtype", "seen"), [("float32", ["float32"] * 2), ("bfloat16", ["float32", "bfloat16"])])
def test_the_dtype_of_the_softmax_is_part_of_the_protocol(folder: Path, dtype: str, seen: list[str]) -> None:
    """lm-eval's own way normalises half-precision logits in half precision: other scores."""
    model = MeasuredModel(
        registry=load_plugins(), folder=folder / "model", artifact=False, dtype=dtype, device=torch.device("cpu"),
        seed=0, base_facts={"model": "tiny"},
    )  # fmt: skip
    found = []
    for scorer in ("auto", "hflm"):
        options = LmEvalOptions.model_validate(
            {"tasks": ["tiny_choice"], "folder": str(folder / "tasks"), "scorer": scorer}
        )
        found.append(measured(options, folder, model)["tiny_choice_acc"].fingerprint)
    assert [each["softmax"] for each in found] == seen
    assert {**found[0], "softmax": ""} == {**found[1], "softmax": ""}


PIQA = """
task: piqa
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


def test_one_protocol_whatever_the_door(data: Path, tmp_path: Path, five: dict[str, Measurement]) -> None:
    (tmp_path / "piqa.yaml").write_text(PIQA.format(data=data / "tasks" / "piqa.validation.jsonl"))
    found = measured(LmEvalOptions(tasks=("piqa",), folder=str(tmp_path), limit=8), data, real(data))["piqa_acc"]
    assert found.fingerprint == five["piqa_acc"].fingerprint
    assert found.value == five["piqa_acc"].value
    (tmp_path / "piqa.yaml").write_text((tmp_path / "piqa.yaml").read_text().replace("Question: ", "Question:"))
    other = measured(LmEvalOptions(tasks=("piqa",), folder=str(tmp_path), limit=8), data, real(data))["piqa_acc"]
    assert other.fingerprint["items_sha256"] != found.fingerprint["items_sha256"]


def test_lambada_and_blimp(data: Path) -> None:
    tasks = ("lambada_openai", "blimp_transitive", "blimp_passive_1")
    found = measured(local(data, *tasks, limit=6), data, real(data))
    perplexity, acc = found["lambada_openai_perplexity"], found["lambada_openai_acc"]
    kept = read_choices(perplexity.attachments["choices-lambada_openai.npz"])
    assert perplexity.value == pytest.approx(np.exp(-kept.log_likelihood.mean(dtype=np.float64)))
    assert (perplexity.better, perplexity.unit) == ("lower", "perplexity")
    assert perplexity.items is not None
    assert statistic_of(perplexity.items, perplexity.value) == "exp-mean"
    assert acc.items is not None
    assert acc.items.tolist() == kept.greedy.astype(float).tolist()
    with pytest.raises(ValueError, match="one right choice among several"):  # one text is always the likeliest of one
        kept.acc()


def test_blimp_is_the_mean_of_its_paradigms(data: Path, tmp_path: Path) -> None:
    (tmp_path / "blimp").mkdir()
    for name, rows in (("passive_1", 2), ("transitive", 6)):
        lines = (data / "tasks" / "blimp" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "blimp" / f"{name}.jsonl").write_text("".join(lines[:rows]))
    model = real(data)
    remarks = LmEvalEvaluator(LmEvalOptions(tasks=("blimp",), data=str(tmp_path), limit=1)).evaluate(model)
    assert Remark("blimp_acc is over 2 of BLiMP's 67 paradigms") in remarks
    short = measured(LmEvalOptions(tasks=("blimp",), data=str(tmp_path), mean="all"), data, model)
    found = measured(LmEvalOptions(tasks=("blimp",), data=str(tmp_path), mean="all", members=True), data, model)
    assert list(short) == ["all", "blimp_acc"]
    for name in ("blimp_passive_1", "blimp_transitive"):
        own = found[f"{name}_acc"]
        assert short["blimp_acc"].details["tasks"][name] == own.value
        assert own.attachments.items() <= short["blimp_acc"].attachments.items()
    assert len(short["blimp_acc"].attachments) == 2
    assert not found["blimp_acc"].attachments
    assert short["blimp_acc"].fingerprint == found["blimp_acc"].fingerprint
    assert list(found) == ["all", "blimp_acc", "blimp_passive_1_acc", "blimp_transitive_acc"]
    mean = (found["blimp_passive_1_acc"].value + found["blimp_transitive_acc"].value) / 2
    assert found["blimp_acc"].value == pytest.approx(mean)
    assert found["all"].value == pytest.approx(mean)
    assert found["all"].details["strata"] == found["blimp_acc"].details["strata"] == [2, 6]
    assert found["blimp_acc"].fingerprint["mean"] == "of the tasks' means"


GROUP = """
group: pair
task:
  - tiny_choice
  - short_choice
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: {by_size}
metadata:
  version: 1.0
"""


@pytest.mark.parametrize("by_size", [True, False])
def test_groups_are_what_lm_eval_makes_of_them(by_size: bool, folder: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:3]))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=folder / "tasks" / "rows.jsonl"))
    (tmp_path / "short.yaml").write_text(TASK.format(data=short).replace("tiny_choice", "short_choice"))
    (tmp_path / "pair.yaml").write_text(GROUP.format(by_size=by_size))
    model = subject(folder)
    ours = measured(LmEvalOptions(tasks=("pair",), folder=str(tmp_path), members=True), folder, model)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1),
        tasks=["pair"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs is not None
    assert ours["pair_acc"].value == pytest.approx(theirs["groups"]["pair"]["acc,none"])
    assert sorted(ours["pair_acc"].details["strata"]) == [2, 5]
    low, high = ours["pair_acc"].low, ours["pair_acc"].high
    assert low is not None
    assert high is not None
    assert 0 <= low <= ours["pair_acc"].value <= high <= 1  # of few items widened, and a share still
    assert {"tiny_choice_acc", "short_choice_acc"} < set(ours)
    with pytest.raises(SuiteError, match="'tiny_choice' is scored twice"):
        measured(LmEvalOptions(tasks=("pair", "tiny_choice"), folder=str(tmp_path)), folder, model)


OTHER_KINDS = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: context
metric_list:
{metrics}
"""


def test_rolling_and_written_answers(folder: Path, tmp_path: Path) -> None:
    data = folder / "tasks" / "rows.jsonl"
    rolling = "".join(f"  - metric: {metric}\n" for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"))
    kinds = {
        "rolled": OTHER_KINDS.format(name="rolled", data=data, kind="loglikelihood_rolling", text="", metrics=rolling),
        "written": OTHER_KINDS.format(
            name="written", data=data, kind="generate_until", text="{{context}}", metrics="  - metric: exact_match\n"
        )
        + "generation_kwargs: {until: ['\\n'], max_gen_toks: 3}\n",
    }
    for name, text in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    model = subject(folder)
    found = measured(LmEvalOptions(tasks=("rolled", "written"), folder=str(tmp_path)), folder, model)
    nats = 0.0
    for row in ROWS:
        tokens = model.tokenizer(row["context"])["input_ids"]
        # lm-eval puts the prefix token in front once more: the first token is scored after it
        front = model.tokenizer.bos_token_id
        with torch.no_grad():
            logits = model.model(torch.tensor([[front, *tokens]])).logits[0].log_softmax(-1)
        nats += sum(float(logits[i, token]) for i, token in enumerate(tokens))
    words = sum(len(row["context"].split()) for row in ROWS)
    size = sum(len(row["context"]) for row in ROWS)
    assert found["rolled_word_perplexity"].value == pytest.approx(np.exp(-nats / words), rel=1e-4)
    assert found["rolled_byte_perplexity"].value == pytest.approx(np.exp(-nats / size), rel=1e-4)
    assert found["rolled_bits_per_byte"].value == pytest.approx(-nats / size / np.log(2), rel=1e-4)
    assert found["rolled_bits_per_byte"].better == "lower"
    assert found["written_exact_match"].value == 0.0
    assert found["written_exact_match"].items is not None
    with pytest.raises(SuiteError, match="'m' is a mean of accuracies, and rolled has none"):
        measured(LmEvalOptions(tasks=("rolled",), folder=str(tmp_path), mean="m"), folder, model)


# -- what is wrong with data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 2}, r"the label is 2, expected 0 to 1"),
        ({"answer": -1}, r"the label is -1, expected 0 to 1"),
        ({"choices": ["a", " "]}, r"choice 1 is empty"),
        ({"choices": []}, "there are no choices"),
    ],
)
def test_broken_items_of_a_folder_are_refused_before_scoring(
    change: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [ROWS[0], ROWS[2], {**ROWS[2], **change}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    options = LmEvalOptions(tasks=("tiny_choice",), folder=str(tmp_path))
    with pytest.raises(SuiteError, match=rf"task tiny_choice, row 3 of .*rows\.jsonl: ({said})"):
        measured(options, folder)
    data.write_text(data.read_text() + "{broken\n")
    with pytest.raises(SuiteError, match=r"rows\.jsonl, row 4: not JSON"):
        task_files(options)


def test_known_sets_have_their_rows_by_every_door(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa.yaml").write_text(
        TASK.format(data=folder / "tasks" / "rows.jsonl").replace("tiny_choice", "piqa")
    )
    options = LmEvalOptions(tasks=("piqa",), folder=str(tmp_path))
    with pytest.raises(SuiteError, match=r"task piqa: 5 rows, piqa has 1838; rows = \"any\" allows"):
        measured(options, folder)
    found = measured(options.model_copy(update={"rows": "any"}), folder)
    assert found["piqa_acc"].fingerprint["items"] == 5


def test_the_hub_without_a_network_is_one_line(folder: Path) -> None:
    with pytest.raises(TrialFailed) as error:
        measured(LmEvalOptions(tasks=("arc_easy",)), folder)
    assert str(error.value).startswith("lm-eval: task 'arc_easy' cannot be loaded (")
    assert 'data = "FOLDER"' in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_written_outside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    measured(LmEvalOptions(tasks=("tiny_choice",), folder=str(folder / "tasks")), folder)
    assert not (tmp_path / "cache").exists()
    assert tmp_path / "cache" == datasets.config.HF_DATASETS_CACHE


def test_the_plan_refuses_a_task_that_no_file_names(folder: Path) -> None:
    with pytest.raises(SuiteError, match=r"no task tiny in .*; there are: tiny_choice"):
        task_files(LmEvalOptions(tasks=("tiny",), folder=str(folder / "tasks")))


def test_the_plan_needs_neither_torch_nor_lm_eval(data: Path) -> None:
    code = (
        "import sys, evenbits_lmeval\n"
        "from evenbits_lmeval.options import LmEvalOptions, task_files\n"
        f"task_files(LmEvalOptions(tasks=('piqa', 'blimp'), data={str(data / 'tasks')!r}))\n"
        "print([name for name in ('torch', 'lm_eval', 'datasets', 'transformers') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_reference_models_families(data: Path) -> None:
    tasks = tuple(f"reference_{name}" for name in FIVE)
    options = LmEvalOptions(tasks=tasks, folder="package:evenbits_reference/tasks", mean="all", limit=4)
    task_files(options)
    found = measured(options, data, real(data))
    assert list(found) == ["all", *(f"{task}_acc" for task in tasks)]
    assert {found[f"{task}_acc"].fingerprint["task"] for task in tasks} == set(tasks)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match='give "folder"'):
        LmEvalOptions(tasks=("x",), folder="a", data="b")
    with pytest.raises(ValueError, match="'piqa' stands twice"):
        LmEvalOptions(tasks=("papers-five", "piqa"))
    with pytest.raises(ValueError, match="'piqa_acc' is the name of a task's own metric"):
        LmEvalOptions(tasks=("papers-five",), mean="piqa_acc")
    with pytest.raises(ValueError, match="should match pattern"):
        LmEvalOptions(tasks=("x",), mean="a/b")
    with pytest.raises(ValueError, match="need names of their own"):
        LmEvalOptions(tasks=("x",), mean="m", mean_norm="m")
    assert LmEvalOptions(tasks=("papers-five", "openbookqa")).names == (*FIVE, "openbookqa")
