"""Local data files: prompts, targets and choices against lm-eval's own for every item, and what broken rows get."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import SuiteError
from evenbits_lmeval.fields import check_hellaswag, check_lambada, check_openbookqa, check_pair, prepare_hellaswag
from evenbits_lmeval.loading import loaded_tasks
from evenbits_lmeval.options import FIVE, LmEvalOptions, task_files
from evenbits_lmeval.sets import KNOWN_ROWS, SETS

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = [
    # lm-eval and what it brings along: not ours to mend, no effect on scores
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ALL = (*FIVE, "openbookqa", "lambada_openai")
# sha256 of all requests of a task, items shuffled by Random(42), as lm-eval 0.3.0's own test of its prompts pins it
# (tests/testdata/TASK-v0-loglikelihood in EleutherAI/lm-evaluation-harness)
PINNED = {
    "piqa": "6048a3a2bb3ad1e6a3d98139618e06b4d7de766edd685bd38837596199c3f69f",
    "arc_easy": "ffa6e39a35a16299dcb015f17f986aaa598ad8b4840c4cebe0339a7042232741",
    "arc_challenge": "41c34c96cca8ace661911d0033d630c554b283f5a3953bcdc50720ae6b00a9c1",
    "winogrande": "90a3eff49de9173964d46f5ed57bcf9a78a72dd1bfe0e5323b25cebb40b49ea9",
    "openbookqa": "78a49a0ca1a47373adb33463b1d092e6bc0d8f4b01bcb380ada48065037849d7",
}


def options(data: Path | str, tasks: Sequence[str], **others: Any) -> LmEvalOptions:
    return LmEvalOptions.model_validate({"tasks": tuple(tasks), "data": str(data), **others})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().splitlines() if line]


def theirs(folder: str, name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], few_shot: int = 0) -> Any:
    """lm-eval's own task over given rows by split, its data set replaced."""
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager(include_path=str(Path(lm_eval.tasks.__file__).parent / folder), include_defaults=False)
    path = manager.task_index[name].yaml_path
    assert path is not None
    config = load_yaml(path)
    for split in ("training_split", "validation_split", "test_split"):
        if config.get(split) not in rows:
            config.pop(split, None)
    config.pop("tag", None)
    config.pop("dataset_kwargs", None)
    data = DatasetDict({split: Dataset.from_list(list(each)) for split, each in rows.items()})
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})
    task.set_config("num_fewshot", few_shot)
    task.set_fewshot_seed(seed=1234)
    return task


def hub_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with the fields that the hub's data set has."""
    if name == "openbookqa":
        return [{"question_stem": row["question"], **row} for row in rows]
    if name != "hellaswag":
        return list(rows)
    made: list[Mapping[str, Any]] = []
    for row in rows:
        activity, context = row["query"].split(": ", 1)
        # ActivityNet's contexts break off in a sentence, which is the second half; WikiHow's have none
        broken_off = re.fullmatch(r"(.*[.!?]) ([^.!?]|[^.!?].*?[^.!?])", context, flags=re.DOTALL)
        first, second = broken_off.groups() if broken_off else (context, "")
        made.append({"activity_label": activity, "ctx_a": first, "ctx_b": second, **_ending_fields(row)})
    return made


def _ending_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"endings": row["endings"], "label": str(row["label"])}


def asked(task: Any) -> list[list[tuple[str, str]]]:
    task.build_all_requests()
    found: dict[int, list[tuple[str, str]]] = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request.args)
    return list(found.values())


def right(task: Any) -> list[Any]:
    """What lm-eval compares with: the choices, whose lengths acc_norm divides by, and the label."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return [task.doc_to_target(doc) for doc in task.eval_docs]
    gold = task.doc_to_text if task.multiple_input else task.doc_to_target
    return [(list(task.doc_to_choice(doc)), gold(doc)) for doc in task.eval_docs]


@pytest.fixture(scope="module")
def ours(data: Path) -> Iterator[dict[str, Any]]:
    with loaded_tasks(options(data / "tasks", (*ALL, "blimp"))) as loaded:
        yield loaded.tasks


@pytest.mark.parametrize("name", ALL)
def test_every_item_asks_what_lm_eval_asks(name: str, data: Path, ours: dict[str, Any]) -> None:
    folder = {"arc_easy": "arc", "arc_challenge": "arc", "lambada_openai": "lambada"}.get(name, name)
    split = SETS[name].file.split(".")[1]
    own = theirs(folder, name, {split: hub_rows(name, lines(data / "tasks" / SETS[name].file))})
    requests = asked(ours[name])
    assert len(requests) == KNOWN_ROWS[name]
    assert requests == asked(own)
    assert right(ours[name]) == right(own)
    assert ours[name].config.metric_list == own.config.metric_list
    if name in PINNED:
        random.Random(42).shuffle(requests)
        flat = [pair for item in requests for pair in item]
        assert hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest() == PINNED[name]


def test_every_pair_of_blimp_asks_what_lm_eval_asks(data: Path, ours: dict[str, Any]) -> None:
    names = [name for name in ours if name.startswith("blimp_")]
    assert len(names) == 34
    for name in names:
        rows = lines(data / "tasks" / "blimp" / f"{name.removeprefix('blimp_')}.jsonl")
        if name == names[0]:
            own = theirs("blimp", name, {"train": rows})
            assert right(ours[name]) == right(own)
            assert asked(ours[name]) == asked(own)
        # the paradigms differ in their rows alone
        assert asked(ours[name]) == [
            [("", f" {row['sentence_good']}"), ("", f" {row['sentence_bad']}")] for row in rows
        ]


def test_hellaswag_breaks_off_3243_times(data: Path) -> None:
    """ActivityNet's share of the validation set (the rest is WikiHow's): these contexts gain a capital."""
    path = data / "tasks" / "hellaswag.validation.jsonl"
    rows = lines(path)
    changed = [prepare_hellaswag(row)["query"] != row["query"] for row in rows]
    broken_off = [row["ctx_b"] != "" for row in hub_rows("hellaswag", rows)]
    assert sum(broken_off) == 3243
    lower = [row["ctx_b"][:1].islower() for row in hub_rows("hellaswag", rows)]
    assert all(change for change, small in zip(changed, lower, strict=True) if small)


def test_the_hubs_fields_are_prepared_as_lm_eval_does() -> None:
    row = {
        "activity_label": "Gardening", "ctx_a": "[header] How to grow [title] Dig. [step] Slowly.", "ctx_b": "",
        "endings": ["[title] Choose an area. [step] Wet it.", "dig [substeps] deeper."], "label": "1",
    }  # fmt: skip
    other = {
        "activity_label": "Roofing",
        "ctx_a": "A man sits.",
        "ctx_b": "the Man",
        "endings": ["a", "b"],
        "label": "0",
    }
    own = theirs("hellaswag", "hellaswag", {"validation": [row, other]})
    prepared = [prepare_hellaswag(each) for each in (row, other)]
    assert [each["query"] for each in prepared] == [own.doc_to_text(doc) for doc in own.eval_docs]
    assert [each["endings"] for each in prepared] == [own.doc_to_choice(doc) for doc in own.eval_docs]
    assert prepared[0]["endings"][0].startswith(" Choose")  # as lm-eval leaves it
    assert prepared[1]["query"].endswith("The man")


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "winogrande"])
def test_examples_are_those_lm_eval_draws(name: str, data: Path, tmp_path: Path) -> None:
    rows = lines(data / "tasks" / SETS[name].file)[:40]
    split = SETS[name].file.split(".")[1]
    for part, chosen in ((split, rows[:20]), ("train", rows[20:])):
        (tmp_path / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    folder = "arc" if name.startswith("arc") else name
    own = theirs(folder, name, {split: rows[:20], "train": rows[20:]}, few_shot=2)
    with loaded_tasks(options(tmp_path, [name], few_shot=2, rows="any")) as loaded:
        requests = asked(loaded.tasks[name])
    assert requests == asked(own)
    assert requests[0][0][0].count("\n\n") == 2


# -- before anything runs ------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, Any]] = {
    "winogrande": {"sentence": "Ann saw Bea so _ left.", "option1": "Ann", "option2": "Bea", "answer": "1"},
    "piqa": {"goal": "cut paper", "sol1": "use scissors", "sol2": "use soup", "label": 0},
    "hellaswag": {"query": "Roofing: A man sits. he", "endings": ["sits", "stands"], "label": 1},
    "arc_easy": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {"question": "Why", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
    "lambada_openai": {"text": "the last word is here"},
}


def write(folder: Path, name: str, rows: Sequence[Any]) -> Path:
    path = folder / SETS[name].file
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("piqa", {"label": 2}, "label is 2, expected 0 to 1"),
        ("piqa", {"label": True}, "label is True, expected 0 to 1"),
        ("piqa", {"label": None}, "label is None, expected 0 to 1"),
        ("piqa", {"sol2": "  "}, "sol2 is empty"),
        ("piqa", {"sol1": "a \ud800"}, "sol1 is 'a \\ud800', half of a surrogate pair"),
        ("hellaswag", {"endings": ["sits", "\udc00"]}, "endings[1] is '\\udc00', half of a surrogate pair"),
        ("piqa", {"goal": 3}, "goal is 3, expected text"),
        ("hellaswag", {"endings": ["sits", ""]}, "endings[1] is empty"),
        ("hellaswag", {"endings": ["sits", "[substeps]"]}, "endings[1] is '[substeps]', markup alone"),
        ("hellaswag", {"endings": ["sits"]}, "endings has 1 entries, expected at least 2"),
        ("hellaswag", {"label": "4"}, "label is '4', expected 0 to 1"),
        ("hellaswag", {"query": "no activity"}, 'query has no ": "'),
        ("arc_easy", {"answerKey": "C"}, "answerKey is 'C', expected one of A, B"),
        ("arc_easy", {"choices": {"text": ["so", "no"], "label": ["A", "A"]}}, "choices.label has one label twice"),
        ("arc_easy", {"choices": {"text": ["so", ""], "label": ["A", "B"]}}, "choices.text[1] is empty"),
        ("arc_easy", {"choices": {"text": ["so", "no", "x"], "label": ["A", "B"]}}, "3 choices with 2 labels"),
        ("arc_easy", {"choices": ["so"]}, "choices is ['so'], expected"),
        ("openbookqa", {"question": ""}, "question is empty"),
        ("winogrande", {"sentence": "Ann saw Bea."}, "sentence has 0 blanks, expected one _"),
        ("winogrande", {"sentence": "_ saw _."}, "sentence has 2 blanks, expected one _"),
        ("winogrande", {"sentence": "Ann saw _"}, "nothing stands after the blank"),
        ("winogrande", {"answer": "3"}, "answer is '3', expected '1' or '2'"),
        ("lambada_openai", {"text": "word"}, "text has no last word"),
    ],
)
def test_a_broken_row_is_one_line_with_file_and_row(name: str, change: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, [GOOD[name], {**GOOD[name], **change}])
    with pytest.raises(SuiteError) as error:
        task_files(options(tmp_path, [name], rows="any"))
    assert str(error.value).startswith(f"lm-eval: {path}, row 2: {said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", GOOD)
def test_missing_fields_and_broken_json_name_the_row(name: str, tmp_path: Path) -> None:
    for field in GOOD[name]:
        path = write(tmp_path, name, [{key: value for key, value in GOOD[name].items() if key != field}])
        with pytest.raises(SuiteError, match=rf"row 1: .*({field}|ctx_|activity_label|no text|endings)"):
            task_files(options(tmp_path, [name], rows="any"))
    for broken, said in (('{"goal": ', "not JSON"), ("[]", "expected a JSON object, not list"), ("", "not JSON")):
        write(tmp_path, name, [GOOD[name], broken, GOOD[name]])
        with pytest.raises(SuiteError, match=f"row 2: {said}"):
            task_files(options(tmp_path, [name], rows="any"))
    write(tmp_path, name, [GOOD[name]] * 2)
    assert task_files(options(tmp_path, [name], rows="any"))[0] == path


def test_bytes_that_are_no_text_name_the_row(tmp_path: Path) -> None:
    path = write(tmp_path, "piqa", [GOOD["piqa"]] * 2)
    path.write_bytes(path.read_bytes() + b'{"goal": "\xff"}\n')
    with pytest.raises(SuiteError, match=r"piqa\.validation\.jsonl, row 3: not UTF-8 text"):
        task_files(options(tmp_path, ["piqa"], rows="any"))
    path.write_bytes(b"")
    with pytest.raises(SuiteError, match=r"piqa\.validation\.jsonl: no rows"):
        task_files(options(tmp_path, ["piqa"], rows="any"))


def test_a_line_separator_inside_a_text_is_no_new_row(tmp_path: Path) -> None:
    row = {**GOOD["piqa"], "goal": "one\u2028two"}
    path = tmp_path / "piqa.validation.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert task_files(options(tmp_path, ["piqa"], rows="any"))[0] == path


def test_other_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    for name, row in GOOD.items():
        path = write(tmp_path, name, [row] * 3)
        with pytest.raises(SuiteError, match=f'3 rows, {name} has {KNOWN_ROWS[name]}; rows = "any" allows') as error:
            task_files(options(tmp_path, [name]))
        assert str(path) in str(error.value)


def test_the_real_files_pass(data: Path) -> None:
    files = task_files(options(data / "tasks", ["papers-five", "openbookqa", "lambada_openai", "blimp"]))
    assert [path.name for path in files if path.suffix == ".yaml"] == [f"{name}.yaml" for name in (*ALL, "blimp")]
    assert len([path for path in files if path.suffix == ".jsonl"]) == 7 + 34
    assert {name: KNOWN_ROWS[name] for name in FIVE} == {
        "piqa": 1838, "hellaswag": 10042, "arc_easy": 2376, "arc_challenge": 1172, "winogrande": 1267,
    }  # fmt: skip


def test_unknown_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, "piqa", [GOOD["piqa"]])
    with pytest.raises(SuiteError, match="no task 'pica' over local data; did you mean \"piqa\""):
        task_files(options(tmp_path, ["pica"]))
    with pytest.raises(SuiteError, match=r"no file arc_easy\.test\.jsonl in .*, which arc_easy needs"):
        task_files(options(tmp_path, ["arc_easy"]))
    with pytest.raises(SuiteError, match=r"no blimp/PARADIGM\.jsonl"):
        task_files(options(tmp_path, ["blimp"]))
    with pytest.raises(SuiteError, match="no folder of data files"):
        task_files(options(tmp_path / "none", ["piqa"]))
    with pytest.raises(SuiteError, match=r"no file piqa\.train\.jsonl in .* for the examples of few_shot = 3"):
        task_files(options(tmp_path, ["piqa"], rows="any", few_shot=3))
    write(tmp_path, "lambada_openai", [GOOD["lambada_openai"]])
    with pytest.raises(SuiteError, match="lambada_openai is scored without examples"):
        task_files(options(tmp_path, ["lambada_openai"], rows="any", few_shot=3))


def test_a_paradigm_is_not_scored_twice(tmp_path: Path) -> None:
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "passive_1.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    with pytest.raises(SuiteError, match="blimp_passive_1 is scored twice: in 'blimp' and in 'blimp_passive_1'"):
        task_files(options(tmp_path, ["blimp", "blimp_passive_1"]))


def test_checks_of_single_rows() -> None:
    hub = {"activity_label": "a", "ctx_a": "b", "endings": ["c", "d"], "label": "1"}
    assert check_hellaswag(hub) == "ctx_b is missing or no text"
    assert check_hellaswag({**hub, "ctx_b": ""}) is None
    assert check_openbookqa({**GOOD["openbookqa"], "question_stem": "", "answerKey": "A"}) == "question_stem is empty"
    assert check_lambada({"text": "two words"}) is None
    assert check_pair({"sentence_good": "a", "sentence_bad": ""}) == "sentence_bad is empty"
