"""What evaluators return becomes part of a record, or is refused in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness.trials import MODEL

from evenbits.errors import TrialFailed
from evenbits.findings import take
from evenbits.job import StageResult
from evenbits.measure import Measurement, Remark, Sample
from evenbits.plan import Stage
from evenbits.record import Record, read_record, write_record

STAGE = Stage("some", {}, "digest")


def number(name: str = "acc", attachments: Mapping[str, bytes] | None = None, **given: object) -> Measurement:
    facts = {"value": 0.5, "unit": "accuracy", "better": "higher", "fingerprint": {"task": "t"}, **given}
    return Measurement(name=name, attachments=attachments or {}, **facts)  # type: ignore[arg-type]


def test_a_measurement_keeps_items_and_files() -> None:
    result = StageResult()
    take(result, STAGE, number(items=np.array([0.0, 1.0]), attachments={"choices-t.jsonl": b"{}"}))
    (metric,) = result.metrics
    assert metric.attachments == ("choices-t.jsonl",)
    assert metric.items == "items-acc.npy"
    assert result.attachments == {"choices-t.jsonl": b"{}"}
    assert result.arrays()["items-acc.npy"].tolist() == [0.0, 1.0]
    assert result.fingerprints[metric.fingerprint] == {"evaluator": "some", "task": "t"}


def test_two_metrics_share_a_file_only_if_it_says_the_same() -> None:
    result = StageResult()
    take(result, STAGE, number("acc", {"choices-t.jsonl": b"a"}))
    take(result, STAGE, number("acc_norm", {"choices-t.jsonl": b"a"}))
    assert list(result.attachments) == ["choices-t.jsonl"]
    with pytest.raises(TrialFailed, match=r"second file of the name .choices-t\.jsonl."):
        take(result, STAGE, number("other", {"choices-t.jsonl": b"b"}))


def test_a_label_names_metrics_and_files() -> None:
    result = StageResult()
    take(result, Stage("some", {}, "digest", label="long"), number(attachments={"choices-t.jsonl": b"a"}))
    assert result.metrics[0].name == "long_acc"
    assert list(result.attachments) == ["long-choices-t.jsonl"]


@pytest.mark.parametrize("name", ["record.json", "log.txt", "items-acc.npy", "../up", "a/b", ".hidden", "", 151 * "n"])
def test_a_file_cannot_take_the_place_of_another(name: str) -> None:
    with pytest.raises(TrialFailed, match="cannot be the name of a file"):
        take(StageResult(), STAGE, number(attachments={name: b"x"}))


def test_samples_and_remarks_are_kept_with_their_source() -> None:
    result = StageResult()
    take(result, STAGE, Sample("Once", " upon", {"tokens": 1}))
    take(result, STAGE, Remark("no energy meter here"))
    assert result.samples[0].model_dump() == {
        "source": "some", "prompt": "Once", "text": " upon", "details": {"tokens": 1},
    }  # fmt: skip
    take(result, Stage("some", {}, "digest", label="long"), Remark("two were cut"))
    assert result.remarks == ["some: no energy meter here", "some long: two were cut"]


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a\nb", 151 * "n"])
def test_a_metric_has_a_name_that_its_items_file_can_bear(name: str) -> None:
    with pytest.raises(TrialFailed, match="cannot be the name of a metric"):
        take(StageResult(), STAGE, number(name))
    take(StageResult(), STAGE, number("acc,none (5-shot)"))


@pytest.mark.parametrize(
    ("items", "details", "reason"),
    [
        (np.ones((2, 2)), {}, r"one number each, not float64 of shape \(2, 2\)"),
        (np.array(["a", None], dtype=object), {}, "one number each, not object"),
        (np.ones(3), {"strata": [1, 1]}, r"sum to the 3 items, not \[1, 1\]"),
        (np.ones(3), {"strata": 3}, "acc: "),
        (np.ones(3), {"weights": [1.0, -1.0, 1.0]}, "above 0"),
    ],
)
def test_items_that_a_report_would_stumble_over_are_refused(
    items: Any, details: Mapping[str, object], reason: str
) -> None:
    with pytest.raises(TrialFailed, match=reason) as caught:
        take(StageResult(), STAGE, number(items=items, details=details))
    assert "\n" not in str(caught.value)
    take(StageResult(), STAGE, number(items=np.ones(3), details={"strata": (1, 2), "weights": [1, 1, 2]}))


def test_what_is_kept_reads_back_as_it_was(tmp_path: Path) -> None:
    """Half a surrogate pair, which JSON lines may hold, and numbers that are none."""
    result = StageResult()
    take(result, STAGE, number(details={"worst": float("inf"), "\ud800": ["\udc00", float("nan")]}))
    take(result, STAGE, Sample("Once \ud83d", " upon", {"id": "\ud800"}))
    take(result, STAGE, Remark("no \udcff"))
    found = Record(
        trial="t", artifact=None, suite="s", model=MODEL, method="dense", status="done", metrics=tuple(result.metrics),
        fingerprints=result.fingerprints, samples=tuple(result.samples), remarks=tuple(result.remarks),
    )  # fmt: skip
    assert read_record(write_record(tmp_path, found)) == found
    assert found.metrics[0].details == {"worst": None, "?": ["?", None]}
    assert found.samples[0].prompt == "Once ?"


@pytest.mark.parametrize("field", ["details", "fingerprint"])
def test_facts_that_are_not_json_are_refused_by_name(field: str) -> None:
    with pytest.raises(TrialFailed, match=f"the {field} of acc are not JSON|the {field} of acc"):
        take(StageResult(), STAGE, number(**{field: {"a": {1, 2}}}))  # type: ignore[arg-type]


def test_tuples_in_facts_read_back_as_they_were_written() -> None:
    result = StageResult()
    take(result, STAGE, number(details={"strata": (3, 4)}))
    assert result.metrics[0].details == json.loads(json.dumps({"strata": [3, 4]}))
