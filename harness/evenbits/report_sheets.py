"""The tables of a report as sheets of strings: what stands where, for a terminal or for Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from evenbits.layers import every_row
from evenbits.record import BudgetFacts
from evenbits.report_format import format_budget, format_bytes, format_number
from evenbits.report_protocols import NEAR, PACKED, RESTORED, all_dense, column_protocols, kernel_of, ran_lines
from evenbits.rows import Cell, Column, Row
from evenbits.tables import ModelTable, Section

SETTINGS_WIDTH = 26  # of a terminal's 120 columns
BRIEF_SETTINGS = 15  # where many columns stand beside them
RATIO = "vs\ndense"  # a terminal's heading; it belongs to the column before it
BRIEF_WIDTH = 10  # of a heading above a number without its interval
NUMBER_WIDTH = 20  # of a heading: about what a number with its interval takes


@dataclass(frozen=True)
class Sheet:
    """One table to show: groups of lines with a rule between them; every line has as many texts as the header."""

    title: str
    header: tuple[str, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    left: int  # how many of the first columns are words, aligned left
    below: tuple[str, ...] = ()  # what must be said of it


def sheets(model: ModelTable, *, shorten: bool) -> Iterator[Sheet]:
    """Quality first, then bits and bytes, then what running costs, then the rows outside their window."""
    quality = [c for c in model.columns if c.quality]
    costs = [c for c in model.columns if c.volatile]  # sizes stand in the sheet of bytes
    more = 6 if shorten else 4  # metrics a sheet
    first = 1 if _names_repeat(model) else 2  # settings must then stand beside the names, and there is less room
    name = model.model.name
    protocols = column_protocols(model)
    if model.dense or any(s.rows for s in model.sections):
        overview = f"{name}: quality at even bits"
        yield _overview(model, overview, first) if shorten else _sheet(model, overview, quality[:2], sizes=True)
        for start in range(first, len(quality), more):
            shown = quality[start : start + more]
            yield (
                _brief(model, f"{name}: more quality", shown)
                if shorten
                else _sheet(model, f"{name}: more quality", shown)
            )
        yield _bytes_sheet(model, f"{name}: bits and bytes", shorten)
        for start in range(0, len(costs), 5):
            shown = costs[start : start + 5]
            kernels = {c.key: kernel for c in shown if (kernel := kernel_of(protocols.get(c.key, {}))) != RESTORED}
            title = f"{name}: cost of running"
            sheet = _brief(model, title, shown, kernels) if shorten else _sheet(model, title, shown, kernels=kernels)
            yield replace(sheet, below=tuple(ran_lines(shown, protocols)))
    outside = tuple(
        tuple(
            (
                *_who(row, section.budget, shorten),
                f"{row.budget_bits:.3f}",
                *(_number(row.cells.get(c.key), c, "", brief=shorten) for c in quality[:1]),
            )
            for row in section.outside
        )
        for section in model.sections
        if section.outside
    )
    if outside:
        header = (*_WHO, "bits", *(_heading(c) for c in quality[:1]))
        yield Sheet(f"{name}: outside the window, not ranked", header, outside, len(_WHO))


_WHO = ("budget", "method", "settings", "recovery", "seeds")


def _who(row: Row, budget: BudgetFacts | None, shorten: bool, width: int = SETTINGS_WIDTH) -> tuple[str, ...]:
    settings = row.settings
    if shorten and len(settings) > width:
        settings = settings[: width - 1] + "…"
    return (
        "" if row.method == "dense" else format_budget(budget),
        row.name,
        settings,
        row.stage,
        str(len(row.records)),
    )


def _sheet(
    model: ModelTable,
    title: str,
    columns: Sequence[Column],
    *,
    sizes: bool = False,
    kernels: Mapping[tuple[str, str], str] | None = None,
) -> Sheet:
    """Everything known of some metrics. kernels: column key -> what ran, where it has to stand in the heading."""
    show_ratio = _with_ratio(model, columns, kernels)
    header = [*_WHO, *(("linear", "model", "size") if sizes else ())]
    for column in columns:
        header += [_heading(column, kernels), *(["vs dense"] if column in show_ratio else [])]

    def line(row: Row, section: Section | None, index: int) -> tuple[str, ...]:
        texts = list(_who(row, section.budget if section is not None else None, shorten=False))
        if sizes:
            texts += [f"{row.bits.linear:.3f}", f"{row.bits.model:.3f}", format_bytes(row.model_bytes)]
        for column in columns:
            texts.append(_number(row.cells.get(column.key), column, _mark(section, index, column), brief=False))
            if column in show_ratio:
                texts.append(_ratio(model, row, column, brief=False))
        return tuple(texts)

    return Sheet(title, tuple(header), _groups(model, line), len(_WHO))


def _names_repeat(model: ModelTable) -> bool:
    """Whether two rows that stand together, of the dense model or of a section, show one name and recovery."""
    groups = [model.dense, *(section.rows for section in model.sections)]
    return any(len({(row.name, row.recovery) for row in rows}) < len(rows) for rows in groups)


def _words(model: ModelTable, *, settings: bool, seeds: bool) -> list[str]:
    """What of `_WHO` a terminal needs to tell rows apart; settings and seeds: whether the sheet has room for them."""
    rows = [row for row, _ in every_row(model)]
    needed = {
        "settings": settings and _names_repeat(model),
        "recovery": any(row.recovery for row in rows),
        "seeds": seeds and any(len(row.records) > 1 for row in rows),
    }
    return [word for word in _WHO if needed.get(word, True)]


def _said(row: Row, section: Section | None, words: Sequence[str], width: int = SETTINGS_WIDTH) -> list[str]:
    who = dict(zip(_WHO, _who(row, section.budget if section is not None else None, True, width), strict=True))
    return [who[word] for word in words]


def _overview(model: ModelTable, title: str, first: int) -> Sheet:
    """For a terminal: bits and size beside the `first` qualities and the time a token takes.

    Recovery stages and seeds are shown where there are any; settings where names do not tell rows apart, else they
    stand in the sheet of bytes.
    """
    columns = [c for c in model.columns if c.quality][:first]
    protocols = column_protocols(model)
    ran = {c.key: kernel_of(protocols.get(c.key, {})) for c in model.columns}
    times = [c for c in model.columns if c.volatile and c.unit == "ms/token"]
    times = sorted(times, key=lambda c: ran[c.key] == RESTORED)[:1]  # a restored weight's time says little
    words = _words(model, settings=True, seeds=True)
    show_ratio = _with_ratio(model, columns)
    header = [*words, "linear", "size"]
    for column in columns:
        header += [_narrow(_heading(column), NUMBER_WIDTH), *([RATIO] if column in show_ratio else [])]
    timed_ratio = _with_ratio(model, times, ran)
    header += [_narrow(_heading(column), 7, " ") for column in times] + [RATIO] * len(timed_ratio)

    def line(row: Row, section: Section | None, index: int) -> tuple[str, ...]:
        texts = [*_said(row, section, words), f"{row.bits.linear:.3f}", format_bytes(row.model_bytes)]
        for column in columns:
            texts.append(_number(row.cells.get(column.key), column, _mark(section, index, column), brief=True))
            if column in show_ratio:
                texts.append(_ratio(model, row, column, brief=True))
        texts += [_number(row.cells.get(column.key), column, "", brief=True) for column in times]
        return (*texts, *(_ratio(model, row, column, brief=True) for column in timed_ratio))

    return Sheet(title, tuple(header), _groups(model, line), len(words), tuple(ran_lines(times, protocols)))


def _brief(
    model: ModelTable, title: str, columns: Sequence[Column], kernels: Mapping[tuple[str, str], str] | None = None
) -> Sheet:
    """For a terminal: values and marks of several metrics; the intervals stand in the files."""
    words = _words(model, settings=True, seeds=False)
    show_ratio = [c for c in _with_ratio(model, columns, kernels) if not c.quality]
    header = list(words)
    for column in columns:
        header.append(_narrow(_heading(column, kernels), BRIEF_WIDTH, " "))
        header += [RATIO] if column in show_ratio else []

    def line(row: Row, section: Section | None, index: int) -> tuple[str, ...]:
        texts = _said(row, section, words, BRIEF_SETTINGS)
        for column in columns:
            cell = row.cells.get(column.key)
            bare = None if cell is None else replace(cell, low=None, high=None)
            texts.append(_number(bare, column, _mark(section, index, column), brief=True))
            if column in show_ratio:
                texts.append(_ratio(model, row, column, brief=True))
        return tuple(texts)

    return Sheet(title, tuple(header), _groups(model, line), len(words))


def _groups(
    model: ModelTable, line: Callable[[Row, Section | None, int], tuple[str, ...]]
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    groups = [tuple(line(row, None, 0) for row in model.dense)]
    groups += [tuple(line(row, section, i) for i, row in enumerate(section.rows)) for section in model.sections]
    return tuple(group for group in groups if group)


def _mark(section: Section | None, index: int, column: Column) -> str:
    return section.marks.get((index, column.key), "") if section is not None else ""


def _with_ratio(
    model: ModelTable, columns: Sequence[Column], kernels: Mapping[tuple[str, str], str] | None = None
) -> list[Column]:
    """The metrics of quality, and costs of what ran from packed weights, where any row can be set against the dense
    model. A cost on restored weights is the dense model's own with noise: a ratio would say of the method what it
    does not."""
    quality = [c for c in columns if c.quality]
    packed = [c for c in columns if not c.quality and (kernels or {}).get(c.key) in (PACKED, NEAR)]

    def known(columns: Sequence[Column]) -> bool:
        return any(model.against_dense(row, c) is not None for row, _ in every_row(model) for c in columns)

    return [*(quality if known(quality) else ()), *(packed if known(packed) else ())]


def _bytes_sheet(model: ModelTable, title: str, shorten: bool) -> Sheet:
    recovery = ["recovery"] if any(row.recovery for row, _ in every_row(model)) else []
    words = ["budget", "method", "settings", *recovery]
    header = [*words, "index", "paper", "linear", "model"]
    if shorten:
        header += ["linear\nsize", "linear vs\nfp32/stored", "model vs\nfp32/stored"]
    else:
        header += ["linear size", "model size", "linear vs fp32", "vs stored", "model vs fp32", "vs stored"]

    def line(row: Row, section: Section | None, _: int) -> tuple[str, ...]:
        bits, times = row.bits, [f"{ratio:.3g}x" for ratio in row.ratios.values()]
        if shorten:
            sizes = [format_bytes(row.linear_bytes)]  # the model's stands in the overview
            times = ["/".join(times[:2]), "/".join(times[2:])]
            who = _said(row, section, words, BRIEF_SETTINGS)
        else:
            sizes = [format_bytes(row.linear_bytes), format_bytes(row.model_bytes)]
            who = list(_who(row, section.budget if section is not None else None, shorten=False))[: len(words)]
        return (
            *who,
            *(f"{b:.3f}" for b in (bits.index, bits.paper, bits.linear, bits.model)),
            *sizes,
            *times,
        )

    return Sheet(title, tuple(header), _groups(model, line), len(words))


def _heading(column: Column, kernels: Mapping[tuple[str, str], str] | None = None) -> str:
    known = column.unit in ("", "1", "bytes", "B", column.name)
    known |= column.name.endswith("_" + column.unit.replace("/", "_per_"))
    known |= column.unit == "accuracy" and "acc" in column.name.split("_")
    kernel = (kernels or {}).get(column.key)
    heading = f"{column.title}{'' if known else f' ({column.unit})'} {'↓' if column.better == 'lower' else '↑'}"
    return heading + (f" (kernel {kernel})" if kernel else "")


def _narrow(heading: str, width: int, joint: str = "") -> str:
    """Broken before a unit, and between the words of a name where a line would be longer than `width`.

    joint: what stands between words in place of their "_" or "."; "" leaves these.
    """
    name, bracket, unit = heading.partition(" (")
    lines: list[str] = []
    for word in re.split(r"[_.]" if joint else r"(?<=[_.])", name):
        if lines and len(lines[-1] + joint) + len(word.removesuffix(" ↓").removesuffix(" ↑")) <= width:
            lines[-1] += joint + word
        else:
            lines.append(word)
    return "\n".join(lines) + (f"\n({unit}" if bracket else "")


def _number(cell: Cell | None, column: Column, mark: str, *, brief: bool) -> str:
    """brief: costs without their interval, and room for a mark on every line so that numbers stand in line."""
    if cell is None:
        return "-"
    written = format_bytes if column.unit in ("bytes", "B") else format_number
    hidden = cell.low is None or cell.high is None or (brief and column.volatile)
    interval = "" if hidden else f" [{written(cell.low or 0.0)}, {written(cell.high or 0.0)}]"
    room = 1 if brief and column.quality else 0
    return (written(cell.value) + interval + f" {mark:{room}}") if mark or room else written(cell.value) + interval


def _ratio(model: ModelTable, row: Row, column: Column, *, brief: bool) -> str:
    """brief: without the interval, for which a terminal has no room; the dense model's own is always 1.

    A cost of packed weights where every layer ran on a dense one says "dense": the ratio would not be the method's.
    """
    if not column.quality and all_dense(row, column):
        return "dense"
    if brief or (row.method == "dense" and not row.recovery):
        ratio = model.against_dense(row, column)
        return "" if ratio is None else _share(ratio)
    found = model.recovery(row, column)
    if found is None:
        return ""
    hidden = found.low is None or found.high is None
    return _share(found.value) + ("" if hidden else f" [{_share(found.low or 0.0)}, {_share(found.high or 0.0)}]")


def _share(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else format_number(value)
