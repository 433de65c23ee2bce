"""The papers' protocols by name: what each expands to, obvious versions of their draws and loops, and known counts."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, Text, fingerprint_id
from evenbits_corpora import provide_corpora
from evenbits_corpora.wikipages import articles, detokenize
from evenbits_perplexity import provide_evaluators
from evenbits_perplexity.counts import FAMILIES, WHOLE, Family, check_text, check_tokens, known_tokens
from evenbits_perplexity.options import PerplexityOptions
from evenbits_perplexity.windows import cut_windows

CORPORA = {corpus.name: corpus for corpus in provide_corpora()}


class Subject:
    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = torch.device("cpu")
        self.seed = 0
        self.facts: Mapping[str, Any] = {"model": "local", "dtype": "float32"}

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        return read(**reference)

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        return lambda steps: None


class Words:
    """A token a word, its number; a BOS (0) in front."""

    bos_token_id = 0
    vocab_size = 50_000

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 0}


def read(name: str, **options: Any) -> Text:
    return CORPORA[name].read(CORPORA[name].options(**options))


def evaluate(subject: Any, **options: Any) -> list[Measurement]:
    (evaluator,) = provide_evaluators()
    found = evaluator.make(evaluator.options(**options)).evaluate(subject)
    return [measurement for measurement in found if isinstance(measurement, Measurement)]


def windows(name: Any, context: int, tokenizer: Any, **options: Any) -> Any:
    checked = PerplexityOptions(protocol=name, context=context, **options)
    text = read(**checked.corpus)
    check_text(text)
    return cut_windows(text, tokenizer, context, checked)


@pytest.fixture(scope="session")
def stories(data: Path) -> Subject:
    transformers = pytest.importorskip("transformers")
    folder = data / "models" / "stories260K"
    transformers.utils.logging.disable_progress_bar()
    return Subject(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True),
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )


@pytest.fixture(scope="session")
def c4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many documents as C4's validation file; of 1 to 29 words, every word of a document another one."""
    draw = random.Random(5)
    path = tmp_path_factory.mktemp("c4") / "c4-validation.00000-of-00008.json"
    with path.open("w") as file:
        for index in range(45_576):
            words = (str(1 + (31 * index + word) % 49_999) for word in range(draw.randint(1, 29)))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def documents_of(path: Path) -> list[list[int]]:
    """Each document's tokens, the BOS in front."""
    return [[0, *map(int, json.loads(line)["text"].split())] for line in path.read_text().splitlines()]


def draw_obviously(documents: list[list[int]], length: int, enough: Callable[[int], bool], whole: bool) -> list[int]:
    """Seed Python's own generator with 0; 256 times, draw documents until one is long enough, then a crop's start.

    The upper bound leaves the very last crop out. whole: a document of just `length` is taken without a second draw.
    """
    random.seed(0)
    stream: list[int] = []
    for _ in range(256):
        ids = documents[random.randint(0, len(documents) - 1)]
        while not enough(len(ids)):
            ids = documents[random.randint(0, len(documents) - 1)]
        start = 0 if whole and len(ids) == length else random.randint(0, len(ids) - length - 1)
        stream += ids[start : start + length]
    return stream


def test_c4_draws_as_the_published_code_does(c4: Path, tmp_path: Path) -> None:
    documents = documents_of(c4)
    cut = windows("c4", 24, Words(), path=str(c4))
    drawn = [token for window in cut.windows for token in window.tokens]
    assert drawn == draw_obviously(documents, 24, lambda tokens: tokens > 24, whole=False)
    assert cut.even_draws > 0  # so published versions part here: one stops, one goes on otherwise
    with pytest.raises(ValueError, match="empty range"):
        draw_obviously(documents, 24, lambda tokens: tokens >= 24, whole=False)
    assert drawn != draw_obviously(documents, 24, lambda tokens: tokens >= 24, whole=True)
    # without documents of just that length all three are one
    other = [document if len(document) != 24 else document[:-1] for document in documents]
    path = tmp_path / "other-validation.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(map(str, ids[1:]))}) + "\n" for ids in other))
    cut = windows("c4", 24, Words(), path=str(path))
    drawn = [token for window in cut.windows for token in window.tokens]
    for whole in (False, True):
        assert drawn == draw_obviously(other, 24, lambda tokens: tokens >= 24, whole=whole)
    assert (cut.even_draws, len(cut.windows), cut.tokens) == (0, 256, 256 * 24)


def test_c4_new_is_the_front_of_1100_documents_in_one_text(c4: Path) -> None:
    cut = windows("c4-new", 24, Words(), path=str(c4))
    ids = [0, *(token for document in documents_of(c4)[:1100] for token in document[1:])]
    assert len(ids) > 256 * 24
    assert [token for window in cut.windows for token in window.tokens] == ids[: 256 * 24]
    short = windows("c4-new", 100, Words(), path=str(c4))  # fewer tokens than 256 windows: all there are, tail dropped
    assert [token for window in short.windows for token in window.tokens] == ids[: len(ids) // 100 * 100]
    assert short.tokens == len(ids)


@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new", "wikitext2-lm-eval"])
def test_expanding_twice_changes_nothing(name: str) -> None:
    once = PerplexityOptions(protocol=name, context=64, path="copy.jsonl")  # type: ignore[call-arg, arg-type]
    assert once.path is None
    assert once.corpus["path"] == "copy.jsonl"
    assert once.units_of is None or once.units_of["path"] == "copy.jsonl"
    assert PerplexityOptions(**once.model_dump()) == once
    assert PerplexityOptions.model_validate(json.loads(once.model_dump_json())) == once


def test_what_the_names_mean_and_what_contradicts_them() -> None:
    (evaluator,) = provide_evaluators()
    options = evaluator.options
    c4 = options(protocol="c4", corpus={"revision": "0" * 40})  # type: ignore[call-arg]
    assert c4.corpus == {"name": "c4", "split": "validation", "revision": "0" * 40}  # type: ignore[attr-defined]
    explicit = {"corpus": {"name": "c4", "split": "validation"}, "windows": "sampled", "samples": 256}
    assert options(**explicit) == options(protocol="c4").model_copy(update={"protocol": None})  # type: ignore[call-arg]
    rolling = options(protocol="wikitext2-lm-eval", bos="start", per=[])  # type: ignore[call-arg]
    assert (rolling.bos, rolling.per) == ("start", ())  # type: ignore[attr-defined]
    assert len(evaluator.corpora(rolling)) == 2
    for wrong, match in (
        ({"protocol": "c4", "samples": 128}, r"protocol = 'c4' means samples = 256 \(leave protocol out .*, not 128"),
        ({"protocol": "wikitext2", "bos": "window"}, "means bos = 'start'"),
        ({"protocol": "c4", "corpus": {"split": "train"}}, "means corpus.split = 'validation'"),
        ({"protocol": "wikitext3", "path": "x"}, "'wikitext2', 'c4', 'c4-new' or 'wikitext2-lm-eval'"),
        ({"path": "x", "corpus": {"name": "c4"}}, "path belongs to a protocol"),
    ):
        with pytest.raises(ValidationError, match=match):
            options(**wrong)


def test_wikitext2_by_an_independent_loop(stories: Subject, data: Path) -> None:
    """The protocol by name, over the raw file, against the joined file cut and scored by hand."""
    text = (data / "text" / "wikitext2_raw_test_joined.txt").read_text(encoding="utf-8")
    ids = torch.tensor(stories.tokenizer(text, verbose=False)["input_ids"])
    assert ids[0] == stories.tokenizer.bos_token_id
    losses = []
    for start in range(0, 12 * 512, 512):
        window = ids[None, start : start + 512]
        with torch.no_grad():
            chances = torch.log_softmax(stories.model(window).logits.double(), dim=-1)
        losses.append(-chances[0, :-1].gather(1, window[0, 1:, None]).mean().item())
    path = str(data / "text" / "wiki.test.raw")
    (named,) = evaluate(stories, protocol="wikitext2", path=path, max_windows=12)
    assert named.value == pytest.approx(math.exp(sum(losses) / 12), rel=1e-6)
    assert named.items == pytest.approx(losses, rel=1e-6)
    assert named.details["tokens"] == len(ids)
    assert named.details["text"] == {"documents": 4358, "words": 241_211, "bytes": 1_296_370}
    assert named.fingerprint["text"] == named.details["text"]
    assert named.fingerprint["windows_rule"] == "joined"
    assert named.fingerprint["begins_with_bos"] is True
    assert "protocol" not in named.fingerprint  # what the name stands for is there: spelt out it is the same protocol
    assert named.details["protocol"] == "wikitext2"


def test_lm_evals_wikitext(stories: Subject, data: Path) -> None:
    """Its task's own functions and its HFLM, over the first articles."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    path = str(data / "text" / "wiki.test.raw")
    pages = read("wikitext2", path=path, form="pages").documents
    assert [wikitext_detokenizer({"page": page}) for page in pages] == read(
        "wikitext2", path=path, form="lm-eval"
    ).documents
    scored = HFLM(pretrained=stories.model, tokenizer=stories.tokenizer, max_length=256, add_bos_token=False)
    requests = [wikitext_detokenizer({"page": page}) for page in pages[:2]]
    found = scored.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0) for text in requests], disable_tqdm=True
    )
    results = [process_results({"page": page}, (value,)) for page, value in zip(pages, found, strict=False)]
    nats, words, size = (-sum(found), *(sum(r[k][1] for r in results) for k in ("word_perplexity", "byte_perplexity")))

    first = {"documents": 2}
    _, word, byte, bits = evaluate(
        stories, protocol="wikitext2-lm-eval", path=path, context=256, corpus=first, units_of=first
    )
    assert word.value == pytest.approx(math.exp(nats / words), rel=1e-6)
    assert byte.value == pytest.approx(math.exp(nats / size), rel=1e-6)
    assert bits.value == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert (word.name, byte.name, bits.name) == ("word_perplexity", "byte_perplexity", "bits_per_byte")
    assert word.fingerprint["in_front"] == "bos"
    assert word.fingerprint["units_of"] == {"name": "wikitext2", "split": "test", "form": "pages", "documents": 2}


def test_articles_put_the_raw_file_together_again(data: Path) -> None:
    raw = (data / "text" / "wiki.test.raw").read_text(encoding="utf-8")
    found = list(articles(read("wikitext2", path=str(data / "text" / "wiki.test.raw")).documents))
    assert " \n" + "\n".join(found) == raw
    assert len(found) == 62
    assert all(re.match(r" = [^=]", article) for article in found)
    assert detokenize(found[0]).startswith(" = Robert Boulter =\n\nRobert Boulter is an English film, television and")
    # by lm-eval's rule each article has an empty piece at either end
    assert sum(len(re.split(r"\s+", article)) for article in found) == 241_211 + 2 * 62


class Known:
    """Looks like a family's tokenizer; further entries stand behind its vocabulary."""

    bos_token_id = 1

    def __init__(self, family: Family, *added: str, hello: int | None = None) -> None:
        self.vocab_size = family.vocabulary
        self.vocabulary = {**family.entries, **{token: self.vocab_size + i for i, token in enumerate(added)}}
        self.hello = family.hello if hello is None else hello

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.hello]}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def family_tokenizer(index: int, *added: str, hello: int | None = None) -> Any:
    return Known(FAMILIES[index], *added, hello=hello)


def test_known_token_counts(data: Path) -> None:
    text = read("wikitext2", path=str(data / "text" / "wiki.test.raw"))
    llama = known_tokens(text, family_tokenizer(0))
    assert llama is not None
    assert (llama.name, llama.tokens + 1) == ("Llama-2", 341_469)
    check_tokens(llama, 341_469, 1, 2048)
    assert (341_469 // 2048, 341_469 // 4096) == (166, 83)
    with pytest.raises(TrialFailed) as caught:
        check_tokens(llama, 335_688, 1, 2048)
    assert str(caught.value).startswith(
        "WikiText-2 test has 335,688 tokens here (163 windows of 2048), and the Llama-2 tokenizer makes 341,469 of it "
        "(166 windows)"
    )
    assert [known_tokens(text, family_tokenizer(index)) for index in range(3)] == list(FAMILIES)
    mistral = SimpleNamespace(vocab_size=32_000, get_vocab=lambda: {"<0x0A>": 13, "\u2581the": 272})
    assert known_tokens(text, mistral) is None
    # derived ones count as the family where what was added cannot change the figure, and not where it does
    assert known_tokens(text, family_tokenizer(0, "<pad>", "[INST]")) == FAMILIES[0]
    assert known_tokens(text, family_tokenizer(1, "  ")) is None  # Phi: two rows hold two spaces
    assert known_tokens(text, family_tokenizer(1, hello=18435)) is None  # a space in front of the text
    part = read("wikitext2", path=str(data / "text" / "wiki.test.raw"), documents=9)
    assert known_tokens(part, family_tokenizer(0)) is None
    assert check_text(part)["documents"] == 9


def test_other_text_under_a_known_name(stories: Subject, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text((data / "text" / "stories_sampled.test.txt").read_text())
    with pytest.raises(TrialFailed, match=r"'wikitext2' is other text than its name says: it has \d+ documents of"):
        evaluate(stories, protocol="wikitext2", path=str(path))
    (allowed,) = evaluate(stories, protocol="wikitext2", path=str(path), max_windows=2, allow_other_counts=True)
    assert allowed.fingerprint["text"]["documents"] < 4358
    (named,) = evaluate(stories, corpus={"name": "text", "path": str(path)}, context=512, max_windows=2)
    assert fingerprint_id(allowed.fingerprint) != fingerprint_id(named.fingerprint)
    demo = str(data / "text" / "c4_demo.jsonl")
    with pytest.raises(TrialFailed, match=r"300 documents; asked for of c4 validation were 1,100 documents"):
        evaluate(stories, protocol="c4-new", path=demo, context=64)
    with pytest.raises(TrialFailed, match=r"300 documents; c4 validation has 45,576 documents"):
        evaluate(stories, protocol="c4", path=demo, context=64)


def test_a_copy_with_other_line_ends_is_the_same_text(data: Path, tmp_path: Path) -> None:
    raw = (data / "text" / "wiki.test.raw").read_bytes()
    for name, content in (("wiki.test.raw", raw.replace(b"\n", b"\r\n")), ("wiki.test.txt", raw.removesuffix(b"\n"))):
        (tmp_path / name).write_bytes(content)
        text = read("wikitext2", path=str(tmp_path / name))
        assert check_text(text) == {"documents": 4358, "words": 241_211, "bytes": 1_296_370}
        assert text.joined() == read("wikitext2", path=str(data / "text" / "wiki.test.raw")).joined()


def test_wikitexts_other_splits_are_known_by_their_bytes(data: Path) -> None:
    """The data set's card counts 4 bytes a row on top of the text; 1,134,123 for the file with <unk> in it."""
    path = data / "text" / "wiki.valid.tokens"
    text = read("wikitext2", path=str(path), split="validation")
    assert sum(len(row.encode()) for row in text.documents) + 4 * 3760 == 1_134_123
    for split, card, rows in (
        ("test", 1_305_088, 4358),
        ("validation", 1_159_288, 3760),
        ("train", 11_061_717, 36_718),
    ):
        known = WHOLE["wikitext2", split]
        assert (known.documents, known.bytes) == (rows, card - 4 * rows + 2 * (rows - 1))
    with pytest.raises(
        TrialFailed, match=r"has 3,760 documents of 1,126,601 bytes; .*3,760 documents of 1,151,766 bytes;"
    ):
        check_text(text)
    assert check_text(read("wikitext2", path=str(path), split="validation", join=" "))["documents"] == 3760


class Llama:
    """Has Llama-2's vocabulary by its looks, and makes a token of every character."""

    vocab_size = 32_000
    bos_token_id = 1

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        words = [FAMILIES[0].hello] if text == "Hello" else [2] * len(text)
        return {"input_ids": [1] * add_special_tokens + words}

    def get_vocab(self) -> Mapping[str, int]:
        return FAMILIES[0].entries


def test_a_known_tokenizer_that_makes_other_tokens_is_refused_in_a_run(data: Path) -> None:
    path = str(data / "text" / "wiki.test.raw")
    with pytest.raises(TrialFailed, match=r"has 1,294,337 tokens here \(632 windows of 2048\).* 341,469 .*166 windows"):
        evaluate(Subject(None, Llama()), protocol="wikitext2", path=path, context=2048)
