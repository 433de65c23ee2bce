"""What a plan answers before anything starts, and when it says that it cannot be done here."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest

from evenbits import plan_text
from evenbits.devices import CudaDevice
from evenbits.effort import Cost, Effort
from evenbits.plan import Plan
from evenbits.plan_text import Takings, shown_time, take
from evenbits.plugins import load_plugins
from evenbits.store import Results


@pytest.fixture
def plan(here: Any, suites: Any) -> Plan:
    found: Plan = here.plan(suites.text('[{ name = "gptq", budget = "free" }]'))
    return found


def taken(here: Any, plan: Plan, *devices: CudaDevice) -> Takings:
    return take(plan, load_plugins(), Results(here.folder / "results"), devices)


def test_what_does_not_fit_is_said(here: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("NOT ENOUGH" in answer for answer in taken(here, plan).answers.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(plan_text, "_ram", lambda: 600_000_000)
    answers = taken(here, plan).answers
    assert answers["disk"].endswith("1 kB free: NOT ENOUGH")
    assert answers["memory"].endswith("600 MB in this machine: NOT ENOUGH")


def test_memory_of_a_gpu_counts_where_the_suite_asks_for_one(here: Any, plan: Plan) -> None:
    asked = replace(plan, suite=plan.suite.model_copy(update={"device": "cuda"}))
    answers = taken(here, asked, CudaDevice("Small", 100_000_000)).answers
    assert answers["memory"].endswith("100 MB on the GPU: NOT ENOUGH")
    assert answers["device"] == "cuda: Small with 100 MB"
    assert answers["hours"].startswith(
        "not known: nothing was measured on a GPU; on a CPU like the benchmarks' at least "
    )
    none = taken(here, asked).answers
    assert "NONE HERE" in none["device"]
    assert "no GPU here" in none["memory"]


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ((Cost(60.0, "a"), Cost(60.0, "a")), "about 2 min"),
        ((Cost(60.0, "a"), Cost(60.0, "a", rough=True)), "roughly 2 min"),
        ((Cost(60.0, "a", least=True), Cost(60.0, "a", rough=True)), "at least 2 min"),
        ((Cost(120.0, "a"), Cost(None, "b", missing=True)), "at least 2 min; 1 of 2 parts were never measured"),
        ((Cost(None, "b", missing=True),), "not known: nothing like it was measured"),
        ((), "nothing is left to do"),
    ],
)
def test_how_sure_hours_are(costs: tuple[Cost, ...], words: str, plan: Plan) -> None:
    found = tuple((plan.trials[0], cost) for cost in costs)
    assert plan_text._hours(Effort(found, (), (), 1)) == words


def test_parts_are_put_together_by_method_and_evidence(plan: Plan) -> None:
    gptq = plan.trials[1]
    costs = ((gptq, Cost(9.0, "one")), (gptq, Cost(200.0, "one")), (gptq, Cost(None, "two")))
    assert list(plan_text._parts(Effort(costs, ((gptq, Cost(1.0, "three")),), (), 1))) == [
        "compress gptq  2 x 9 s to 3 min  one", "compress gptq  1 x ?             two",
        "evaluate       1 x 1 s           three",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.361, "0.36 s"), (89.0, "89 s"), (5000.0, "83 min"), (7200.0, "2.0 h"), (4.889e7, "13,600 h")],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert shown_time(seconds) == text
