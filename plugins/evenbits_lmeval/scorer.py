"""lm-eval's HFLM with log-likelihoods by token trees: what requests share is encoded once, and nothing is padded.

Tokenisation, BOS rule, rolling windows and generation are lm-eval's own. Scores equal HFLM's but for float noise; a
model for which they do not (it is probed with the requests' own tokens) is scored by HFLM, with the reason kept.
Unlike HFLM, log-softmax is always float32, a continuation longer than the context window is scored over its last
max_length tokens instead of ending in an AssertionError, and a context of no tokens counts as an empty one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm  # type: ignore[import-untyped]

from evenbits.errors import TrialFailed
from evenbits_lmeval.packing import NO_NUMBER, Request, TreeForward, failure, probe, text_config
from evenbits_lmeval.trie import Array

Encoding = Literal["joint", "apart"]
Kind = Literal["auto", "tree", "hflm"]
Tokens = list[int]
Pair = tuple[tuple[str, str] | None, Tokens, Tokens]  # what lm-eval's caches call it, context, continuation

ENCODED_TOGETHER = 1024  # requests whose texts and token lists are in memory at a time
CPU_TOKENS = 768
ACCELERATOR_TOKENS = 8192
LOGIT_BYTES = {"cpu": 1 << 30, "accelerator": 1 << 32}  # of one pass's float32 logits at most, were all of them made


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request as it is scored: the last `scored` of `tokens` (int32), of which 1 or more are context."""

    name: tuple[str, str] | None
    tokens: Array
    scored: int

    @property
    def pair(self) -> Pair:
        tokens = self.tokens.tolist()
        return self.name, tokens[: -self.scored], tokens[-self.scored :]


class TreeLM(HFLM):  # type: ignore[misc]
    """Built by `make_scorer`. After scoring: path, reason, truncated, and policy for the record."""

    cache_hook: Any  # lm-eval puts its own here when it caches requests

    def __init__(
        self,
        *,
        encoding: Encoding,
        kind: Kind,
        batch_tokens: int | None,
        progress: Callable[[int], None] | None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.encoding = encoding
        self.kind = kind
        self.truncated = 0
        """Requests that lost tokens on the left, each time it was scored."""
        self.reason: str | None = "asked for" if kind == "hflm" else None
        """Why HFLM scored what was last asked for, in part or whole; None where the trees did."""
        self.progress = progress
        self._forward = TreeForward(self.model, batch_tokens or default_batch_tokens(self.model))
        self._probed = (0, 0)  # the longest request and the longest row that packed scores were checked for
        self._gathered: list[Fitted] | None = None  # while requests are encoded that are to be scored all at once
        self._silent = False
        self._encoded: dict[tuple[str, bool | None], Tokens] | None = None

    @property
    def path(self) -> Literal["tree", "hflm"]:
        return "tree" if self.reason is None else "hflm"

    @property
    def policy(self) -> Mapping[str, Any]:
        """What of the scorer a protocol names; JSON."""
        facts: dict[str, Any] = {
            "scorer": self.path,
            "encoding": self.encoding,
            "softmax": "the logits' dtype" if self.softmax_dtype is None else "float32",
        }
        if self.path == "tree":
            return {**facts, "batch_tokens": self._forward.batch_tokens}
        return {**facts, "batch_size": self.batch_size}

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: lm-eval 0.3.0 knew only the end of text."""
        if self.encoding == "apart" and getattr(self, "custom_prefix_token_id", None) is None:
            return int(self.tokenizer.eos_token_id)
        return int(super().prefix_token_id)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> Tokens:
        """As HFLM; within one call for log-likelihoods a text met before (a context, at each choice) is remembered."""
        if self._encoded is None or left_truncate_len or kwargs:
            return list(super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs))
        key = (string, add_special_tokens)
        if key not in self._encoded:
            self._encoded[key] = list(super().tok_encode(string, add_special_tokens))
        return self._encoded[key]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would write the continuation) for each request, in their order.

        Encoding "apart" is that of lm-eval 0.3.0: context and continuation each by themselves, the continuation without
        special tokens, end of text for an empty context.
        Raises TrialFailed for a continuation of no tokens, and for a model whose scores are not numbers.
        """
        gathered: list[Fitted] = []
        self._gathered = gathered
        try:
            for low in range(0, len(requests), ENCODED_TOGETHER):
                self._encode(requests[low : low + ENCODED_TOGETHER])
        finally:
            self._gathered = self._encoded = None
        return self._answer(gathered, disable_tqdm, None)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text. Progress is told of texts, not of windows, once all are scored."""
        progress, self.progress, self._silent = self.progress, None, disable_tqdm
        try:
            found = list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))
        finally:
            self.progress, self._silent = progress, False
        if progress is not None:
            progress(len(requests))
        return found

    def _encode(self, requests: list[Any]) -> None:
        """Have the requests encoded and handed to _loglikelihood_tokens, which gathers them."""
        self._encoded = {}
        for context, continuation in (request.args for request in requests):
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise _nothing_to_score(context, continuation)
        if self.encoding == "joint":
            super().loglikelihood(requests, disable_tqdm=True)
            return
        pairs: list[Pair] = []
        for context, continuation in (request.args for request in requests):
            before = [self.prefix_token_id] if context == "" else self.tok_encode(context)
            after = self.tok_encode(continuation, add_special_tokens=False)
            pairs.append(((context, continuation), before, after))
        self._loglikelihood_tokens(pairs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        fitted = [self._fit(request) for request in requests]
        if self._gathered is not None:
            self._gathered += fitted
            return []
        return self._answer(fitted, disable_tqdm, override_bs)

    def _answer(self, requests: Sequence[Fitted], silent: bool, batch_size: int | None) -> list[tuple[float, bool]]:
        silent = silent or self._silent
        if not requests:
            return []
        if self.path == "tree":
            self._check(requests)
        if self.path == "hflm":
            return self._by_hflm(requests, silent, batch_size)
        return self._by_trees(requests, silent or self.rank != 0)

    def _by_hflm(self, requests: Sequence[Fitted], silent: bool, batch_size: int | None) -> list[tuple[float, bool]]:
        pairs = [request.pair for request in requests]
        self.logits_cache = not _split_twice(pairs)
        with self._counted():
            found = list(super()._loglikelihood_tokens(pairs, disable_tqdm=silent, override_bs=batch_size))
        if any(math.isnan(score) for score, _ in found):  # of choices lm-eval would take the first for the best
            raise TrialFailed(NO_NUMBER)
        return found

    def _by_trees(self, requests: Sequence[Fitted], silent: bool) -> list[tuple[float, bool]]:
        """Scores of fitted requests. A pass that fails leaves the rest to HFLM, unless trees are a must."""
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        # the last token of a continuation is only a target: it is not encoded
        asked = [Request(request.tokens[:-1], request.tokens[-request.scored :]) for request in requests]
        with tqdm(total=len(requests), disable=silent, desc="Running loglikelihood requests") as bar:
            try:
                for numbers, scores in self._forward.score(asked):
                    for number, score in zip(numbers, scores, strict=True):
                        answer = answers[number] = (score.log_probability, score.greedy)
                        name = requests[number].name
                        if name is not None:  # a rolling window has no name: its text is cached as a whole
                            self.cache_hook.add_partial("loglikelihood", name, answer)
                    bar.update(len(numbers))
                    if self.progress is not None:
                        self.progress(len(numbers))
            except Exception as error:  # a longer row than the model has room for, or memory
                self._decline(failure(error))
        left = [number for number, answer in enumerate(answers) if answer is None]
        if left:
            rest = self._by_hflm([requests[number] for number in left], silent, None)
            for number, answer in zip(left, rest, strict=True):
                answers[number] = answer
        return [answer for answer in answers if answer is not None]

    def _fit(self, request: Pair) -> Fitted:
        """The last max_length + 1 tokens of context and continuation, of which 1 or more are context."""
        name, context, continuation = request
        if not continuation:
            raise _nothing_to_score(*(name or ("", "")))
        context = context or [self.prefix_token_id]
        over = max(0, len(context) + len(continuation) - (self.max_length + 1))
        self.truncated += over > 0
        return Fitted(
            name,
            np.array([*context, *continuation][over:], dtype=np.int32),
            min(len(continuation), self.max_length),
        )

    def _check(self, requests: Sequence[Fitted]) -> None:
        """Compare packed scores with single ones on the longest request, in the longest row, unless done before."""
        tokens = max((request.tokens for request in requests), key=len).tolist()
        row = min(self._forward.batch_tokens, sum(len(request.tokens) for request in requests))
        longest, longest_row = self._probed
        if len(tokens) <= longest and row <= longest_row:
            return
        self._probed = max(len(tokens), longest), max(row, longest_row)
        reason = "no causal model" if self.backend != "causal" else probe(self._forward, tokens, row)
        if reason is not None:
            self._decline(reason)

    def _decline(self, reason: str) -> None:
        if self.kind == "tree":
            raise TrialFailed(f'lm-eval: {reason}; scorer "hflm" (or "auto") takes lm-eval\'s own way')
        self.reason = reason

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Have progress told of each answer that HFLM hands to the cache hook."""
        hook = self.cache_hook
        if self.progress is not None:
            self.cache_hook = _Progress(hook, self.progress)
        try:
            yield
        finally:
            self.cache_hook = hook


class _Progress:
    def __init__(self, hook: Any, progress: Callable[[int], None]) -> None:
        self.hook = hook
        self.progress = progress

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        self.hook.add_partial(attribute, request, answer)
        self.progress(1)


def make_scorer(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    device: torch.device | str,
    encoding: Encoding = "joint",
    add_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    batch_size: int = 16,
    kind: Kind = "auto",
    progress: Callable[[int], None] | None = None,
) -> TreeLM:
    """An lm-eval model for simple_evaluate.

    encoding: "joint" as lm-eval 0.4 on; "apart" as lm-eval 0.3.0, which also has no BOS unless add_bos is True.
    add_bos: whether special tokens stand before every context; None: the tokenizer's own rule.
    max_length: context in tokens; None: the model's.
    batch_tokens: tokens of one forward pass of trees; None: by device and vocabulary.
    batch_size: requests of one forward pass where HFLM scores, and of rolling windows and generation.
    kind: "auto" trees where a probe finds them right, else HFLM; "tree" fails instead (TrialFailed, while scoring);
    "hflm" lm-eval's own way, its log-softmax in the logits' dtype.
    progress: called with the number of requests scored since the last call.
    """
    if encoding == "apart" and tokenizer.eos_token_id is None:
        raise TrialFailed("lm-eval: this tokenizer has no end of text, which encoding apart puts before empty contexts")
    return TreeLM(
        encoding=encoding,
        kind=kind,
        batch_tokens=batch_tokens,
        progress=progress,
        pretrained=model,
        tokenizer=tokenizer,
        device=str(device),
        batch_size=batch_size,
        max_length=max_length,
        add_bos_token=False if encoding == "apart" and add_bos is None else add_bos,
        softmax_dtype=None if kind == "hflm" else "float32",
    )


def default_batch_tokens(model: Any) -> int:
    """Tokens of one pass: measured to be best on a CPU, more on an accelerator, fewer where the vocabulary is large."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    config = text_config(model)
    room = LOGIT_BYTES["cpu" if on_cpu else "accelerator"] // (4 * max(1, int(getattr(config, "vocab_size", 0))))
    return max(256, min(CPU_TOKENS if on_cpu else ACCELERATOR_TOKENS, room))


def _split_twice(requests: Sequence[Pair]) -> bool:
    """Whether two requests differ only in where the context ends (and in the last token).

    HFLM 0.4.13 reuses logits between such requests and takes those of the wrong positions for the shorter continuation.
    """
    lengths: dict[tuple[int, ...], int] = {}
    for _, context, continuation in requests:
        if lengths.setdefault((*context, *continuation[:-1]), len(continuation)) != len(continuation):
            return True
    return False


def _nothing_to_score(context: str, continuation: str) -> TrialFailed:
    return TrialFailed(
        f"lm-eval: the continuation {continuation[:60]!r} after {context[-60:]!r} has no tokens to score"
    )
