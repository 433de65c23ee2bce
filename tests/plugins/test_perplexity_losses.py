"""Losses in chunks and from a streamed model, and which bytes and words of a text its tokens stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, Text, fingerprint_id
from evenbits.plugins import load_plugins
from evenbits.subject import MeasuredModel
from evenbits.testing import compress_model, tiny_model, tiny_text
from evenbits_perplexity import losses
from evenbits_perplexity.encoding import encode_located
from evenbits_perplexity.evaluator import PerplexityEvaluator
from evenbits_perplexity.losses import batch_inputs, order_batches, sum_losses
from evenbits_perplexity.options import PerplexityOptions
from evenbits_perplexity.windows import Window, cut_windows

REGISTRY = load_plugins()
CPU = torch.device("cpu")


def evaluate(subject: Any, **options: Any) -> list[Measurement]:
    found = PerplexityEvaluator(PerplexityOptions(**options)).evaluate(subject)
    return [measurement for measurement in found if isinstance(measurement, Measurement)]


# -- losses --------------------------------------------------------------------------------------------------


def some_windows(vocabulary: int) -> list[Window]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((9, 8), (12, 3), (5, 4), (12, 11), (2, 1))  # tokens, of which the last so many are predicted
    return [Window(torch.randint(vocabulary, (n,), generator=generator).tolist(), p) for n, p in sizes]


def logits_of(inputs: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Any function of each position's own token: nothing that padding or a batch's other rows could change."""
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    return table[inputs].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_losses_in_chunks_are_those_of_an_obvious_loop(
    dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 37
    windows = some_windows(vocabulary)
    batches = order_batches(windows, 2)
    assert sorted(index for batch in batches for index in batch) == list(range(5))
    monkeypatch.setattr(losses, "CHUNK_BYTES", positions * vocabulary * 4)
    steps: list[int] = []
    logits = (logits_of(batch_inputs(windows, batch, 11), vocabulary, dtype) for batch in batches)
    sums, name = sum_losses(windows, batches, logits, steps.append)
    for window, found in zip(windows, sums, strict=True):
        first = len(window.tokens) - window.predicted
        expected = 0.0
        for position in range(first, len(window.tokens)):
            row = logits_of(torch.tensor(window.tokens[position - 1]), vocabulary, dtype).double().tolist()
            expected += math.log(sum(map(math.exp, row))) - row[window.tokens[position]]
        assert found == pytest.approx(expected, rel=1e-5)
    assert (name, sum(steps)) == (str(dtype).removeprefix("torch."), 5)


def test_no_chunk_is_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    plain = functional.cross_entropy

    def watched(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        seen.append(logits.shape)
        assert logits.dtype == torch.float32
        assert logits.nbytes <= losses.CHUNK_BYTES
        return torch.as_tensor(plain(logits, targets, **options))

    monkeypatch.setattr(functional, "cross_entropy", watched)
    window = Window([0] * 301, 300)
    sums, _ = sum_losses([window], [[0]], [torch.zeros(1, 301, 128_000, dtype=torch.bfloat16)], lambda done: None)
    assert sums[0] == pytest.approx(300 * math.log(128_000), rel=1e-6)
    assert [shape[0] for shape in seen] == [131, 131, 38]


def test_logits_that_do_not_come_are_named() -> None:
    windows = some_windows(8)
    with pytest.raises(TrialFailed, match="logits of 0 of 3 batches came"):
        sum_losses(windows, order_batches(windows, 2), [], lambda done: None)
    with pytest.raises(TrialFailed, match="logits of 2 positions for 8 predicted tokens"):
        sum_losses(windows[:1], [[0]], [torch.zeros(1, 2, 8)], lambda done: None)


# -- one block at a time -------------------------------------------------------------------------------------


class Streamed:
    """A subject whose model must not be asked for."""

    seed = 0
    device = CPU

    def __init__(self, tokenizer: Any, text: Text, model: Callable[[Tensor], Tensor]) -> None:
        self.tokenizer, self.text, self.model_of, self.facts = tokenizer, text, model, {"dtype": "float32"}
        self.shapes: list[tuple[int, ...]] = []

    @property
    def model(self) -> Any:
        raise AssertionError("the whole model was opened")

    def stream_logits(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            assert batch.dtype == torch.int64
            self.shapes.append(tuple(batch.shape))
            yield self.model_of(batch)

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        return self.text

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        return lambda steps: None


class Letters:
    """A token a letter."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 97 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + index): index for index in range(26)}


def test_streamed_batches_go_through_the_same_code() -> None:
    text = Text(["abcabcabcabd", "xyzzyx"], "", {"name": "letters"})

    def uniform(batch: Tensor) -> Tensor:
        return logits_of(batch, 26, torch.float32)

    streamed = Streamed(Letters(), text, uniform)
    options = {"corpus": {"name": "letters"}, "context": 5, "windows": "documents", "batch_size": 2}
    (block,) = evaluate(streamed, **options, memory="block")

    class Whole(Streamed):
        model: Any = SimpleNamespace(eval=lambda: None)

    whole = Whole(Letters(), text, uniform)
    call = torch.nn.Module()
    call.forward = lambda input_ids, use_cache: SimpleNamespace(logits=uniform(input_ids))
    Whole.model = call
    (at_once,) = evaluate(whole, **options)
    assert block.value == at_once.value
    assert (block.items == at_once.items).all()  # type: ignore[union-attr]
    assert fingerprint_id(block.fingerprint) == fingerprint_id(at_once.fingerprint)
    assert (block.details["memory"], at_once.details["memory"]) == ("block", "model")
    assert streamed.shapes == [(2, 4), (2, 5), (1, 5)]
    whole.stream_logits = None  # type: ignore[assignment]
    with pytest.raises(TrialFailed, match="this model cannot be streamed; leave memory out"):
        evaluate(whole, **options, memory="block")


@pytest.mark.parametrize("stored", ["dense", "rtn"])
def test_a_real_model_streamed_gives_the_same_figure(data: Path, tmp_path: Path, stored: str) -> None:
    folder = data / "models" / "stories260K"
    if stored == "rtn":
        rtn = REGISTRY.compressors["rtn"].value
        compress_model(rtn, rtn.options.model_validate({"bits": 3, "group_size": 16}), folder, tmp_path / "artifact")
        folder = tmp_path / "artifact"
    corpus = {"name": "text", "path": str(data / "text" / "stories_sampled.test.txt"), "split": "blank-lines"}
    options = {"corpus": corpus, "windows": "documents-first", "context": 128, "max_windows": 12, "batch_size": 5}
    found = []
    for memory in ("model", "block"):
        subject = MeasuredModel(REGISTRY, folder, stored == "rtn", "float32", CPU, 0, {"model": "stories"})
        (measured,) = evaluate(subject, **options, memory=memory)
        assert (subject._model is None) == (memory == "block")
        found.append(measured)
    whole, block = found
    assert block.value == pytest.approx(whole.value, rel=1e-9)
    assert block.items == pytest.approx(whole.items, rel=1e-6)
    assert fingerprint_id(block.fingerprint) == fingerprint_id(whole.fingerprint)
    assert block.fingerprint["attention"]
    assert block.fingerprint["logits_dtype"] == "float32"


@pytest.mark.parametrize("memory", ["model", "block"])
def test_what_the_model_has_no_row_for_is_named(tmp_path: Path, memory: str) -> None:
    """On a GPU an index out of range would end the process."""
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(300))
    corpus = {"name": "text", "path": str(text)}
    for kind in ("gpt2", "opt"):
        tiny_model(tmp_path / kind, kind)
        subject = MeasuredModel(REGISTRY, tmp_path / kind, False, "float32", CPU, 0, {})
        with pytest.raises(TrialFailed, match=r"^a text of 129 tokens, and the model has 128 positions: "):
            evaluate(subject, corpus=corpus, context=129, memory=memory)
        assert len(evaluate(subject, corpus=corpus, context=128, max_windows=1, memory=memory)) == 1
    subject._tokenizer = Letters()  # "n" is 13
    text.write_text("z" * 30 + "\u0089" * 30)  # 40
    with pytest.raises(TrialFailed, match=r"^the tokenizer gives token 40, and the model's vocabulary ends at 35: "):
        evaluate(subject, corpus=corpus, context=16, memory=memory)


# -- words and bytes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["stories260K", "babyllama105"])
def tokenizer(data: Path, request: pytest.FixtureRequest) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(data / "models" / request.param, local_files_only=True)


ODD = [
    "",
    " ",
    "a",
    "  two  words \n\n and three\t",
    "caf\u00e9 na\u00efve \U0001f600\U0001f600 \u4f60\u597d end",
    "\n\nx\n",
]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("special", [True, False])
def test_every_byte_and_word_belongs_to_one_token(tokenizer: Any, text: str, special: bool) -> None:
    found = encode_located(tokenizer, text, special=special)
    assert found.ids == tokenizer(text, add_special_tokens=special)["input_ids"]
    assert found.bytes_before is not None
    assert found.words_before is not None
    for counts, total in ((found.bytes_before, len(text.encode())), (found.words_before, len(text.split()))):
        assert len(counts) == len(found.ids) + 1
        assert counts[0] == 0
        assert (counts[1:] >= counts[:-1]).all()
        if counts[-1] != total:  # a text of which the tokenizer makes nothing has no token to belong to
            assert counts[-1] == 0
            assert not text.strip()


class Pairs:
    """A fast tokenizer of two characters a token, with offsets; a BOS in front if asked."""

    is_fast = True
    bos_token_id = 0
    eos_token_id = None

    def __call__(
        self, text: str, *, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool
    ) -> dict[str, list[Any]]:
        spans = [(start, min(start + 2, len(text))) for start in range(0, len(text), 2)]
        ids = [1 + (ord(text[start]) + end) % 25 for start, end in spans]
        if add_special_tokens:
            ids, spans = [0, *ids], [(0, 0), *spans]
        return {"input_ids": ids, "offset_mapping": spans}

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(26)}


def predicted_spans(length: int, context: int, bos: str) -> list[tuple[int, int]]:
    """Characters that Pairs' predicted tokens cover in a text of `length`, window by window; joined."""
    spans: list[Any] = [(start, min(start + 2, length)) for start in range(0, length, 2)]
    spans = [None, *spans] if bos == "start" else spans
    step = context - (bos == "window")
    covered = []
    for start in range(0, len(spans) - step + 1, step):
        inside = spans[start + (bos != "window") : start + step]
        covered.append((inside[0][0], inside[-1][1]))
    return covered


@pytest.mark.parametrize("bos", ["start", "window", "none"])
@pytest.mark.parametrize("context", [3, 4, 7])
def test_words_and_bytes_are_those_of_exactly_what_was_predicted(bos: Any, context: int) -> None:
    text = "One d\u00e9j\u00e0 vu, two of them \u4f60\u597d;  and  a longword here, then some more of it to drop"
    options = PerplexityOptions(corpus={"name": "pairs"}, context=context, bos=bos)
    cut = cut_windows(Text([text], "", {"name": "pairs"}), Pairs(), context, options)
    spans = predicted_spans(len(text), context, bos)
    assert len(spans) == len(cut.windows) > 1
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    for window, (first, last) in zip(cut.windows, spans, strict=True):
        assert window.bytes == len(text[first:last].encode())
        assert window.words == sum(first <= start < last for start in starts)  # where it begins


def test_per_word_and_per_byte_are_the_same_nats_over_other_counts() -> None:
    text = Text(["once upon a time there was a cat, and it sat and sat"], "", {"name": "pairs"})
    subject = Streamed(Pairs(), text, lambda batch: logits_of(batch, 26, torch.float32))
    options = {"corpus": {"name": "pairs"}, "context": 6, "memory": "block"}
    token, word, byte, bits = evaluate(subject, **options, per=["word_perplexity", "byte_perplexity", "bits_per_byte"])
    nats = token.details["loss"] * token.details["predictions"]
    words, size = token.details["predicted"]["words"], token.details["predicted"]["bytes"]
    assert 0 < words < 14
    assert word.value == pytest.approx(math.exp(nats / words), rel=1e-12)
    assert byte.value == pytest.approx(math.exp(nats / size), rel=1e-12)
    assert bits.value == pytest.approx(nats / size / math.log(2), rel=1e-12)
    for found in (word, byte):
        assert math.exp(found.items.mean()) == pytest.approx(found.value, rel=1e-12)  # type: ignore[union-attr]
    assert bits.items.mean() == pytest.approx(bits.value, rel=1e-12)  # type: ignore[union-attr]
    for found in (token, word, byte, bits):
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        assert found.fingerprint["metric"] == found.name
    assert (word.fingerprint["words"], byte.fingerprint["bytes"]) == (words, size)
    (plain,) = evaluate(subject, **options)
    assert plain.fingerprint == token.fingerprint
    assert plain.details["word_perplexity"] == pytest.approx(word.value, rel=1e-12)


def test_lm_evals_rolling_windows(data: Path, tmp_path: Path) -> None:
    """HFLM's own rolling log-likelihood, with and without the tokenizer's BOS, on documents short and long."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    subject = MeasuredModel(REGISTRY, data / "models" / "stories260K", False, "float32", CPU, 0, {})
    stories = (data / "text" / "stories_sampled.test.txt").read_text().split("\n\n")[:6]
    documents = [*stories, "Once.", stories[0] + stories[1]]
    path = tmp_path / "documents.txt"
    path.write_text("\n\n".join(documents))
    for bos in ("none", "start"):
        scorer = HFLM(
            pretrained=subject.model, tokenizer=subject.tokenizer, max_length=96, add_bos_token=bos == "start"
        )
        requests = [Instance("loglikelihood_rolling", {}, (document.strip(),), 0) for document in documents]
        nats = -sum(scorer.loglikelihood_rolling(requests, disable_tqdm=True))
        _, word, byte, bits = evaluate(
            subject,
            corpus={"name": "text", "path": str(path), "split": "blank-lines"},
            windows="rolling",
            bos=bos,
            context=96,
            per=("word_perplexity", "byte_perplexity", "bits_per_byte"),
        )
        words = sum(len(re.split(r"\s+", document.strip())) for document in documents)
        size = sum(len(document.strip().encode()) for document in documents)
        assert word.value == pytest.approx(math.exp(nats / words), rel=1e-6)
        assert byte.value == pytest.approx(math.exp(nats / size), rel=1e-6)
        assert bits.value == pytest.approx(nats / size / math.log(2), rel=1e-6)
