"""The paper suites and their expected values: they read, name each other rightly, and say what the facts say."""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evenbits.elsewhere import elsewhere
from evenbits.plan import Plan, Trial, make_plan
from evenbits.plugins import Registry, load_plugins
from evenbits.published import NEVER_GATE, TOLERANCES, Published, PublishedRow, published_path, read_published
from evenbits.reproduced_cells import SHARE
from evenbits.reproduced_entries import split_name
from evenbits.reproduction import reproduce, shapes_of
from evenbits.shapes import read_config
from evenbits.suite import Suite, read_suite

ROOT = Path(__file__).resolve().parents[1]
script: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "paper_elsewhere.py"))
SUITES: list[Path] = script["paper_suites"]()
LLAMA2 = ["aqlm", "awq_gptq_2048", "pocketllm_table1", "vptq"]
SOURCES_THAT_MIX = ["pocketllm_table1", "pocketllm_table2", "llm_codebook_llama", "llm_codebook_vicuna"]
# what no setting of a method reaches, and the suite says so
SKIPPED = {("llm_codebook_llama", "gptq", 2.0), ("llm_codebook_vicuna", "gptq", 2.0)}


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = load_plugins()
    found.collect_all()
    return found


@pytest.fixture(scope="module")
def suites(registry: Registry) -> dict[str, Suite]:
    """As they are with no variable set: models and texts from the hub."""
    return {path.stem: read_suite(path, registry, environment={}) for path in SUITES}


@pytest.fixture(scope="module")
def published() -> dict[str, Published]:
    return {path.stem: read_published(published_path(path)) for path in SUITES}


@pytest.fixture(scope="module")
def plans(suites: dict[str, Suite], registry: Registry) -> dict[str, Plan]:
    return {name: make_plan(suite, registry) for name, suite in suites.items()}


def metrics_of(suite: Suite, registry: Registry) -> set[str]:
    """What the suite's evaluators will call their metrics."""
    found = set()
    for stage in suite.evaluators:
        front = "" if stage.label is None else f"{stage.label}_"
        if stage.name == "perplexity":
            found.add(f"{front}perplexity")
            continue
        options: Any = registry.find("evaluators", stage.name, "evaluator").value.options.model_validate(stage.options)
        found |= {f"{front}{name}_acc" for name in options.names} | {f"{front}{options.mean}"}
    return found


def find_trials(plan: Plan, label: str, at: float | None) -> list[Trial]:
    """What a printed row's label names, by the rule of `find_entry`."""
    trials = [trial for trial in plan.trials if "+".join([trial.label, *(s.name for s in trial.recovery)]) == label]
    trials = trials or [trial for trial in plan.trials if trial.label == label]
    return [trial for trial in trials if at is None or (trial.budget is not None and trial.budget.centre == at)]


def test_there_is_a_suite_for_every_table_and_values_beside_each() -> None:
    assert {path.stem for path in SUITES} == {
        *LLAMA2,
        "llm_codebook_llama",
        "llm_codebook_vicuna",
        "pocketllm_table2",
        "qwen3_study_0.6B",
        "qwen3_study_1.7B",
    }
    assert all(published_path(path).is_file() for path in SUITES)


@pytest.mark.parametrize("name", [path.stem for path in SUITES])
class TestEach:
    def test_model_is_pinned_and_outlined(
        self, name: str, suites: dict[str, Suite], published: dict[str, Published]
    ) -> None:
        (model,) = suites[name].model
        assert model.id is not None
        assert re.fullmatch(r"[0-9a-f]{40}", str(model.revision))
        assert model.outline is not None
        assert model.shown == published[name].model
        assert suites[name].elsewhere is not None

    def test_what_may_be_local_is_the_hubs_without_it(
        self, name: str, suites: dict[str, Suite], registry: Registry
    ) -> None:
        suite = suites[name]
        assert suite.calibration is not None
        assert "path" not in suite.calibration.corpus
        assert not any({"path", "data", "limit", "max_windows"} & stage.options.keys() for stage in suite.evaluators)
        given = {
            "EVENBITS_CALIBRATION": "a", "EVENBITS_WIKITEXT2": "b", "EVENBITS_C4": "c", "EVENBITS_TASKS": "d",
            "EVENBITS_LIMIT": "5", "EVENBITS_WINDOWS": "6", "EVENBITS_SAMPLES": "7", "EVENBITS_OTHER_TEXT": "true",
        }  # fmt: skip
        local = read_suite(ROOT / "suites" / "paper" / f"{name}.toml", registry, environment=given)
        assert local.calibration is not None
        assert (local.calibration.corpus["path"], local.calibration.samples) == ("a", 7)
        paths = {stage.label: stage.options.get("path") for stage in local.evaluators}
        assert (paths["wikitext2"], paths["c4"]) == ("b", "c")
        tasks = [stage.options for stage in local.evaluators if stage.name == "lm-eval"]
        assert tasks
        assert all((one["data"], one["limit"]) == ("d", "5") for one in tasks)

    def test_rows_name_entries_and_metrics(
        self,
        name: str,
        suites: dict[str, Suite],
        published: dict[str, Published],
        plans: dict[str, Plan],
        registry: Registry,
    ) -> None:
        known = metrics_of(suites[name], registry)
        for row in published[name].rows:
            assert {metric.removesuffix(SHARE) for metric in row.values} <= known, row.method
            if row.label is not None and row.label != "dense":
                assert len(find_trials(plans[name], row.label, row.at)) == 1, f"{row.method}: {row.label}@{row.at}"
        for claim in published[name].orderings:
            assert claim.metric in known
            for entry in (claim.first, *claim.behind):
                assert entry == "dense" or len(find_trials(plans[name], *split_name(entry))) == 1, entry

    def test_the_papers_sizes_lie_in_the_windows(
        self, name: str, suites: dict[str, Suite], plans: dict[str, Plan]
    ) -> None:
        """On the outline's shapes, recovery stages billed; and what runs is what was asked for."""
        plan = plans[name]
        assert {(name, skip.label, skip.budget.centre) for skip in plan.skips if skip.budget is not None} == {
            one for one in SKIPPED if one[0] == name
        }
        for method in suites[name].methods:
            stages = tuple(stage.name for stage in method.recovery)
            for budget in method.budgets(suites[name].budgets):
                if (name, method.shown, None if budget is None else budget.centre) in SKIPPED:
                    continue
                (trial,) = (
                    trial
                    for trial in plan.trials
                    if (trial.label, trial.budget, tuple(s.name for s in trial.recovery))
                    == (method.shown, budget, stages)
                )
                assert trial.predicted is not None
                bits = trial.predicted.linear if budget is None or budget.on == "linear" else trial.predicted.model
                assert budget is None or bits in budget
                for key, value in method.sizes.items():
                    assert key == "parts" or trial.options[key] == value

    def test_printed_bits_are_those_of_the_setting(
        self, name: str, published: dict[str, Published], plans: dict[str, Plan]
    ) -> None:
        """By the method's own formula, or it is said why not."""
        for row in published[name].rows:
            if row.bits is None or row.label in (None, "dense") or "bits" in row.mixed:
                continue
            (trial,) = find_trials(plans[name], str(row.label), row.at)
            assert trial.predicted is not None
            assert trial.predicted.paper == pytest.approx(row.bits, abs=TOLERANCES[row.tolerance].bits), row.method

    def test_averages_and_formulas_recompute_or_are_marked(
        self, name: str, published: dict[str, Published], registry: Registry
    ) -> None:
        path = ROOT / "suites" / "paper" / f"{name}.toml"
        found = reproduce(published[name], None, shapes=shapes_of(path), registry=registry)
        marked = {row.mixed.get(str(row.average)) for row in published[name].rows}
        for number in found.recomputed:
            assert number.computed is not None
            assert number.outcome == "agrees" or number.note in marked or number.origin.trust == "X", number

    def test_runs_on_the_reference_model_or_says_why_not(
        self, name: str, suites: dict[str, Suite], registry: Registry
    ) -> None:
        """Planned alone; tests/paper_elsewhere.py runs all of it."""
        path = ROOT / "suites" / "paper" / f"{name}.toml"
        suite = read_suite(path, registry, environment={}, overrides={"model": "reference"})
        folder = Path(registry.find("models", "reference", "model").value)
        there = elsewhere(suite, read_config(folder), cuda=False).suite
        plan = make_plan(there, registry)
        asked = sum(len(method.budgets(there.budgets)) for method in there.methods)
        assert len(plan.trials) + len(plan.skips) == asked + 1 + len(there.dense_recovery)
        assert all(re.search(r"no setting|takes \d", skip.reason) for skip in plan.skips)
        on_model = any(spec.on == "model" for spec in there.budgets)  # the embedding alone is above these
        assert bool(plan.skips) == on_model
        assert there.calibration is not None
        assert there.calibration.length == 256


def each_value(files: dict[str, Published]) -> Iterator[tuple[str, PublishedRow, Any, str, float]]:
    for name, one in files.items():
        for row in one.rows:
            for metric, value in row.values.items():
                yield name, row, one.origin_of(row), metric, value


def test_dense_models_agree_between_suites(published: dict[str, Published]) -> None:
    """One model has one perplexity at one context; accuracies may differ by who ran them."""
    found: dict[tuple[str, str, int], set[float]] = {}
    for name, row, origin, metric, value in each_value(published):
        if row.label == "dense" and metric.endswith("perplexity"):
            found.setdefault((published[name].model, metric, origin.context), set()).add(value)
    assert all(len(values) == 1 for values in found.values()), found
    assert found["meta-llama/Llama-2-7b-hf", "wikitext2_perplexity", 4096] == {5.12}
    assert found["meta-llama/Llama-2-7b-hf", "wikitext2_perplexity", 2048] == {5.47}
    assert found["meta-llama/Llama-2-7b-hf", "c4_perplexity", 4096] == {6.63}


def test_one_source_prints_one_number(published: dict[str, Published]) -> None:
    """A row that stands in several suites is the same in all of them."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for name, row, origin, metric, value in each_value(published):
        if row.bits is None or metric in row.mixed:
            continue
        method = re.split(r"[ ,]", row.method)[0]
        key = (
            published[name].model,
            method,
            row.stage,
            row.bits,
            origin.source,
            origin.version,
            origin.context,
            metric,
        )
        found.setdefault(key, {}).setdefault(name, value)
        assert len(set(found[key].values())) == 1, (key, found[key])
    assert any(len(values) > 1 for values in found.values())


def test_copied_rows_are_the_originals(published: dict[str, Published]) -> None:
    """PocketLLM's table copies AQLM's and VPTQ's rows: digit for digit but where it is marked."""

    def row(name: str, method: str) -> PublishedRow:
        (found,) = (row for row in published[name].rows if row.method == method)
        return found

    for copy, original in (
        (row("pocketllm_table1", "AQLM, 8x"), row("aqlm", "AQLM, 2x15")),
        (row("pocketllm_table1", "AQLM, 10x"), row("aqlm", "AQLM, 2x12")),
        (row("pocketllm_table1", "AQLM, 16x"), row("aqlm", "AQLM v4, 1x15")),
        (row("pocketllm_table1", "GPTQ, 10x"), row("aqlm", "GPTQ, no groups, act-order")),
        (row("pocketllm_table1", "Llama-2-7B"), row("aqlm", "FP16")),
        (
            row("pocketllm_table1", "VPTQ, 10x"),
            next(r for r in published["vptq"].rows if r.label == "vptq" and r.at == 3.02),
        ),
    ):
        differing = {metric for metric, value in copy.values.items() if original.values[metric] != value}
        assert differing == {m for m in copy.mixed if m in copy.values and copy.values[m] != original.values[m]}


def test_what_sources_mix_is_marked_and_told(published: dict[str, Published]) -> None:
    dense = published["pocketllm_table1"].rows[0]
    assert {"arc_easy_acc", "arc_challenge_acc"} <= dense.mixed.keys()
    ours = [row for row in published["pocketllm_table1"].rows if row.label == "pocketllm+lora"]
    assert len(ours) == 3
    assert all(row.stage == "lora" for row in ours)
    assert all({"eraB_arc_easy_acc", "eraB_arc_challenge_acc"} <= row.mixed.keys() for row in ours)
    vptq = next(
        row for row in published["pocketllm_table1"].rows if row.label == "vptq" and "hellaswag_acc" in row.values
    )
    assert vptq.values["hellaswag_acc"] == 56.0
    assert "hellaswag_acc" in vptq.mixed
    awq = next(row for row in published["pocketllm_table2"].rows if row.values.get("zero_shot_acc") == 62.44)
    assert "52.9" in awq.mixed["zero_shot_acc"]
    for name, words in (
        ("pocketllm_table1", ("float32", "LoRA", "era", "56.00")),
        ("pocketllm_table2", ("float32", "LoRA", "52.9")),
        ("llm_codebook_llama", ("whole model", "float16")),
    ):
        told = " ".join(published[name].notes)
        assert all(word in told for word in words), name


def test_what_was_not_read_in_a_primary_source_never_gates(published: dict[str, Published]) -> None:
    for name in SOURCES_THAT_MIX:
        one = published[name]
        for part in (*one.rows, *one.orderings):
            origin = one.origin_of(part)
            if origin.source is not None and origin.source.startswith(("PocketLLM", "LLM-Codebook")):
                assert origin.trust in NEVER_GATE
    swapped = next(row for row in published["vptq"].rows if row.method == "DB-LLM")
    assert swapped.trust == "X"


def test_a_cut_paper_suite_runs_whole_on_stories260k(data: Path, tmp_path: Path) -> None:
    """Two of its methods at one budget, with few items and windows: every evaluator and the profiler."""
    pytest.importorskip("lm_eval")
    text = (ROOT / "suites" / "paper" / "awq_gptq_2048.toml").read_text()
    tables = re.split(r"^(?=\[)", text, flags=re.M)
    kept = [table for table in tables if not table.startswith("[[methods]]") or "budget = 4.0\n" in table]
    kept = [table for table in kept if 'name = "awq"' not in table]
    suite = tmp_path / "cut.toml"
    suite.write_text("".join(kept))
    environment = script["local_data"](data, tmp_path) | {
        "EVENBITS_LIMIT": "4", "EVENBITS_WINDOWS": "2", "EVENBITS_SAMPLES": "2", "EVENBITS_OTHER_TEXT": "true",
        "EVENBITS_DISABLE": "mlflow", "PYTHONPATH": os.pathsep.join([str(ROOT / "harness"), str(ROOT / "plugins")]),
    }  # fmt: skip
    model = str(data / "models" / "stories260K")
    code, said, _ = script["run_elsewhere"](suite, model, tmp_path / "results", environment)
    assert code == 0, said
    assert "elsewhere: " in said
    assert "context 2048 -> 512" in said
    found = list(script["outcomes"](tmp_path / "results"))
    assert sorted(name for status, name, _ in found if status == "done") == ["dense", "gptq@4", "rtn@4"]
