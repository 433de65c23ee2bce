"""The leaderboard of a model: one group of rows a budget and recovery stage, its marks beside its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from evenbits.page_entries import (
    MARK_WORDS,
    Entry,
    Shown,
    budget_words,
    heading,
    interval_text,
    mark_html,
    number_text,
    share_text,
)
from evenbits.page_html import NONE, Child, Html, hidden, join, scrolled, tag
from evenbits.report_format import format_bytes
from evenbits.report_protocols import NEAR, PACKED, all_dense, column_protocols, kernel_of, ran_lines
from evenbits.rows import Column, why

TIMES = "\N{MULTIPLICATION SIGN}"


def leaderboard(shown: Shown) -> Html:
    """Every row of the model; the page's script sorts within groups, hides rows and metrics."""
    if not shown.entries:
        return tag("p", "No trial has a result.", class_="quiet")
    staged = any(entry.row.recovery for entry in shown.entries)
    columns = _columns(shown)
    header = [
        _head("method", "method"),
        *([_head("recovery", "stage")] if staged else []),
        _head("seeds", "seeds", "num"),
    ]
    header += [
        _head(join(["linear bits", hidden(" per weight")]), "linear", "num"),
        _head(join(["model bits", hidden(" per parameter")]), "model", "num"),
        _head(join(["size", hidden(" of the whole model")]), "size", "num"),
        _head(join(["ratio", hidden(" of the model as stored to it")]), "ratio", "num"),
    ]
    for column, ratio in columns:
        header.append(_head(heading(column), f"m:{column.title}", "num", metric=column.title))
        if ratio:
            words = join(["vs dense", hidden(f" in {column.title}")])
            header.append(_head(words, f"r:{column.title}", "num", metric=column.title))
    bodies = [_body(shown, group, columns, staged, len(header)) for group in _groups(shown)]
    caption = tag("caption", tag("span", f"{shown.name}: quality at even bits, with 95 % intervals"))
    inner = tag("table", caption, tag("thead", tag("tr", *header)), *bodies, class_="board", data_model=shown.key)
    costs = [column for column in shown.columns if column.volatile]
    protocols = column_protocols(shown.table)
    below = [tag("p", line, class_="quiet") for line in ran_lines(costs, protocols)]
    return join([_key(shown), scrolled(inner, f"{shown.name}: leaderboard"), *below])


def _key(shown: Shown) -> Html | None:
    """What the signs beside the numbers mean; None where no row has one."""
    signs = {mark for entry in shown.entries for column in shown.quality if (mark := entry.mark(column))}
    said = [tag("span", tag("b", sign), f" {words}") for sign, words in MARK_WORDS.items() if sign in signs]
    return tag("p", *said, class_="key") if said else None


def setbacks(shown: Shown) -> Html | None:
    """Failed and skipped trials with their reasons; None where there are none."""
    records = (*shown.table.failed, *shown.table.skipped)
    if not records:
        return None
    lines = []
    for record in records:
        trace = record.failure.traceback if record.failure is not None else None
        told = tag("span", why(record) or "no reason was recorded")
        more = tag("details", tag("summary", "traceback"), tag("pre", trace)) if trace else None
        name = tag("th", record.label or record.method, scope="row")
        stage = " + ".join(record.recovery) or "none"
        cells: list[Child] = [record.status, budget_words(record.budget), stage, str(record.seed), join([told, more])]
        lines.append(tag("tr", name, *(tag("td", cell) for cell in cells)))
    head = ("method", "status", "budget", "recovery", "seed", "why")
    inner = tag(
        "table",
        tag("caption", f"{shown.name}: trials without a result"),
        tag("thead", tag("tr", *(tag("th", one, scope="col") for one in head))),
        tag("tbody", *lines),
        class_="setbacks",
    )
    return scrolled(inner, f"{shown.name}: trials without a result")


def _columns(shown: Shown) -> list[tuple[Column, bool]]:
    """Each with whether a ratio to the dense model says something of the method: not of a time on restored
    weights."""
    protocols = column_protocols(shown.table)
    found = []
    for column in shown.columns:
        packed = kernel_of(protocols.get(column.key, {})) in (PACKED, NEAR)
        known = any(shown.table.against_dense(entry.row, column) is not None for entry in shown.entries)
        found.append((column, known and (column.quality or packed)))
    return found


def _groups(shown: Shown) -> Iterator[list[Entry]]:
    """The dense models; by budget and stage the ranked rows; what lies outside a window; what has no budget."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in shown.entries:
        ranked = entry.group in ("ranked", "free")
        key = entry.group, shown.budget_key(entry), entry.row.stage_key if ranked else ""
        groups.setdefault(key, []).append(entry)
    yield from groups.values()


def _title(shown: Shown, group: Sequence[Entry]) -> str:
    first = group[0]
    if first.group == "dense":
        return "uncompressed"
    title = "no budget, not ranked" if first.group == "free" else budget_words(first.budget)
    if first.group == "outside":
        return f"{title}: outside the window, not ranked"
    return title + (f", after {first.row.stage}" if first.row.recovery else "")


def _body(
    shown: Shown, group: Sequence[Entry], columns: Sequence[tuple[Column, bool]], staged: bool, width: int
) -> Html:
    title = tag("th", tag("span", _title(shown, group)), colspan=width, scope="rowgroup")
    lines = [_line(shown, entry, columns, staged) for entry in group]
    return tag("tbody", tag("tr", title, class_="group"), *lines)


def _line(shown: Shown, entry: Entry, columns: Sequence[tuple[Column, bool]], staged: bool) -> Html:
    row = entry.row
    settings = tag("span", row.settings, class_="settings") if row.settings else None
    link = tag("a", row.name, href=f"#t-{entry.id}", class_="open")
    cells = [tag("th", link, settings, scope="row", data_v=row.name.lower())]
    if staged:
        cells.append(tag("td", row.stage, data_v=row.stage.lower()))
    ratio = row.ratios["model_stored"]
    cells += [
        _cell(str(len(row.records)), len(row.records)),
        _cell(f"{row.bits.linear:.3f}", row.bits.linear),
        _cell(f"{row.bits.model:.3f}", row.bits.model),
        _cell(format_bytes(row.model_bytes), row.model_bytes, title=f"{row.model_bytes:,.0f} bytes"),
        _cell(f"{ratio:.2f}{TIMES}", ratio),
    ]
    for column, with_ratio in columns:
        key = column.title
        found = row.cells.get(column.key)
        if found is None:
            cells.append(_cell(join([tag("span", NONE, aria_hidden="true"), hidden("not measured")]), None, metric=key))
        else:
            mark = entry.mark(column)
            between = tag("span", interval_text(found.low, found.high, column), class_="ci")
            value = tag("span", number_text(found.value, column), class_="v")
            written = join([value, mark_html(mark) or tag("span", class_="mark"), between])
            cells.append(_cell(written, found.value, metric=key, class_="best" if mark == "*" else ""))
        if with_ratio:
            cells.append(_ratio(shown, entry, column))
    words = " ".join([row.name, row.method, row.stage, row.settings]).lower()
    return tag(
        "tr", *cells, id=f"r-{entry.id}", data_entry=entry.id, data_budget=shown.budget_key(entry),
        data_stage=row.stage, data_group=entry.group, data_text=words,
    )  # fmt: skip


def _ratio(shown: Shown, entry: Entry, column: Column) -> Html:
    row, key = entry.row, column.title
    if not column.quality and all_dense(row, column):
        return _cell(join(["dense", hidden(": every layer ran on a dense weight")]), None, metric=key)
    if not column.quality or (row.method == "dense" and not row.recovery):
        ratio = shown.table.against_dense(row, column)
        return _cell("" if ratio is None else share_text(ratio), ratio, metric=key)
    found = shown.table.recovery(row, column)
    if found is None:
        return _cell("", None, metric=key)
    parts: list[Child] = [tag("span", share_text(found.value), class_="v")]
    if found.low is not None and found.high is not None:
        parts.append(tag("span", f"[{share_text(found.low)}, {share_text(found.high)}]", class_="ci"))
    return _cell(join(parts), found.value, metric=key)


def _head(words: Child, key: str, kind: str | None = None, metric: str | None = None) -> Html:
    return tag("th", words, scope="col", data_col=key, class_=kind, data_metric=metric)


def _cell(
    words: Child, value: float | None, *, metric: str | None = None, class_: str = "", title: str | None = None
) -> Html:
    known = value is not None and not math.isnan(value)
    number = f"{value:.8g}".replace("inf", "Infinity") if known else None
    return tag("td", words, class_=f"num {class_}".strip(), data_v=number, data_metric=metric, title=title)
