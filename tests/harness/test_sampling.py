"""Each sampling rule against a hand-made corpus, its numbers when text is short, and the overlap of two texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Text
from evenbits.sampling import encode, overlap, sample_windows, tokenizer_identity

RULES = ("even", "crop", "document", "blocks", "prompt")


class Words:
    """One token per word, which is a number; BOS is 0, put in front where special tokens are asked for."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [int(word) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {"1": 1}


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


def corpus(*lengths: int, **facts: Any) -> Text:
    """Documents of these many tokens (BOS aside), all tokens distinct."""
    documents, start = [], 1
    for length in lengths:
        documents.append(numbers(start, start + length))
        start += length
    return Text(documents, " ", {"name": "numbers"}, **facts)


def test_even_windows_are_spread_over_the_whole_text() -> None:
    windows = sample_windows(corpus(99), Words(), 5, 10, seed=0)
    assert [window[0] for window in windows] == [0, 20, 40, 60, 80]  # the BOS is the text's first token
    assert all(window == list(range(window[0], window[0] + 10)) for window in windows)
    assert sample_windows(corpus(99), Words(), 10, 10, seed=1) == sample_windows(corpus(99), Words(), 10, 10, seed=2)


def test_crops_follow_the_published_draws() -> None:
    windows = sample_windows(corpus(60, 39), Words(), 4, 10, seed=3, rule="crop")
    draw = random.Random(3)
    assert [window[0] for window in windows] == [draw.randint(0, 100 - 10 - 1) for _ in range(4)]
    assert all(len(window) == 10 for window in windows)


def test_documents_are_drawn_until_long_enough() -> None:
    text = corpus(5, 20, 9, 30, 8)
    windows = sample_windows(text, Words(), 50, 10, seed=0, rule="document")
    firsts = [set(encode(Words(), text.documents[index])) for index in (1, 3)]
    places = [[set(window) <= tokens for tokens in firsts].index(True) for window in windows]
    assert set(places) == {0, 1}
    assert windows != sample_windows(text, Words(), 50, 10, seed=1, rule="document")


def test_blocks_skip_long_documents_and_join_the_rest() -> None:
    text = corpus(4, 100, 6, 3, 7)
    (first, second) = sample_windows(text, Words(), 2, 10, seed=0, rule="blocks")
    joined = first + second
    assert len(first) == len(second) == 10
    assert not set(joined) & set(range(5, 105))  # the document of 100
    assert joined.count(0) >= 3  # each document has its own BOS


def test_prompts_keep_their_start_and_are_not_repeated() -> None:
    windows = sample_windows(corpus(20, 5, 12, 9), Words(), 3, 10, seed=0, rule="prompt")
    assert all(window[0] == 0 and len(window) == 10 for window in windows)
    assert len({window[1] for window in windows}) == 3


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_deterministic_by_seed_and_leave_global_state(rule: str) -> None:
    text = corpus(*range(12, 60))
    length = 40 if rule == "blocks" else 11
    before = random.getstate()
    first = sample_windows(text, Words(), 6, length, seed=4, rule=rule)
    assert first == sample_windows(text, Words(), 6, length, seed=4, rule=rule)
    assert [len(window) for window in first] == [length] * 6
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("rule", "numbers_named"),
    [
        ("even", "has 31 tokens, 4 windows of 10 need 40"),
        ("crop", "has 31 tokens, random crops of 40 need at least 41"),
        ("document", "the longest of 3 documents has 11 tokens, need 41"),
        ("blocks", r"has 33 tokens in documents of at most 40, 4 blocks need 160"),
        ("prompt", "has 0 documents of at least 40 tokens, need 4"),
    ],
)
def test_too_short_names_the_numbers(rule: str, numbers_named: str) -> None:
    with pytest.raises(TrialFailed, match=f"text too short: corpus 'numbers'.*{numbers_named}"):
        sample_windows(corpus(10, 10, 10), Words(), 4, 10 if rule == "even" else 40, seed=0, rule=rule)


def test_the_corpus_names_its_own_rule_and_unknown_ones_are_refused() -> None:
    text = corpus(50, 50, sampling="document")
    assert sample_windows(text, Words(), 3, 9, 1) == sample_windows(text, Words(), 3, 9, 1, rule="document")
    with pytest.raises(SuiteError, match="unknown sampling rule 'odd'; there are: even, crop"):
        sample_windows(text, Words(), 3, 9, 1, rule="odd")
    with pytest.raises(SuiteError, match="not 0 of 9"):
        sample_windows(text, Words(), 0, 9, 1)


def test_tokenizer_identity_ignores_truncation_but_not_content() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def build(*words: str) -> Any:
        model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))

    one, same, other = build("a", "b"), build("a", "b"), build("a", "c")
    same.backend_tokenizer.enable_truncation(5)
    assert tokenizer_identity(one) == tokenizer_identity(same) != tokenizer_identity(other)
    assert tokenizer_identity(one)["fast"]
    assert not tokenizer_identity(Words())["fast"]


TEXT = numbers(0, 200)


@pytest.mark.parametrize(
    ("calibration", "share"),
    [
        ([TEXT], 1.0),
        ([numbers(1000, 2000)], 0.0),
        ([], 0.0),
        ([numbers(0, 100)], 88 / 188),
        ([numbers(0, 100), numbers(100, 200)], 176 / 188),  # a document's end parts n-grams
        ([TEXT.replace(" ", "\n , ")], 1.0),  # spacing and punctuation do not hide a copy
        ([" ".join(reversed(TEXT.split()))], 0.0),  # the same words in another order
    ],
)
def test_overlap_counts_distinct_ngrams(calibration: list[str], share: float) -> None:
    assert overlap(calibration, TEXT) == pytest.approx(share)


def test_overlap_of_short_and_upper_case_text() -> None:
    assert overlap(["A small CAT sat"], "a Small cat") == 1.0
    assert overlap(["a cat small"], "a small cat") == 0.0
    assert overlap(["words"], " \n") == 0.0
    assert overlap(["b b b b"], "b b b b b b", n=3) == 1.0


def test_overlap_of_real_texts(data: Path) -> None:
    read = {name: (data / "text" / name).read_text(encoding="utf-8") for name in ("wiki.valid.tokens", "wiki.test.raw")}
    assert overlap([read["wiki.valid.tokens"]], read["wiki.test.raw"]) < 0.005
    # line by line: n-grams across a line's end are lost, all others are found
    assert 0.85 < overlap(read["wiki.test.raw"].splitlines(), read["wiki.test.raw"]) < 0.9
