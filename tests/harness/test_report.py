"""Tables, the machine-readable list and the plots, from records made by hand."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from evenbits.errors import MissingExtra
from evenbits.plots import pareto_front
from evenbits.record import (
    Bits,
    BudgetFacts,
    Failure,
    LayerFacts,
    Ledger,
    MetricFacts,
    ModelFacts,
    Record,
    SampleFacts,
    write_record,
)
from evenbits.report import as_csv, as_json, as_markdown, as_terminal, gather, verdict, write_report
from evenbits.report_text import format_bytes, format_number
from evenbits.rows import Row
from evenbits.tables import ModelTable, Table

MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float16", parameters=1_200_000, linear_weights=1_000_000,
    stored_bits=16, linear_bytes=2_000_000, model_bytes=2_400_000,
)  # fmt: skip
PROTOCOL = {"corpus": {"name": "wiki", "sha256": "ab"}, "context": 2048, "metric": "perplexity"}
HARD = np.random.default_rng(0).normal(2.0, 0.4, 100)  # nats per window, what all methods find hard
TWO = BudgetFacts(centre=2.0, window=0.05)


class Store:
    """Records with their items in folders, as a run leaves them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: list[Record] = []
        self.folders: dict[str, Path] = {}

    def add(
        self,
        method: str,
        linear: float | None = None,
        *,
        items: np.ndarray[Any, Any] | None = None,
        protocol: Mapping[str, Any] = PROTOCOL,
        metrics: Sequence[MetricFacts] = (),
        budget: BudgetFacts | None = TWO,
        **facts: Any,
    ) -> Record:
        trial = f"trial{len(self.records)}"
        found = list(metrics)
        if items is not None:
            with np.errstate(over="ignore"):
                value = float(np.exp(items.mean()))
            found.insert(
                0,
                MetricFacts(
                    name="perplexity", value=value, low=value * 0.98, high=value * 1.02, unit="perplexity",
                    better="lower", source="perplexity", fingerprint="f1", items="perplexity.npy",
                ),
            )  # fmt: skip
        record = Record(
            trial=trial,
            artifact=None if method == "dense" else f"artifact{len(self.records)}",
            suite="tests",
            model=MODEL,
            method=method,
            budget=None if method == "dense" else budget,
            ledger=None if linear is None else ledger(linear),
            metrics=tuple(found),
            fingerprints={"f1": dict(protocol), "f2": {"gpu": "none", "kernel": facts.pop("kernel", "dense")}},
            **{"status": "done", "seconds": {"compress": 1.5}, **facts},
        )
        self.records.append(record)
        self.folders[trial] = self.root / trial
        write_record(self.root / trial, record, {} if items is None else {"perplexity.npy": items})
        return record

    def table(self) -> Table:
        return gather(self.records, self.folders)

    def model(self) -> ModelTable:
        (model,) = self.table().models
        return model


def ledger(linear: float) -> Ledger:
    size = round(linear * MODEL.linear_weights / 8)
    return Ledger(
        bits=Bits(index=math.floor(linear), paper=linear - 0.01, linear=linear, model=8 * (size + 400_100) / 1_200_000),
        roles={"code": size - 1000, "scale": 1000},
        linear_bytes=size,
        rest_bytes=400_000,
        model_bytes=size + 400_100,
        ratios={},
        compressed_weights=MODEL.linear_weights,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "trials")


def worse_by(amount: float, seed: int = 1) -> np.ndarray[Any, Any]:
    return HARD + amount + np.random.default_rng(seed).normal(0.0, 0.01, len(HARD))


def marks(model: ModelTable, section: int = 0) -> dict[str, str]:
    column = model.columns[0]
    found = model.sections[section]
    return {row.name: found.marks.get((i, column.key), "") for i, row in enumerate(found.rows)}


def row(model: ModelTable, name: str) -> Row:
    return next(r for s in model.sections for r in (*s.rows, *s.outside) if r.name == name)


def test_marks_say_what_was_tested(store: Store) -> None:
    store.add("dense", items=HARD)
    store.add("good", 2.00, items=worse_by(0.1))
    store.add("twin", 2.00, items=worse_by(0.1, seed=2))
    store.add("bad", 2.01, items=worse_by(0.5))
    store.add("lean", 1.96, items=worse_by(0.4))
    model = store.model()
    assert [r.name for r in model.sections[0].rows][2:] == ["lean", "bad"]
    found = marks(model)
    assert {found["good"], found["twin"]} == {"*", "~"}
    assert found["bad"] == "-"
    assert found["lean"] == ""  # behind, but with fewer bits than all that are ahead


def test_best_is_marked_within_a_recovery_stage(store: Store) -> None:
    store.add("plain", 2.00, items=worse_by(0.2))
    store.add("lesser", 2.00, items=worse_by(0.3))
    store.add("tuned", 2.00, items=worse_by(0.05), recovery=("lora",), recovery_options=({},))
    assert marks(store.model()) == {"plain": "*", "lesser": "-", "tuned": ""}


def test_verdict_gives_its_reason(store: Store) -> None:
    store.add("good", 2.00, items=worse_by(0.1))
    store.add("bad", 2.00, items=worse_by(0.5))
    store.add("rich", 2.04, items=worse_by(0.01))
    store.add("tuned", 2.00, items=worse_by(0.01), recovery=("lora",), recovery_options=({"rank": 4},))
    store.add("calibrated", 2.00, items=worse_by(0.2), calibration={"corpus": "c4", "sha256": "1"})
    store.add("elsewhere", 2.00, items=worse_by(0.3), calibration={"corpus": "wiki", "sha256": "2"})
    store.add("unmeasured", 2.00)
    store.add("broken", 2.00, items=np.full(100, 2000.0))
    model = store.model()
    column = model.columns[0]

    def say(a: str, b: str) -> tuple[str, str]:
        found = verdict(row(model, a), row(model, b), column)
        return found.outcome, found.reason

    assert say("good", "bad")[0] == "better"
    assert re.fullmatch(r"paired test on 100 items: p (= 0\.00\d*|< 1e-06)", say("good", "bad")[1])
    assert say("bad", "good")[0] == "worse"
    assert say("good", "good")[0] == "not distinguishable"
    assert say("rich", "good") == ("not comparable", "rich is ahead with more bits (2.0400 against 2.0000)")
    assert say("good", "rich") == ("not comparable", "rich is ahead with more bits (2.0400 against 2.0000)")
    assert say("good", "tuned") == ("not comparable", "different recovery stages: none and lora")
    assert say("calibrated", "elsewhere") == ("not comparable", "different calibration tokens")
    assert say("calibrated", "bad")[0] == "better"  # bad was offered the same tokens
    assert say("good", "unmeasured") == ("not comparable", "no perplexity for unmeasured")
    assert say("good", "broken") == ("better", "one of them diverged")


def test_seeds_are_joined_and_must_not_overlap(store: Store) -> None:
    for seed in (0, 1):
        store.add("steady", 2.00, items=worse_by(0.20 + 0.001 * seed), seed=seed)
        store.add("lucky", 2.00, items=worse_by((0.05, 0.30)[seed]), seed=seed)
    model = store.model()
    steady, lucky = row(model, "steady"), row(model, "lucky")
    cell = lucky.cells[model.columns[0].key]
    assert len(lucky.records) == 2
    assert cell.value == pytest.approx(np.mean(cell.by_seed))
    assert cell.low is not None
    assert cell.high is not None
    assert cell.low <= min(cell.by_seed) < max(cell.by_seed) <= cell.high
    found = verdict(lucky, steady, model.columns[0])
    assert found.outcome == "not distinguishable"
    assert "2 and 2 seeds" in found.reason


def test_without_items_intervals_decide_and_without_those_nothing(store: Store) -> None:
    def accuracy(value: float, half: float | None) -> MetricFacts:
        low, high = (None, None) if half is None else (value - half, value + half)
        return MetricFacts(
            name="accuracy", value=value, low=low, high=high, unit="", better="higher", source="t", fingerprint="f1"
        )

    store.add("a", 2.0, metrics=[accuracy(0.7, 0.01)])
    store.add("b", 2.0, metrics=[accuracy(0.6, 0.01)])
    store.add("c", 2.0, metrics=[accuracy(0.695, 0.01)])
    store.add("d", 2.0, metrics=[accuracy(0.5, None)])
    model = store.model()
    assert marks(model) == {"a": "*", "c": "~", "b": "-", "d": ""}
    assert verdict(row(model, "a"), row(model, "d"), model.columns[0]).outcome == "not comparable"


def test_protocols_never_share_a_column(store: Store) -> None:
    store.add("dense", items=HARD)
    store.add("short", 2.0, items=worse_by(0.1), protocol={**PROTOCOL, "context": 512, "seed": 3})
    store.add("same", 2.0, items=worse_by(0.2), protocol={**PROTOCOL, "seed": 4})
    table = store.table()
    model = table.models[0]
    first, second = model.columns
    assert [first.title, second.title] == ["perplexity [a]", "perplexity [b]"]
    assert table.notes == (
        "perplexity was measured under 2 protocols, never compared: [a] context=2048; [b] context=512",
    )
    assert row(model, "short").cells.keys() == {second.key}
    assert row(model, "same").cells.keys() == model.dense[0].cells.keys() == {first.key}
    assert model.against_dense(row(model, "short"), second) is None
    assert model.against_dense(row(model, "same"), first) == pytest.approx(math.exp(0.2), rel=0.01)
    assert verdict(row(model, "short"), row(model, "same"), first).outcome == "not comparable"


def test_cost_of_different_kernels_is_not_compared(store: Store) -> None:
    def seconds(value: float) -> MetricFacts:
        return MetricFacts(
            name="decode", value=value, unit="s", better="lower", source="t", fingerprint="f2", volatile=True
        )

    store.add("slow", 2.0, metrics=[seconds(0.2)])
    store.add("fast", 2.0, metrics=[seconds(0.1)], kernel="fused")
    model = store.model()
    assert [c.title for c in model.columns] == ["decode [a]", "decode [b]"]
    assert not model.columns[0].quality
    assert model.sections[0].marks == {}  # what is not quality is not ranked


def test_what_is_outside_its_window_is_not_ranked(store: Store) -> None:
    store.add("fits", 2.0, items=worse_by(0.5))
    store.add("other", 2.02, items=worse_by(0.6))
    store.add("heavy", 2.14, items=worse_by(0.1))
    store.add("told", 2.0, items=worse_by(0.1), within_budget=False)
    store.add("free", 2.0, items=worse_by(0.1), budget=None)
    model = store.model()
    none, two = model.sections
    assert [r.name for r in none.rows] == ["free"]
    assert none.marks == {}
    assert marks(model, 1) == {"fits": "*", "other": "-"}
    assert [r.name for r in two.outside] == ["told", "heavy"]
    assert "outside the window, not ranked" in as_markdown(store.table())


def full(store: Store) -> Table:
    facts: dict[str, Any] = {"options": {"bits": 2, "group": 128, "act_order": True, "codebook": None}}
    store.add("dense", items=HARD)
    store.add("gptq", 2.01, items=worse_by(0.1), **facts)
    store.add("gptq", 2.01, items=worse_by(0.2), options={**facts["options"], "act_order": False})
    store.add("rtn", 2.14, items=worse_by(0.9), options={"note": "a|b *c*"})
    store.add("quip", budget=TWO, status="skipped", reason="no setting within 2 +- 0.05 linear bits")
    failure = Failure(kind="signal", signal="SIGKILL", stage="compress", message="killed\nby the system")
    store.add("vptq", budget=TWO, status="failed", failure=failure, seed=3)
    return store.table()


def test_markdown_holds_every_trial_and_is_well_formed(store: Store) -> None:
    text = as_markdown(full(store))
    assert "failed: small: vptq at 2 ±0.05 bits, seed 3: compress: SIGKILL: killed by the system" in text
    assert "skipped: small: quip at 2 ±0.05 bits, seed 0: no setting within 2 +- 0.05 linear bits" in text
    assert "a\\|b \\*c\\*" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = block.splitlines()
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    quality = text.split("### ")[1]
    assert quality.index("| dense |") < quality.index("| gptq |")
    assert "| act_order bits=2 group=128 |" in quality
    assert "| no-act_order bits=2 group=128 |" in quality
    assert f"{math.exp(HARD.mean()):.3f} [" in quality
    assert "32.000" not in text
    assert "| 16.000 | 16.000 | 16.000 | 16.000 | 2 MB | 2.4 MB | 2x | 1x | 2x | 1x |" in text


def test_terminal_fits_120_columns(store: Store) -> None:
    target = io.StringIO()
    as_terminal(full(store), Console(file=target, width=80, force_terminal=False))  # a file or pipe
    text = target.getvalue()
    assert max(map(len, text.splitlines())) <= 120
    line = next(line for line in text.splitlines() if "gptq" in line)
    for part in ("2 ±0.05", "act_order bits=2", "2.010", "*"):
        assert part in line  # one line a row: nothing was folded
    assert "SIGKILL" in text


def test_csv_reads_back_unrounded(store: Store) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(full(store)))))
    assert [r["method"] for r in rows] == ["dense", "gptq", "gptq", "rtn", "quip", "vptq"]
    assert [r["status"] for r in rows] == ["done", "done", "done", "outside the window", "skipped", "failed"]
    assert float(rows[0]["perplexity"]) == math.exp(HARD.mean())
    assert rows[1]["perplexity mark"] == "*"
    assert float(rows[1]["linear_ratio_fp32"]) == pytest.approx(32 / 2.01, rel=1e-3)
    assert float(rows[1]["model_ratio_stored"]) == pytest.approx(16 / float(rows[1]["model_bits"]))
    assert rows[5]["reason"].startswith("compress: SIGKILL")


KEYS = {
    "model", "method", "options", "budget", "seed", "recovery", "status", "bits", "bytes", "seconds", "metrics",
    "fingerprint", "layers", "samples", "remarks",
}  # fmt: skip


def test_json_has_exactly_the_promised_keys(store: Store) -> None:
    full(store)
    store.add("broken", 2.0, items=np.full(100, 2000.0))
    found = as_json(store.records)
    json.dumps(found, allow_nan=False)
    dense, gptq, *_, skipped, failed, broken = found
    assert dense.keys() == gptq.keys() == KEYS
    assert skipped.keys() == failed.keys() == KEYS | {"reason"}
    assert dense["bits"] == {"index": 16.0, "paper": 16.0, "linear": 16.0, "model": 16.0}
    assert dense["budget"] is None
    assert gptq["budget"] == {"centre": 2.0, "window": 0.05, "on": "linear"}
    assert gptq["bytes"] == {"code": 250_250, "scale": 1000, "linear": 251_250, "model": 651_350}
    assert gptq["metrics"]["perplexity"].keys() == {"value", "low", "high", "unit", "better"}
    assert gptq["fingerprint"] == {"perplexity": "f1"}
    assert skipped["bits"] is None
    assert broken["metrics"]["perplexity"]["value"] is None


def test_json_keeps_both_of_one_metric_measured_twice(store: Store) -> None:
    again = MetricFacts(
        name="perplexity", value=9.0, unit="perplexity", better="lower", source="t", fingerprint="f2"
    )  # fmt: skip
    record = store.add("gptq", 2.0, items=HARD, metrics=[again])
    (found,) = as_json([record])
    assert found["fingerprint"] == {"perplexity": "f1", "perplexity@f2": "f2"}
    assert found["metrics"]["perplexity@f2"]["value"] == 9.0


def test_no_records_make_an_empty_report(tmp_path: Path) -> None:
    assert sorted(p.name for p in write_report(tmp_path, [])) == ["report.csv", "report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text()) == []


def test_report_files_are_the_same_each_time(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    full(store)
    first = write_report(tmp_path / "1", store.records, store.folders)
    second = write_report(tmp_path / "2", store.records, store.folders)
    assert [p.name for p in first] == [
        "pareto-small-perplexity.png", "pareto-small-perplexity.svg", "recovery-small.png", "recovery-small.svg",
        "report.csv", "report.json", "report.md",
    ]  # fmt: skip
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    svg = first[1].read_text()
    assert ">linear bits per weight, from bytes on disk<" in svg  # text stays text
    assert "dc:date" not in svg


def test_what_is_far_beyond_the_rest_is_named_at_the_edge(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    full(store)
    plain = write_report(tmp_path / "1", store.records, store.folders)[1].read_text()
    assert "off the scale" not in plain
    store.add("pruned to death", 2.0, items=HARD + 9.0)  # e^9 times the perplexity
    text = write_report(tmp_path / "2", store.records, store.folders)[1].read_text()
    assert "pruned to death, off the scale:" in text
    ticks = [float(found) for found in re.findall(r">([0-9.]+)</text>", text)]
    assert max(ticks) < 1000


def test_plots_without_matplotlib_name_the_extra(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(store)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"evenbits\[plots\]"):
        write_report(tmp_path / "out", store.records, store.folders)
    assert not (tmp_path / "out").exists()
    assert len(write_report(tmp_path / "out", store.records, store.folders, plots=False)) == 3


def test_pareto_front_keeps_what_nothing_beats() -> None:
    points = [(2.0, 9.0), (2.0, 8.0), (3.0, 8.0), (3.0, 6.0), (4.0, 7.0)]
    assert pareto_front(points, "lower") == [1, 3]
    assert pareto_front(points, "higher") == [0]
    assert pareto_front([(2.0, 0.5), (3.0, 0.7)], "higher") == [0, 1]


def test_recovery_stands_with_its_interval(store: Store) -> None:
    table = full(store)
    model = table.models[0]
    line = next(line for line in as_markdown(table).splitlines() if "| act_order bits=2" in line)
    found = model.recovery(model.sections[0].rows[0], model.columns[0])
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert f"| {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] |" in line
    dense, gptq, *_ = csv.DictReader(io.StringIO(as_csv(table)))
    assert [float(gptq[f"perplexity vs dense{part}"]) for part in ("", " low", " high")] == [
        found.value, found.low, found.high,
    ]  # fmt: skip
    assert (dense["perplexity vs dense"], dense["perplexity vs dense low"]) == ("1.0", "")


def cost(value: float, fingerprint: str = "f2") -> MetricFacts:
    return MetricFacts(
        name="decode", value=value, unit="s", better="lower", source="t", fingerprint=fingerprint, volatile=True
    )


def test_costs_say_what_ran(store: Store) -> None:
    store.add("rtn", 2.0, items=worse_by(0.1), metrics=[cost(0.2)], kernel="dense-restored")
    text = as_markdown(store.table())
    assert "| decode (s) ↓ |" in text
    assert "ran on dense-restored weights: these times and energies say nothing about the method's speed" in text
    store.add("gptq", 2.0, items=worse_by(0.2), metrics=[cost(0.1)], kernel="marlin")
    text = as_markdown(store.table())
    assert "decode [b]: ran with kernel marlin; not ranked." in text
    assert "decode [a]: ran on dense-restored weights" in text
    assert "| decode [a] (s) ↓ | decode [b] (s) ↓ (kernel marlin) |" in text
    shown = text.split("cost of running")[1].split("\n\n")[1].splitlines()[2:]
    assert [line.split("|")[-3:-1] for line in shown] == [[" 0.2000 ", " - "], [" - ", " 0.1000 "]]  # and no mark


PACKED = {
    "packed_layers": 5,
    "dense_layers": 2,
    "held_bytes": 1500,
    "why_dense": {"no kernel": 2},
    "phases": {"decode": {"rows": 1, "ran": [{"kernel": "gemv", "config": "wide", "reason": "one row", "layers": 5}]}},
}


def test_what_ran_from_packed_weights_stands_beside_its_ratio(store: Store) -> None:
    def timed(value: float, kernels: Any) -> list[MetricFacts]:
        return [cost(value).model_copy(update={"details": {"kernels": kernels}})]

    whole = {"packed_layers": 0, "dense_layers": 0, "whole": "the dense model, by torch's matmul"}
    store.add("dense", None, items=worse_by(0.0), metrics=timed(0.2, whole), kernel="packed")
    store.add("rtn", 2.0, items=worse_by(0.1), metrics=timed(0.1, PACKED), kernel="packed")
    store.add("gptq", 2.0, items=worse_by(0.2), metrics=timed(0.3, PACKED), kernel="packed")
    refused = {"packed_layers": 0, "dense_layers": 7, "why_dense": {"no kernel": 7}}
    store.add("spqr", 2.0, items=worse_by(0.3), metrics=timed(0.2, refused), kernel="packed")
    text = as_markdown(store.table())
    header, _, *rows = text.split("cost of running")[1].split("\n\n")[1].splitlines()
    assert header.endswith("| decode (s) ↓ (kernel packed) | vs dense |")
    assert [row.split("|")[-3:-1] for row in rows] == [
        [" 0.2000 ", " 1.000 "], [" 0.1000 ", " 0.500 "], [" 0.3000 ", " 1.500 "], [" 0.2000 ", " dense "],
    ]  # fmt: skip
    assert "ran from packed weights where a method has a path for its layers, the dense model by torch's matmul" in text
    assert "say nothing about the method's speed" not in text
    assert "with packed weights, dense: the dense model, by torch's matmul." in text
    assert (
        "with packed weights, rtn @ 2 ±0.05 (holding 1.5 kB), gptq @ 2 ±0.05 (holding 1.5 kB): "
        "decode of 1 row: 5 layers by gemv wide (one row); "
        "2 layers on dense weights (no kernel)"
    ) in text
    assert "with packed weights, spqr @ 2 ±0.05: 7 layers on dense weights (no kernel)" in text


def test_protocols_are_listed_by_column(store: Store) -> None:
    store.add("rtn", 2.0, items=worse_by(0.1), metrics=[cost(0.2)])
    table = store.table()
    column = table.models[0].columns[0]
    section = as_markdown(table).split("## Protocols")[1]
    assert (
        f"- perplexity (`{column.protocol}`): corpus.name = wiki; corpus.sha256 = ab; context = 2048; "
        "metric = perplexity\n"
    ) in section
    assert "- decode (`" in section
    assert "## Protocols" not in as_markdown(gather([]))


def test_what_all_protocols_share_is_said_once(store: Store) -> None:
    tasks = [{"task": name, "bos": "none", "torch": "2"} for name in ("piqa", "arc")]
    mean = MetricFacts(name="mean", value=0.5, unit="accuracy", better="higher", source="t", fingerprint="f2")
    record = store.add("rtn", 2.0, items=worse_by(0.1), protocol={**PROTOCOL, "torch": "2"}, metrics=[mean])
    named = record.model_copy(update={"fingerprints": {**record.fingerprints, "f2": {"tasks": tasks, "torch": "2"}}})
    section = as_markdown(gather([named])).split("## Protocols")[1]
    assert "Unless a column says otherwise: torch = 2." in section
    assert "): tasks.\\*.task = piqa, arc; tasks.\\*.bos = none\n" in section
    assert section.count("torch") == 1


def test_what_was_cut_or_not_measured_is_noted(store: Store) -> None:
    def accuracy(cut: int) -> MetricFacts:
        return MetricFacts(
            name="accuracy", value=0.5, unit="", better="higher", source="t", fingerprint="f1",
            details={"items": 9, "truncated": cut},
        )  # fmt: skip

    store.add("a", 2.0, metrics=[accuracy(0)], remarks=("no energy meter here",))
    text = as_markdown(store.table())
    assert "Note: small: no energy meter here (1 of 1 trials)." in text
    assert "did not fit" not in text
    store.add("b", 2.0, metrics=[accuracy(3)])
    store.add("c", 2.0, metrics=[accuracy(5)])
    target = io.StringIO()
    as_terminal(store.table(), Console(file=target, width=200))
    for shown in (as_markdown(store.table()), target.getvalue()):
        assert "small: accuracy: 3 to 5 items did not fit in the context and were cut (2 of 3 trials)" in shown


def test_headings_and_settings_give_way_to_names(store: Store) -> None:
    """Two metrics of long names beside each other: no method is broken over lines."""
    long = [
        MetricFacts(name=f"reference_{task}_acc", value=0.5, low=0.4, high=0.6, unit="accuracy", better="higher",
                    source="t", fingerprint="f1")
        for task in ("winogrande", "hellaswag", "arc_challenge")
    ]  # fmt: skip
    options = {"codebook_size": 4096, "group_size": 128, "symmetric": True}
    store.add("dense", metrics=long)
    store.add("llm-codebook", 2.0, metrics=long, options=options)
    store.add("gptq", 2.0, metrics=long, options=options)
    target = io.StringIO()
    as_terminal(store.table(), Console(file=target, width=80))
    lines = target.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("llm-codebook" in line for line in lines) == 3
    assert any("winogrande_acc" in line for line in lines)


def shown(table: Table, width: int) -> str:
    target = io.StringIO()
    as_terminal(table, Console(file=target, width=width, force_terminal=True, color_system=None))
    return target.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_terminal_cuts_a_number(store: Store, width: int) -> None:
    """Every number of the wide table stands in the narrow one too, whole."""
    full(store)
    accuracy = MetricFacts(
        name="mean_acc", value=0.51234, low=0.41234, high=0.61234, unit="accuracy", better="higher", source="t",
        fingerprint="f1",
    )  # fmt: skip
    for method, stages in (("awq", ()), ("awq", ("distill",)), ("a method of a very long name, not tuned", ())):
        store.add(
            method, 2.0, items=worse_by(0.3), metrics=[accuracy, cost(0.25)], options={"bits": 2, "note": "x" * 60},
            recovery=stages, recovery_options=({},) * len(stages),
        )  # fmt: skip
    table = store.table()
    text = shown(table, width)
    assert max(map(len, text.splitlines())) <= width
    for numbers in (r"(?<![\w.])\d+\.\d+x?(?![\w.])", r"[\d.]+ \[[\d.]+, [\d.]+\]"):
        wide = set(re.findall(numbers, shown(table, 400)))
        assert len(wide) > 3
        assert wide <= set(re.findall(numbers, text))


def test_rows_of_one_name_are_told_apart_on_every_sheet(store: Store) -> None:
    """The dense model after two recoveries of one name, and a method with and without its recovery."""
    tasks = [
        MetricFacts(name=f"task{i}_acc", value=0.5, unit="accuracy", better="higher", source="t", fingerprint="f1")
        for i in range(3)
    ]
    store.add("dense", items=HARD, metrics=tasks)
    for loss in ("kl", "next"):
        given: dict[str, Any] = {"recovery": ("distill",), "recovery_options": ({"loss": loss},)}
        store.add("dense", 16.0, items=HARD, metrics=tasks, **given)
    store.add("rtn", 2.0, items=worse_by(0.2), metrics=tasks)
    store.add("rtn", 2.0, items=worse_by(0.1), metrics=tasks, recovery=("distill",), recovery_options=({"loss": "kl"},))
    for sheet in shown(store.table(), 120).split("small: ")[1:4]:
        lines = [line for line in sheet.split("\n*")[0].splitlines() if re.match(r" [^b].* (dense|rtn) ", line)]
        words = [line.split("0.5000")[0] if "more" in sheet else line for line in lines]
        assert len(words) == 5
        assert len(set(words)) == 5
        assert sum("distill" in word for word in words) == 3
    markdown = as_markdown(store.table()).split("bits and bytes")[1].split("\n\n")[1]
    assert markdown.splitlines()[0].startswith("| budget | method | settings | recovery | index |")


def test_names_are_shown_as_they_are(store: Store, tmp_path: Path) -> None:
    """rich's markup and emoji codes, mathtext, and the underscore with which matplotlib hides a label."""
    names = ["[red]a[/] :bug:", "$\\frac{x}$", "$b_{$", "_hidden", "日本"]
    store.add("dense", items=HARD)
    for number, name in enumerate(names):
        store.add("rtn", 2.0, items=worse_by(0.1 * number), label=name, options={"note": f"{name} [bold]"})
        store.add("rtn", 2.4, items=worse_by(0.1 * number), label=name)
    text = shown(store.table(), 200)
    assert all(name in text for name in names)
    pytest.importorskip("matplotlib")
    for path in write_report(tmp_path, store.records, store.folders):
        if path.suffix == ".svg":
            found = path.read_text().replace("\u200b", "")
            assert all(f">{name}" in found for name in names)


def test_a_report_leaves_nothing_of_an_earlier_one(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    full(store)
    folder, mine = tmp_path / "report", {"mine.md", "notes-layers.md"}
    folder.mkdir()
    for name in ("pareto-small-gone.svg", "samples.md", *mine):
        (folder / name).write_text("old")
    written = write_report(folder, store.records, store.folders, table=store.table())
    assert {path.name for path in folder.iterdir()} == {path.name for path in written} | mine


def leaderboard() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "leaderboard.py"
    spec = importlib.util.spec_from_file_location("leaderboard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_leaderboard_has_every_page_and_picture(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = (LayerFacts(name="model.layers.0.mlp.up_proj", bits=2.0, error=0.1),)
    samples = (SampleFacts(source="samples", prompt="A [b](c.md)", text=" d"),)
    store.add("dense", items=HARD, samples=samples)
    store.add("rtn", 2.0, items=worse_by(0.1), layers=layers, samples=samples)
    written, folder = tmp_path / "report", tmp_path / "board"
    write_report(written, store.records, store.folders)
    folder.mkdir()
    (folder / "stale.png").write_text("of an earlier report")
    names = leaderboard().copy_report(written, folder, "A note.")
    assert names == sorted(path.name for path in folder.iterdir())
    assert {"report.md", "layers.md", "samples.md", "recovery-small.png", "layers-small-error.png"} <= set(names)
    linked = [
        target for page in folder.glob("*.md") for target in re.findall(r"(?<!\\)\]\(([^)]*)\)", page.read_text())
    ]
    assert set(linked) == set(names) - {"report.md"}
    report = (folder / "report.md").read_text()
    assert report.endswith("\n\nA note.\n")
    assert "`layers.csv`" in report
    for picture in folder.glob("*.png"):
        assert picture.stat().st_size < (written / picture.name).stat().st_size


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.4721, "5.472"), (0.98765, "0.9877"), (123.456, "123.5"), (98765.4, "98765"), (2.5e7, "2.500e+07"),
     (9.99996, "10.000"), (0.0, "0"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_are_readable(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (251_250, "251 kB"), (999_600, "1 MB"), (2.2e9, "2.2 GB")])
def test_bytes_are_readable(count: float, text: str) -> None:
    assert format_bytes(count) == text
