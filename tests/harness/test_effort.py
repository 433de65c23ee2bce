"""Hours rest on what was measured, and say so; what nobody measured has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evenbits.effort import Estimator, flops_per_second, pass_seconds
from evenbits.footprint import measured_costs
from evenbits.plan import Plan, Stage, Trial
from evenbits.plugins import load_plugins
from evenbits.scored_tokens import tokens_of
from evenbits.shapes import LLAMA2_7B
from evenbits.store import Results

METHODS = """[
    { name = "rtn", budget = "free", options = { bits = 3, group_size = 32 } },
    { name = "gptq", budget = "free" },
    { name = "trouble", budget = "free" },
]"""


def record(folder: Path, trial: Trial, seconds: dict[str, float], device: str = "cpu", **changes: Any) -> None:
    """What an estimate reads of a finished trial's record; those of earlier versions have no `samples`."""
    facts = {
        "status": "done", "trial": trial.id, "suite": trial.suite, "method": trial.method,
        "options": dict(trial.options), "model": trial.model.facts.model_dump(),
        "layers": [{}] * len(trial.model.shapes.layers), "calibration": trial.calibration, "recovery": [],
        "seconds": seconds, "metrics": [{"source": "perplexity"}],
        "fingerprints": {"x": {"device": device}}, **changes,
    }  # fmt: skip
    path = folder / "runs" / str(facts["suite"]) / f"{trial.id}{len(list(folder.rglob('record.json')))}" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(facts))


def estimator(here: Any, plan: Plan, device: Any = "cpu") -> Estimator:
    return Estimator(plan, load_plugins(), Results(here.folder / "results"), device)


@pytest.fixture
def plan(here: Any, suites: Any) -> Plan:
    found: Plan = here.plan(suites.text(METHODS))
    return found


def larger(trial: Trial) -> Trial:
    """The trial on Llama-2-7B, in float16."""
    facts = trial.model.facts.model_copy(update={"name": "7b", "parameters": LLAMA2_7B.parameters})
    return replace(trial, model=replace(trial.model, shapes=LLAMA2_7B, dtype="float16", facts=facts))


def test_records_of_the_same_settings_give_their_mean(here: Any, plan: Plan) -> None:
    _, rtn, gptq, _ = plan.trials
    for seconds in (4.0, 6.0):
        record(here.folder / "results", gptq, {"compress": seconds, "evaluate": 1.0})
    record(here.folder / "results", gptq, {"compress": 90.0}, options={**gptq.options, "bits": 7})
    found = estimator(here, plan)
    assert found.compress(gptq).seconds == pytest.approx(5.0)
    assert (found.compress(gptq).basis, found.compress(gptq).rough) == ("recorded in tiny on tiny", False)
    assert found.compress(rtn).basis.startswith("benchmark")  # of which no record is here
    other = found.compress(replace(gptq, options={**gptq.options, "bits": 7}))
    assert other.seconds == pytest.approx(90.0)
    third = found.compress(replace(gptq, options={**gptq.options, "bits": 7, "damping": 0.5}))
    assert third.seconds == pytest.approx(90.0)
    assert (third.basis, third.rough) == ("recorded in tiny on tiny, other settings", True)


def test_a_record_of_this_model_goes_before_the_same_settings_on_a_smaller_one(here: Any, plan: Plan) -> None:
    """What a layer costs beside its weights does not shrink with it: scaled up, small models overestimate."""
    gptq = plan.trials[2]
    eighth = gptq.model.facts.model_copy(update={"linear_weights": gptq.model.facts.linear_weights // 8, "name": "s",
                                                 "revision": "small"})  # fmt: skip
    record(here.folder / "results", gptq, {"compress": 3.0}, model=eighth.model_dump())
    assert estimator(here, plan).compress(gptq).seconds == pytest.approx(24.0)
    record(here.folder / "results", gptq, {"compress": 4.0}, options={**gptq.options, "bits": 7})
    assert estimator(here, plan).compress(gptq).seconds == pytest.approx(4.0)


def test_recovery_stages_after_a_method(here: Any, plan: Plan) -> None:
    """What has a measurement counts, and what has none is said; the method's own artifact is made once."""
    gptq = plan.trials[2]
    after = replace(gptq, recovery=(Stage("distill", {"steps": 3}, ""),), chain=(*gptq.chain, "x"))
    record(here.folder / "results", gptq, {"compress": 4.0})
    partly = estimator(here, plan).compress(after)
    assert (partly.seconds, partly.missing) == (pytest.approx(4.0), True)
    assert partly.basis.endswith("; without distill")
    assert estimator(here, plan).compress(after, base=False).seconds is None
    stages: dict[str, Any] = {"recovery": ["distill"], "recovery_options": [{"steps": 3}]}
    record(here.folder / "results", gptq, {"compress": 9.0}, **stages)
    found = estimator(here, plan)
    assert found.compress(after).seconds == pytest.approx(9.0)
    assert found.compress(after, base=False).seconds == pytest.approx(5.0)
    both = replace(plan, trials=(gptq, after))
    effort = Estimator(both, load_plugins(), Results(here.folder / "results"), "cpu").effort()
    assert [cost.seconds for _, cost in effort.compress] == [pytest.approx(4.0), pytest.approx(5.0)]


def test_what_nobody_measured_has_no_number(here: Any, plan: Plan) -> None:
    found = estimator(here, plan)
    trouble = plan.trials[3]
    assert (found.compress(trouble).seconds, found.compress(trouble).basis) == (None, "no measurement of trouble")
    assert found.evaluate(trouble).seconds is None
    effort = found.effort()
    assert [trial.label for trial, _ in effort.compress] == ["rtn", "gptq", "trouble"]
    assert effort.wall_seconds == sum(cost.seconds or 0 for _, cost in effort.compress)


def test_a_benchmark_of_large_layers_goes_before_records_of_tiny_ones(here: Any, plan: Plan) -> None:
    gptq = plan.trials[2]
    record(here.folder / "results", gptq, {"compress": 4.0})
    found, wide = estimator(here, plan), larger(gptq)
    cost = found.compress(wide)
    (row,) = (row for row in measured_costs()["methods"] if row["method"] == "gptq")
    own = row["seconds"] * LLAMA2_7B.weights / row["weights"]
    assert cost.seconds == pytest.approx(own + pass_seconds(LLAMA2_7B, 4 * 32, "float16", found.cores))
    assert cost.basis == "benchmark"
    assert cost.least  # one layer's work, without the road around it


def test_passes_over_the_calibration_text() -> None:
    """Two of every block at two operations a weight and token, and half of X^T X at each distinct input."""
    tokens, cores = 1000, 2
    forward = 2 * 2 * LLAMA2_7B.weights * tokens / flops_per_second("bfloat16", cores)
    moments = 32 * (3 * 4096**2 + 11008**2) * tokens / flops_per_second("float32", cores)
    assert pass_seconds(LLAMA2_7B, tokens, "bfloat16", cores) == pytest.approx(forward + moments)


def test_evaluation_by_records_or_by_tokens(here: Any, suites: Any, tiny: Any) -> None:
    text = suites.text(METHODS)
    corpus = f'options.corpus = {{ name = "text", path = "{tiny.test}" }}'
    plan = here.plan(text)
    dense = plan.trials[0]
    record(here.folder / "results", dense, {"evaluate": 3.0}, metrics=[{"source": "perplexity"}])
    twice = dense.model.facts.model_copy(update={"parameters": 2 * dense.model.facts.parameters})
    found = estimator(here, plan).evaluate(replace(dense, model=replace(dense.model, facts=twice)))
    assert found.seconds == pytest.approx(6.0)
    assert (found.basis, found.rough) == ("recorded in tiny on tiny, 2 times its parameters", True)
    later = replace(plan, trials=tuple(replace(trial, id=f"{trial.id}2") for trial in plan.trials))
    assert estimator(here, later).evaluate(dense).basis.endswith(", perhaps with other settings")

    known = here.plan(text.replace(corpus, 'options.protocol = "c4"\noptions.path = "' + str(tiny.test) + '"'))
    wide = larger(known.trials[0])  # no record of a model as large
    cost = estimator(here, known).evaluate(wide)
    rate = flops_per_second("float32", estimator(here, known).cores)
    assert wide.model.facts.dtype == "float32"
    expected = 2 * LLAMA2_7B.parameters * 256 * 32 / flops_per_second("float16", estimator(here, known).cores)
    assert cost.seconds == pytest.approx(expected)
    assert cost.seconds != pytest.approx(2 * LLAMA2_7B.parameters * 256 * 32 / rate)
    assert cost.basis.startswith("0.0082M tokens at ")
    assert cost.least


def test_hours_of_another_device_are_said_to_be(here: Any, plan: Plan) -> None:
    gptq = plan.trials[2]
    record(here.folder / "results", gptq, {"compress": 4.0})
    assert estimator(here, plan, "cuda").effort().foreign
    record(here.folder / "results", gptq, {"compress": 1.0}, device="cuda")
    there = estimator(here, plan, "cuda")
    assert (there.effort().foreign, there.compress(gptq).seconds) == (False, pytest.approx(1.0))
    assert there.compress(plan.trials[1]).seconds is None  # of rtn the CPU's benchmark alone is known: not mixed in
    assert estimator(here, plan).compress(gptq).seconds == pytest.approx(4.0)


def test_a_gpus_records_say_nothing_of_a_cpu(here: Any, plan: Plan) -> None:
    gptq = plan.trials[2]
    record(here.folder / "results", gptq, {"compress": 0.5, "evaluate": 0.5}, device="cuda")
    found = estimator(here, plan)
    assert found.compress(gptq).basis.startswith("benchmark, layers ")
    assert found.evaluate(gptq).seconds is None


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "done"}', '{"status": "done", "model": {}, "seconds": null}'])
def test_a_damaged_record_is_no_evidence(here: Any, plan: Plan, text: str) -> None:
    path = here.folder / "results" / "runs" / "tiny" / "x" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert estimator(here, plan).compress(plan.trials[1]).basis.startswith("benchmark")
    assert estimator(here, plan).evaluate(plan.trials[1]).seconds is None


def test_tokens_of_the_papers_protocols(here: Any, suites: Any) -> None:
    stage = here.plan(suites.text()).trials[0].evaluators[0]

    def tokens(vocabulary: int | None = None, **options: Any) -> int | None:
        return tokens_of(replace(stage, options={"corpus": {"name": "wikitext2"}, **options}), vocabulary, 4096)

    assert tokens(32000) == 341_468
    assert tokens(151_669) == tokens(151_936) == 299_078
    assert tokens() == pytest.approx(341_468, rel=0.01)
    assert tokens(32000, max_windows=3) == 3 * 4096
    assert tokens(32000, protocol="c4", context=2048) == 256 * 2048
    assert tokens(32000, corpus={"name": "text"}) is None

    def tasks(*names: str, **options: Any) -> int | None:
        return tokens_of(replace(stage, name="lm-eval", options={"tasks": names, **options}), None, None)

    five = tasks("papers-five")
    assert five is not None
    assert five == pytest.approx(sum(tasks(n) or 0 for n in ("winogrande", "piqa", "hellaswag", "arc_easy",
                                                              "arc_challenge")), abs=3)  # fmt: skip
    assert tasks("piqa", limit=919) == pytest.approx((tasks("piqa") or 0) / 2, abs=1)
    assert tasks("piqa", "mine") is None
