"""What the gate found as text: for a terminal, as Markdown for the summary of a CI job, as JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from evenbits.gate import FALSE_ALARMS, Check, Gated
from evenbits.gate_snapshot import Snapshot
from evenbits.markdown import plain, table_lines
from evenbits.report_format import format_number

HEADINGS = ("row", "what", "baseline", "now", "change", "interval", "p")
WIDTH = 140
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Lines = list[tuple[str, ...]]


BY_TIMES = 9.0
"""A relative change from here on is told as so many times."""


def headline(found: Gated) -> str:
    """The verdict in one line, with what is worst."""
    absent = f"the run is incomplete, {len(found.incomplete)} without numbers"
    if found.exit_code == 3:
        return f"{found.suite}: not decided: {absent}"
    if found.exit_code == 1:
        worst = min(found.regressions, key=lambda c: (c.low is None, not c.main, c.what.startswith("Pareto")))
        size = f" {_change(worst)}" if worst.low is not None else f": {worst.text}"
        rows = {check.row for check in found.regressions}
        more = f", and {len(rows) - 1} more {'row' if len(rows) == 2 else 'rows'}" if len(rows) > 1 else ""
        text = f"{found.suite}: REGRESSION: {worst.row}: {worst.what}{size}{more}"
        return text + (f"; {absent}" if found.incomplete else "")
    better = sum(check.outcome == "improvement" for check in found.checks)
    judged = sum(check.outcome != "not judged" for check in found.checks)
    return f"{found.suite}: passes: {judged} checks" + (f", {better} of them improvements" if better else "")


@dataclass(frozen=True)
class Finding:
    """What is to be said of one row, or of all rows whose protocol changed alike. lines: each says which row."""

    lines: tuple[str, ...]
    causes: tuple[str, ...]


def findings(checks: Sequence[Check]) -> list[Finding]:
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.text if check.text.startswith("protocol changed") else check.row, []).append(check)
    found = []
    for alike in groups.values():
        first, rows = alike[0], list(dict.fromkeys(check.row for check in alike))
        lines = [_sentence(check) for check in alike]
        if first.text.startswith("protocol changed"):
            names = ", ".join(dict.fromkeys(check.what for check in alike))
            where = f"{len(rows)} rows ({', '.join(rows[:3])}{', ...' if len(rows) > 3 else ''})"
            lines = [f"{where if len(rows) > 1 else rows[0]}: {names}: {first.text}"]
        causes = list(dict.fromkeys(cause for check in alike for cause in check.causes))
        if len(rows) > 1:
            causes = [cause for cause in causes if all(cause in check.causes for check in alike)]
        found.append(Finding(tuple(lines), tuple(causes)))
    return found


def _sentence(check: Check) -> str:
    """What, how large, how sure; sizes and layers have their numbers in the text."""
    numbers = ""
    if check.low is not None:
        numbers = f" {_number(check.before)} -> {_number(check.now)}, {_change(check)} {_interval(check)}"
    what = "" if check.what == "row" else f"{check.what}{numbers}: "
    return f"{check.row}: {what}{check.text}" + (f", p {p}" if (p := _p_value(check)) else "")


def as_terminal(found: Gated, console: Console) -> None:
    if not console.is_terminal and console.width < WIDTH:
        console.width = WIDTH
    style = {0: "bold green", 1: "bold red", 3: "bold yellow"}[found.exit_code]
    console.print(escape(headline(found)), style=style, highlight=False, soft_wrap=True)
    console.print(escape(_against(found)), style="dim", highlight=False, soft_wrap=True)
    for title, told in _told(found):
        console.print(f"\n[bold]{title}[/]")
        for one in told:
            for text in (*one.lines, *(f"  with it: {cause}" for cause in one.causes)):
                console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)
    for text in _remarks(found):
        console.print(escape(text), highlight=False, soft_wrap=True)
    numbers = [check for check in found.checks if check.before is not None]
    lines = _lines([check for check in numbers if check.outcome == "regression" or check.main])
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate((*HEADINGS, "verdict")):
        shown.add_column(name, justify="left" if number < 2 or name == "verdict" else "right", overflow="fold")
    for line in lines:
        shown.add_row(*map(escape, line))
    console.print(shown)
    console.print(escape(_legend(found)), style="dim", highlight=False, soft_wrap=True)


def as_markdown(found: Gated) -> str:
    """Verdict first, then what was found, then every number, folded."""
    parts = [f"# Gate: {plain(headline(found))}", plain(_against(found))]
    for title, told in _told(found):
        lines = []
        for one in told:
            lines += [f"- {plain(text)}" for text in one.lines]
            lines += [f"  - with it: {plain(cause)}" for cause in one.causes]
        parts += [f"## {title}", "\n".join(lines)]
    if remarks := [f"- {plain(text)}" for text in _remarks(found)]:
        parts.append("\n".join(remarks))
    main = [check for check in found.checks if check.main]
    parts += ["## Numbers", table_lines([(*HEADINGS, "verdict"), *_lines(main)], 2)]
    if others := [check for check in found.checks if not check.main and check.what != "row"]:
        table = table_lines([(*HEADINGS, "verdict"), *_lines(others)], 2)
        parts.append(
            f"<details><summary>{len(others)} more: tasks, layers, sizes, times</summary>\n\n{table}\n\n</details>"
        )
    return "\n\n".join([*parts, plain(_legend(found))]) + "\n"


def as_junit(found: Gated) -> str:
    """One test case for everything judged of a row; a trial without numbers is an error, a regression a failure."""
    cases = []
    for check in found.checks:
        if check.what == "row" and check.outcome == "not judged":
            continue  # it stands below, as an error
        kind: Literal["ok", "failure", "error", "skipped"] = "ok"
        if check.outcome in ("regression", "not judged"):
            kind = "failure" if check.outcome == "regression" else "skipped"
        told = [_sentence(check), *(f"with it: {cause}" for cause in check.causes)]
        text = "" if check.outcome == "ok" else "\n".join([check.outcome, *told])
        cases.append(Case(check.row, check.what, kind, check.text, text))
    for absence in found.incomplete:
        name = absence.place or f"trial {absence.trial}"
        cases.append(Case(name, "row", "error", f"{absence.status}: {absence.reason}"))
    return junit(found.suite, cases)


@dataclass(frozen=True)
class Case:
    """A test case of JUnit's XML. message: of a failure, error or skip, in one line; text: whatever there is to say."""

    classname: str
    name: str
    kind: Literal["ok", "failure", "error", "skipped"]
    message: str = ""
    text: str = ""


def junit(suite: str, cases: Sequence[Case]) -> str:
    """The XML that CI servers read: https://github.com/testmoapp/junitxml."""
    kinds = [case.kind for case in cases]
    counts = {"tests": len(cases), "failures": kinds.count("failure"), "errors": kinds.count("error")}
    attributes = {name: str(count) for name, count in (counts | {"skipped": kinds.count("skipped")}).items()}
    root = ElementTree.Element("testsuites", {"name": "evenbits gate", **attributes})
    parent = ElementTree.SubElement(root, "testsuite", {"name": _xml(suite), **attributes})
    for case in cases:
        names = {"classname": _xml(case.classname), "name": _xml(case.name), "time": "0"}
        element = ElementTree.SubElement(parent, "testcase", names)
        if case.kind == "ok":
            if case.text:
                ElementTree.SubElement(element, "system-out").text = _xml(case.text)
        else:
            found = ElementTree.SubElement(element, case.kind, {"message": _xml(case.message)})
            found.text = _xml(case.text or case.message)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _told(found: Gated) -> Iterator[tuple[str, list[Finding]]]:
    titles = {"regression": "Regressions", "improvement": "Improvements", "advisory": "Advisory, no alarm"}
    for outcome, title in titles.items():
        if checks := [check for check in found.checks if check.outcome == outcome]:
            yield title, findings(checks)


def _remarks(found: Gated) -> Iterator[str]:
    for absence in found.incomplete:
        name = absence.place or f"trial {absence.trial}"
        yield f"without numbers: {name}: {absence.status}: {absence.reason}"
    for text in found.notes:
        yield f"note: {text}"


def _lines(checks: Sequence[Check]) -> Lines:
    return [
        (
            check.row,
            check.what,
            _number(check.before),
            _number(check.now),
            _change(check),
            _interval(check),
            _p_value(check),
            check.outcome if check.outcome != "ok" else "",
        )
        for check in checks
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10_000 else format_number(value)


def _change(check: Check) -> str:
    if check.change is None:
        return ""
    if not check.absolute and check.change >= BY_TIMES:
        return f"{1 + check.change:,.0f} times"
    return f"{100 * check.change:+.2f} points" if check.absolute else f"{100 * check.change:+.2f} %"


def _interval(check: Check) -> str:
    if check.low is None or check.high is None:
        return ""
    if not check.absolute and check.change is not None and check.change >= BY_TIMES:
        return f"[{1 + check.low:,.0f}, {1 + check.high:,.0f}]"
    return f"[{100 * check.low:+.2f}, {100 * check.high:+.2f}]"


def _p_value(check: Check) -> str:
    if check.p_value is None:
        return ""
    return f"{check.p_value:.2g}" if check.p_value >= 1e-6 else "< 1e-06"


def _against(found: Gated) -> str:
    texts = []
    if found.baseline.updates:
        last = found.baseline.updates[-1]
        texts.append(f"baseline of {last.date} ({last.reason})")
    before, now = (_made_by(side) for side in (found.baseline, found.night))
    texts.append(f"commit {before}" if before == now else f"commit {before}, now {now}")
    seeds = [sorted({seed for row in side.rows for seed in row.seeds}) for side in (found.baseline, found.night)]
    texts.append("seeds " + ", now ".join(" ".join(map(str, side)) or "none" for side in seeds))
    return "; ".join(texts)


def _made_by(side: Snapshot) -> str:
    commits = [str(git["commit"])[:9] for made in side.environments.values() if (git := made.get("git"))]
    return " and ".join(sorted(set(commits))) or "unknown"


def _legend(found: Gated) -> str:
    return (
        f"Changes are relative, of accuracies in points of 100, with {100 * found.level:g} % intervals over seeds;"
        " p is one-sided and adjusted for all tests of its kind. Together the tests are held to a false alarm in"
        f" {100 * FALSE_ALARMS:g} % of nights, as far as seeds scatter as the baseline's do."
    )


def _xml(text: str) -> str:
    """Without characters that XML 1.0 has no form for, as a model's name or a message may hold."""
    return _NOT_XML.sub("?", text)
