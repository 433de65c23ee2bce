"""The static page: all of a table is on it, all text stays text, and nothing on it comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness.page_records import CLOSING, HOSTILE, PROMPTS, layers, make_trials
from tests.harness.trials import TWO, Trials, accuracy, cost, perplexity
from typer.testing import CliRunner

from evenbits.cli import app
from evenbits.nights import make_night
from evenbits.page import render_page, run_command, write_page
from evenbits.page_html import VOID, embed, tag, text
from evenbits.page_plot import log_ticks, nice_ticks
from evenbits.published import Origin, Published
from evenbits.record import BudgetFacts
from evenbits.reproduced import RecomputedNumber, ReproducedCell, ReproducedOrdering, ReproducedRow, Reproduction
from evenbits.tables import Table, gather

COMMAND = "evenbits run suites/tests.toml"


class Page(HTMLParser):
    """Elements in order with their attributes and text; balance is checked on the way."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, int]] = []
        self.texts: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attributes}) == len(attributes), attributes
        self.elements.append((name, dict(attributes)))
        self.texts.append([])
        if name not in VOID:
            self.open.append((name, len(self.elements) - 1))

    def handle_endtag(self, name: str) -> None:
        assert self.open, f"</{name}> closes nothing"
        assert self.open[-1][0] == name, f"</{name}> where {self.open[-1][0]} is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, index in self.open:
            self.texts[index].append(data)

    def find(self, name: str, **attributes: str) -> list[str]:
        """Texts of the elements with these attributes (a trailing underscore dropped), whitespace as it is."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            "".join(self.texts[i])
            for i, (element, found) in enumerate(self.elements)
            if element == name and all(found.get(key) == value for key, value in wanted.items())
        ]

    def values(self, key: str) -> list[str]:
        return [value for _, found in self.elements if (value := found.get(key)) is not None]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.find("script", id="data")[0])
        return found


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return make_trials(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def table(trials: Trials) -> Table:
    return gather(trials.records, trials.folders)


@pytest.fixture(scope="module")
def source(table: Table) -> str:
    return render_page(table, command=COMMAND)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def check(page: Page) -> None:
    """What holds of every page."""
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert not [one for one in ids if re.search(r"\s", one)]
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    for href in page.values("href"):
        assert href == "data:," or href.removeprefix("#") in ids, href
    regions = [found.get("aria-label") for _, found in page.elements if found.get("role") == "region"]
    assert not {None, "", "table"} & set(regions)
    assert not re.findall(r"nan|inf", " ".join(page.values("d") + page.values("transform")))
    for key in ("aria-labelledby", "aria-describedby"):
        assert set(page.values(key)) <= set(ids)
    assert not page.values("src")
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], (name, attributes)
    assert [found.get("type") for name, found in page.elements if name == "script"] == ["application/json", None]
    assert {"img", "iframe", "object", "embed", "base"}.isdisjoint(name for name, _ in page.elements)


def test_it_is_valid_and_reaches_nothing(page: Page, source: str) -> None:
    check(page)
    assert not re.findall(r"https?:|url\(|@import|//[a-z]", source.replace("http://www.w3.org/2000/svg", ""))
    policy = next(found["content"] for name, found in page.elements if found.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("style", "script"):
        inner = page.find(name)[-1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    for name, found in page.elements:
        if name == "th":
            assert found.get("scope") in ("col", "row", "rowgroup")
    captions = [name for name, _ in page.elements].count("caption")
    assert captions == [name for name, _ in page.elements].count("table")


def test_its_script_writes_no_markup() -> None:
    script = (files("evenbits") / "page_assets" / "page.js").read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "XMLHttp",
    ):
        assert word not in script


def test_text_of_records_stays_text(page: Page, source: str) -> None:
    assert HOSTILE not in source
    assert "document.title='owned'</script>" not in source
    assert "\u2028" not in source
    assert [one for one in page.find("a", class_="open") if one == HOSTILE]
    row = next(row for row in page.data["models"][0]["rows"] if row["name"] == HOSTILE)
    assert CLOSING in row["settings"]
    assert any("</script>" in said for said in page.find("td", class_="said"))
    assert any(f"bad {HOSTILE}" in cell for cell in page.find("td"))


def test_text_and_json_are_made_safe() -> None:
    assert text("a<b>&\"'\r\nc") == "a&lt;b&gt;&amp;&quot;&#x27;\nc"
    assert text("a\u202eb\x00\u200d") == "a\\u202eb\\u0000\u200d"  # would reorder what follows; joins letters
    assert tag("p", "<", tag("br"), hidden=True, title='"', lang=None) == '<p hidden title="&quot;">&lt;<br></p>'
    raw = embed({"</script>": "\u2028<!--&"})
    assert not set(raw) & set("<>&\u2028")
    assert json.loads(raw) == {"</script>": "\u2028<!--&"}
    with pytest.raises(ValueError):
        embed(math.inf)


def test_the_leaderboard_has_every_number_with_its_mark(page: Page, table: Table) -> None:
    model = table.models[0]
    lines = {
        found["data-entry"]: i for i, (_, found) in enumerate(page.elements) if "data-entry" in found and "id" in found
    }
    ranked = [(section, i, row) for section in model.sections for i, row in enumerate(section.rows)]
    assert len(ranked) == 6
    for section, index, row in ranked:
        written = "".join(page.texts[lines[row.records[0].trial]])
        for column in [c for c in model.columns if c.quality]:
            cell = row.cells[column.key]
            assert f"{cell.value:.4g}"[:5] in written
            mark = section.marks.get((index, column.key), "")
            assert {"*": "best of its", "~": "not told apart", "-": "another is better", "": ""}[mark] in written
            ratio = model.recovery(row, column)
            assert ratio is not None
            assert f"{ratio.value:.3f}" in written
    assert page.find("th", scope="rowgroup") == [
        "uncompressed", "2 ±0.05 linear bits per weight", "2 ±0.05 linear bits per weight, after distill",
        "2 ±0.05 linear bits per weight: outside the window, not ranked", "3 ±0.05 linear bits per weight",
        "uncompressed", "2 ±0.05 linear bits per weight",
    ]  # fmt: skip
    assert any("vptq" in line and "no setting within" in line for line in page.find("tr"))
    assert "Traceback: line 1" in page.find("pre")


def test_a_trial_has_its_bytes_seeds_protocols_and_command(page: Page, table: Table) -> None:
    whole = page.find("article", id="t-gptq0")[0]
    assert "250,000" in whole  # bytes of its one role
    assert "gptq1" in whole
    assert "seed 1: slow disk" in whole
    assert "3.3 min" in whole
    command = [one for one in page.find("code") if "--seed 1" in one]
    assert command == [f"git checkout {'c' * 40}\n{COMMAND} --seed 0 --seed 1"]
    assert "The checkout had changes that are not in this commit." in whole
    for column in table.models[0].columns:
        fields = page.find("details", id=f"p-{column.protocol}")
        assert len(fields) == 1
        assert "context2048" in fields[0].replace("\n", "")
    assert len(page.find("details", id="e-0")) == 1
    assert not page.find("details", id="e-1")  # the same environment stands once
    rows = {row["id"]: row for row in page.data["models"][0]["rows"]}
    means = [0.105, 0.21, 0.315, 0.105, 0.21, 0.315]  # of two seeds, by kind and then by block
    assert rows["gptq0"]["layers"][1] == pytest.approx(means)
    assert page.data["models"][0]["places"][0][0] == "model.layers.0.self_attn.q_proj"
    continuations = page.find("td", class_="said")
    assert continuations.count(PROMPTS["The dog"]) == 9  # once a row, wherever it is shown
    assert page.find("b", class_="parted")[1].startswith("</script>")


@pytest.mark.parametrize(
    ("paper", "words"),
    [
        (2.0, "Its files take 2.000 bits a weight, and paper bits say 2.000."),
        (1.6, "Its files take 0.400 bits a weight (25.0%) more than paper bits say."),
        (2.5, "Its files take 0.500 bits a weight (20.0%) fewer than paper bits say."),
    ],
)
def test_what_is_stored_is_set_against_what_is_claimed(paper: float, words: str, tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    trials.add("dense", accuracy(np.ones(3)))
    trials.add("checkpoint", accuracy(np.ones(3)))
    dense, record = sorted(trials.records, key=lambda record: record.method != "dense")
    assert record.ledger is not None
    bits = record.ledger.bits.model_copy(update={"paper": paper})
    claimed = record.model_copy(update={"ledger": record.ledger.model_copy(update={"bits": bits})})
    found = Page(render_page(gather([dense, claimed]), command=COMMAND))
    said = [text for text in found.find("p", class_="quiet") if "paper bits" in text]
    assert said[-1:] == [words]


def test_the_plot_without_scripts_keeps_what_is_far_off_at_the_edge(page: Page) -> None:
    assert len(page.find("svg", class_="plot")) == 2
    assert [one for one in page.find("text", class_="off") if one.endswith("↑")]  # kmeans, 148 times the dense model's
    assert nice_ticks(1.66, 2.3, 6) == [1.8, 2.0, 2.2]
    assert nice_ticks(-1, 1, 4) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert log_ticks(3, 300) == [5, 10, 20, 50, 100, 200]
    assert log_ticks(0.5, 5e4) == [1, 10, 100, 1000, 10000]


def test_the_same_table_makes_the_same_page(table: Table, source: str, tmp_path: Path) -> None:
    path = write_page(tmp_path / "report", table, command=COMMAND)
    assert path == tmp_path / "report" / "page.html"
    assert path.read_text() == source


def test_a_page_of_little(tmp_path: Path) -> None:
    check(Page(render_page(gather([]), command=COMMAND)))
    trials = Trials(tmp_path)
    diverged, items = perplexity(np.full(4, 800.0), value=math.inf, low=None, high=None)
    trials.add("rtn", (diverged, items))
    trials.add("gptq", budget=None, ledger=None)
    trials.add("dense")
    trials.add("nf4", status="failed")
    trials.add("awq", perplexity(np.full(4, 0.5), low=math.nan, high=math.inf, name="other"))
    page = Page(render_page(gather(trials.records, trials.folders), command=COMMAND))
    check(page)
    assert page.find("p", class_="nothing") == ["No compressed model has a finite perplexity."]
    row = next(row for row in page.data["models"][0]["rows"] if row["name"] == "rtn")
    assert row["cells"]["perplexity"][0] is None
    assert "inf" in page.find("span", class_="v")
    hollow = Trials(tmp_path / "hollow")
    hollow.add("awq", perplexity(np.full(4, 0.5), low=math.nan, high=math.inf))
    check(Page(render_page(gather(hollow.records, hollow.folders), command=COMMAND)))
    failed = Trials(tmp_path / "failed")
    failed.add("nf4", status="failed", ledger=None)
    page = Page(render_page(gather(failed.records), command=COMMAND))
    check(page)
    assert page.find("p", class_="quiet")[1:] == ["No trial has a result."]
    assert page.find("p", class_="lede") == ["1 trial on small: 1 failed"]


def test_budgets_of_model_bits_are_plotted_over_model_bits(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    budget = BudgetFacts(centre=4.3, window=0.1, on="model")
    for number, method in enumerate(("rtn", "gptq")):
        trials.add(method, perplexity(np.full(4, 0.5 + number)), budget=budget, linear=2.0 + number / 10)
    page = Page(render_page(gather(trials.records, trials.folders), command=COMMAND))
    check(page)
    assert page.data["models"][0]["over"] == "model"
    assert page.find("text", class_="name mid") == ["model bits per parameter"]
    assert len(page.find("rect", class_="window")) == 1


def test_five_hundred_trials_make_a_page_of_bearable_size(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    record = trials.add("rtn", accuracy(np.ones(3)), options={f"option{i}": i for i in range(6)})
    facts = {"layers": layers(0.1, 32), "metrics": (record.metrics[0].model_copy(update={"items": None}),)}
    many = [record.model_copy(update={"trial": f"t{i}", "label": f"rtn{i}", **facts}) for i in range(500)]
    source = render_page(gather(many), command=COMMAND)
    assert len(source) < 5_000_000
    assert source.count("model.layers.31.mlp.down_proj") == 1  # a layer's name stands once, not with every trial


def reproduction(**changes: Any) -> Reproduction:
    origin = Origin(source="paper, table 1", version="v2", context=4096, era="A", trust="V")
    cell = ReproducedCell("perplexity", 5.5, 5.61, 5.5, 5.7, 0.11, "differs", "0.03 allowed", True, 0.03)
    row = ReproducedRow(
        HOSTILE, "gptq", "none", origin, 4.0, 4.1, 4.0, "4.1 on disk", (cell,), "a note", 2.0, "scalar4"
    )
    bare = replace(cell, measured=None, low=None, high=None, difference=None, outcome="published only", reason="none")
    alone = replace(row, method="QTIP", label=None, measured_bits=None, bits_note="", cells=(bare,))
    ordering = ReproducedOrdering("8x at or above dense", "acc", "agrees", "p = 0.01", origin, False)
    number = RecomputedNumber("average of AQLM", 62.35, 62.354, "agrees", origin)
    published = Published(title="PocketLLM, Table 1", model="llama", origin=origin, notes=("two eras are mixed",))
    found = Reproduction(published, "small", False, (row, alone), (ordering,), (number,))
    return replace(found, **changes)


def test_reproduction_stands_beside_what_is_printed(table: Table) -> None:
    page = Page(render_page(table, reproduction=reproduction(), command=COMMAND))
    check(page)
    section = page.find("section", id="reproduction")[0]
    for words in ("two eras are mixed", "QTIP", HOSTILE, "8x at or above dense", "Measured on small, not on llama",
                  "paper, table 1, v2, context 4096, lm-eval era A", "62.35", "4.1 on disk"):  # fmt: skip
        assert words in section
    assert page.find("span", data_outcome="differs") == ["✗differs"]
    assert page.find("span", data_outcome="agrees") == ["✓agrees"] * 2
    assert page.find("span", data_outcome="published only") == ["○published only"]
    assert "+0.11" in page.find("td", class_="num")


def test_nights_are_lines_with_their_steps(table: Table, trials: Trials) -> None:
    first = make_night(trials.store, trials.suite)
    nights = []
    for number in range(16):
        worse = 1.5 if number >= 8 else 1.0
        row = next(r for r in first.rows if r.name == "gptq" and r.budget.startswith("3"))
        reading = row.readings["perplexity"]
        assert reading.value is not None
        value = worse * reading.value + 0.001 * (number % 3)
        readings = {
            "perplexity": reading.model_copy(update={"value": value, "low": value - 0.01, "high": value + 0.01})
        }
        rows = (row.model_copy(update={"readings": readings, "measured": f"2026-01-{number + 1:02d}"}),)
        nights.append(first.model_copy(update={"date": f"2026-01-{number + 1:02d}T00:00:00+00:00", "rows": rows}))
    page = Page(render_page(table, history=nights, command=COMMAND))
    check(page)
    section = page.find("section", id="history")[0]
    assert "16 nights, 2026-01-01 to 2026-01-16" in section
    assert "01-09 worse" in section
    assert len(page.find("path", class_="step")) == 1
    assert len(page.find("circle", class_="point k0")) == 16


def test_the_command_names_the_suite_and_another_model(
    tmp_path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "my suite.toml"
    suite.write_text('name = "tests"\nmodel = ["small", { name = "other", path = "x" }]\n')

    def none() -> list[str]:
        raise AssertionError("the suite's own models need no plugins")

    assert run_command(suite, table, none) == f"evenbits run '{suite}'"
    suite.write_text('name = "tests"\nmodel = { id = "org/big", revision = "1" }\n')
    only = Table(table.models[:1])
    assert run_command(suite, only, lambda: ["small"]) == f"evenbits run '{suite}' --model small"
    assert run_command(suite, only, list) == f"evenbits run '{suite}' --model path/to/small"
    monkeypatch.chdir(tmp_path)
    assert run_command(suite, only, list) == "evenbits run 'my suite.toml' --model path/to/small"
    suite.write_text('name = "tests"\nmodel = { path = "${EVENBITS_MODEL}" }\n')
    assert run_command(suite, only, none) == "evenbits run 'my suite.toml'"


@pytest.fixture
def run(tmp_path: Path) -> tuple[CliRunner, list[str], Path]:
    trials = Trials(tmp_path / "results")
    trials.add("dense", cost("size_bytes", 4))  # no quality: nothing for matplotlib to draw
    trials.add("rtn", cost("size_bytes", 3), budget=TWO)
    suite = tmp_path / "tests.toml"
    suite.write_text('name = "tests"\nmodel = "small"\n')
    arguments = ["report", str(suite), "--results", str(tmp_path / "results")]
    return CliRunner(), arguments, trials.store.run_folder("tests") / "report" / "page.html"


def test_report_writes_the_page_and_keeps_it_up_to_date(run: tuple[CliRunner, list[str], Path]) -> None:
    runner, arguments, path = run
    assert runner.invoke(app, arguments).exit_code == 0
    assert not path.exists()
    assert runner.invoke(app, [*arguments, "--html"]).exit_code == 0
    check(Page(path.read_text()))
    path.write_text("an older one")
    assert runner.invoke(app, arguments).exit_code == 0
    check(Page(path.read_text()))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--html", "--format", "csv"], "only prints"),
        (["--html", "--history", "nowhere"], "no such folder of nights"),
        (["--history", "."], "needs --html"),
    ],
)
def test_what_does_not_go_together_is_said(
    run: tuple[CliRunner, list[str], Path], more: Sequence[str], said: str
) -> None:
    runner, arguments, _ = run
    assert said in str(runner.invoke(app, [*arguments, *more]).exception)
