"""What the models wrote after each prompt, dense and compressed one below the other (samples.md)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from evenbits.layers import every_row
from evenbits.markdown import literal, plain, table_lines
from evenbits.record import BudgetFacts, SampleFacts
from evenbits.report_format import format_budget, name_among
from evenbits.rows import Row
from evenbits.tables import ModelTable, Table

ABOUT = (
    "Each model continued each prompt by itself. The words that it has in common with the dense model's "
    "continuation, up to where it first parts from it, are plain; **from there on they are bold**. One other token is "
    "enough to part, so read what stands there, not how early it is.",
    "Words in common: share of the words, in any order, that are in both (twice the common ones over all of both). "
    "Log-prob: mean log-probability, in nats, that the model gave the tokens it wrote. Of several seeds the first.",
)

_HEADER = (
    "budget", "method", "continuation", "linear bits", "words in common", "parts at", "tokens", "log-prob", "ended by",
)  # fmt: skip

# words with the space before them; a sign of a script that sets no spaces stands for itself
_WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)")


@dataclass(frozen=True)
class Written:
    """A row's continuation of one prompt."""

    row: Row
    budget: BudgetFacts | None
    sample: SampleFacts


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what each row made of it: the dense model first, then in the table's order."""

    source: str
    text: str
    dense: SampleFacts | None
    written: tuple[Written, ...]


@dataclass(frozen=True)
class Parting:
    """How a text compares with the dense model's.

    same: how many leading words are equal; split: where the rest begins in the text; common: share of words.
    differs: False where both texts are equal.
    """

    same: int
    split: int
    common: float
    differs: bool


def compare_texts(text: str, dense: str) -> Parting:
    """Word by word with the space before each, so that a line break in place of a space parts them too."""
    own, other = _WORD.findall(text), _WORD.findall(dense)
    same = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    bags = [Counter(word.strip() for word in words) for words in (own, other)]
    total = len(own) + len(other)
    common = 2 * (bags[0] & bags[1]).total() / total if total else 1.0
    return Parting(same, sum(map(len, own[:same])), common, own != other)


def prompts_of(model: ModelTable) -> list[Prompt]:
    """Every prompt of any trial, in order of appearance; prompts asked for with other lengths stand apart."""
    found: dict[tuple[str, str, str], list[Written]] = {}
    for row, budget in every_row(model):
        record = next((r for r in sorted(row.records, key=lambda r: r.seed) if r.samples), None)
        for sample in () if record is None else record.samples:
            key = sample.source, sample.prompt, str(sample.details.get("new_tokens"))
            found.setdefault(key, []).append(Written(row, budget, sample))
    return [
        Prompt(
            source,
            text,
            next((w.sample for w in written if w.row.method == "dense" and not w.row.recovery), None),
            tuple(written),
        )
        for (source, text, _), written in found.items()
    ]


def has_samples(table: Table) -> bool:
    return any(prompts_of(model) for model in table.models)


def samples_markdown(table: Table) -> str:
    parts = ["# Sample continuations", *ABOUT]
    for model in table.models:
        prompts = prompts_of(model)
        if prompts:
            parts.append(f"## {plain(model.model.name)}")
        for number, prompt in enumerate(prompts, 1):
            parts.append(f"### {plain(model.model.name)}: prompt {number} of {len(prompts)} ({plain(prompt.source)})")
            if prompt.dense is None:
                parts.append("No continuation of the dense model to compare with.")
            parts.append(f"Prompt: {literal(prompt.text)}")
            parts.append(_table(prompt))
    return "\n\n".join(parts) + "\n"


def _table(prompt: Prompt) -> str:
    lines = [list(_HEADER)]
    for written in prompt.written:
        row, sample = written.row, written.sample
        dense = prompt.dense
        parting = None if dense is None or sample is dense else compare_texts(sample.text, dense.text)
        peers = [other.row for other in prompt.written]
        logprob = sample.details.get("mean_logprob")
        lines.append(
            [
                plain("" if row.method == "dense" else format_budget(written.budget)),
                plain(name_among(row, peers)),
                _marked(sample.text, parting),
                f"{row.bits.linear:.3f}",
                "" if parting is None else f"{parting.common:.0%}",
                "" if parting is None else f"word {parting.same + 1}" if parting.differs else "nowhere",
                plain(str(sample.details.get("tokens", ""))),
                f"{logprob:.3f}" if isinstance(logprob, float) else "",
                plain(str(sample.details.get("stopped", ""))),
            ]
        )
    return table_lines(lines, left=3, escape=False)


def _marked(text: str, parting: Parting | None) -> str:
    if parting is None or not parting.differs:
        return literal(text)
    rest = text[parting.split :].lstrip()
    kept = literal(text[: len(text) - len(rest)])
    return f"{kept}<b>{literal(rest)}</b>" if rest else kept
