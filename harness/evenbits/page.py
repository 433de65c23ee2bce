"""`evenbits report --html`: one static page that needs no network, made of a gathered table.

Its style and its script lie in page_assets and are written into it; a Content-Security-Policy allows these two by
their digests and nothing else, so that no text of a record can load, send or run anything.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from evenbits import __version__
from evenbits.nights import Night
from evenbits.page_entries import Shown, script_data, show_models
from evenbits.page_history import history_html
from evenbits.page_html import Html, embed, fold, join, tag
from evenbits.page_leaderboard import leaderboard, setbacks
from evenbits.page_plot import SHAPES, legend, plot
from evenbits.page_reproduction import reproduction_html
from evenbits.page_sections import notes, protocols, samples
from evenbits.page_trials import Environments, article
from evenbits.record import Record, write_atomically
from evenbits.report_text import LEGEND
from evenbits.reproduced import Reproduction
from evenbits.tables import Table

PAGE = "page.html"


def write_page(
    folder: Path,
    table: Table,
    *,
    reproduction: Reproduction | None = None,
    history: Sequence[Night] | None = None,
    command: str,
) -> Path:
    """Write page.html into `folder` and return its path.

    history: the nights of `evenbits history`, oldest first. command: what ran the suite, without seeds.
    """
    path = folder / PAGE
    page = render_page(table, reproduction=reproduction, history=history, command=command)
    write_atomically(path, page.encode())
    return path


def render_page(
    table: Table,
    *,
    reproduction: Reproduction | None = None,
    history: Sequence[Night] | None = None,
    command: str,
) -> str:
    """The page as text; the same table gives the same page."""
    shown = show_models(table)
    records = [record for one in shown for record in _records(one)]
    suite = ", ".join(dict.fromkeys(record.suite for record in records)) or "no trials"
    environments = Environments()
    trials = [article(one, entry, environments, command) for one in shown for entry in one.entries]
    sections = [*(_model(one, len(shown) > 1) for one in shown)]
    written = samples(shown)
    if written is not None:
        sections.append(_section("samples", "What the models write", written))
    if reproduction is not None:
        sections.append(_section("reproduction", "Published and reproduced", *reproduction_html(reproduction)))
    if history:
        sections.append(_section("history", "Nights", *history_html(history)))
    said = list(notes(table))
    if said:
        sections.append(_section("notes", "Notes", tag("ul", *(tag("li", note) for note in said))))
    if trials:
        sections.append(_section("reading", "How to read this", *(tag("p", line) for line in LEGEND)))
    fingerprints = protocols(shown)
    if fingerprints:
        about = tag("p", "A number is compared only with numbers of the same protocol.", class_="quiet")
        sections.append(_section("protocols", "Protocols", about, *fingerprints))
    if trials:
        sections.append(_section("trials", "Every trial", *trials))
        sections.append(_section("environments", "Environments", *environments.html()))
    style, script = _asset("page.css"), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=tag("title", f"{suite}: evenbits"),
        policy=_policy(style, script),
        style=style,
        script=script,
        heading=join([suite]),
        lede=_lede(shown, records),
        filters=_filters(shown),
        sections=join(sections, "\n"),
        command=join([f"{command.replace(' run ', ' report ', 1).partition(' --model ')[0]} --html"]),
        version=__version__,
        data=embed(script_data(shown, SHAPES)),
    )


def run_command(suite: Path, table: Table, registered: Callable[[], Container[str]]) -> str:
    """What ran the suite, without seeds. Where a model is not one of the suite's own, it was given by `--model`.

    registered: the names that `--model` takes besides folders; asked for only then. Of a folder no more than its last
    name is known, and the command says so. Below the working directory the suite's path is written from there.
    """
    raw = suite.read_text()
    said = tomllib.loads(raw).get("model", [])
    own = {_name(model) for model in (said if isinstance(said, list) else [said])}
    other = [model.model.name for model in table.models if model.model.name not in own]
    here = suite.resolve()
    words = ["evenbits", "run", str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else suite)]
    if other and not any("${" in name for name in own):  # what a variable gave cannot be told from `--model`
        words += ["--model", other[0] if other[0] in registered() else f"path/to/{other[0]}"]
    return shlex.join(words)


def _name(model: Any) -> str:
    if isinstance(model, dict):
        return str(model.get("name") or model.get("id") or Path(str(model.get("path"))).name)
    return str(model)


def _asset(name: str) -> str:
    return (files("evenbits") / "page_assets" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    digests = [
        "'sha256-" + base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode() + "'" for raw in (style, script)
    ]
    return (
        f"default-src 'none'; style-src {digests[0]}; script-src {digests[1]}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _records(shown: Shown) -> Iterator[Record]:
    for entry in shown.entries:
        yield from entry.row.records
    yield from (*shown.table.failed, *shown.table.skipped)


def _lede(shown: Sequence[Shown], records: Sequence[Record]) -> Html:
    counts = {status: sum(record.status == status for record in records) for status in ("done", "failed", "skipped")}
    names = list(dict.fromkeys(one.name for one in shown))
    models = f"on {', '.join(names)}" if len(names) < 5 else f"on {len(names)} models"
    finished = max((record.finished for record in records), default="")[:16].replace("T", " ")
    commits = dict.fromkeys(
        str(git["commit"])[:10] + (" with changes" if git.get("dirty") else "")
        for record in records
        if isinstance(git := record.environment.get("git"), Mapping) and git.get("commit")
    )
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    parts = [
        f"{len(records)} trial{'' if len(records) == 1 else 's'} {models}"
        + (f": {told}" if counts["done"] < len(records) else "")
    ]
    parts += [f"finished {finished} UTC"] if finished else []
    parts += [f"evenbits at {', '.join(commits)}"] if commits else []
    return join([*(tag("span", part) for part in parts)])


def _section(name: str, title: str, *children: Html) -> Html:
    return tag("section", tag("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title")


def _model(shown: Shown, several: bool) -> Html:
    facts = shown.table.model
    about = (
        f"revision {facts.revision}: {facts.parameters:,} parameters, {facts.linear_weights:,} of them in linear "
        f"layers, {facts.stored_bits} bits each as stored; evaluated in {facts.dtype}"
    )
    quality = shown.quality
    parts = [
        tag("h2", shown.name, id=f"{shown.key}-title"),
        tag("p", about, class_="quiet"),
    ]
    if quality:
        figure = tag("figure", plot(shown, quality[0]), class_="pareto", data_model=shown.key)
        empty = tag("div", class_="scroll", tabindex=0, role="region", aria_label="The plot's numbers")
        numbers = fold("The plot's numbers as a table", empty, class_="numbers live")
        parts += [tag("h3", "Quality against bits"), figure, legend(shown, quality[0]), numbers]
    parts += [tag("h3", "Leaderboard"), leaderboard(shown)]
    back = setbacks(shown)
    if back is not None:
        parts += [tag("h3", "Failed and skipped"), back]
    return tag(
        "section", *parts, class_="model", id=shown.key, data_model=shown.key, aria_labelledby=f"{shown.key}-title"
    )


def _filters(shown: Sequence[Shown]) -> Html:
    """Made here so that they stand in the page's order; hidden until the script brings them to life."""
    models = [(one.key, one.name if _single(shown, one) else f"{one.name} ({one.table.model.dtype})") for one in shown]
    budgets = dict.fromkeys(name for one in shown for name in one.budgets)
    stages = dict.fromkeys(entry.row.stage for one in shown for entry in one.entries)
    metrics = dict.fromkeys(column.title for one in shown for column in one.quality)
    search = tag(
        "input", type="search", name="text", autocomplete="off", placeholder="name or setting", spellcheck="false"
    )
    parts = [
        _select("model", "Model", [("", "all"), *models], hide=len(shown) < 2),
        _select("budget", "Budget", [("", "all"), *((name, name) for name in budgets)], hide=len(budgets) < 2),
        _select("stage", "Recovery", [("", "all"), *((stage, stage) for stage in stages)], hide=len(stages) < 2),
        tag("label", "Method", search),
        _select("metric", "Metric", [(title, title) for title in metrics], hide=len(metrics) < 2),
        _select("x", "Plot over", [("linear", "linear bits"), ("model", "model bits")], hide=not metrics),
    ]  # fmt: skip
    return join(parts)


def _single(shown: Sequence[Shown], one: Shown) -> bool:
    return sum(other.name == one.name for other in shown) == 1


def _select(name: str, label: str, options: Sequence[tuple[str, str]], *, hide: bool) -> Html:
    inner = tag("select", *(tag("option", words, value=value) for value, words in options), name=name)
    return tag("label", label, inner, hidden=hide)
