"""Draw calibration windows from a corpus the way the papers do, and measure how much of a test text they contain.

Five rules, one per way in which published code samples; every rule returns windows of exactly the asked length.
Imports no torch: the tokenizer is passed in, and is any `transformers` tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Text

_WORD = re.compile(r"\w+")


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a whole text, however long; `special`: let the tokenizer add what it adds by itself (BOS)."""
    # verbose=False: a text longer than the model's context is what every caller here has
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Class, kind and content hash of a tokenizer, for fingerprints.

    Truncation and padding are left out: they are state that a caller sets, not part of how text becomes tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = tokenizer.get_vocab()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "fast": backend is not None, "sha256": digest[:16]}


def sample_windows(
    text: Text, tokenizer: Any, samples: int, length: int, seed: int, rule: str | None = None
) -> list[list[int]]:
    """`samples` windows of exactly `length` token ids, drawn by `rule` (default: the corpus's own).

    even      tokenise the joined text, cut it in non-overlapping windows, take evenly spaced ones; no randomness
    crop      tokenise the joined text, take random crops (GPTQ on WikiText-2, arXiv:2210.17323)
    document  pick a random document of more than `length` tokens, take a random crop of it (GPTQ on C4; AQLM, VPTQ)
    blocks    shuffle, skip documents of more than `length` tokens, concatenate, cut in blocks (AWQ on the Pile,
              arXiv:2306.00978). Unlike AWQ, which stops after `samples` documents and so returns fewer blocks than
              asked for, documents are taken until `samples` blocks are full
    prompt    the first `length` tokens of distinct random documents that have as many (instruction data)

    Randomness is Python's `random` seeded with `seed`, in the draw order of the published code; the draws hence
    depend on the tokenizer and on `length`. BOS stands where the tokenizer puts it by itself.
    Raises TrialFailed when the text is too short, with the numbers; SuiteError for an unknown rule.
    """
    if samples < 1 or length < 1:
        raise SuiteError(f"calibration needs at least one sample of at least one token, not {samples} of {length}")
    name = rule or text.sampling
    if name not in _RULES:
        raise SuiteError(f"unknown sampling rule {name!r}; there are: {', '.join(_RULES)}")
    return _RULES[name](text, tokenizer, samples, length, random.Random(seed))


def _even(text: Text, tokenizer: Any, samples: int, length: int, _: random.Random) -> list[list[int]]:
    ids = encode(tokenizer, text.joined())
    windows = len(ids) // length
    if windows < samples:
        raise _too_short(text, f"{len(ids)} tokens, {samples} windows of {length} need {samples * length}")
    starts = [index * windows // samples * length for index in range(samples)]
    return [ids[start : start + length] for start in starts]


def _crop(text: Text, tokenizer: Any, samples: int, length: int, draw: random.Random) -> list[list[int]]:
    ids = encode(tokenizer, text.joined())
    if len(ids) <= length:
        raise _too_short(text, f"{len(ids)} tokens, random crops of {length} need at least {length + 1}")
    return [_random_crop(ids, length, draw) for _ in range(samples)]


def _document(text: Text, tokenizer: Any, samples: int, length: int, draw: random.Random) -> list[list[int]]:
    count = len(text.documents)
    windows: list[list[int]] = []
    short: dict[int, int] = {}  # documents found too short -> their tokens; without it a draw could repeat for ever
    while len(windows) < samples:
        index = draw.randint(0, count - 1)
        if index in short:
            if len(short) == count:
                longest = max(short.values())
                raise _too_short(text, f"the longest of {count} documents has {longest} tokens, need {length + 1}")
            continue
        ids = encode(tokenizer, text.documents[index])
        if len(ids) > length:
            windows.append(_random_crop(ids, length, draw))
        else:
            short[index] = len(ids)
    return windows


def _blocks(text: Text, tokenizer: Any, samples: int, length: int, draw: random.Random) -> list[list[int]]:
    ids: list[int] = []
    for document in _shuffled(text, draw):
        tokens = encode(tokenizer, document.strip())
        if len(tokens) <= length:
            ids += tokens
        if len(ids) >= samples * length:
            return [ids[start : start + length] for start in range(0, samples * length, length)]
    raise _too_short(
        text, f"{len(ids)} tokens in documents of at most {length}, {samples} blocks need {samples * length}"
    )


def _prompt(text: Text, tokenizer: Any, samples: int, length: int, draw: random.Random) -> list[list[int]]:
    windows: list[list[int]] = []
    for document in _shuffled(text, draw):
        ids = encode(tokenizer, document)
        if len(ids) >= length:
            windows.append(ids[:length])
        if len(windows) == samples:
            return windows
    raise _too_short(text, f"{len(windows)} documents of at least {length} tokens, need {samples}")


_Rule = Callable[[Text, Any, int, int, random.Random], list[list[int]]]
_RULES: dict[str, _Rule] = {
    "even": _even,
    "crop": _crop,
    "document": _document,
    "blocks": _blocks,
    "prompt": _prompt,
}


def _random_crop(ids: list[int], length: int, draw: random.Random) -> list[int]:
    start = draw.randint(0, len(ids) - length - 1)  # the published code never takes the very last crop either
    return ids[start : start + length]


def _shuffled(text: Text, draw: random.Random) -> Iterator[str]:
    order = list(range(len(text.documents)))
    draw.shuffle(order)
    return (text.documents[index] for index in order)


def _too_short(text: Text, numbers: str) -> TrialFailed:
    return TrialFailed(f"text too short: corpus {text.identity.get('name', '?')!r} has {numbers}")


def overlap(calibration_text: Iterable[str], test_text: str, n: int = 13) -> float:
    """Share of the test text's distinct word n-grams that also stand in the calibration text, 0 to 1.

    Words are runs of letters, digits and underscores, lower-cased, so that spacing and punctuation do not hide a
    copy. A test text of fewer than n words is compared as one n-gram of all its words; one of no words gives 0.
    n = 13 is the length used for GPT-3's contamination check (arXiv:2005.14165, appendix C). Time and memory grow
    with the number of words: about a microsecond each, and one string per distinct n-gram of the test text.
    """
    words = _words(test_text)
    n = min(n, len(words))
    if n == 0:
        return 0.0
    vocabulary = set(words)
    wanted = set(_ngrams(words, n))
    total = len(wanted)
    for document in calibration_text:
        run: list[str] = []
        for word in _words(document):
            if word in vocabulary:
                run.append(word)
            else:  # no n-gram across a word that the test text does not have can match
                wanted.difference_update(_ngrams(run, n))
                run = []
        wanted.difference_update(_ngrams(run, n))
    return 1 - len(wanted) / total


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str], n: int) -> Iterator[str]:
    return (" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
