"""What models wrote, beside each other: where texts part, and that nobody's text becomes markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evenbits.markdown import literal, plain
from evenbits.record import Bits, BudgetFacts, Ledger, ModelFacts, Record, SampleFacts
from evenbits.report import as_json, gather, write_report
from evenbits.report_samples import compare_texts, prompts_of, samples_markdown

MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float16", parameters=1200, linear_weights=1000, stored_bits=16,
    linear_bytes=2000, model_bytes=2400,
)  # fmt: skip
LEDGER = Ledger(
    bits=Bits(index=2, paper=2, linear=2, model=2), roles={"code": 250}, linear_bytes=250, rest_bytes=0,
    model_bytes=250, ratios={}, compressed_weights=1000,
)  # fmt: skip


def record(method: str, texts: dict[str, str], seed: int = 0, **facts: Any) -> Record:
    details = {"new_tokens": 8, "tokens": 5, "stopped": "length", "mean_logprob": -0.5}
    samples = tuple(SampleFacts(source="samples", prompt=p, text=t, details=details) for p, t in texts.items())
    dense = method == "dense"
    given = {"status": "done", **facts}
    return Record(
        trial=f"{method}{seed}", artifact=None if dense else method, suite="t", model=MODEL, method=method, seed=seed,
        budget=None if dense else BudgetFacts(centre=2, window=0.1), ledger=None if dense else LEDGER,
        samples=samples, **given,
    )  # fmt: skip


def test_where_texts_part() -> None:
    dense = " the cat sat on the mat"
    same = compare_texts(dense, dense)
    assert (same.same, same.differs, same.common) == (6, False, 1.0)
    text = " the cat ran to the mat"
    found = compare_texts(text, dense)
    assert found.same == 2
    assert text[found.split :] == " ran to the mat"
    assert found.common == pytest.approx(2 * 4 / 12)  # the, cat, the, mat
    short = compare_texts(" the cat", dense)
    assert (short.same, short.differs, short.split) == (2, True, len(" the cat"))
    assert compare_texts(" the\ncat", dense).same == 1  # a line break is no space
    assert compare_texts("", "").common == 1.0
    assert compare_texts("", dense).common == 0.0
    assert compare_texts("猫が好き", "猫は好き").same == 1  # a script without spaces: sign by sign


def test_dense_stands_first_and_partings_are_marked() -> None:
    prompts = {"Once upon a time": " there was a cat.", "The dog": " ran"}
    texts = {"Once upon a time": " there was no cat.", "The dog": " ran"}
    table = gather([record("rtn", texts), record("rtn", {"Once upon a time": "?"}, 1), record("dense", prompts)])
    (first, second) = prompts_of(table.models[0])
    assert [written.row.name for written in first.written] == ["dense", "rtn"]
    assert first.written[1].sample.text == " there was no cat."  # the first seed's
    text = samples_markdown(table)
    assert "Prompt: Once upon a time" in text
    assert "|  | dense |  there was a cat. | 16.000 |  |  | 5 | -0.500 | length |" in text
    assert "| 2 ±0.1 | rtn |  there was <b>no cat.</b> | 2.000 | 75% | word 3 | 5 | -0.500 | length |" in text
    assert "| 2 ±0.1 | rtn |  ran | 2.000 | 100% | nowhere | 5 | -0.500 | length |" in text
    assert second.dense is not None


def test_without_the_dense_model_nothing_is_compared() -> None:
    text = samples_markdown(gather([record("rtn", {"A": " b"})]))
    assert "No continuation of the dense model" in text
    assert "| 2 ±0.1 | rtn |  b | 2.000 |  |  | 5 |" in text


HOSTILE = "| a ** <b>x</b> `c` [l](http://x.y) ![i](j) &amp; ~~s~~ \\ # _u_ $m$ :o: @you\r\n\n- item\u202e\x00\ud800"


def test_written_text_never_becomes_markup(tmp_path: Path) -> None:
    markdown = pytest.importorskip("markdown_it")
    records = [record("dense", {HOSTILE: HOSTILE}), record("rtn", {HOSTILE: HOSTILE + " more"})]
    text = samples_markdown(gather(records))
    text.encode()
    parser = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    table = next(part for part in text.split("\n\n") if part.startswith("| budget"))
    kinds = {token.type for token in parser.parse(table)}
    assert {"table_open", "tr_open", "td_open"} <= kinds
    cells = [token for token in parser.parse(table) if token.type == "inline"]
    assert len(cells) == 9 * 3
    inside = list(cells[9 + 2].children)
    assert {child.type for child in inside} <= {"text", "text_special", "html_inline"}
    assert {child.content for child in inside if child.type == "html_inline"} == {"<br>"}
    spelled = "".join("\n" if child.type == "html_inline" else child.content for child in inside)
    assert spelled == (
        "| a ** <b>x</b> `c` [l](http://x.y) ![i](j) &amp; ~~s~~ \\ # _u_ $m$ :o: @you\n\n"
        "- item(U+202E)(U+0000)(U+D800)"
    )


def test_names_stay_readable() -> None:
    assert plain("act_order bits=2 [low, high] ") == "act_order bits=2 [low, high]"
    assert plain("a|b *c* <i> `d` [x](y) _e_\nf") == "a\\|b \\*c\\* &lt;i> \\`d\\` [x]\\(y) \\_e\\_ f"
    assert plain("$m$") == "\\$m\\$"  # no formula
    assert literal("a\u200db") == "a\u200db"


def test_trials_without_samples_leave_no_page(tmp_path: Path) -> None:
    failed = record("vptq", {}, status="skipped", reason="none fits")
    bare = [record("dense", {}), record("rtn", {}), failed]
    assert not any(path.name == "samples.md" for path in write_report(tmp_path / "1", bare, plots=False))
    given = [*bare, record("gptq", {"A": " b"})]
    written = write_report(tmp_path / "2", given, plots=False)
    assert "samples.md" in {path.name for path in written}
    assert "(samples.md)" in (tmp_path / "2/report.md").read_text()
    found = as_json(given)
    json.dumps(found)
    assert [len(one["samples"]) for one in found] == [0, 0, 0, 1]
    assert found[3]["samples"][0] == {
        "source": "samples", "prompt": "A", "text": " b",
        "details": {"new_tokens": 8, "tokens": 5, "stopped": "length", "mean_logprob": -0.5},
    }  # fmt: skip
