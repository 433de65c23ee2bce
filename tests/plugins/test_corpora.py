"""Corpora from local files, and the hub's data sets on local stand-ins; offline they fail in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Text, fingerprint_id
from evenbits_corpora import provide_corpora

CORPORA = {corpus.name: corpus for corpus in provide_corpora()}
HUB = sorted(set(CORPORA) - {"text"})


def read(name: str, **options: Any) -> Text:
    corpus = CORPORA[name]
    return corpus.read(corpus.options(**options))


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8", newline="")
    return str(path)


STORIES = "One.\nStill one.\n\nTwo.\n \n\n\nThree.\n"


@pytest.mark.parametrize(
    ("split", "documents", "joined"),
    [
        ("none", [STORIES], STORIES),
        ("blank-lines", ["One.\nStill one.", "Two.", "Three."], "One.\nStill one.\n\nTwo.\n\nThree."),
        ("lines", STORIES[:-1].split("\n"), STORIES[:-1]),
        ("Two", ["One.\nStill one.", ".\n \n\n\nThree."], "One.\nStill one.\n\n.\n \n\n\nThree."),
    ],
)
def test_text_splits(tmp_path: Path, split: str, documents: list[str], joined: str) -> None:
    text = read("text", path=write(tmp_path / "a.txt", STORIES), split=split)
    assert list(text.documents) == documents
    assert text.joined() == joined
    assert text.sampling == "even"


def test_text_identity_says_what_was_read_but_not_where(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\ntwo\r\n")
    text = read("text", path=path, split="lines", join="|", sampling="crop")
    assert text.joined() == "one|two"
    assert text.sampling == "crop"
    assert text.identity == {
        "name": "text",
        "files": ["a.txt"],
        "sha256": [hashlib.sha256(b"one\r\ntwo\r\n").hexdigest()],
        "split": "lines",
        "join": "|",
    }
    assert str(tmp_path) not in json.dumps(text.identity)
    other = read("text", path=write(tmp_path / "a.txt", "one\ntwo\n"), split="lines", join="|")
    assert fingerprint_id(other.identity) != fingerprint_id(text.identity)


def test_text_of_several_files_rows_and_gzip(tmp_path: Path) -> None:
    rows = write(tmp_path / "b.jsonl", '{"body": "row 1"}\n\n{"body": "row\u2028 2"}\n')
    packed = tmp_path / "c.txt.gz"
    packed.write_bytes(gzip.compress("curly \u2018quotes\u2019 \u201chere\u201d".encode()))
    text = read("text", path=[rows, str(packed)], field="body", straight_quotes=True)
    assert list(text.documents) == ["row 1", "row\u2028 2", "curly 'quotes' \"here\""]
    assert text.identity["field"] == "body"
    assert text.identity["straight_quotes"] is True
    listed = write(tmp_path / "d.json", json.dumps([{"text": "x"}, {"text": "y"}]))
    assert list(read("text", path=listed).documents) == ["x", "y"]


def test_text_refuses_in_one_line(tmp_path: Path) -> None:
    def refuse(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            read("text", **options)
        assert "\n" not in str(caught.value)

    refuse(SuiteError, "no file .*missing.txt", path=str(tmp_path / "missing.txt"))
    refuse(SuiteError, f"{tmp_path} is a folder; give its files", path=str(tmp_path))
    refuse(SuiteError, f"{tmp_path} is a folder", path=[write(tmp_path / "a.txt", "a"), str(tmp_path)])
    refuse(SuiteError, "names no file", path=[])
    refuse(TrialFailed, "empty: no text in .*e.txt", path=write(tmp_path / "e.txt", " \n\n"), split="blank-lines")
    refuse(SuiteError, "line 2: not JSON", path=write(tmp_path / "j.jsonl", '{"text": "a"}\n{oops\n'))
    refuse(SuiteError, "line 1: rows must be JSON objects", path=write(tmp_path / "k.jsonl", '"a"\n'))
    refuse(SuiteError, "no text in field 'text'; it has: body", path=write(tmp_path / "l.jsonl", '{"body": "a"}'))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refuse(SuiteError, "cannot read .*latin.txt as text", path=str(tmp_path / "latin.txt"))
    (tmp_path / "bad.gz").write_bytes(b"not gzip")
    refuse(SuiteError, "cannot read .*bad.gz", path=str(tmp_path / "bad.gz"))
    with pytest.raises(ValidationError):
        CORPORA["text"].options(path="a", splitt="lines")  # type: ignore[call-arg]


def test_wikitext_rows_rebuild_the_string_that_gptq_joins(data: Path) -> None:
    text = read("wikitext2", path=str(data / "text" / "wiki.test.raw"))
    assert len(text.documents) == 4358
    assert text.joined() == (data / "text" / "wikitext2_raw_test_joined.txt").read_text(encoding="utf-8")
    assert text.sampling == "crop"


def test_wikitext_articles_begin_at_headings_of_the_first_level(tmp_path: Path) -> None:
    first = " = A = \n \n It 's 1 @.@ 5 ( or so ) . \n \n = = Part = = \n \n"
    path = write(tmp_path / "wiki.test.raw", f" \n{first} = B = \n Two . \n")
    pages = read("wikitext2", path=path, form="pages")
    assert list(pages.documents) == [first.removesuffix("\n"), " = B = \n Two . \n"]
    assert pages.identity["form"] == "pages"
    assert "form" not in read("wikitext2", path=path).identity
    scored = read("wikitext2", path=path, form="lm-eval", documents=1)
    assert list(scored.documents) == [" = A =\n\nIt's 1.5 (or so).\n\n== Part ==\n"]


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        write(tmp_path / f"wiki.{part}.raw", f"{part}\n")
    for split, content in (("train", "train\n"), ("validation", "valid\n"), ("test", "test\n")):
        assert read("wikitext2", path=str(tmp_path), split=split).joined() == content
    (tmp_path / "wiki.test.raw").unlink()
    with pytest.raises(SuiteError, match="file of split 'test' in"):
        read("wikitext2", path=str(tmp_path))


def test_c4_as_packed_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "document %d"}\n' % index for index in range(5))))
    text = read("c4", path=str(tmp_path), documents=3)
    assert text.joined() == "document 0 document 1 document 2"
    assert text.sampling == "document"
    assert text.identity["documents"] == 3
    assert text.identity["sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()]
    with pytest.raises(ValidationError):
        CORPORA["c4"].options(split="test")  # type: ignore[call-arg]


def test_alpaca_layout(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    ]
    text = read("alpaca", path=write(tmp_path / "alpaca.json", json.dumps(rows)))
    assert list(text.documents) == [
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3",
        "### Instruction:\nGreet.\n\n### Response:\nHello",
    ]
    assert text.sampling == "prompt"
    with pytest.raises(SuiteError, match="alpaca: a row has no text in field 'instruction'; it has: text"):
        read("alpaca", path=write(tmp_path / "other.json", '[{"text": "a"}]'))


@pytest.mark.parametrize("name", HUB)
def test_parquet_and_text_stand_in_for_any_data_set(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet  # type: ignore[import-untyped, unused-ignore]

    row = {"text": ["a b", "c d"], "instruction": ["a b", "c d"], "output": ["x", "y"]}
    parquet.write_table(Table.from_pydict(row), tmp_path / "rows.parquet")
    text = read(name, path=str(tmp_path / "rows.parquet"))
    assert len(text.documents) == 2
    assert "a b" in text.documents[0]
    assert text.identity["name"] == name
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SuiteError, match="as parquet"):
        read(name, path=str(tmp_path / "broken.parquet"))


@pytest.mark.parametrize("name", HUB)
def test_without_the_hub_one_line_says_what_to_do(name: str) -> None:
    """The tests run with HF_HUB_OFFLINE=1, so the client itself refuses."""
    pytest.importorskip("datasets")
    revision = {"revision": "0" * 40} if name in {"redpajama", "bookcorpus"} else {}
    with pytest.raises(SuiteError, match="give path = a local copy") as caught:
        read(name, **revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["redpajama", "bookcorpus"])
def test_a_data_set_of_unknown_revision_asks_for_one(name: str) -> None:
    with pytest.raises(SuiteError, match=r"no revision of .* is pinned; give revision"):
        read(name)


def test_pinned_revisions_are_commits() -> None:
    from evenbits_corpora.hub import SOURCES

    pinned = {source.name: source.revision for source in SOURCES if source.revision}
    assert pinned["c4"] == "607bd4c8450a42878aa9ddc051a65a055450ef87"
    assert all(len(revision) == 40 and int(revision, 16) for revision in pinned.values())
