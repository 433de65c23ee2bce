"""Published protocols by one word. Each is only a set of the evaluator's own options, so what it says can be read here.

Sources: WikiText-2 and C4 as in GPTQ (arXiv:2210.17323) and the code published with it, AQLM, QuIP# and QTIP; C4 "new"
as in SparseGPT (arXiv:2301.00774), Wanda and GPTQ's --new-eval; lm-eval's wikitext task, version 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """options: what the word stands for. free: those of them that a suite may set otherwise."""

    options: Mapping[str, Any]
    free: tuple[str, ...] = ()


_PAGES = {"name": "wikitext2", "split": "test", "form": "pages"}

PROTOCOLS: Mapping[str, Protocol] = {
    "wikitext2": Protocol({"corpus": {"name": "wikitext2", "split": "test"}, "windows": "joined", "bos": "start"}),
    "c4": Protocol(
        {"corpus": {"name": "c4", "split": "validation"}, "windows": "sampled", "bos": "start", "samples": 256}
    ),
    "c4-new": Protocol(
        {
            "corpus": {"name": "c4", "split": "validation", "documents": 1100},
            "windows": "joined",
            "bos": "start",
            "max_windows": 256,
        }
    ),
    "wikitext2-lm-eval": Protocol(
        {
            "corpus": {**_PAGES, "form": "lm-eval"},
            "windows": "rolling",
            "bos": "none",  # what lm-eval 0.4.0 to 0.4.9.1 does; later versions leave it to the tokenizer: bos = start
            "units_of": dict(_PAGES),
            "words": "pieces",
            "per": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
        },
        free=("bos", "per"),
    ),
}
_CORPORA = ("corpus", "units_of")


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in full: what the protocol says, and `path` moved to the corpora that it stands in for.

    Expanding twice changes nothing. Raises ValueError where an option says otherwise than the protocol.
    """
    options = dict(given)
    name: Any = options.get("protocol")
    path = options.pop("path", None)
    if name not in PROTOCOLS:
        if name is None and path is not None:  # an unknown name is refused by the field's own check
            raise ValueError("path belongs to a protocol; without one it stands in the corpus: corpus = {path = ...}")
        return options
    protocol = PROTOCOLS[name]
    for key, value in protocol.options.items():
        if key in _CORPORA:
            own = {} if path is None else {"path": path}
            options[key] = _merged(name, key, value, {**own, **dict(options.get(key) or {})})
        elif key in protocol.free:
            options.setdefault(key, value)
        elif _plain(options.setdefault(key, value)) != _plain(value):
            raise ValueError(f"{_instead(name, key, value)}, not {options[key]!r}")
    return options


def _merged(name: str, key: str, fixed: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    for inner, value in given.items():
        if inner in fixed and fixed[inner] != value:
            raise ValueError(f"{_instead(name, f'{key}.{inner}', fixed[inner])}, not {value!r}")
    return {**given, **fixed}


def _instead(name: str, key: str, value: Any) -> str:
    return f"protocol = {name!r} means {key} = {_plain(value)!r} (leave protocol out to choose by yourself)"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
