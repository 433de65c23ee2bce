"""In which fields two protocols differ."""

from __future__ import annotations

from typing import Any

from tests.harness.trials import Trials, perplexity

from evenbits.fingerprints import differing_fields, flatten, name_fields, protocol_of

ONE: dict[str, Any] = {"corpus": {"name": "wiki", "join": "\n\n", "files": ["a", "b"]}, "context": 2048, "bos": "start"}


def test_nested_fields_are_dotted_and_what_is_alike_is_left_out() -> None:
    other = {**ONE, "corpus": {**ONE["corpus"], "join": " ", "files": ["a"]}, "context": 512, "kernel": "fused"}
    assert differing_fields(ONE, other) == [
        ("context", "2048", "512"),
        ("corpus.files", '["a", "b"]', '["a"]'),
        ("corpus.join", '"\\n\\n"', " "),  # a line break is seen
        ("kernel", "(absent)", "fused"),
    ]
    assert differing_fields(ONE, dict(ONE)) == []


def test_which_trial_it_was_is_no_protocol() -> None:
    assert differing_fields({**ONE, "trial": "a", "seed": 1}, {**ONE, "trial": "b", "method": "x"}) == []


def test_a_field_given_as_null_differs_from_one_not_given() -> None:
    assert differing_fields({"limit": None}, {}) == [("limit", "null", "(absent)")]
    assert differing_fields({"limit": 1}, {"limit": True}) == [("limit", "1", "true")]
    assert differing_fields({"limit": 1}, {"limit": 1.0}) == [("limit", "1", "1.0")]  # other ids, so never one column


def test_tables_in_a_list_are_numbered_and_joined_where_they_agree() -> None:
    """A mean over tasks holds the fingerprint of each."""
    tasks: list[dict[str, Any]] = [{"task": name, "lm_eval": "0.4.13", "bos": None} for name in ("piqa", "arc")]
    newer = [{**task, "lm_eval": "0.4.9"} for task in tasks]
    newer[1]["bos"] = True
    assert differing_fields({"tasks": tasks}, {"tasks": newer}) == [
        ("tasks.*.lm_eval", "0.4.13", "0.4.9"),
        ("tasks.1.bos", "null", "true"),
    ]
    ((field, _, _),) = differing_fields({"tasks": tasks}, {"tasks": tasks[:1]})
    assert field == "tasks"


def test_a_sentence_names_some_and_counts_the_rest() -> None:
    found = [(f"f{n}", "a" * 60, "b") for n in range(7)]
    said = name_fields(found)
    assert said.startswith(f"f0 ({'a' * 39}… against b), f1")
    assert said.endswith("f3 (" + "a" * 39 + "… against b) and 3 more")
    assert name_fields(found[:5]).endswith("f4 (" + "a" * 39 + "… against b)")


def test_flat_fields_are_text() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": "x"}) == {"a.b": "1", "a.c.d": "null", "e": "x"}


def test_an_unknown_fingerprint_stands_for_itself(tmp_path: Any) -> None:
    """A record that lost its fingerprints is comparable with none."""
    import numpy as np

    record = Trials(tmp_path).add("rtn", perplexity(np.arange(3.0), fingerprint="gone"))
    assert protocol_of(record, record.metrics[0]) == {"fingerprint": "gone"}
