"""The ablation suites plan, their claims name rows that exist, and the page says what the records say."""

from __future__ import annotations

import math
import runpy
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evenbits.plan import make_plan
from evenbits.plugins import Registry, load_plugins
from evenbits.record import (
    Bits,
    BudgetFacts,
    Failure,
    LayerFacts,
    Ledger,
    MetricFacts,
    ModelFacts,
    Record,
    write_record,
)
from evenbits.store import Results
from evenbits.suite import read_suite

ROOT = Path(__file__).resolve().parents[1]
SUITES = [path for path in sorted((ROOT / "suites" / "ablation").glob("*.toml")) if path.stem[:3] in ("poc", "ord")]
ablations = runpy.run_path(str(ROOT / "tests" / "ablations.py"))

MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float32", parameters=1200, linear_weights=1000, stored_bits=16,
    linear_bytes=4000, model_bytes=4800,
)  # fmt: skip
LAYERS = ("a", "b", "c")
SUITE = """\
# Why this is
# compared.
name = "made_up"
description = "made up | for a test"
model = "reference"
seeds = [0, 1]
methods = [
    { name = "rtn", label = "base", budget = "free", options = { bits = 2 } },
    { name = "rtn", label = "same", budget = "free", options = { bits = 3 } },
    { name = "rtn", label = "worse", budget = "free", options = { bits = 4 } },
    { name = "rtn", label = "dearer", budget = "free", options = { bits = 5 } },
    { name = "rtn", label = "broken", budget = "free", options = { bits = 6 } },
    { name = "rtn", label = "absent", budget = "free", options = { bits = 7 } },
]
"""
CLAIMS = """
[[made_up]]
text = "the base is best"
ahead = "base"
behind = ["same", "worse", "dearer", "broken", "absent"]
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = load_plugins()
    found.collect_all()
    return found


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_plans_all_that_it_lists(
    path: Path, registry: Registry, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "EVENBITS_DATA" in path.read_text():
        monkeypatch.setenv("EVENBITS_DATA", str(request.getfixturevalue("data")))
    suite = read_suite(path, registry)
    planned = make_plan(suite, registry)
    assert suite.name == path.stem
    assert not planned.skips
    centres = [spec.budget().centre for spec in suite.budgets]
    listed = {
        (m.shown, tuple(stage.name for stage in m.recovery), centre)
        for m in suite.methods
        for centre in ([None] if m.budget == "free" else centres)
    }
    listed |= {("dense", tuple(stage.name for stage in stages), None) for stages in ((), *suite.dense_recovery)}
    found = {
        (t.label, tuple(stage.name for stage in t.recovery), None if t.budget is None else t.budget.centre)
        for t in planned.trials
    }
    assert found == listed


def test_claims_name_rows_of_their_suites(registry: Registry) -> None:
    claims = ablations["read_claims"]()
    suites = {path.stem: read_suite(path, registry) for path in SUITES}
    assert suites, "no suites found"
    assert claims.keys() == suites.keys()
    for name, asked in claims.items():
        suite = suites[name]
        centres = [f" @ {spec.budget().centre:g}" for spec in suite.budgets] if len(suite.budgets) > 1 else [""]
        labels = [" + ".join((m.shown, *(stage.name for stage in m.recovery))) for m in suite.methods]
        rows = {label + centre for label in labels for centre in centres} | {"dense"}
        rows |= {" + ".join(("dense", *(stage.name for stage in stages))) for stages in suite.dense_recovery}
        named = {row for claim in asked for row in (claim.ahead, *claim.behind)}
        assert named <= rows, f"{name}: {sorted(named - rows)}"


class Made:
    """A results folder with records made by hand."""

    def __init__(self, root: Path) -> None:
        self.results = Results(root)
        self.results.check_schema(create=True)
        self.trials: list[str] = []
        self.hard = np.random.default_rng(0).normal(1.0, 0.3, 200)  # nats a document

    def add(
        self,
        label: str,
        seed: int,
        linear: float,
        error: float,
        more: float | None,
        noise: float = 0.01,
        centre: float | None = None,
    ) -> None:
        """`more`: nats above what documents are hard by; None: the trial failed. centre: of its budget."""
        facts: dict[str, Any] = {"status": "failed", "failure": Failure(kind="error", stage="compress", message="no")}
        items: dict[str, np.ndarray[Any, Any]] = {}
        if more is not None:
            rng = np.random.default_rng(seed + 10 * len(label))
            values = self.hard + more + rng.normal(0.0, noise, len(self.hard))
            items = {"items.npy": values}
            metric = MetricFacts(
                name="perplexity", value=math.exp(values.mean()), unit="perplexity", better="lower",
                source="perplexity", fingerprint="f", items="items.npy",
            )  # fmt: skip
            facts = {"status": "done", "metrics": (metric,), "fingerprints": {"f": {"context": 256}}}
            if label != "dense":
                facts["ledger"] = Ledger(
                    bits=Bits(index=2.0, paper=2.0, linear=linear, model=linear), roles={}, linear_bytes=300,
                    rest_bytes=0, model_bytes=400, ratios={}, compressed_weights=1000,
                )  # fmt: skip
                facts["layers"] = tuple(LayerFacts(name=name, bits=2.0, error=error) for name in LAYERS)
        trial = f"trial{len(self.trials)}"
        method = "dense" if label == "dense" else "rtn"
        record = Record(
            trial=trial,
            artifact=None,
            suite="made_up",
            model=MODEL,
            method=method,
            label=label,
            seed=seed,
            budget=None if centre is None else BudgetFacts(centre=centre, window=0.1, on="linear"),
            **facts,
        )
        write_record(self.results.trial_folder("made_up", trial), record, items)
        self.trials.append(trial)
        self.results.write_plan("made_up", self.trials)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "results")
    made.add("dense", 0, 32.0, 0.0, 0.0, noise=0.0)
    for seed in (0, 1):
        shift = 0.001 * seed
        made.add("base", seed, 2.1, 0.10 + shift, 0.1 + shift)
        made.add("same", seed, 2.1, 0.10 + shift, 0.1 + shift)
        made.add("worse", seed, 2.1, 0.20 + shift, 0.3 + shift)
        made.add("dearer", seed, 2.2, 0.05 + shift, 0.05 + shift)
        made.add("broken", seed, 2.1, 0.1, None)
    return made


def page(made: Made, folder: Path) -> str:
    suite, claims = folder / "made_up.toml", folder / "claims.toml"
    suite.write_text(SUITE)
    claims.write_text(CLAIMS)
    text: str = ablations["page"]([suite], made.results, ablations["read_claims"](claims))
    return text


def test_the_page_says_what_the_records_say(made: Made, tmp_path: Path) -> None:
    text = page(made, tmp_path)
    assert "Why this is compared." in text
    rows = {cells[0]: cells[1:] for cells in table_rows(text)}
    assert list(rows)[:3] == ["", "dense", "base"]
    head = rows[""]
    base = dict(zip(head, rows["base"], strict=True))
    dense = float(dict(zip(head, rows["dense"], strict=True))["perplexity"])
    assert base["seeds"] == "2"
    assert base["linear bits"] == "2.1000"
    value = float(base["perplexity"].split()[0])
    assert math.log(value / dense) == pytest.approx(float(base["ln rise"]), abs=2e-4)
    assert float(base["ln rise"]) == pytest.approx(0.1, abs=0.005)
    assert base["weight error"] == "0.1005 [0.1000, 0.1010]"
    assert base["calibrated error"] == ""


def test_verdicts_are_those_of_the_records(made: Made, tmp_path: Path) -> None:
    found = {cells[2].split(" (")[0]: cells[3:] for cells in table_rows(page(made, tmp_path)) if len(cells) == 5}
    assert found["same"][0].startswith("not distinguishable")
    assert found["worse"][0].startswith("better (t test over ")
    assert found["worse"][1] == "0.501, lower in 3 of 3"
    assert found["dearer"][0].startswith("number higher (p = ")
    assert "more bits (2.2000 against 2.1000)" in found["dearer"][0]
    assert found["broken"][0] == "not run: broken"
    assert found["absent"][0] == "not run: absent"


def test_what_has_no_result_is_named(made: Made, tmp_path: Path) -> None:
    text = page(made, tmp_path)
    assert "- broken, seed 1: no\n" in text
    assert "- absent, seed 0: not run\n" in text
    assert "- base" not in text


def test_a_suite_without_a_run_is_said_to_have_none(tmp_path: Path) -> None:
    made = Made(tmp_path / "results")
    assert page(made, tmp_path).rstrip().endswith("**Not run.**")


def test_the_page_in_results_is_of_all_suites() -> None:
    """What is shown belongs to the suites as they are: each has its section, each label its row or its reason."""
    for path in SUITES:
        topic = path.stem.partition("_")[0]
        written = (ROOT / "results" / "ablation" / f"{topic}.md").read_text()
        assert f"`suites/ablation/{path.name}`" in written
        start = written.index(f"`suites/ablation/{path.name}`")
        end = written.find("\n## ", start)
        part = written[start : end if end > 0 else len(written)]
        for method in tomllib.loads(path.read_text())["methods"]:
            label = method if isinstance(method, str) else method.get("label", method["name"])
            known = (f"| {label} ", f"- {label}", "**Not run.**")
            assert any(text in part for text in known), f"{path.name}: {label}"


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| :--")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_under_several_budgets_a_row_is_known_by_its_own(tmp_path: Path) -> None:
    made = Made(tmp_path / "results")
    made.add("dense", 0, 32.0, 0.0, 0.0, noise=0.0)
    for centre in (2.0, 3.0):
        for seed in (0, 1):
            made.add("base", seed, centre, 0.1, 0.5 - 0.1 * centre, centre=centre)
            made.add("worse", seed, centre, 0.2, 0.8 - 0.1 * centre, centre=centre)
    suite, claims = tmp_path / "made_up.toml", tmp_path / "claims.toml"
    head = SUITE.partition("methods = ")[0]
    methods = '"rtn", label = "base" }, { name = "rtn", label = "worse" }, { name = "rtn", label = "absent" }'
    suite.write_text(f"{head}budgets = [2.0, 3.0]\nmethods = [{{ name = {methods}]\n")
    claims.write_text('[[made_up]]\ntext = "so it is"\nahead = "base @ 3"\nbehind = ["worse @ 3", "base @ 2"]\n')
    text = ablations["page"]([suite], made.results, ablations["read_claims"](claims))
    assert "# Ablations: made" in text
    assert "| base @ 2 |" in text
    assert "| worse @ 3 |" in text
    assert "- absent @ 2, seed 0: not run" in text
    verdicts = [line for line in text.splitlines() if line.startswith("| so it is")]
    assert len(verdicts) == 2
    assert "better" in verdicts[0]


def test_a_page_has_one_topic() -> None:
    topic_of = ablations["topic_of"]
    assert topic_of([Path("a/orderings_x.toml"), Path("orderings_y.toml")]) == "orderings"
    with pytest.raises(SystemExit, match="one topic, not of orderings, pocketllm"):
        topic_of([Path("orderings_x.toml"), Path("pocketllm_y.toml")])
