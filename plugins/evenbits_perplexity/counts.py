"""Known counts of the papers' data sets: other text under the same name, or another tokenization, shows at once.

WikiText-2 raw, test: 4,358 rows and 241,211 words; the rows rebuild wiki.test.raw (1,290,590 bytes, sha256 173c87a5...)
and come to 1,296,370 bytes when joined by blank lines. The other splits' bytes follow from the data set's card, which
counts 4 bytes a row on top of the text (test: 1,305,088). C4: 364,608 validation documents in 8 files of equal length.
Tokens: 341,469 with BOS for Llama-2 (166 windows of 2048, 83 of 4096); GPT-2 and Qwen2 as their logs print it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evenbits.errors import TrialFailed
from evenbits.measure import Text
from evenbits.sampling import encode

ALLOW = "allow it by allow_other_counts = true, which leaves the figure unlike the papers'"


@dataclass(frozen=True)
class TextCounts:
    """None: not known."""

    documents: int
    words: int | None = None
    bytes: int | None = None  # of the documents joined, UTF-8

    def of(self, found: Mapping[str, int]) -> TextCounts:
        """What was found, as far as it is known here."""
        return TextCounts(**{name: found[name] for name, known in asdict(self).items() if known is not None})

    def __str__(self) -> str:
        parts = [f"{self.documents:,} documents"]
        within = {"words": self.words, "bytes": self.bytes}
        if inner := [f"{count:,} {name}" for name, count in within.items() if count is not None]:
            parts.append(" and ".join(inner))
        return " of ".join(parts)


@dataclass(frozen=True)
class Family:
    """A tokenizer known by the size of its vocabulary, the ids of some of its entries, and what it makes of "Hello".

    The last tells those apart that put a space in front of a text. tokens: of WikiText-2's joined test rows, without
    BOS.
    """

    name: str
    vocabulary: int
    entries: Mapping[str, int]
    hello: int
    tokens: int


WHOLE: Mapping[tuple[str, str], TextCounts] = {
    ("wikitext2", "test"): TextCounts(4358, 241_211, 1_296_370),
    ("wikitext2", "validation"): TextCounts(3760, bytes=1_151_766),
    ("wikitext2", "train"): TextCounts(36_718, bytes=10_988_279),
    ("c4", "validation"): TextCounts(45_576),
}
PAGES = 62  # articles of WikiText-2's test split
FAMILIES = (
    Family("Llama-2", 32_000, {"<0x0A>": 13, "\u2581the": 278, "\u2581Hello": 15043, "\u2581": 29871}, 15043, 341_468),
    Family("GPT-2", 50_257, {"\u0120the": 262, "Hello": 15496, "\u0120world": 995}, 15496, 287_644),
    Family("Qwen2", 151_643, {"\u0120the": 279, "Hello": 9707, "\u0120world": 1879}, 9707, 299_078),
)


def check_text(text: Text) -> dict[str, int]:
    """Counts of a text, for the record. Raises TrialFailed in one line when its name is known for others."""
    found = count_text(text)
    identity = text.identity
    name, split = str(identity.get("name")), str(identity.get("split"))
    known = WHOLE.get((name, split))
    if known is None:
        return found
    if identity.get("form", "rows") != "rows":
        if split != "test":
            return found
        known = TextCounts(PAGES)
    elif identity.get("join") != "\n\n":
        known = TextCounts(known.documents)  # joined otherwise, the bytes are others
    what = f"{name} {split} has"
    asked = identity.get("documents")
    if asked is not None:
        known = TextCounts(min(int(asked), known.documents))
        what = f"asked for of {name} {split} were"
    seen = known.of(found)
    if seen != known:
        raise TrialFailed(f"corpus {name!r} is other text than its name says: it has {seen}; {what} {known}; {ALLOW}")
    return found


def count_text(text: Text) -> dict[str, int]:
    """Documents; words and bytes too where they are checked, as counting them takes a copy of the text."""
    if text.identity.get("name") != "wikitext2":
        return {"documents": len(text.documents)}
    joined = text.joined()
    return {"documents": len(text.documents), "words": len(joined.split()), "bytes": len(joined.encode())}


def known_tokens(text: Text, tokenizer: Any) -> Family | None:
    """The family of the tokenizer, where it is known how many tokens it makes of this text when joined.

    None too for one whose vocabulary was added to by what stands in the text, as Phi's was to GPT-2's by runs of
    spaces.
    """
    wanted = {"name": "wikitext2", "split": "test", "join": "\n\n"}
    if any(text.identity.get(key) != value for key, value in wanted.items()):
        return None
    if {"documents", "form"} & text.identity.keys():
        return None
    size, vocabulary = getattr(tokenizer, "vocab_size", None), tokenizer.get_vocab()
    for family in FAMILIES:
        if size == family.vocabulary and all(vocabulary.get(key) == value for key, value in family.entries.items()):
            joined = text.joined()
            added = any(token in joined for token, index in vocabulary.items() if index >= family.vocabulary)
            same = not added and encode(tokenizer, "Hello", special=False) == [family.hello]
            return family if same else None
    return None


def check_tokens(family: Family, tokens: int, special: int, context: int) -> None:
    """tokens: of the whole text, `special` of them added by the tokenizer.

    Raises TrialFailed in one line when they are not as many as the family's tokenizer is known to make.
    """
    known = family.tokens + special
    if tokens != known:
        raise TrialFailed(
            f"WikiText-2 test has {tokens:,} tokens here ({tokens // context} windows of {context}), and the "
            f"{family.name} tokenizer makes {known:,} of it ({known // context} windows): other rows, another join or "
            f"another tokenizer; {ALLOW}"
        )
