"""Greedy continuations: equal to transformers' own, stopped where a text ends; one clear line for what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from evenbits.errors import TrialFailed
from evenbits.measure import Sample, Text
from evenbits.models import load_tokenizer, open_model
from evenbits.tiny import ModelKind, tiny_model, tiny_text
from evenbits_samples import provide_evaluators
from evenbits_samples.evaluator import end_tokens, greedy

CPU = torch.device("cpu")
NEVER: frozenset[int] = frozenset()
KINDS: tuple[ModelKind, ...] = ("llama", "gpt2", "opt")


class LocalSubject:
    def __init__(self, model: Any, tokenizer: Any, documents: tuple[str, ...] = ()) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.documents = documents
        self.device = CPU
        self.seed = 0
        self.facts: Mapping[str, Any] = {}
        self.steps: list[int] = []

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        return Text(self.documents, "\n", dict(reference))

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        return self.steps.append


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[ModelKind], tuple[Any, Any]]]:
    opened: dict[str, tuple[Any, Any]] = {}

    def get(kind: ModelKind) -> tuple[Any, Any]:
        if kind not in opened:
            folder: Path = tiny_model(tmp_path_factory.mktemp("samples") / kind, kind)
            opened[kind] = open_model(folder, "float32", CPU), load_tokenizer(folder)
        return opened[kind]

    yield get
    opened.clear()


def run(subject: Any, **options: Any) -> list[Sample]:
    (evaluator,) = provide_evaluators()
    found: Any = evaluator.make(evaluator.options(**options)).evaluate(subject)
    return list(found)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_transformers_generates(models: Any, kind: ModelKind) -> None:
    """And with a KV cache as without: every token is the likeliest by a forward pass over all of the text."""
    model, tokenizer = models(kind)
    ids = tokenizer("the red dog saw a small house")["input_ids"]
    new, scores, ended = greedy(model, ids, 20, NEVER, CPU)
    prompt = torch.tensor([ids])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, eos_token_id=None
    )
    assert new == expected[0, len(ids) :].tolist()
    assert not ended
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
    likely = torch.log_softmax(logits, dim=-1)
    assert likely.argmax(dim=-1).tolist() == new
    assert scores == pytest.approx(likely.max(dim=-1).values.tolist(), abs=1e-4)


def test_a_model_without_cache_writes_the_same(models: Any) -> None:
    model, tokenizer = models("llama")
    ids = tokenizer("the old cat")["input_ids"]

    class Uncached:
        def eval(self) -> None: ...

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return SimpleNamespace(logits=model(input_ids=input_ids, use_cache=False).logits)

    assert greedy(Uncached(), ids, 8, NEVER, CPU)[0] == greedy(model, ids, 8, NEVER, CPU)[0]


def test_a_sample_says_how_it_came_to_be(models: Any) -> None:
    model, tokenizer = models("llama")
    subject = LocalSubject(model, tokenizer)
    prompts = ("the red dog", "a quiet river saw")
    first = run(subject, prompts=prompts, new_tokens=6)
    assert first == run(subject, prompts=prompts, new_tokens=6)
    assert subject.steps == [1, 1, 1, 1]
    assert [sample.prompt for sample in first] == list(prompts)
    for sample, words in zip(first, (3, 4), strict=True):
        details = sample.details
        assert details["prompt_tokens"] == words + 1  # the BOS
        assert (details["decoding"], details["new_tokens"]) == ("greedy", 6)
        new, scores, ended = greedy(model, tokenizer(sample.prompt)["input_ids"], 6, end_tokens(model, tokenizer), CPU)
        assert details["tokens"] == len(new)
        assert details["stopped"] == ("end of text" if ended else "length")
        assert details["mean_logprob"] == pytest.approx(sum(scores) / len(scores))
        assert sample.text.split() == tokenizer.decode(new, skip_special_tokens=True).split()
        assert sample.text.startswith(" ")  # as it goes on from the prompt


def test_it_stops_at_the_end_of_a_text(models: Any) -> None:
    model, tokenizer = models("llama")
    ids = tokenizer("the red dog")["input_ids"]
    free, scores, _ = greedy(model, ids, 12, NEVER, CPU)
    third = free[2]
    assert third not in free[:2]
    assert greedy(model, ids, 12, frozenset({third}), CPU) == (free[:2], scores[:2], True)
    assert end_tokens(model, tokenizer) == {1, 2}
    several = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=None), generation_config=SimpleNamespace(eos_token_id=[7, 9])
    )
    assert end_tokens(several, SimpleNamespace(eos_token_id=None, bos_token_id=None)) == {7, 9}


def test_it_stops_where_the_context_does(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenbits_samples.evaluator.end_tokens", lambda model, tokenizer: NEVER)
    model, tokenizer = models("gpt2")  # learnt positions: the 129th would not be there
    subject = LocalSubject(model, tokenizer)
    (sample,) = run(subject, prompts=(tiny_text(120),), new_tokens=40)
    assert sample.details["stopped"] == "context"
    assert sample.details["prompt_tokens"] + sample.details["tokens"] == 128
    with pytest.raises(TrialFailed, match="prompt 2 has 141 tokens, the model's context 128; give a shorter one"):
        run(subject, prompts=("the dog", tiny_text(140)))


def test_prompts_from_a_corpus(models: Any) -> None:
    model, tokenizer = models("llama")
    documents = ("too short", tiny_text(30), "the dog", tiny_text(40, seed=1), tiny_text(50, seed=2))
    subject = LocalSubject(model, tokenizer, documents)
    corpus = {"name": "tiny"}
    samples = run(subject, corpus=corpus, count=2, prompt_tokens=10, new_tokens=4)
    assert [sample.prompt for sample in samples] == [
        " ".join(documents[1].split()[:9]), " ".join(documents[3].split()[:9]),
    ]  # fmt: skip
    assert all(sample.details["prompt_tokens"] == 10 for sample in samples)
    with pytest.raises(TrialFailed, match="corpus 'tiny' has 3 documents of more than 10 tokens, not 4; lower count"):
        run(subject, corpus=corpus, count=4, prompt_tokens=10)


def test_a_broken_model_is_one_clear_line(models: Any) -> None:
    _, tokenizer = models("llama")

    class Broken:
        config = SimpleNamespace(max_position_embeddings=64, eos_token_id=None)

        def eval(self) -> None: ...

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.full((1, input_ids.shape[1], 8), float("nan")))

    with pytest.raises(TrialFailed, match="logits are not finite at token 1 after prompt 1"):
        run(LocalSubject(Broken(), tokenizer), prompts=("the dog",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either prompts"),
        ({"prompts": ["a"], "corpus": {"name": "x"}}, "give either prompts"),
        ({"corpus": {"path": "x"}}, "corpus needs a name"),
        ({"prompts": ["a", " "]}, "prompt 2 is empty"),
        ({"prompts": ["a", "a"]}, "prompt 'a' is given twice"),
        ({"prompts": ["a"], "new_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    (evaluator,) = provide_evaluators()
    with pytest.raises(ValidationError, match=message):
        evaluator.options(**options)


def test_its_corpus_is_known_to_the_overlap_check() -> None:
    (evaluator,) = provide_evaluators()
    for given, corpora in (({"prompts": ["a"]}, []), ({"corpus": {"name": "x"}}, [{"name": "x"}])):
        assert list(evaluator.corpora(evaluator.options.model_validate(given))) == corpora
