"""Printed beside measured, on the page: what a paper says, what was found, and what may be said of the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evenbits.page_html import MINUS, NONE, Child, Html, join, scrolled, table, tag
from evenbits.report_format import format_number
from evenbits.report_reproduction import LEGEND, origin_words, summary_line
from evenbits.reproduced import ReproducedCell, ReproducedRow, Reproduction

SIGNS = {"agrees": "✓", "differs": "✗", "published only": "○", "not measured": "○", "not comparable": "≠"}
"""A sign before each verdict's word, so that a column of them can be read at a glance without colours."""


def reproduction_html(found: Reproduction) -> list[Html]:
    """Its parts, with headings of the third level."""
    published = found.published
    parts = [tag("p", tag("strong", published.title)), tag("p", summary_line(found) + ".")]
    if not found.same_model:
        said = f"Measured on {found.model}, not on {published.model}: values stand side by side and are not compared."
        parts.append(tag("p", said, class_="notice"))
    measured = [row for row in found.rows if row.measured]
    others = [row for row in found.rows if not row.measured]
    if measured:
        parts += [tag("h3", f"Printed, and measured on {found.model}"), _measured(measured)]
    if others:
        parts += [tag("h3", "Printed alone"), _printed(others)]
    if found.orderings:
        claims = [
            [o.claim, o.metric, _verdict(o.outcome, o.gates), _told(o.reason, o.note), origin_words(o.origin)]
            for o in found.orderings
        ]
        head = ["claim", "metric", "verdict", "why", "source"]
        parts += [tag("h3", "Claimed orderings"), _table("Claimed orderings", head, claims, (1, 2, 3, 4))]
    if found.recomputed:
        numbers = [
            [r.what, f"{r.printed:g}", _known(r.computed), _verdict(r.outcome, r.gates), r.note, origin_words(r.origin)]
            for r in found.recomputed
        ]
        head = ["what", "printed", "computed", "verdict", "note", "source"]
        parts += [tag("h3", "Printed numbers computed again"), _table("Computed again", head, numbers, (3, 4, 5))]
    if published.notes:
        parts.append(tag("h3", "What the source mixes, and what else to know of it"))
        parts += [tag("p", note, class_="quiet") for note in published.notes]
    return [*parts, tag("p", LEGEND, class_="quiet")]


def _table(caption: str, head: Sequence[str], lines: Sequence[Sequence[Child]], words: Sequence[int]) -> Html:
    return table(caption, head, lines, words=words, class_="repro")


def _measured(rows: Sequence[ReproducedRow]) -> Html:
    """A group of lines for each row of the paper, headed by where it stands."""
    head = ("metric", "printed", "ours", "95 % interval", "difference", "allowed", "verdict", "why")
    kinds = ["", "num", "num", "num", "num", "num", "", ""]
    bodies = []
    for row in rows:
        facts = [
            row.entry,
            "" if row.stage == "none" else f"tuned: {row.stage}",
            row.tolerance,
            row.bits_note,
            row.note,
        ]
        told = "; ".join(fact for fact in [*facts, origin_words(row.origin)] if fact)
        title = tag("th", row.method, tag("span", told, class_="note"), colspan=len(head), scope="rowgroup")
        lines = [tag("tr", *(_cell_html(i, kinds[i], one) for i, one in enumerate(_line(cell)))) for cell in row.cells]
        bodies.append(tag("tbody", tag("tr", title, class_="group"), *lines))
    header = [tag("th", name, scope="col", class_=kind or None) for name, kind in zip(head, kinds, strict=True)]
    caption = tag("caption", tag("span", "What is printed beside what was measured"), class_="vh")
    inner = tag("table", caption, tag("thead", tag("tr", *header)), *bodies, class_="repro")
    return scrolled(inner, "What is printed beside what was measured")


def _cell_html(index: int, kind: str, words: Child) -> Html:
    return tag("th", words, scope="row") if index == 0 else tag("td", words, class_=kind or None)


def _line(cell: ReproducedCell) -> Iterator[Child]:
    yield cell.metric
    yield _printed_number(cell)
    yield _known(cell.measured, cell)
    known = cell.low is not None and cell.high is not None
    yield f"[{_known(cell.low, cell)}, {_known(cell.high, cell)}]" if known else ""
    yield "" if cell.difference is None else f"{cell.difference:+.3g}".replace("-", MINUS)
    yield "" if cell.allowed is None else f"±{cell.allowed:.2g}"
    yield _verdict(cell.outcome, cell.gates)
    yield cell.reason


def _printed(rows: Sequence[ReproducedRow]) -> Html:
    metrics = list(dict.fromkeys(cell.metric for row in rows for cell in row.cells))
    lines: list[list[Child]] = []
    for row in rows:
        values = {cell.metric: _printed_number(cell) for cell in row.cells}
        stage = "" if row.stage == "none" else f"tuned: {row.stage}"
        told = "; ".join(part for part in (stage, row.note) if part)
        name = join([row.method, tag("span", told, class_="note") if told else None])
        first = row.cells[0] if row.cells else None
        verdict = _verdict("published only" if first is None else first.outcome, True)
        mixed = [f"{cell.metric}: {cell.mixed}" for cell in row.cells if cell.mixed]
        why = "; ".join(dict.fromkeys([*([first.why] if first is not None and first.why else []), *mixed]))
        lines.append([name, *(values.get(metric, NONE) for metric in metrics), verdict, why, origin_words(row.origin)])
    last = len(metrics) + 1
    return _table("Printed alone", ["method", *metrics, "verdict", "why", "source"], lines, (last, last + 1, last + 2))


def _verdict(outcome: str, gates: bool) -> Html:
    sign = tag("span", SIGNS.get(outcome, ""), aria_hidden="true", class_="sign")
    compared = outcome in ("agrees", "differs")
    note = tag("span", "does not gate", class_="note") if compared and not gates else None
    return join([tag("span", sign, outcome, class_="verdict", data_outcome=outcome), note])


def _told(reason: str, note: str) -> str:
    return f"{reason}. {note}" if note else reason


def _known(value: float | None, cell: ReproducedCell | None = None) -> str:
    """A measured number with the printed one's decimals, or by its own size."""
    if value is None:
        return NONE
    return format_number(value) if cell is None or abs(value) >= 1e6 else f"{value:.{cell.decimals}f}"


def _printed_number(cell: ReproducedCell) -> str:
    return f"{cell.published:.{cell.decimals}f}"
