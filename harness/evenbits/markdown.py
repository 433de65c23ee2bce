"""Any text made safe inside Markdown: what a model wrote, or what a suite calls things, must not become markup.

Entities, not backslashes: an entity is text in every dialect and in table cells too (CommonMark 0.31, section 2.5).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MARKUP = frozenset("&<>|*_~`[]\\$:@#!")
_ACTIVE = re.compile(r"[\\|*~`<&$]|(?<!\w)_|_(?!\w)|(?<=\])\(")  # an underscore inside a word is no emphasis
_WRITTEN = {"<": "&lt;", "&": "&amp;"}
JOINERS = "\u200c\u200d"  # letters of some scripts and emoji are joined or kept apart by them


def literal(text: str) -> str:
    """Text that renders as it is, in one line of source: markup as entities, line breaks as <br>.

    Other control and format characters (which could reorder or hide what stands beside them) are spelled out.
    """
    return "".join(map(_literal, text.replace("\r\n", "\n").replace("\r", "\n")))


def plain(text: str) -> str:
    """For names and numbers in a cell or a line: only what would be markup there, so that the source stays readable."""
    return _ACTIVE.sub(lambda found: _WRITTEN.get(found[0], f"\\{found[0]}"), " ".join(text.split()))


def table_lines(lines: Sequence[Sequence[str]], left: int, *, escape: bool = True) -> str:
    """A Markdown table: a header, then lines; the first `left` columns are words. escape: cells are raw text."""
    rule = [":--" if i < left else "--:" for i in range(len(lines[0]))]
    shown = [[plain(cell) if escape else cell for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (shown[0], rule, *shown[1:]))


def _literal(sign: str) -> str:
    if sign == "\n":
        return "<br>"
    if sign == "\t":
        return " "
    if sign in MARKUP:
        return f"&#{ord(sign)};"
    if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") and sign not in JOINERS:
        return f"(U+{ord(sign):04X})"
    return sign
