"""Cut a text in token windows by the rule of the options. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evenbits.errors import TrialFailed
from evenbits.measure import Text
from evenbits.sampling import sample_windows
from evenbits_perplexity.encoding import Encoded, encode_located
from evenbits_perplexity.options import PerplexityOptions


@dataclass(frozen=True)
class Window:
    """tokens: of which the last `predicted` are predicted. bytes, words: of the text of those; None where the
    tokenizer cannot say."""

    tokens: list[int]
    predicted: int
    bytes: int | None = None
    words: int | None = None


@dataclass(frozen=True)
class Cut:
    """tokens: of the whole text under the BOS rule, cut or dropped; under windows = joined, `special` of them are a BOS
    or EOS that the tokenizer added.

    even_draws: under windows = sampled, how many drawn documents had exactly as many tokens as a window. They are
    passed over, as most published code does; AQLM takes them whole, GPTQ's first version stops at them, so that a
    figure is only sure to be all of theirs where this is 0.
    """

    windows: list[Window]
    tokens: int
    special: int = 0
    even_draws: int = 0


def cut_windows(text: Text, tokenizer: Any, context: int, options: PerplexityOptions) -> Cut:
    """Windows have exactly `context` tokens; under documents 2 to `context`, under rolling 2 to `context` + 1, of which
    the last is only predicted.

    Raises TrialFailed when no window can be had, with the tokens there are and those needed.
    """
    if options.bos == "window" and tokenizer.bos_token_id is None:
        raise TrialFailed("bos = window, but the tokenizer has no BOS token")
    if options.windows == "sampled":
        return _sampled(text, tokenizer, context, options)
    special, front = options.bos == "start", _front(tokenizer, options)
    added = 0
    if options.windows == "joined":
        document = encode_located(tokenizer, text.joined(), special=special)
        windows, tokens = list(_without_overlap(document, context, front)), len(document.ids)
        added = _special(document.ids, tokenizer) if special else 0
    else:
        cut = _rolling if options.windows == "rolling" else _sharing_one
        windows, tokens = [], 0
        for part in text.documents:
            document = encode_located(tokenizer, part, special=special)
            found = list(cut(document, context, front))
            windows += found[:1] if options.windows == "documents-first" else found
            tokens += len(document.ids)
    if not windows:
        name = text.identity.get("name", "?")
        need = context if options.windows == "joined" else 2
        raise TrialFailed(
            f"text too short: corpus {name!r} has {tokens} tokens, one window of {context} needs at least "
            f"{need - len(front)}"
        )
    return Cut(windows[: options.max_windows], tokens, added)


def _special(ids: Sequence[int], tokenizer: Any) -> int:
    """How many tokens at the ends of a text the tokenizer has added: a BOS, an EOS."""
    marks = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")} - {None}
    return sum(ids[end] in marks for end in (0, -1)) if len(ids) > 1 else 0


def prefix_token(tokenizer: Any) -> tuple[str, int]:
    """What stands in front of a document under windows = rolling: "bos" or "eos", and its id."""
    for name in ("bos", "eos"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            return name, token
    raise TrialFailed("windows = rolling needs a BOS or EOS token in front, and the tokenizer has neither")


def _front(tokenizer: Any, options: PerplexityOptions) -> list[int]:
    if options.windows == "rolling":
        return [prefix_token(tokenizer)[1]]
    return [tokenizer.bos_token_id] if options.bos == "window" else []


def _window(document: Encoded, start: int, stop: int, predicted: int, front: Sequence[int] = ()) -> Window:
    """The tokens start..stop of a document behind those of `front`, the last `predicted` of them predicted."""
    tokens = [*front, *document.ids[start:stop]]
    if document.bytes_before is None or document.words_before is None:
        return Window(tokens, predicted)
    before = document.bytes_before, document.words_before
    return Window(tokens, predicted, *(int(counts[stop] - counts[stop - predicted]) for counts in before))


def _without_overlap(document: Encoded, context: int, front: list[int]) -> Iterator[Window]:
    step = context - len(front)
    for start in range(0, len(document.ids) - step + 1, step):
        yield _window(document, start, start + step, context - 1, front)


def _sharing_one(document: Encoded, context: int, front: list[int]) -> Iterator[Window]:
    """Every token but the first is predicted exactly once; with a BOS in front, the first one too."""
    last = len(document.ids)
    held = context - len(front)
    for start in range(0, last - 1 + len(front), context - 1):
        stop = min(start + held, last)
        yield _window(document, start, stop, stop - start - 1 + len(front), front)


def _rolling(document: Encoded, context: int, front: list[int]) -> Iterator[Window]:
    """Every token is predicted exactly once, with at most `context` tokens before it; lm-eval's rule."""
    last = len(document.ids)
    for start in range(0, last, context):
        stop = min(start + context, last)
        if start == 0:
            yield _window(document, 0, stop, stop, front)
        else:
            yield _window(document, stop - context - 1, stop, stop - start)


class _Places:
    """Stands in for the tokenizer where windows are drawn: each token of each text is a number of its own.

    So a drawn window says where it lies; draws depend on lengths alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.documents: list[Encoded] = []
        self.starts: list[int] = []
        self.tokens = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, range]:
        document = encode_located(self.tokenizer, text, special=add_special_tokens)
        self.documents.append(document)
        self.starts.append(self.tokens)
        self.tokens += len(document.ids)
        return {"input_ids": range(self.tokens - len(document.ids), self.tokens)}


def _sampled(text: Text, tokenizer: Any, context: int, options: PerplexityOptions) -> Cut:
    places = _Places(tokenizer)
    drawn = sample_windows(text, places, options.samples, context, seed=0)
    if text.sampling == "blocks":  # a block may hold the end of one document and the start of the next
        ids = [token for document in places.documents for token in document.ids]
        windows = [Window([ids[place] for place in window], context - 1) for window in drawn]
    else:
        windows = []
        for window in drawn:
            index = bisect_right(places.starts, window[0]) - 1
            start = window[0] - places.starts[index]
            windows.append(_window(places.documents[index], start, start + context, context - 1))
    even = sum(len(document.ids) == context for document in places.documents) if text.sampling == "document" else 0
    return Cut(windows[: options.max_windows], len(windows) * context, even_draws=even)
