"""WikiText's rows as articles, and the detokenization that lm-eval's wikitext task scores (task version 2).

The articles are those of EleutherAI/wikitext_document_level, which cuts the raw file at its top-level headings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# in the order they are applied; each undoes one habit of the tokenized text. Some never match, and stand here because
# they are part of the published task.
_STEPS: tuple[tuple[str, str, bool], ...] = (
    ("s '", "s'", False),
    (r"/' [0-9]/", r"/'[0-9]/", True),
    (" @-@ ", "-", False),
    (" @,@ ", ",", False),
    (" @.@ ", ".", False),
    (" : ", ": ", False),
    (" ; ", "; ", False),
    (" . ", ". ", False),
    (" ! ", "! ", False),
    (" ? ", "? ", False),
    (" , ", ", ", False),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)", True),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]", True),
    (r"{\s*([^}]*?)\s*}", r"{\1}", True),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"', True),
    (r"'\s*([^']*?)\s*'", r"'\1'", True),
    ("= = = =", "====", False),
    ("= = =", "===", False),
    ("= =", "==", False),
    (" \u00b0 ", "\u00b0", False),
    (" \n", "\n", False),
    ("\n ", "\n", False),
    (" N ", " 1 ", False),
    (" 's", "'s", False),
)


def articles(rows: Iterable[str]) -> Iterator[str]:
    """The text of each article, heading first, from the data set's rows; blank rows are the raw file's line of a space.

    Blank lines before the first heading belong to none, those before any other to the article that ends there.
    """
    lines: list[str] = []
    for row in rows:
        line = row.removesuffix("\n") or " "
        if _opens_article(line):
            if any(map(str.strip, lines)):
                yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join([*lines, ""])


def _opens_article(line: str) -> bool:
    merged = line.replace("= = =", "===").replace("= =", "==").strip()
    return merged.startswith("= ") and merged.endswith(" =")


def detokenize(article: str) -> str:
    for pattern, replacement, regular in _STEPS:
        article = re.sub(pattern, replacement, article) if regular else article.replace(pattern, replacement)
    return article
