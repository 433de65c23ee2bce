"""What a paper prints beside what was measured: for a terminal and as Markdown.

What fails stands first, then the claims, then two sheets: rows of which anything was measured, a line for each number,
and all other rows, a line each. Reasons stand below as lettered notes, sources as numbered ones, each once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from evenbits.markdown import plain, table_lines
from evenbits.published import NEVER_GATE, TOLERANCES, TRUST, Origin, decimals_of
from evenbits.report_format import format_number
from evenbits.report_reproduction_data import full_reason
from evenbits.report_sheets import Sheet
from evenbits.report_text import GAP, NAME_WIDTH, fit
from evenbits.reproduced import (
    Failing,
    RecomputedNumber,
    ReproducedCell,
    ReproducedOrdering,
    ReproducedRow,
    Reproduction,
    failing,
)

WORD_WIDTH = 30  # of a method's name in a terminal
LEAST_WIDTH = 20  # of it and of a metric's, where there is little room
FAILS = "!"
_PLURAL = {"agrees": "agree", "differs": "differ"}

LEGEND = (
    f"{FAILS} fails: the source is trusted, the class of tolerance is not advisory, nothing is mixed, and the number "
    "differs. Bits are compared by the method's own formula; what lies on disk is said where it differs. Accuracies in "
    "per cent. allowed: the tolerance of the row's class; where only the first n of a test set's N items were "
    "measured, also the half of the interval that faces the printed value, times sqrt(1 - n/N)."
)


@dataclass
class Notes:
    """What is said once below the tables: reasons by letter, sources by number."""

    reasons: dict[str, str] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)

    def letter(self, reason: str) -> str:
        return self.reasons.setdefault(reason, _letter(len(self.reasons)))

    def source(self, origin: Origin) -> str:
        return f"[{self.sources.setdefault(origin_words(origin), len(self.sources) + 1)}]"


def origin_words(origin: Origin) -> str:
    """Where a number stands, under which protocol it was measured, and how far it can be trusted."""
    trust = None if origin.trust is None else f"{TRUST[origin.trust]} ({origin.trust})"
    if trust is not None and origin.trust in NEVER_GATE:
        trust += ", never gates"
    parts = [
        origin.source,
        origin.version,
        None if origin.context is None else f"context {origin.context}",
        None if origin.era is None else f"lm-eval era {origin.era}",
        trust,
    ]
    return ", ".join(part for part in parts if part)


def summary_line(found: Reproduction) -> str:
    """What fails, and how many of the printed numbers and claims came out how."""
    cells = [cell for row in found.rows for cell in row.cells]
    kinds: Mapping[str, Sequence[ReproducedCell | ReproducedOrdering | RecomputedNumber]] = {
        "printed": cells, "claimed": found.orderings, "computed again": found.recomputed
    }  # fmt: skip
    failed = len(failing(found))
    judged = {*(cell.outcome for cell in cells), *(one.outcome for one in found.orderings)}
    parts = ["1 fails" if failed == 1 else f"{failed or 'nothing'} fail{'' if failed else 's'}"]
    parts = parts if failed or judged & {"agrees", "differs"} else ["nothing is measured and compared"]
    for kind, group in kinds.items():
        counts = Counter(one.outcome for one in group)
        told = ", ".join(f"{count} {_PLURAL.get(outcome, outcome)}" for outcome, count in counts.most_common())
        parts += [f"{len(group)} {kind}: {told}"] if group else []
    return "; ".join(parts)


def print_reproduction(found: Reproduction, console: Console) -> None:
    """Readable at 120 columns, which are taken where the output is not a terminal."""
    if not console.is_terminal and console.width < 120:
        console.width = 120
    notes = Notes()
    console.print(Text(f"Reproduction: {found.published.title}", style="bold"))
    for line in _opening(found):
        console.print(Text(line))
    console.print()
    if (claims := _claims_sheet(found, notes)) is not None:
        console.print(_rich(claims, {}, wrap=True))
    if (measured := _measured_sheet(found, notes, brief=True)) is not None:
        console.print(_rich(measured, _word_widths(measured, console.width)))
    if (recomputed := _recomputed_sheet(found, notes, brief=True)) is not None:
        console.print(_rich(recomputed, {}, wrap=True))
    if (others := _others_sheet(found, notes, brief=True)) is not None:
        for part in _parts(others, console.width - (WORD_WIDTH - NAME_WIDTH)):
            console.print(_rich(part, {"method": WORD_WIDTH}))
    for line in _below(found, notes, brief=True):
        console.print(Text(line), style="dim")


def reproduction_markdown(found: Reproduction, level: int = 1) -> str:
    """level: of its heading."""
    notes = Notes()
    parts = [f"{'#' * level} Reproduction: {plain(found.published.title)}", *map(plain, _opening(found))]
    sheets = [
        _claims_sheet(found, notes),
        _measured_sheet(found, notes, brief=False),
        _recomputed_sheet(found, notes, brief=False),
        _others_sheet(found, notes, brief=False),
    ]
    for sheet in sheets:
        if sheet is not None:
            parts.append(f"{'#' * (level + 1)} {plain(sheet.title)}")
            parts.append(table_lines([sheet.header, *(line for group in sheet.groups for line in group)], sheet.left))
    below = _below(found, notes, brief=False)
    parts += [f"{'#' * (level + 1)} Notes", "\n".join(f"- {plain(line)}" for line in below)]
    return "\n\n".join(parts) + "\n"


def _opening(found: Reproduction) -> Iterator[str]:
    if not found.same_model:
        yield (
            f"Measured on {found.model}, not on {found.published.model}: values stand side by side and are not "
            "compared; orderings are of that model and never gate."
        )
    yield summary_line(found)
    yield from (f"{FAILS} {_told(one)}" for one in failing(found))


def _told(one: Failing) -> str:
    printed = "" if one.published is None else f" {one.published:g} printed, {_known(one.measured)} here:"
    return f"{one.what}: {one.metric}:{printed} {one.reason}"


def _known(value: float | None) -> str:
    return "nothing" if value is None else format_number(value)


def _measured_sheet(found: Reproduction, notes: Notes, *, brief: bool) -> Sheet | None:
    """A line for each number of rows of which anything was measured. brief: words of a row stand below each other, and
    the class of tolerance is told by what it allows."""
    groups = []
    for row in found.rows:
        if not row.measured:
            continue
        numbers = [_numbers(row, cell, notes) for cell in row.cells]
        if brief:
            words = [f"{row.method} {notes.source(row.origin)}"]
            words += [] if row.entry == row.method else [f"  {row.entry}"]
            words += [] if row.stage == "none" else [f"  tuned: {row.stage}"]
            words += [""] * (len(numbers) - len(words))
            numbers += [("",) * len(numbers[0])] * (len(words) - len(numbers))
            groups.append(tuple((word, *rest) for word, rest in zip(words, numbers, strict=True)))
        else:
            words = [row.method, row.entry, row.stage, row.tolerance, notes.source(row.origin)]
            groups.append(tuple((*words, *rest) for rest in numbers))
    who = ("method",) if brief else ("method", "entry", "tuned", "tolerance", "source")
    header = (*who, "metric", "printed", "ours", "95 % interval", "difference", "allowed", "verdict")
    return Sheet(f"printed and measured on {found.model}", header, tuple(groups), len(who) + 1) if groups else None


def _numbers(row: ReproducedRow, cell: ReproducedCell, notes: Notes) -> tuple[str, ...]:
    bits = cell.metric == "bits"
    places = max(2, cell.decimals) if bits else cell.decimals
    limits = () if cell.low is None or cell.high is None else (cell.low, cell.high)
    interval = f"[{', '.join(_fixed(limit, places) for limit in limits)}]" if limits else ""
    reason = full_reason(row, cell)
    plainly = cell.outcome == "agrees" and ";" not in reason  # the tolerance stands in a column of its own
    return (
        cell.metric,
        _fixed(cell.published, places),
        "-" if cell.measured is None else _fixed(cell.measured, places + 1 if bits else places),
        interval,
        "" if cell.difference is None else _signed(cell.difference, places + 1 if bits else places),
        "" if cell.allowed is None else f"±{cell.allowed:.2g}",
        _marked(_failed(cell), "" if plainly else notes.letter(reason)),
    )


def _others_sheet(found: Reproduction, notes: Notes, *, brief: bool) -> Sheet | None:
    """A line for each row of which nothing was measured: what is printed, and why that is all."""
    rows = [row for row in found.rows if not row.measured]
    metrics = list(dict.fromkeys(cell.metric for row in rows for cell in row.cells if cell.metric != "bits"))
    lines = []
    for row in rows:
        reason = row.cells[0].why if row.cells else ""
        outcome = row.cells[0].outcome if row.cells else "published only"
        verdict = _marked(outcome, notes.letter(reason) if reason else "")  # before the letters of single numbers
        printed = {
            cell.metric: _marked(
                f"{cell.published:g}" if cell.metric == "bits" else _fixed(cell.published, cell.decimals),
                notes.letter(cell.mixed) if cell.mixed else "",
            )
            for cell in row.cells
        }
        words = (row.method, row.stage, notes.source(row.origin), verdict)
        lines.append((*words, *(printed.get(name, "") for name in ("bits", *metrics))))
    names = [name.replace("_", "\n") for name in metrics] if brief else metrics
    header = ("method", "tuned", "source", "verdict", "bits", *names)
    return Sheet("printed alone", header, (tuple(lines),), 5) if lines else None


def _parts(sheet: Sheet, width: int) -> Iterator[Sheet]:
    """`fit`, and of each part the lines that have a number there; those without any stand in the first."""
    for count, part in enumerate(fit(sheet, width)):
        groups = []
        for whole, group in zip(sheet.groups, part.groups, strict=True):
            alone = [count == 0 and not any(texts[sheet.left :]) for texts in whole]
            shown = [any(texts[part.left :]) or bare for texts, bare in zip(group, alone, strict=True)]
            groups.append(tuple(texts for texts, keep in zip(group, shown, strict=True) if keep))
        yield replace(part, groups=tuple(groups))


def _failed(one: ReproducedCell | ReproducedOrdering | RecomputedNumber) -> str:
    return f"{one.outcome} {FAILS}" if one.gates and one.outcome == "differs" else one.outcome


def _marked(text: str, letter: str) -> str:
    return f"{text} ({letter})" if letter else text


def _claims_sheet(found: Reproduction, notes: Notes) -> Sheet | None:
    header = ("claim", "metric", "verdict", "why", "source")
    lines = [
        (
            one.claim,
            one.metric,
            _marked(_failed(one), notes.letter(one.note) if one.note else ""),
            one.reason,
            notes.source(one.origin),
        )
        for one in found.orderings
    ]
    return Sheet("claimed orderings", header, (tuple(lines),), len(header)) if lines else None


def _recomputed_sheet(found: Reproduction, notes: Notes, *, brief: bool) -> Sheet | None:
    """Averages and formulas, all of words. brief: those alone that do not agree."""
    header = ("what", "printed", "computed", "verdict", "note", "source")
    lines = [
        (
            one.what,
            f"{one.printed:g}",
            "-" if one.computed is None else f"{one.computed:.{decimals_of(one.printed) + 2}f}",
            _failed(one),
            one.note,
            notes.source(one.origin),
        )
        for one in found.recomputed
        if not (brief and one.outcome == "agrees")
    ]
    more = len(found.recomputed) - len(lines)
    title = "printed numbers computed again" + (f" ({more} more agree: --format markdown)" if more else "")
    return Sheet(title, header, (tuple(lines),), len(header)) if lines else None


def _below(found: Reproduction, notes: Notes, *, brief: bool) -> Iterator[str]:
    yield from found.published.notes
    yield from (f"({letter}) {reason}" for reason, letter in notes.reasons.items())
    yield from (f"[{number}] {source}" for source, number in notes.sources.items())
    for name in dict.fromkeys(row.tolerance for row in found.rows if row.measured):
        words = TOLERANCES[name].words if name in TOLERANCES else name
        yield f"allowed: {words}" if brief else f"{name}: {words}"
    yield from dict.fromkeys(f"{row.method}: {row.note}" for row in found.rows if row.note)
    if found.rows:
        yield LEGEND


def _word_widths(sheet: Sheet, width: int) -> dict[str, int]:
    """How wide words may be for the numbers to be whole: the method's give way first, then the metric's."""
    table = [sheet.header, *(texts for group in sheet.groups for texts in group)]
    wide = {name: max(cell_len(texts[i]) for texts in table) for i, name in enumerate(sheet.header)}
    found = {"method": min(wide["method"], WORD_WIDTH), "metric": wide["metric"]}
    wide |= found
    over = sum(wide.values()) + GAP * len(wide) - width
    for name in found:
        found[name] -= max(0, min(over, found[name] - LEAST_WIDTH))
        over -= wide[name] - found[name]
    return found


def _rich(sheet: Sheet, widths: Mapping[str, int], *, wrap: bool = False) -> RichTable:
    """widths: of columns of words that may be folded. wrap: all are words, and sentences share the width."""
    shown = RichTable(title=Text(sheet.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    shown.padding, shown.pad_edge = (0, 1, 0, 0), False
    for number, name in enumerate(sheet.header):
        if wrap:
            share = {"why": 3, "claim": 2, "what": 2, "note": 2}.get(name)
            shown.add_column(Text(name), no_wrap=share is None, ratio=share)
        else:
            justify: Literal["left", "right"] = "left" if number < sheet.left or name == "verdict" else "right"
            shown.add_column(Text(name), justify=justify, overflow="fold", max_width=widths.get(name))
    for group in sheet.groups:
        for texts in group:
            shown.add_row(*map(Text, texts))
        shown.add_section()
    return shown


def _signed(value: float, places: int) -> str:
    shown = f"{value:+.{places}f}"
    return shown if float(shown) else shown[1:]


def _fixed(value: float, places: int) -> str:
    """With as many digits as the source prints; a diverged model's number may have any size."""
    return f"{value:.{places}f}" if math.isfinite(value) and abs(value) < 1e5 else format_number(value)


def _letter(number: int) -> str:
    first, last = divmod(number, 26)
    return ("" if first == 0 else chr(ord("a") + first - 1)) + chr(ord("a") + last)
