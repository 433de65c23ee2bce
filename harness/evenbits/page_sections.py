"""The page's parts besides tables and trials: what the models write, protocols, notes, how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evenbits.page_entries import Shown
from evenbits.page_html import Child, Html, facts, fold, join, scrolled, tag
from evenbits.page_trials import protocols_used
from evenbits.report_format import format_budget
from evenbits.report_protocols import notes_of, readable
from evenbits.report_samples import Parting, Prompt, Written, compare_texts, prompts_of
from evenbits.tables import Table


def samples(shown: Sequence[Shown]) -> Html | None:
    """Every continuation once, by prompt; the script copies a row's own into its dialog."""
    parts: list[Html] = []
    for one in shown:
        prompts = prompts_of(one.table)
        ids = {tuple(r.trial for r in e.row.records): e.id for e in one.entries}
        if prompts and len(shown) > 1:
            parts.append(tag("h3", one.name))
        for number, prompt in enumerate(prompts, 1):
            parts.append(_prompt(one, prompt, number, len(prompts), ids))
    if not parts:
        return None
    about = (
        "Each model continued each prompt by itself. What it has in common with the dense model's continuation, up to "
        "where it first parts from it, is plain; from there on it is ",
        tag("b", "marked", class_="parted"),
        ". One other token is enough to part, so read what stands there, not how early it is.",
    )
    return join([tag("p", *about, class_="quiet"), *parts])


def _prompt(shown: Shown, prompt: Prompt, number: int, of: int, ids: dict[tuple[str, ...], str]) -> Html:
    head = ("method", "budget", "continuation", "words in common", "parts at", "tokens", "log-prob", "ended by")
    lines = [_written(prompt, written, ids) for written in prompt.written]
    label = f"{shown.name}: continuations of prompt {number}"
    inner = tag(
        "table",
        tag("caption", label, class_="vh"),
        tag("thead", tag("tr", *(tag("th", one, scope="col") for one in head))),
        tag("tbody", *lines),
        class_="samples",
    )
    quote = tag("blockquote", prompt.text, class_="prompt")
    missing = None if prompt.dense else tag("p", "No continuation of the dense model to compare with.", class_="quiet")
    return fold(f"Prompt {number} of {of}", quote, missing, scrolled(inner, label), class_="asked", open=number == 1)


def _written(prompt: Prompt, written: Written, ids: dict[tuple[str, ...], str]) -> Html:
    row, sample, dense = written.row, written.sample, prompt.dense
    parting = None if dense is None or sample is dense else compare_texts(sample.text, dense.text)
    logprob = sample.details.get("mean_logprob")
    cells: list[Child] = [
        format_budget(written.budget) if written.budget is not None else "",
        _marked(sample.text, parting),
        "" if parting is None else f"{parting.common:.0%}",
        "" if parting is None else f"word {parting.same + 1}" if parting.differs else "nowhere",
        str(sample.details.get("tokens", "")),
        f"{logprob:.3f}" if isinstance(logprob, float) else "",
        str(sample.details.get("stopped", "")),
    ]
    name = " + ".join([row.name, *row.recovery])
    kinds = {1: "said", 2: "num", 4: "num", 5: "num"}
    return tag(
        "tr",
        tag("th", name, scope="row"),
        *(tag("td", cell, class_=kinds.get(i)) for i, cell in enumerate(cells)),
        data_entry=ids.get(tuple(r.trial for r in row.records)),
        data_dense=sample is dense,
    )


def _marked(words: str, parting: Parting | None) -> Html:
    if parting is None or not parting.differs:
        return join([words])
    rest = words[parting.split :].lstrip()
    kept = words[: len(words) - len(rest)]
    return join([kept, tag("b", rest, class_="parted") if rest else None])


def protocols(shown: Sequence[Shown]) -> list[Html]:
    """Each protocol once, with every field of its fingerprint."""
    found = []
    for identity, (fields, names) in protocols_used(shown).items():
        summary = join([tag("code", identity), " ", ", ".join(names)])
        body = facts((key, value or "(empty)") for key, value in readable(fields).items())
        found.append(fold(summary, tag("div", body), id=f"p-{identity}"))
    return found


def notes(table: Table) -> Iterator[str]:
    yield from (f"{note}." for note in table.notes)
    for model in table.models:
        yield from (f"{note}." for note in notes_of(model))
