"""The evaluator on two real small models: losses that others measured, every BOS rule, and what it refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, Text, fingerprint_id
from evenbits_corpora import provide_corpora
from evenbits_perplexity import provide_evaluators
from evenbits_perplexity.options import PerplexityOptions
from evenbits_perplexity.windows import cut_windows

DATA = Path(os.environ.get("EVENBITS_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"no test data in {DATA} (set EVENBITS_DATA)")


class LocalSubject:
    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = torch.device("cpu")
        self.seed = 0
        self.facts: Mapping[str, Any] = {"model": "local", "dtype": "float32"}
        self.steps: list[int] = []

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        options = {key: value for key, value in reference.items() if key != "name"}
        (corpus,) = (corpus for corpus in provide_corpora() if corpus.name == reference["name"])
        return corpus.read(corpus.options(**options))

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        return self.steps.append


@pytest.fixture(scope="module")
def subjects() -> Iterator[Callable[[str], LocalSubject]]:
    transformers = pytest.importorskip("transformers")
    opened: dict[str, LocalSubject] = {}

    def get(name: str) -> LocalSubject:
        if name not in opened:
            folder = DATA / "models" / name
            transformers.utils.logging.disable_progress_bar()
            opened[name] = LocalSubject(
                transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True),
                transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
            )
        return opened[name]

    yield get
    opened.clear()


def evaluate(subject: Any, **options: Any) -> Measurement:
    (evaluator,) = provide_evaluators()
    (measurement,) = evaluator.make(evaluator.options(**options)).evaluate(subject)
    assert isinstance(measurement, Measurement)
    return measurement


def test_file(**options: Any) -> dict[str, Any]:
    return {"name": "text", "path": str(DATA / "text" / "stories_sampled.test.txt"), **options}


test_file.__test__ = False  # type: ignore[attr-defined]


@needs_data
@pytest.mark.parametrize(
    ("model", "bos", "perplexity", "predictions"),
    [
        ("stories260K", "start", 3.6896, 43_860),
        ("stories260K", "window", 4.0726, 44_115),
        ("babyllama105", "start", 1.7734, 98_940),
        ("babyllama105", "window", 1.9175, 99_450),
    ],
)
def test_dense_anchors_at_256(subjects: Any, model: str, bos: str, perplexity: float, predictions: int) -> None:
    result = evaluate(subjects(model), corpus=test_file(), context=256, bos=bos, batch_size=16)
    assert result.value == pytest.approx(perplexity, abs=6e-5)
    assert result.details["predictions"] == predictions == result.details["windows"] * 255
    assert result.low is not None
    assert result.high is not None
    assert result.low < result.value < result.high < 1.1 * result.value
    assert result.items is not None
    assert result.items.dtype == np.float64
    assert math.exp(result.items.mean()) == pytest.approx(result.value, rel=1e-12)


@needs_data
@pytest.mark.parametrize(
    ("model", "rule", "split", "loss", "predictions"),
    [
        ("stories260K", "documents", "blank-lines", 1.2006, 43_615),
        ("stories260K", "documents-first", "blank-lines", 1.1934, 41_804),
        ("stories260K", "joined", "none", 1.2956, None),
        ("babyllama105", "documents", "blank-lines", 0.5474, 99_472),
        ("babyllama105", "documents-first", "blank-lines", 0.3851, 34_170),
    ],
)
def test_losses_of_the_data_readme(
    subjects: Any, model: str, rule: str, split: str, loss: float, predictions: int | None
) -> None:
    result = evaluate(subjects(model), corpus=test_file(split=split), windows=rule, batch_size=16)
    # joined: the README's figure counts the tail of less than a window, which the papers' protocol drops
    assert result.details["loss"] == pytest.approx(loss, abs=1e-4 if predictions else 5e-4)
    if predictions is not None:
        assert result.details["predictions"] == predictions
    assert result.items is not None
    assert result.items.mean() == pytest.approx(result.details["loss"], rel=1e-12)


@needs_data
@pytest.mark.parametrize(
    ("model", "loss", "predictions"), [("stories260K", 1.264, 1802), ("babyllama105", 0.615, 1275)]
)
def test_real_stories(subjects: Any, model: str, loss: float, predictions: int) -> None:
    corpus = {
        "name": "text",
        "path": str(DATA / "text" / "tinystories_sample.txt"),
        "split": "<|endoftext|>",
        "straight_quotes": True,
    }
    result = evaluate(subjects(model), corpus=corpus, windows="documents-first")
    assert result.details["loss"] == pytest.approx(loss, abs=5e-4)
    assert result.details["predictions"] == predictions


@needs_data
def test_batch_size_changes_nothing_but_other_protocols_have_other_fingerprints(subjects: Any) -> None:
    subject = subjects("stories260K")
    base = {"corpus": test_file(), "context": 128, "max_windows": 10}
    one, four = (evaluate(subject, **base, batch_size=size) for size in (1, 4))
    assert one.items == pytest.approx(four.items, rel=1e-5)
    assert fingerprint_id(one.fingerprint) == fingerprint_id(four.fingerprint)
    assert sum(subject.steps[-3:]) == 10
    for change in ({"bos": "window"}, {"bos": "none"}, {"context": 64}, {"max_windows": 11}):
        other = evaluate(subject, **{**base, **change})
        assert fingerprint_id(other.fingerprint) != fingerprint_id(one.fingerprint), change
    assert one.fingerprint["dtype"] == "float32"
    assert one.fingerprint["corpus"]["sha256"]


@needs_data
def test_sampled_windows_are_the_same_twice(subjects: Any) -> None:
    corpus = {"name": "c4", "path": str(DATA / "text" / "c4_demo.jsonl")}
    first, second = (
        evaluate(subjects("stories260K"), corpus=corpus, windows="sampled", samples=4, context=64) for _ in range(2)
    )
    assert first.value == second.value
    assert first.details["windows"] == 4
    assert first.fingerprint["sampling"] == {"rule": "document", "seed": 0}


@needs_data
def test_text_shorter_than_a_window(subjects: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Once upon a time")
    with pytest.raises(TrialFailed, match=r"has \d+ tokens, one window of 512 needs at least 512"):
        evaluate(subjects("stories260K"), corpus={"name": "text", "path": str(path)})


class Broken(torch.nn.Module):
    """Uniform over 8 tokens, but NaN wherever token 7 stands, or with logits far beyond any exp."""

    config = SimpleNamespace()

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 8)
        logits[..., 0] = self.wrong
        logits[input_ids == 7] = math.nan
        return SimpleNamespace(logits=logits)


class Digits:
    """One token per digit; no BOS."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(char) for char in text if char.isdigit()]}

    def get_vocab(self) -> dict[str, int]:
        return {str(digit): digit for digit in range(8)}


def digits(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "digits.txt"
    path.write_text(text)
    return {"name": "text", "path": str(path)}


def test_uniform_model_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    result = evaluate(LocalSubject(Broken(), Digits()), corpus=digits(tmp_path, "123456" * 5), context=4)
    assert result.value == pytest.approx(8)
    assert (result.details["windows"], result.details["predictions"]) == (7, 21)


class Steep(torch.nn.Module):
    """Sure of token 0, however wrong that is: the loss of any other is `wrong`."""

    config = SimpleNamespace()

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 8)
        logits[..., 0] = self.wrong
        return SimpleNamespace(logits=logits)


def test_an_interval_too_wide_for_a_float_is_no_failure(tmp_path: Path) -> None:
    """Two windows, of losses 0 and 600: what is known of the mean goes from nothing to more than exp can hold."""
    subject = LocalSubject(Steep(600.0), Digits())
    result = evaluate(subject, corpus=digits(tmp_path, "1000" + "1111"), context=4)
    assert result.items is not None
    assert result.items == pytest.approx([0, 600])
    assert result.details["loss"] == pytest.approx(300)
    assert result.low is not None
    assert result.high is not None
    assert 1 <= result.low <= result.value < result.high < math.inf


def test_failures_are_named(tmp_path: Path) -> None:
    subject = LocalSubject(Broken(), Digits())
    with pytest.raises(TrialFailed, match="not finite in window 2 "):
        evaluate(subject, corpus=digits(tmp_path, "123412347234"), context=4)
    with pytest.raises(TrialFailed, match="give context"):
        evaluate(subject, corpus=digits(tmp_path, "1234"))
    with pytest.raises(TrialFailed, match="no BOS token"):
        evaluate(subject, corpus=digits(tmp_path, "1234"), context=4, bos="window")
    with pytest.raises(TrialFailed, match="overflows"):
        evaluate(LocalSubject(Broken(5000.0), Digits()), corpus=digits(tmp_path, "12341234"), context=4)
    with pytest.raises(ValidationError, match="needs a name"):
        PerplexityOptions(corpus={})
    with pytest.raises(ValidationError, match="bos can only be start"):
        PerplexityOptions(corpus={"name": "c4"}, windows="sampled", bos="none")
    with pytest.raises(ValidationError, match="bos can only be start or none"):
        PerplexityOptions(corpus={"name": "c4"}, windows="rolling", bos="window")
    with pytest.raises(ValidationError, match="count whole documents"):
        PerplexityOptions(corpus={"name": "c4"}, words="pieces")
    with pytest.raises(ValidationError, match="never opens the whole model: give context"):
        PerplexityOptions(corpus={"name": "c4"}, memory="block")
    with pytest.raises(TrialFailed, match="this tokenizer does not say"):
        evaluate(subject, corpus=digits(tmp_path, "1234"), context=4, per=["word_perplexity"])
    with pytest.raises(TrialFailed, match="neither"):
        evaluate(subject, corpus=digits(tmp_path, "1234"), context=4, windows="rolling")


class DigitsWithBos(Digits):
    bos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [0, *ids] if options["add_special_tokens"] else ids}


@pytest.mark.parametrize(
    ("windows", "bos", "expected"),
    [
        ("joined", "start", [[0, 1, 2], [3, 4, 5]]),
        ("joined", "none", [[1, 2, 3], [4, 5, 6]]),
        ("joined", "window", [[0, 1, 2], [0, 3, 4], [0, 5, 6]]),
        ("documents", "start", [[0, 1, 2], [2, 3, 4], [0, 5, 6]]),
        ("documents", "window", [[0, 1, 2], [0, 3, 4], [0, 5, 6]]),
        ("documents", "none", [[1, 2, 3], [3, 4], [5, 6]]),
        ("documents-first", "start", [[0, 1, 2], [0, 5, 6]]),
        ("rolling", "none", [[0, 1, 2, 3], [1, 2, 3, 4], [0, 5, 6]]),
        ("rolling", "start", [[0, 0, 1, 2], [1, 2, 3, 4], [0, 0, 5, 6]]),
    ],
)
def test_where_windows_are_cut(windows: Any, bos: Any, expected: list[list[int]]) -> None:
    text = Text(["1234", "56"], "", {"name": "digits"})
    options = PerplexityOptions(corpus={"name": "digits"}, windows=windows, bos=bos)
    assert [window.tokens for window in cut_windows(text, DigitsWithBos(), 3, options).windows] == expected
