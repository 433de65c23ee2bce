"""Token trees against an obvious version, and their scores against lm-eval's HFLM, item by item and model by model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from evenbits.errors import TrialFailed
from evenbits.models import load_tokenizer, open_model
from evenbits.tiny import tiny_model
from evenbits_lmeval.packing import join_rows
from evenbits_lmeval.trie import Prefixes, Row, cut_rows, lay_out, sort_prefixes

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = [
    # lm-eval and what it brings along: not ours to mend, no effect on scores
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NATS = 1e-4
Pair = tuple[str, str]

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9)


def nodes_of(some: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """The nodes of a tree, each by the whole prefix that ends in it."""
    return {tuple(one[: end + 1]) for one in some for end in range(len(one))}


def listed(prefixes: Prefixes, row: Row) -> list[list[int]]:
    return [prefixes.sequences[at].tolist() for at in range(row.first, row.last)]


@given(sequences)
def test_sorted_prefixes_count_each_shared_token_once(given_: list[list[int]]) -> None:
    prefixes = sort_prefixes(given_)
    kept = [sequence.tolist() for sequence in prefixes.sequences]
    assert kept == sorted(list(one) for one in {tuple(one) for one in given_})
    assert [kept[at] for at in prefixes.index] == given_
    for at, (one, other) in enumerate(pairwise(kept), start=1):
        same = [a == b for a, b in zip(one, other, strict=False)]
        assert prefixes.shared[at] == (same.index(False) if False in same else len(same))
    assert prefixes.nodes == len(nodes_of(given_))


@given(sequences, st.integers(1, 20), st.floats(0, 10), st.floats(0, 1))
def test_rows_hold_all_sequences_at_the_least_cost(
    given_: list[list[int]], longest: int, fixed: float, quadratic: float
) -> None:
    prefixes = sort_prefixes(given_)
    count = len(prefixes.sequences)

    def cost(bounds: Sequence[int]) -> float:
        total = 0.0
        for first, last in pairwise(bounds):
            size = len(nodes_of(listed(prefixes, Row(first, last, 0))))
            if size > longest and last - first > 1:
                return float("inf")
            total += fixed + size + quadratic * size**2
        return total

    rows = cut_rows(prefixes, longest, fixed, quadratic)
    found = [rows[0].first, *(row.last for row in rows)]
    assert (found[0], found[-1]) == (0, count)
    assert all(row.size == len(nodes_of(listed(prefixes, row))) for row in rows)
    cuts = range(1 << (count - 1))
    least = min(cost([0, *(at for at in range(1, count) if cut >> (at - 1) & 1), count]) for cut in cuts)
    assert cost(found) == pytest.approx(least)


@given(sequences)
def test_a_node_sees_its_ancestors_and_itself(given_: list[list[int]]) -> None:
    prefixes = sort_prefixes(given_)
    layout = lay_out(prefixes, Row(0, len(prefixes.sequences), prefixes.nodes))
    texts: dict[int, tuple[int, ...]] = {}
    for sequence, path in zip(prefixes.sequences, layout.paths, strict=True):
        assert layout.tokens[path].tolist() == sequence.tolist()
        assert layout.depths[path].tolist() == list(range(len(sequence)))
        for end, node in enumerate(path.tolist()):
            assert texts.setdefault(node, tuple(sequence[: end + 1].tolist())) == tuple(sequence[: end + 1].tolist())
    assert sorted(texts.values()) == sorted(nodes_of(given_))
    mask = np.zeros((len(texts), len(texts)), dtype=bool)
    layout.allow(mask)
    for node, text in texts.items():
        for other, prefix in texts.items():
            assert mask[node, other] == (text[: len(prefix)] == prefix)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_a_pass_holds_rows_of_like_length(sizes: list[int], batch_tokens: int) -> None:
    rows = [Row(at, at + 1, size) for at, size in enumerate(sizes)]
    batches = join_rows(rows, batch_tokens)
    assert sorted((row for batch in batches for row in batch.rows), key=lambda row: row.first) == rows
    for batch in batches:
        assert batch.length == max(row.size for row in batch.rows)
        assert len(batch.rows) == 1 or len(batch.rows) * batch.length <= batch_tokens
    assert all(max(r.size for r in b.rows) <= min(r.size for r in a.rows) for a, b in pairwise(batches))


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("scorer") / "model"
    tiny_model(folder)
    return load_tokenizer(folder)


def random_model(tokenizer: Any, kind: str, **settings_: Any) -> Any:
    """A small model of any architecture in transformers, weights large enough that scores depend on the context."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config = transformers.CONFIG_MAPPING[kind](
        **{**shape, "vocab_size": len(tokenizer), "initializer_range": 0.3, "pad_token_id": None, **settings_}
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def scorer(model: Any, tokenizer: Any, **options: Any) -> Any:
    from evenbits_lmeval.scorer import make_scorer

    return make_scorer(model, tokenizer, device="cpu", **options)


def hflm(model: Any, tokenizer: Any, **options: Any) -> Any:
    """Without its cache of logits: with it, 0.4.13 takes the wrong ones where one text is split at two places."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4, "logits_cache": False, **options})


def ask(lm: Any, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    return list(lm.loglikelihood(requests, disable_tqdm=True))


def assert_same(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]], nats: float = NATS) -> None:
    assert len(ours) == len(theirs)
    for (one, greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=nats)
        assert greedy == other_greedy


PAIRS: list[Pair] = [
    ("the red dog saw a", " cat"),
    ("the red dog saw a", " small tree house again and the dog"),
    ("the red dog saw a", " small tree"),
    ("the red dog saw a", " small tree"),  # twice: one answer each
    ("the red dog", " saw a small tree"),  # the text of the one before, split elsewhere
    ("", "the red dog"),
    ("then a quiet bird found one old river and", " the happy friend gave a story"),
    ("then a quiet bird found one old river and", " the happy cat made the small house so there"),
    ("here", " ."),
    ("two blue birds", " likes two blue"),
    ("two red birds", " likes two blue"),
]
ARCHITECTURES: list[tuple[str, dict[str, Any], str | None]] = [
    ("llama", {"num_key_value_heads": 2}, None),
    ("llama", {"num_key_value_heads": 2, "attn_implementation": "eager"}, None),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, None),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, None),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, None),
    ("gpt_neox", {}, None),
    ("phi", {}, None),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": 40}, None),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}, r"attention window \(5 tokens\)"),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}, None),
    ("bloom", {"n_head": 4, "n_layer": 2}, r"packed (scores|sequences)"),
    ("mamba", {"state_size": 4}, r"packed (scores|sequences)"),
]


@pytest.mark.parametrize(("kind", "settings_", "refused"), ARCHITECTURES)
def test_every_architecture_scores_as_hflm(
    kind: str, settings_: dict[str, Any], refused: str | None, tokenizer: Any
) -> None:
    model = random_model(tokenizer, kind, **settings_)
    lm = scorer(model, tokenizer, batch_tokens=48)
    ours = ask(lm, PAIRS)
    assert_same(ours, ask(hflm(model, tokenizer), PAIRS))
    if refused is None:
        assert (lm.path, lm.reason) == ("tree", None)
    else:
        assert lm.path == "hflm"
        assert re.search(refused, lm.reason)
        with pytest.raises(TrialFailed, match=refused):
            ask(scorer(model, tokenizer, kind="tree"), PAIRS)


def test_a_model_deaf_to_mask_or_positions_is_found_out(tokenizer: Any) -> None:
    for deaf in ("attention_mask", "position_ids"):
        model = random_model(tokenizer, "llama")
        forward = model.forward

        def without(*given_: Any, deaf: str = deaf, forward: Any = forward, **named: Any) -> Any:
            named.pop(deaf, None)
            return forward(*given_, **named)

        model.forward = without
        lm = scorer(model, tokenizer)
        ours = ask(lm, PAIRS)
        assert "packed scores differ from single ones by" in lm.reason
        assert_same(ours, ask(hflm(model, tokenizer), PAIRS))


@pytest.mark.parametrize("width", [28, 40])
def test_an_attention_that_reaches_back_by_places_in_the_row_is_found_out(width: int, tokenizer: Any) -> None:
    """Its window holds the longest request, but not the row in which that one shares its front with others."""
    shape_ = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    model = random_model(tokenizer, "gpt_neo", window_size=width, max_position_embeddings=256, **shape_)
    ends = [f" {a} {b} {c}" for a in ("cat", "dog", "tree") for b in ("house", "small", "again") for c in ("here", "a")]
    pairs = [*PAIRS, *(("the red dog saw a", end) for end in ends)]
    assert max(len(tokenizer("".join(pair))["input_ids"]) for pair in pairs) < width
    lm = scorer(model, tokenizer, batch_tokens=200)
    assert_same(ask(lm, pairs), ask(hflm(model, tokenizer), pairs))
    assert "packed scores differ from single ones by" in lm.reason


def test_a_probe_of_one_token_again_and_again_still_tells_models_apart(tokenizer: Any) -> None:
    from evenbits_lmeval.packing import TreeForward, probe

    for tokens in ([3] * 8, [0] * 8, [5, 5], [0], [1, 0, 1, 0, 1, 0]):
        deaf = TreeForward(random_model(tokenizer, "mamba", state_size=4), 64)
        assert probe(deaf, tokens, 64) is not None
        assert probe(TreeForward(random_model(tokenizer, "llama"), 64), tokens, 64) is None


def test_a_head_that_is_no_module_of_the_forward(tokenizer: Any) -> None:
    model = random_model(tokenizer, "llama")
    theirs = ask(hflm(model, tokenizer), PAIRS)

    def forward(input_ids: torch.Tensor, **named: Any) -> Any:
        hidden = model.model(input_ids, **named).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=torch.nn.functional.linear(hidden, model.lm_head.weight)
        )

    model.forward = forward
    assert_same(ask(scorer(model, tokenizer, kind="tree"), PAIRS), theirs)


@pytest.mark.parametrize("kind", ["auto", "tree", "hflm"])
def test_scores_that_are_no_numbers_end_the_trial(kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would take the first choice of every item."""
    import evenbits_lmeval.scorer as module

    model = random_model(tokenizer, "llama")
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[tokenizer("here", add_special_tokens=False)["input_ids"][-1]] = float("nan")
    assert ask(scorer(model, tokenizer, kind=kind), PAIRS[:2])  # neither says it
    monkeypatch.setattr(module, "probe", lambda *_: None)
    lm = scorer(model, tokenizer, kind=kind)
    with pytest.raises(TrialFailed, match="not numbers"):
        ask(lm, PAIRS)
    monkeypatch.undo()
    with torch.no_grad():
        table.fill_(float("nan"))
    with pytest.raises(TrialFailed, match="not numbers"):
        ask(scorer(model, tokenizer, kind=kind), PAIRS)


@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("encoding", ["joint", "apart"])
def test_how_many_requests_are_encoded_at_a_time_changes_nothing(
    together: int, encoding: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evenbits_lmeval.scorer as module

    model = random_model(tokenizer, "llama")
    whole = scorer(model, tokenizer, encoding=encoding, max_length=12)
    expected = ask(whole, PAIRS)
    monkeypatch.setattr(module, "ENCODED_TOGETHER", together)
    parts = scorer(model, tokenizer, encoding=encoding, max_length=12)
    assert ask(parts, PAIRS) == expected  # to the last bit
    assert parts.truncated == whole.truncated > 0


def test_a_pass_that_fails_leaves_the_rest_to_hflm(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenbits_lmeval.packing import TreeForward

    model = random_model(tokenizer, "llama")
    told: list[int] = []
    lm = scorer(model, tokenizer, batch_tokens=24, progress=told.append)
    scored, passes = TreeForward._score_batch, []

    def failing(*given_: Any) -> Any:
        passes.append(1)
        if len(passes) > 1:
            raise RuntimeError("no room\nfor this")
        return scored(*given_)

    monkeypatch.setattr(TreeForward, "_score_batch", failing)
    assert_same(ask(lm, PAIRS), ask(hflm(model, tokenizer), PAIRS))
    assert (lm.path, lm.reason) == ("hflm", "packed sequences fail: RuntimeError: no room")
    assert sum(told) == len(PAIRS)
    passes.clear()
    with pytest.raises(TrialFailed, match="no room"):
        ask(scorer(model, tokenizer, batch_tokens=24, kind="tree"), PAIRS)


def test_half_precision_within_its_own_noise(tokenizer: Any) -> None:
    full = random_model(tokenizer, "llama")
    reference = np.array([score for score, _ in ask(hflm(full, tokenizer), PAIRS)])
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model(tokenizer, "llama").to(dtype)
        lm = scorer(model, tokenizer)
        ours = np.array([score for score, _ in ask(lm, PAIRS)])
        theirs = np.array([score for score, _ in ask(hflm(model, tokenizer, softmax_dtype="float32"), PAIRS)])
        assert lm.path == "tree"
        noise = np.abs(theirs - reference).max()  # what the dtype costs
        assert np.abs(ours - theirs).max() <= noise
        assert np.abs(ours - reference).max() <= 2 * noise


def test_requests_are_cut_from_the_left_as_hflm_cuts_them(tokenizer: Any) -> None:
    model = random_model(tokenizer, "llama")
    longest = max(len(tokenizer(continuation)["input_ids"]) for _, continuation in PAIRS)
    lm = scorer(model, tokenizer, max_length=longest)
    assert_same(ask(lm, PAIRS), ask(hflm(model, tokenizer, max_length=longest), PAIRS))
    lengths = [len(tokenizer(context + continuation)["input_ids"]) for context, continuation in PAIRS]
    assert lm.truncated == sum(length > longest + 1 for length in lengths) > 0
    assert lm.path == "tree"


@pytest.mark.parametrize("kind", ["tree", "hflm"])
def test_a_continuation_longer_than_the_context_is_scored_over_its_end(kind: str, tokenizer: Any) -> None:
    model = random_model(tokenizer, "llama")
    pair = ("the dog", " saw a small tree house again and then the cat")
    with pytest.raises(AssertionError):
        ask(hflm(model, tokenizer, max_length=4), [pair])
    lm = scorer(model, tokenizer, max_length=4, kind=kind)
    ((found, _),) = ask(lm, [pair])
    ids = torch.tensor([tokenizer("".join(pair))["input_ids"][-5:]])
    with torch.inference_mode():
        logs = model(ids[:, :-1]).logits[0].log_softmax(-1)
    assert found == pytest.approx(float(logs.gather(1, ids[0, 1:, None]).sum()), abs=NATS)
    assert lm.truncated == 1


def test_apart_encodes_each_by_itself_and_starts_from_end_of_text(tokenizer: Any) -> None:
    model = random_model(tokenizer, "llama")
    lm = scorer(model, tokenizer, encoding="apart")

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for (context, continuation), (found, greedy) in zip(PAIRS, ask(lm, PAIRS), strict=True):
        before, after = plain(context) or [tokenizer.eos_token_id], plain(continuation)
        with torch.inference_mode():
            logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
        wanted = torch.tensor(after)
        assert found == pytest.approx(float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum()), abs=NATS)
        assert greedy == bool((logits.argmax(-1) == wanted).all())
    assert lm.policy["encoding"] == "apart"


@pytest.mark.parametrize("kind", ["tree", "hflm"])
def test_one_text_split_at_two_places(kind: str, tokenizer: Any) -> None:
    """HFLM's cache of logits (0.4.13) takes those of the wrong positions for the shorter continuation."""
    model = random_model(tokenizer, "llama")
    pairs = [("the red dog", " saw a small tree"), ("the red dog saw a", " small tree")]
    theirs = ask(hflm(model, tokenizer), pairs)
    assert_same(ask(scorer(model, tokenizer, kind=kind), pairs), theirs)
    assert_same([ask(hflm(model, tokenizer, logits_cache=True), [pair])[0] for pair in pairs], theirs)


def test_short_requests_are_probed_too(tokenizer: Any) -> None:
    model = random_model(tokenizer, "mamba", state_size=4)
    lm = scorer(model, tokenizer)
    pairs = [("the", " dog"), ("the", " cat"), ("red", " dog")]
    assert_same(ask(lm, pairs), ask(hflm(model, tokenizer), pairs))
    assert lm.path == "hflm"


def test_a_score_does_not_depend_on_company(tokenizer: Any) -> None:
    model = random_model(tokenizer, "llama")
    together = ask(scorer(model, tokenizer, batch_tokens=1000), PAIRS)
    assert_same(ask(scorer(model, tokenizer, batch_tokens=1), PAIRS), together)
    assert_same([ask(scorer(model, tokenizer), [pair])[0] for pair in PAIRS], together)
    assert_same(ask(scorer(model, tokenizer), PAIRS[::-1])[::-1], together)
    assert ask(scorer(model, tokenizer, batch_tokens=1000), PAIRS) == together  # to the last bit


@pytest.mark.parametrize("kind", ["tree", "hflm"])
def test_progress_and_the_request_cache_hear_of_every_request(kind: str, tokenizer: Any) -> None:
    told: list[int] = []
    lm = scorer(random_model(tokenizer, "llama"), tokenizer, kind=kind, progress=told.append, batch_tokens=40)
    cached: dict[Pair, tuple[float, bool]] = {}

    class Hook:
        def add_partial(self, attribute: str, request: Pair, answer: tuple[float, bool]) -> None:
            assert attribute == "loglikelihood"
            cached[request] = answer

    lm.cache_hook = Hook()
    answers = ask(lm, PAIRS)
    assert sum(told) == len(PAIRS)
    assert len(told) > 1
    assert [cached[pair] for pair in PAIRS] == answers


def test_rolling_windows_are_scored_as_hflm_scores_them(tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    model = random_model(tokenizer, "llama")
    text = " ".join(context + continuation for context, continuation in PAIRS)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0), Instance("loglikelihood_rolling", {}, ("a cat",), 1)]
    ours, theirs = (
        lm.loglikelihood_rolling(requests, disable_tqdm=True)
        for lm in (scorer(model, tokenizer, max_length=16, batch_size=4), hflm(model, tokenizer, max_length=16))
    )
    assert ours == pytest.approx(theirs, abs=NATS)


@pytest.mark.parametrize("kind", ["tree", "hflm"])
def test_progress_of_rolling_texts_counts_texts_and_shows_no_bars(
    kind: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.instance import Instance

    told: list[int] = []
    lm = scorer(random_model(tokenizer, "llama"), tokenizer, max_length=4, kind=kind, progress=told.append)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("the red dog saw a cat again", "a cat")]
    capsys.readouterr()
    lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert sum(told) == len(requests)
    assert "requests" not in capsys.readouterr().err
    assert len(ask(lm, PAIRS[:1])) == 1
    assert sum(told) == len(requests) + 1


def test_a_continuation_of_no_tokens_is_refused_in_one_line(tokenizer: Any) -> None:
    for pair in (("", ""), ("the dog", "")):
        with pytest.raises(TrialFailed, match="has no tokens to score") as caught:
            ask(scorer(random_model(tokenizer, "llama"), tokenizer), [*PAIRS, pair])
        assert "\n" not in str(caught.value)


def test_the_five_sets_are_scored_as_hflm_scores_them(data: Path) -> None:
    """The whole sets are in tests/benchmarks/zero_shot.py."""
    from evenbits_lmeval.loading import loaded_tasks
    from evenbits_lmeval.options import FIVE, LmEvalOptions
    from evenbits_lmeval.scoring import build

    folder = data / "models" / "stories260K"
    model, tokenizer = open_model(folder, "float32", "cpu"), load_tokenizer(folder)
    options = LmEvalOptions.model_validate({"tasks": FIVE, "data": str(data / "tasks"), "limit": 12})
    with loaded_tasks(options) as loaded:
        asked = {name: list(build(name, task, options).flat) for name, task in loaded.tasks.items()}
    assert len(asked) == 5
    ours, theirs = scorer(model, tokenizer, kind="tree"), hflm(model, tokenizer, batch_size=8)
    for requests in asked.values():
        assert_same(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))
    cut = scorer(model, tokenizer, kind="tree", max_length=128)
    for requests in asked.values():
        kept = [one for one in requests if len(tokenizer(one.args[1])["input_ids"]) <= 128]
        again = hflm(model, tokenizer, batch_size=8, max_length=128)
        assert_same(cut.loglikelihood(kept, disable_tqdm=True), again.loglikelihood(kept, disable_tqdm=True))
    assert cut.truncated > 0
