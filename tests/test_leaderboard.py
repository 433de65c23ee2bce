"""The README's leaderboard: what it is made of, that it is not stale, and that staleness would be seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness.trials import TWO, Trials, accuracy, cost, perplexity
from tests.test_docs import script

from evenbits.plan import Plan
from evenbits.plugins import Registry, load_plugins
from evenbits.record import BudgetFacts
from evenbits.tables import gather

ROOT = Path(__file__).resolve().parents[1]
BOARD = ROOT / "results" / "leaderboard"
leaderboard = script("leaderboard")
THREE = BudgetFacts(centre=3.0, window=0.05)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()


@pytest.fixture(scope="module")
def plan(registry: Registry) -> Plan:
    """The leaderboard's suite as it plans today."""
    found: Plan = leaderboard.plan_today(ROOT / "suites" / "methods.toml", registry)
    return found


@pytest.fixture
def rows(plan: Plan) -> dict[str, Any]:
    """A rows.json that the plan agrees with, numbers left out."""
    found: dict[str, dict[str, Any]] = {}
    for trial in plan.trials:
        entry = leaderboard._entry(trial.label, [], trial.budget)
        row = found.setdefault(
            leaderboard._name(entry),
            {**entry, "method": trial.method, "options": dict(trial.options), "seeds": [], "artifacts": [],
             "predicted": None if trial.predicted is None else trial.predicted.model_dump(), "metrics": {}},
        )  # fmt: skip
        row["seeds"].append(trial.seed)
        row["artifacts"].append(trial.artifact)
    model = plan.trials[0].model.facts
    absent = [
        {**leaderboard._entry(skip.label, [], skip.budget), "status": "skipped", "reason": skip.reason}
        for skip in plan.skips
    ]
    return copy.deepcopy({
        "suite": "suites/methods.toml", "commits": ["c" * 40], "rows": list(found.values()), "absent": absent,
        "model": {"name": model.name, "revision": model.revision, "dtype": model.dtype},
        "settings": leaderboard._settings(plan),
    })  # fmt: skip


def row_of(rows: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in rows["rows"] if leaderboard._name(row) == name)


def test_the_readme_is_not_stale(plan: Plan, registry: Registry) -> None:
    """The section is made of rows.json, and rows.json is what the suite asks for today. A change of code is told by
    `python tests/leaderboard.py --check`, and fails nothing: half an hour of compute is not asked of every commit."""
    section, path = leaderboard.shown_rows((ROOT / "README.md").read_text(), BOARD)
    assert path == BOARD / "methods" / "rows.json", "run python tests/leaderboard.py suites/methods.toml"
    kept = json.loads(path.read_text())
    assert leaderboard.readme_section(kept) == section, "README.md is edited by hand: run tests/leaderboard.py"
    assert leaderboard.differences(kept, plan, registry) == []
    assert all(len(commit.rstrip("+")) >= 7 for commit in kept["commits"])
    assert path.stat().st_size < 100_000


def test_what_is_planned_today_is_not_stale(rows: dict[str, Any], plan: Plan, registry: Registry) -> None:
    assert leaderboard.differences(rows, plan, registry) == []
    assert leaderboard.changed_code(rows, plan) == []


def _drop_a_row(rows: dict[str, Any]) -> None:
    rows["rows"].remove(row_of(rows, "gptq @ 2.05"))


def _add_a_row(rows: dict[str, Any]) -> None:
    rows["rows"].append({**row_of(rows, "gptq @ 2.05"), "label": "gone"})


def _forget_a_skip(rows: dict[str, Any]) -> None:
    rows["absent"].pop()


CHANGES = {
    "another option": (lambda r: row_of(r, "gptq @ 2.05")["options"].update(bits=7), "gptq @ 2.05: bits=7"),
    "an option that is gone": (lambda r: row_of(r, "rtn @ 3.05")["options"].update(gone=1), "rtn @ 3.05: gone=1"),
    "fewer seeds": (lambda r: row_of(r, "gptq @ 3.05")["seeds"].pop(), "gptq @ 3.05: seeds"),
    "other bits": (lambda r: row_of(r, "kmeans @ 4.05")["predicted"].update(linear=4.2), "kmeans @ 4.05: bits"),
    "a method more": (_drop_a_row, "gptq @ 2.05: planned today, not measured"),
    "a method less": (_add_a_row, "gone @ 2.05: measured, not planned today"),
    "another model": (lambda r: r["model"].update(revision="sha256:0"), "model: revision"),
    "another context": (lambda r: r["settings"]["evaluators"][0]["options"].update(context=512), "context=512"),
    "an evaluator less": (lambda r: r["settings"]["evaluators"].pop(), "evaluators: "),
    "other calibration": (
        lambda r: r["settings"]["calibration"].update(samples=1),
        "calibration: samples=1, and 128 today",
    ),
    "what was skipped": (_forget_a_skip, "skipped in one"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, rows: dict[str, Any], plan: Plan, registry: Registry) -> None:
    change, words = CHANGES[name]
    change(rows)
    found = leaderboard.differences(rows, plan, registry)
    assert len(found) == 1
    assert words in found[0]


def test_an_option_that_came_since_changes_nothing_at_its_default(
    rows: dict[str, Any], plan: Plan, registry: Registry
) -> None:
    del row_of(rows, "gptq @ 2.05")["options"]["act_order"]
    assert leaderboard.differences(rows, plan, registry) == []
    del row_of(rows, "gptq-act @ 2.05")["options"]["act_order"]  # there it does not stand at its default
    assert len(leaderboard.differences(rows, plan, registry)) == 1


def test_changed_code_is_told_by_method(rows: dict[str, Any], plan: Plan) -> None:
    for name in ("gptq @ 2.05", "gptq @ 3.05", "awq @ 4.05"):
        row_of(rows, name)["artifacts"][0] = "other"
    assert leaderboard.changed_code(rows, plan) == ["gptq", "awq"]


def made(folder: Path, plan: Plan) -> tuple[dict[str, Any], Trials]:
    """rows.json of two methods at two budgets."""
    trials = Trials(folder)
    rng = np.random.default_rng(0)
    base, right = rng.normal(0.5, 0.1, 150), (rng.random(150) < 0.95).astype(float)
    facts = {"environment": {"git": {"commit": "a" * 40, "dirty": False}}, "finished": "2026-02-03T00:00:00+00:00"}
    trials.add("dense", perplexity(base), accuracy(right), cost("size", 3), **facts)
    for method, budget, more in (("good", TWO, 0.1), ("bad", TWO, 0.5), ("bad", THREE, 0.2)):
        items = base + more + rng.normal(0, 0.01, 150)
        trials.add(method, perplexity(items), accuracy(right), budget=budget, linear=budget.centre, **facts)
    trials.add("good", status="skipped", reason="no setting within 3 +- 0.05", budget=THREE)
    rows: dict[str, Any] = leaderboard.rows_file(
        Path("suites/methods.toml"), plan, trials.records, gather(trials.records, trials.folders), "pareto.png"
    )
    return rows, trials


def test_the_section_shows_value_interval_and_mark(tmp_path: Path, plan: Plan) -> None:
    rows, trials = made(tmp_path, plan)
    assert json.loads(leaderboard.one_line_a_row(rows)) == rows
    text = leaderboard.readme_section(rows)
    lines = text.splitlines()
    assert lines[0] == "<!-- leaderboard -->"
    assert lines[-1] == "<!-- /leaderboard -->"
    assert "`aaaaaaa` on 2026-02-03" in text
    assert "evenbits run suites/methods.toml && python tests/leaderboard.py suites/methods.toml" in text
    assert "![pareto](results/leaderboard/methods/pareto.png)" in text
    tables = [line for line in lines if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in tables[:5]] == [
        "perplexity ↓",
        ":--",
        "dense (16 bits)",
        "good",
        "bad",
    ]
    best = trials.records[1].metrics[0].value
    good, bad = tables[3], tables[4]
    assert f"| **{best:.3f}** [" in good
    assert good.endswith("\\* | none |")
    assert " - |" in bad
    assert tables[5].split("|")[1].strip() == "acc ↑"
    assert "good: no setting at 3" in text
    assert "size" not in text


def test_only_what_rows_hold_is_shown(tmp_path: Path, plan: Plan) -> None:
    rows, _ = made(tmp_path, plan)
    kept = json.loads(leaderboard.one_line_a_row(rows))
    assert leaderboard.readme_section(kept) == leaderboard.readme_section(rows)
    kept["rows"][1]["metrics"]["perplexity"]["value"] = 1.234
    assert "1.234" in leaderboard.readme_section(kept)


def test_a_report_is_copied_with_all_that_it_links_to(tmp_path: Path) -> None:
    from PIL import Image

    written, folder = tmp_path / "report", tmp_path / "kept"
    written.mkdir()
    (written / "report.md").write_text("![p](p.svg)\n[layers](layers.md), [as CSV](t.csv), [page](page.html)\n")
    (written / "layers.md").write_text("[back](report.md)\n")
    Image.new("RGB", (8, 8), "red").save(written / "p.png")
    assert leaderboard.copy_report(written, folder, "note") == ["layers.md", "p.png", "report.md"]
    text = (folder / "report.md").read_text()
    assert "![p](p.png)" in text
    assert "as CSV (`t.csv`, beside the records)" in text
    assert "page (`page.html`, beside the records)" in text
    assert text.endswith("note\n")


def test_a_readme_without_one_section_is_refused() -> None:
    for text in ("", "<!-- leaderboard --> no link <!-- /leaderboard -->"):
        with pytest.raises(SystemExit, match="one"):
            leaderboard.shown_rows(text, BOARD)
