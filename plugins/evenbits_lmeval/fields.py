"""What each row of the papers' sets must have, and the fields that the YAML tasks name, made from it.

Prepared rows have the hub's fields, HellaSwag's those of lm-eval's `process_docs`. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from evenbits_lmeval.rows import Check, Row, index_fault, text_fault, texts_fault


def check_winogrande(row: Mapping[str, Any]) -> str | None:
    fault = text_fault(row, "sentence", "option1", "option2", "answer")
    if fault is not None:
        return fault
    _, blank, after = row["sentence"].partition("_")
    if not blank or "_" in after:
        return f"sentence has {row['sentence'].count('_')} blanks, expected one _"
    if not after.strip():
        return "nothing stands after the blank, and that is what is scored"
    return None if row["answer"] in ("1", "2") else f"answer is {row['answer']!r}, expected '1' or '2'"


def check_piqa(row: Mapping[str, Any]) -> str | None:
    return text_fault(row, "goal", "sol1", "sol2") or index_fault(row, "label", 2)


def check_hellaswag(row: Mapping[str, Any]) -> str | None:
    if "query" in row:
        fault = text_fault(row, "query")
        if fault is None and ": " not in row["query"]:
            fault = 'query has no ": " between activity and context'
    else:
        fault = text_fault(row, "activity_label", "ctx_a")
        if fault is None and not isinstance(row.get("ctx_b"), str):  # empty for WikiHow
            fault = "ctx_b is missing or no text"
    if fault is not None:
        return fault
    endings = row.get("endings")
    fault = texts_fault(endings, "endings") or index_fault(row, "label", len(endings or ()))
    if fault is not None:
        return fault
    for index, ending in enumerate(row["endings"]):
        if not _without_markup(ending).strip():
            return f"endings[{index}] is {ending!r}, markup alone"
    return None


def check_lettered(question: str) -> Check:
    def check(row: Mapping[str, Any]) -> str | None:
        fault = text_fault(row, question, "answerKey")
        if fault is not None:
            return fault
        choices = row.get("choices")
        if not isinstance(choices, Mapping):
            return f'choices is {choices!r}, expected {{"text": [...], "label": [...]}}'
        texts, labels = choices.get("text"), choices.get("label")
        fault = texts_fault(texts, "choices.text") or texts_fault(labels, "choices.label")
        if fault is not None:
            return fault
        assert isinstance(texts, list)
        assert isinstance(labels, list)
        if len(texts) != len(labels):
            return f"{len(texts)} choices with {len(labels)} labels"
        if len(set(labels)) < len(labels):
            return f"choices.label has one label twice: {', '.join(labels)}"
        if row["answerKey"].lstrip() not in labels:  # lm-eval forgives OpenBookQA a space in front
            return f"answerKey is {row['answerKey']!r}, expected one of {', '.join(labels)}"
        return None

    return check


def check_openbookqa(row: Mapping[str, Any]) -> str | None:
    return check_lettered("question_stem" if "question_stem" in row else "question")(row)


def check_lambada(row: Mapping[str, Any]) -> str | None:
    fault = text_fault(row, "text")
    if fault is not None:
        return fault
    context, _, target = row["text"].rpartition(" ")
    return None if context.strip() and target.strip() else "text has no last word after a space"


def check_pair(row: Mapping[str, Any]) -> str | None:
    # the two may be the same: principle_A_case_2 has such a row, and lm-eval counts its tie as right
    return text_fault(row, "sentence_good", "sentence_bad")


def only(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


def prepare_piqa(row: Row) -> Row:
    return {**only("goal", "sol1", "sol2")(row), "label": int(row["label"])}


def prepare_openbookqa(row: Row) -> Row:
    stem = row["question_stem"] if "question_stem" in row else row["question"]
    return {"question_stem": stem, **_prepare_lettered(row, "answerKey")}


def _prepare_lettered(row: Row, *names: str) -> Row:
    choices = {"text": row["choices"]["text"], "label": row["choices"]["label"]}
    return {**only(*names)(row), "choices": choices}


def prepare_hellaswag(row: Row) -> Row:
    """As lm-eval prepares the hub's fields: the second half of the context capitalised, WikiHow's markup taken out.

    A re-laid `query` has the halves joined. The second half is the beginning of a sentence that the endings complete:
    what stands after the last full stop where the query does not end in one. (What a re-laid file cannot give back is
    the second space that lm-eval leaves in front of an ending that began with markup.)
    """
    if "query" in row:
        finished, start = _split_context(row["query"])
        query = finished + start.capitalize()
    else:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_markup(ending) for ending in row["endings"]]
    return {"query": _without_markup(query), "endings": endings, "label": int(row["label"])}


def _split_context(query: str) -> tuple[str, str]:
    stop = max(query.rfind(mark) for mark in (". ", "! ", "? "))
    if stop < 0 or query.endswith((".", "!", "?")):
        return query, ""
    return query[: stop + 2], query[stop + 2 :]


def _without_markup(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def prepare_arc(row: Row) -> Row:
    return _prepare_lettered(row, "question", "answerKey")
