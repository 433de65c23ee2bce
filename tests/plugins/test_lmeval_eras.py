"""How the eras of lm-eval turn real items into tokens, with a SentencePiece-like tokenizer, and what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, Remark
from evenbits.models import load_tokenizer, open_model
from evenbits.plugins import load_plugins
from evenbits.subject import MeasuredModel
from evenbits_lmeval.choices import read_choices
from evenbits_lmeval.evaluator import LmEvalEvaluator
from evenbits_lmeval.loading import loaded_tasks
from evenbits_lmeval.options import ADD_BOS, ERAS, LmEvalOptions
from evenbits_lmeval.scoring import build

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = [
    # lm-eval and what it brings along: not ours to mend, no effect on scores
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
BOS, END = 1, 2  # <s> and </s> of stories260K
Encoded = tuple[tuple[str, str], list[int], list[int]]


@pytest.fixture(scope="module")
def opened(data: Path) -> tuple[Any, Any]:
    folder = data / "models" / "stories260K"
    return open_model(folder, "float32", "cpu"), load_tokenizer(folder)


def options(data: Path, *tasks: str, **others: Any) -> LmEvalOptions:
    return LmEvalOptions.model_validate({"tasks": tasks, "data": str(data / "tasks"), **others})


def encoded(opened: tuple[Any, Any], wanted: LmEvalOptions) -> list[Encoded]:
    """(texts, context tokens, continuation tokens) of each request as they reach the model."""
    from evenbits_lmeval.scorer import make_scorer

    lm: Any = make_scorer(
        *opened, device="cpu", encoding=ERAS[wanted.era].encoding, add_bos=ADD_BOS[wanted.bos_rule], kind="hflm"
    )
    seen: list[Encoded] = []

    def note(requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        seen.extend(requests)
        return [(0.0, False)] * len(requests)

    lm._loglikelihood_tokens = note
    with loaded_tasks(wanted) as loaded:
        requests = [request for name, task in loaded.tasks.items() for request in build(name, task, wanted).flat]
    lm.loglikelihood(requests, disable_tqdm=True)
    return seen


@pytest.mark.parametrize("task", ["piqa", "winogrande", "arc_easy", "lambada_openai"])
def test_eras_differ_in_one_space_and_in_bos(task: str, data: Path, opened: tuple[Any, Any]) -> None:
    tokenizer = opened[1]

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    space = plain("")[:1] or [tokenizer.convert_tokens_to_ids("▁")]
    a, b, c = (encoded(opened, options(data, task, limit=20, era=era)) for era in "ABC")
    for (texts, a_context, a_scored), (_, b_context, b_scored), (_, c_context, c_scored) in zip(a, b, c, strict=True):
        context, continuation = texts
        # 0.3.0: each by itself. The tokenizer puts a space in front of every text, and the continuation has its own
        assert (a_context, a_scored) == (plain(context), plain(continuation))
        # since 0.4.0: one text, cut where the context ends
        whole = plain(context + continuation)
        assert (b_context, b_scored) == (plain(context), whole[len(plain(context)) :])
        assert a_context == b_context
        assert a_scored == space + b_scored
        # since 0.4.9.2: the tokenizer's BOS in front
        assert (c_context, c_scored) == ([BOS, *b_context], b_scored)


def test_blimp_has_no_context(data: Path, opened: tuple[Any, Any]) -> None:
    """0.3.0: end of text, then the sentence as it is; later: BOS, then a space and the sentence."""
    a, b, c = (encoded(opened, options(data, "blimp_transitive", limit=5, era=era)) for era in "ABC")
    tokenizer = opened[1]
    for (a_texts, a_context, a_scored), (b_texts, b_context, b_scored) in zip(a, b, strict=True):
        assert (a_context, b_context) == ([END], [BOS])
        assert b_texts[1] == f" {a_texts[1]}"
        assert not a_texts[1].startswith(" ")
        assert a_scored == tokenizer(a_texts[1], add_special_tokens=False)["input_ids"]
        assert b_scored == tokenizer(b_texts[1], add_special_tokens=False)["input_ids"]
    assert b == c


def test_a_given_bos_rule_overrides_the_eras(data: Path, opened: tuple[Any, Any]) -> None:
    a = encoded(opened, options(data, "piqa", limit=3, era="A"))
    with_bos = encoded(opened, options(data, "piqa", limit=3, era="A", bos="always"))
    assert [(texts, [BOS, *context], scored) for texts, context, scored in a] == with_bos
    assert encoded(opened, options(data, "piqa", limit=3, era="A", bos="tokenizer")) == with_bos
    b = encoded(opened, options(data, "piqa", limit=3, era="B"))
    assert encoded(opened, options(data, "piqa", limit=3, era="C", bos="none")) == b
    assert encoded(opened, options(data, "piqa", limit=3, era="B", bos="tokenizer")) == encoded(
        opened, options(data, "piqa", limit=3)
    )


def subject(data: Path) -> MeasuredModel:
    return MeasuredModel(
        registry=load_plugins(),
        folder=data / "models" / "stories260K",
        artifact=False,
        dtype="float32",
        device=torch.device("cpu"),
        seed=0,
        base_facts={"model": "stories260K"},
    )


def test_the_fingerprint_says_what_stands_in_front(data: Path) -> None:
    model = subject(data)

    def fields(*tasks: str, **others: Any) -> dict[str, Any]:
        first = LmEvalEvaluator(options(data, *tasks, limit=1, **others)).evaluate(model)[0]
        assert isinstance(first, Measurement)
        return dict(first.fingerprint)

    chosen = ("era", "encoding", "bos", "front")
    seen = {era: tuple(fields("piqa", era=era)[key] for key in chosen) for era in "ABC"}
    assert seen == {
        "A": ("A", "apart", "none", None),
        "B": ("B", "joint", "none", None),
        "C": ("C", "joint", "tokenizer", "<s>"),
    }
    assert [fields("blimp_transitive", era=era)["front"] for era in "ABC"] == ["</s>", "<s>", "<s>"]
    assert fields("piqa", era="A", bos="tokenizer")["front"] == "<s>"
    given = fields("piqa", era="B", bos="always")
    assert (given["era"], given["bos"], given["front"]) == ("B", "always", "<s>")


def test_a_bos_that_the_tokenizer_has_not_is_refused(data: Path) -> None:
    model = subject(data)
    # the template that puts <s> in front is taken away
    from tokenizers.processors import TemplateProcessing

    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with pytest.raises(TrialFailed, match='bos = "always", but this tokenizer puts no BOS'):
        LmEvalEvaluator(options(data, "piqa", limit=1, bos="always")).evaluate(model)


@pytest.mark.parametrize("scorer", ["auto", "hflm"])
def test_what_is_cut_is_counted(scorer: str, data: Path, opened: tuple[Any, Any]) -> None:
    wanted = options(data, "arc_easy", limit=12, max_length=64, scorer=scorer)
    found = LmEvalEvaluator(wanted).evaluate(subject(data))
    lengths = [len(context) + len(scored) for _, context, scored in encoded(opened, wanted)]
    acc = found[0]
    assert isinstance(acc, Measurement)
    kept = read_choices(acc.attachments["choices-arc_easy.npz"])
    cut = [max(0, length - 65) for length in lengths]  # 64 of context; the last token is only a target
    assert kept.cut_tokens.tolist() == cut
    assert 0 < sum(each > 0 for each in cut) == acc.details["truncated_requests"] < len(cut)
    starts = [0, *kept.choices.cumsum().tolist()]
    items = sum(any(cut[a:b]) for a, b in pairwise(starts))
    assert acc.details["truncated_items"] == items
    remarks = [each.text for each in found if isinstance(each, Remark)]
    assert remarks == [f"items longer than the context, cut on the left: {items} of arc_easy"]
