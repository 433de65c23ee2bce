"""HTML made of data: whatever is not an `Html` is text, and is escaped. No element carries a style or a script."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any

from evenbits.markdown import JOINERS

NONE = "\N{EN DASH}"  # where there is no number
MINUS = "\N{MINUS SIGN}"
VOID = frozenset({"br", "wbr", "hr", "input", "meta", "link", "img", "col"})


class Html(str):
    """A finished piece of HTML."""

    __slots__ = ()


Child = str | Html | None


@lru_cache(maxsize=1 << 14)  # a page says most of its words and numbers many times
def text(value: str) -> Html:
    """Text as it is. Control and format characters, which could hide or reorder what stands beside them, spelled out;
    line breaks and joiners of letters stay."""
    if not value.isprintable():
        value = "".join(map(_shown, value.replace("\r\n", "\n")))
    return Html(html.escape(value, quote=True))


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Attributes: a trailing underscore is dropped, others are written as dashes; True stands alone, False
    and None are left out."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Html:
    """between: plain text, escaped too."""
    parts = [child if isinstance(child, Html) else text(child) for child in children if child is not None]
    return Html(text(between).join(parts))


def table(
    caption: str,
    header: Sequence[Child],
    lines: Iterable[Sequence[Child]],
    *,
    words: Collection[int] = (),
    seen: bool = True,
    class_: str = "",
) -> Html:
    """A table in a box of its own that scrolls. The first cell of a line is its heading; words: further columns that
    are no numbers. seen: False where a heading above says what the caption does."""
    kinds = ["" if i == 0 or i in words else "num" for i in range(len(header))]
    head = [tag("th", one, scope="col", class_=kind or None) for one, kind in zip(header, kinds, strict=True)]
    body = [
        tag(
            "tr",
            *(
                tag("th", one, scope="row") if i == 0 else tag("td", one, class_=kinds[i] or None)
                for i, one in enumerate(line)
            ),
        )
        for line in lines
    ]
    inner = tag(
        "table",
        tag("caption", tag("span", caption, class_=None if seen else "vh")),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
        class_=class_ or None,
    )
    return scrolled(inner, caption)


def scrolled(inner: Html, label: str) -> Html:
    """A box that scrolls sideways, which a keyboard can reach."""
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def facts(pairs: Iterable[tuple[Child, Child]]) -> Html:
    """A list of names with their values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def fold(summary: Child, *children: Child, **attributes: str | int | bool | None) -> Html:
    return tag("details", tag("summary", summary), *children, **attributes)


def hidden(words: str) -> Html:
    """Words for those who do not see the sign beside them."""
    return tag("span", words, class_="vh")


def embed(data: Any) -> Html:
    """JSON for a script element: no "<" can end the element, no line separator can end a line, no inf or nan."""
    raw = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return Html(raw.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(str(value))}"'


def _shown(sign: str) -> str:
    if sign in "\n\t" or sign in JOINERS:
        return sign
    if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co"):
        return f"\\u{ord(sign):04x}"
    return sign
