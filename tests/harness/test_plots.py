"""Recovery over bits: which way up, what lies far off, and what is written in the figure."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evenbits.plots_look import file_name, method_looks
from evenbits.plots_recovery import draw_recovery, recovery_points, split_far
from evenbits.record import Bits, BudgetFacts, Ledger, MetricFacts, ModelFacts, Record, write_record
from evenbits.report import gather
from evenbits.tables import Table

MODEL = ModelFacts(
    name="small model", revision="sha256:1", dtype="float16", parameters=1200, linear_weights=1000, stored_bits=16,
    linear_bytes=2000, model_bytes=2400,
)  # fmt: skip
HARD = np.random.default_rng(0).normal(2.0, 0.4, 100)


class Trials:
    """Records with a perplexity and an accuracy, and their items."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[Record] = []

    def add(self, method: str, bits: float, losses: Any, hits: Any, **facts: Any) -> None:
        items = {"perplexity.npy": np.asarray(losses, float), "accuracy.npy": np.asarray(hits, float)}
        metrics = (
            MetricFacts(
                name="perplexity", value=math.exp(items["perplexity.npy"].mean()), unit="perplexity", better="lower",
                source="t", fingerprint="f", items="perplexity.npy",
            ),
            MetricFacts(
                name="accuracy", value=float(items["accuracy.npy"].mean()), unit="", better="higher", source="t",
                fingerprint="f", items="accuracy.npy",
            ),
        )  # fmt: skip
        size = round(bits * 125)
        ledger = Ledger(
            bits=Bits(index=bits, paper=bits, linear=bits, model=bits), roles={"code": size}, linear_bytes=size,
            rest_bytes=0, model_bytes=size, ratios={}, compressed_weights=1000,
        )  # fmt: skip
        dense = method == "dense"
        trial = f"trial{len(self.records)}"
        record = Record(
            trial=trial, artifact=None if dense else trial, suite="t", model=MODEL, method=method,
            budget=None if dense else BudgetFacts(centre=round(bits), window=0.1), status="done",
            ledger=None if dense else ledger, metrics=metrics, fingerprints={"f": {"context": 64}}, **facts,
        )  # fmt: skip
        self.records.append(record)
        write_record(self.folder / trial, record, items)

    def table(self) -> Table:
        return gather(self.records, {r.trial: self.folder / r.trial for r in self.records})


HITS = np.arange(100) % 5 != 0


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    found = Trials(tmp_path)
    found.add("dense", 16, HARD, HITS)
    found.add("gptq", 2.0, HARD + 0.2, HITS & (np.arange(100) % 7 != 0))
    found.add("gptq", 3.0, HARD + 0.1, HITS)
    return found


def test_one_is_dense_and_more_is_better_in_every_metric(trials: Trials) -> None:
    (model,) = trials.table().models
    for column in model.columns:
        points = recovery_points(model, column)
        for point in points:
            assert point.low is not None
            assert point.high is not None
            assert point.low <= point.value <= point.high
        values = [point.value for point in points]
        if column.name == "perplexity":
            assert values == pytest.approx([math.exp(-0.2), math.exp(-0.1)])
        else:
            assert values == pytest.approx([(HITS & (np.arange(100) % 7 != 0)).sum() / HITS.sum(), 1.0])


def test_figure_says_which_way_the_ratio_goes(trials: Trials) -> None:
    pytest.importorskip("matplotlib")
    table = trials.table()
    files = draw_recovery(table)
    assert sorted(files) == ["recovery-small-model.png", "recovery-small-model.svg"]
    assert files == draw_recovery(table)
    text = files["recovery-small-model.svg"].decode()
    for shown in ("recovery (dense / value)", "recovery (value / dense)", "dense", "Pareto front", "gptq"):
        assert f">{shown}</text>" in text
    assert "small model: recovery (1 is the dense model, higher is better)" in text


def test_without_the_dense_model_there_is_nothing_to_draw(trials: Trials) -> None:
    trials.records = trials.records[1:]
    assert draw_recovery(trials.table()) == {}


def test_what_lies_far_below_stands_at_the_edge(trials: Trials) -> None:
    pytest.importorskip("matplotlib")
    near = [0.9, 0.95, 0.97, 0.99]
    assert split_far([*near, 0.1]) == 0.9
    assert split_far([*near, 0.1, 0.2, 0.15]) == -math.inf  # that many are no outliers
    assert split_far([0.2, 0.4, 0.6, 0.8, 0.95]) == -math.inf
    assert split_far([0.99, 0.991, 0.97, 0.93]) == split_far([1, 1, 1, 0.9957]) == -math.inf  # near is near
    assert split_far([0.5]) == split_far([]) == -math.inf
    for bits in (2.05, 3.05, 3.08):
        trials.add("rtn", bits, HARD + 0.15, HITS)
    trials.add("pruned", 2.0, HARD + 9.0, HITS & False)
    text = draw_recovery(trials.table())["recovery-small-model.svg"].decode()
    assert text.count(">&lt;0.01 ↓</text>") == 2
    ticks = [float(found) for found in re.findall(r">([01]\.[0-9]+)</text>", text)]
    assert min(ticks) > 0.5


def test_a_method_keeps_its_colour_through_recovery(trials: Trials) -> None:
    trials.add("gptq", 2.0, HARD + 0.1, HITS, recovery=("lora",), recovery_options=({},))
    rows = [row for s in trials.table().models[0].sections for row in s.rows]
    looks = method_looks(rows)
    assert looks["gptq"][0] == looks["gptq + lora"][0]
    assert looks["gptq"][1] != looks["gptq + lora"][1]


def test_file_names_are_safe_and_unique() -> None:
    assert file_name("pareto-org/model: x-acc", {}) == "pareto-org-model-x-acc"
    assert file_name("a", {"a.png": b"", "a-2.png": b""}) == "a-3"
