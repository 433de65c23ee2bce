"""Cut a text in token windows by the rule of the options. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evenbits.errors import TrialFailed
from evenbits.measure import Text
from evenbits.sampling import encode, sample_windows
from evenbits_perplexity.options import PerplexityOptions


def cut_windows(text: Text, tokenizer: Any, context: int, options: PerplexityOptions) -> tuple[list[list[int]], int]:
    """Windows of token ids, and the number of tokens the text has under the BOS rule (all of it, cut or dropped).

    Windows have exactly `context` tokens, but for documents: there 2 to `context`.
    Raises TrialFailed when no window can be had, with the tokens there are and those needed.
    """
    if options.bos == "window" and tokenizer.bos_token_id is None:
        raise TrialFailed("bos = window, but the tokenizer has no BOS token")
    if options.windows == "sampled":
        windows = sample_windows(text, tokenizer, options.samples, context, seed=0)
        tokens = sum(map(len, windows))
    elif options.windows == "joined":
        ids = encode(tokenizer, text.joined(), special=options.bos == "start")
        windows, tokens = _without_overlap(ids, context, _front(tokenizer, options)), len(ids)
    else:
        encoded = [encode(tokenizer, document, special=options.bos == "start") for document in text.documents]
        cuts = [_sharing_one(ids, context, _front(tokenizer, options)) for ids in encoded]
        windows = [w for cut in cuts for w in (cut if options.windows == "documents" else cut[:1])]
        tokens = sum(map(len, encoded))
    if not windows:
        name = text.identity.get("name", "?")
        need = context if options.windows == "joined" else 2
        raise TrialFailed(
            f"text too short: corpus {name!r} has {tokens} tokens, one window of {context} needs at least "
            f"{need - len(_front(tokenizer, options))}"
        )
    return windows[: options.max_windows], tokens


def _front(tokenizer: Any, options: PerplexityOptions) -> list[int]:
    return [tokenizer.bos_token_id] if options.bos == "window" else []


def _without_overlap(ids: Sequence[int], context: int, front: list[int]) -> list[list[int]]:
    step = context - len(front)
    return [front + list(ids[start : start + step]) for start in range(0, len(ids) - step + 1, step)]


def _sharing_one(ids: Sequence[int], context: int, front: list[int]) -> list[list[int]]:
    """Every token but the first is predicted exactly once; with a BOS in front, the first one too."""
    if front:
        step = context - 1
        return [front + list(ids[start : start + step]) for start in range(0, len(ids), step)]
    return [list(ids[start : start + context]) for start in range(0, len(ids) - 1, context - 1)]
