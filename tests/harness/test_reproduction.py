"""Printed beside measured: every outcome, what gates and what never does, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.harness.trials import MODEL, Trials, accuracy, ledger, perplexity
from typer.testing import CliRunner

from evenbits import cli
from evenbits.errors import SuiteError
from evenbits.plugins import Registry, load_plugins
from evenbits.published import Formula, Ordering, Origin, Published, PublishedRow, read_published
from evenbits.record import BudgetFacts, Failure
from evenbits.report import write_report
from evenbits.report_reproduction import print_reproduction, reproduction_markdown, summary_line
from evenbits.report_reproduction_data import reproduction_csv, reproduction_json
from evenbits.reproduced_entries import names_of
from evenbits.reproduction import ReproducedCell, Reproduction, failing, load_reproduction, reproduce
from evenbits.shapes import LLAMA2_7B
from evenbits.tables import ModelTable, gather

ORIGIN = Origin(source="a paper, Table 1", version="v2", context=2048, era="B", trust="V")
PROTOCOL = {"context": 2048, "era": "B", "task": "arc_easy", "items": 2376, "metric": "any"}
SPREAD = np.random.default_rng(0).normal(0, 0.05, 200)  # of the losses over windows
SPREAD -= SPREAD.mean()
THREE = BudgetFacts(centre=3.0, window=0.1)


def at_perplexity(value: float, *, spread: float = 1.0) -> tuple[Any, Any]:
    return perplexity(math.log(value) + spread * SPREAD)


def at_accuracy(value: float, items: int = 2376, **facts: Any) -> tuple[Any, Any]:
    """Right on the first `value` of the items, so that two models differ in one direction alone."""
    return accuracy((np.arange(items) < round(value * items)).astype(np.float64), name="arc_easy_acc", **facts)


def printed(label: str | None, tolerance: str = "scalar4", **facts: Any) -> PublishedRow:
    return PublishedRow(**{"method": "M", "label": label, "stage": "none", "tolerance": tolerance, **facts})


def published(*rows: PublishedRow, **facts: Any) -> Published:
    return Published(**{"title": "T", "model": MODEL.name, "origin": ORIGIN, "rows": rows, **facts})


def table(trials: Trials) -> ModelTable:
    (model,) = gather(trials.records, trials.folders).models
    return model


def cell(trials: Trials, row: PublishedRow, metric: str = "perplexity", **facts: Any) -> ReproducedCell:
    (found,) = reproduce(published(row, **facts), table(trials)).rows
    return next(one for one in found.cells if one.metric == metric)


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    """dense, and gptq at 2 bits: perplexities 5.47 and 5.694, accuracies 70 and 65 % of the whole ARC-Easy."""
    made = Trials(tmp_path / "results")
    made.add("dense", at_perplexity(5.47), at_accuracy(0.70), protocol=PROTOCOL)
    made.add("gptq", at_perplexity(5.694), at_accuracy(0.65), linear=2.14, protocol=PROTOCOL)
    return made


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()


@pytest.mark.parametrize(
    ("value", "tolerance", "outcome", "said"),
    [
        (5.69, "scalar4", "agrees", "within ±0.03"),
        (5.66, "scalar4", "agrees", "within ±0.03"),  # 5.694 is 5.69 in the paper's digits
        (5.65, "scalar4", "differs", "outside ±0.03; its 95 % interval holds the printed value"),
        (4.00, "scalar4", "differs", "outside ±0.03"),
        (5.55, "codebook", "agrees", "within ±0.166"),  # 3 %
        (5.40, "codebook", "differs", "outside ±0.162"),
        (60.4, "scalar2", "differs", "1.04 times the dense model's, not above 3"),
    ],
)
def test_a_perplexity_by_its_class(trials: Trials, value: float, tolerance: str, outcome: str, said: str) -> None:
    found = cell(trials, printed("gptq", tolerance, values={"perplexity": value}))
    assert (found.outcome, found.published) == (outcome, value)
    assert found.reason.startswith(said)
    assert found.measured == pytest.approx(5.694)
    assert (found.difference is None) == (tolerance == "scalar2")
    assert found.gates == (tolerance != "scalar2")


def test_every_number_is_rounded_to_the_digits_that_are_printed(trials: Trials, tmp_path: Path) -> None:
    """9.39 and 13.4 in one row of the Qwen3 study; a last 0 is a digit, too: 13.40 is not 13.4."""
    text = """title = "T"\nmodel = "small"\norigin = { source = "S", context = 2048, trust = "V" }
    [[rows]]\nmethod = "M"\nlabel = "rtn"\nstage = "none"\ntolerance = "dense"
    values = { perplexity = 9.39, c4_perplexity = PRINTED }"""
    named = [(f"{name}perplexity", value) for name, value in (("", 9.393), ("c4_", 13.44))]
    metrics = [perplexity(math.log(value) + SPREAD, name=name) for name, value in named]
    trials.add("rtn", *metrics, budget=THREE, protocol=PROTOCOL)
    for number, outcome in (("13.4", "agrees"), ("13.40", "differs"), ("13.44", "agrees")):
        path = tmp_path / "t.published.toml"
        path.write_text(text.replace("PRINTED", number))
        found = reproduce(read_published(path), table(trials)).rows[0].cells
        assert [one.outcome for one in found] == ["agrees", outcome]
        assert [one.decimals for one in found] == [2, len(number) - 3]


def test_an_accuracy_in_per_cent(trials: Trials) -> None:
    near = cell(trials, printed("gptq", values={"arc_easy_acc": 64.1}), "arc_easy_acc")
    assert (near.outcome, near.reason) == ("agrees", "within ±1 points")
    assert near.measured == pytest.approx(64.98, abs=0.01)
    assert near.difference == pytest.approx(0.88, abs=0.01)
    assert cell(trials, printed("gptq", values={"arc_easy_acc": 63.8}), "arc_easy_acc").outcome == "differs"
    dense = cell(trials, printed("dense", "dense", values={"arc_easy_acc": 69.4}), "arc_easy_acc")
    assert (dense.outcome, dense.reason.split(";")[0]) == ("differs", "outside ±0.5 points")


def test_a_part_of_the_test_set_may_differ_by_chance_too(tmp_path: Path) -> None:
    """What chance adds is half the interval that faces the printed value, less the more of the set was measured."""
    row = printed("gptq", values={"arc_easy_acc": 70.0})
    for items, outcome, chance in ((200, "agrees", 6.7), (2000, "differs", 0.88), (2376, "differs", 0.0)):
        made = Trials(tmp_path / str(items))
        metric = at_accuracy(0.65, items, low=0.65 - 0.93 / items**0.5, high=0.65 + 0.99 / items**0.5)
        made.add("gptq", metric, protocol={**PROTOCOL, "items": items})
        found = cell(made, row, "arc_easy_acc")
        assert (found.outcome, items) == (outcome, items)
        assert found.allowed == pytest.approx(1.0 + chance, abs=0.06)
        assert ("for being the first" in found.reason) == (items < 2376)


def test_part_of_the_windows_and_of_a_mean(tmp_path: Path) -> None:
    made = Trials(tmp_path / "results")
    counts = {"windows": 16, "tokens": 341_469, "windows_rule": "joined"}
    tasks = {"a": {"task": "piqa", "items": 1838}, "b": {"task": "arc_easy", "items": 594}}
    mean = accuracy(np.full(4, 0.5), name="mean_acc", low=0.4, high=0.6)
    both = {key: value for key, value in PROTOCOL.items() if key not in ("task", "items")}
    made.add("gptq", at_perplexity(5.7), mean, protocol={**both, **counts, "tasks": tasks})
    row = printed("gptq", values={"perplexity": 5.6, "mean_acc": 59.0})
    found = cell(made, row)
    assert found.outcome == "agrees"
    assert found.reason.endswith("for being the first 16 of 166 windows")
    assert cell(made, row, "mean_acc").allowed == pytest.approx(1 + 10 * math.sqrt(3 / 4))


@pytest.mark.parametrize(
    ("origin", "metric", "said"),
    [
        ({"context": 4096}, "perplexity", "context 2048 against 4096"),
        ({"era": "A"}, "arc_easy_acc", "lm-eval era B against A"),
    ],
)
def test_other_protocols_are_not_compared(trials: Trials, origin: Any, metric: str, said: str) -> None:
    row = printed("gptq", values={metric: 60.0}, **origin)
    found = cell(trials, row, metric)
    assert (found.outcome, found.reason, found.difference) == ("not comparable", said, None)
    assert found.measured is not None
    silent = Origin(source="a paper", trust="V")
    found = cell(trials, printed("gptq", values={metric: 60.0}), metric, origin=silent)
    assert found.outcome == "not comparable"
    assert found.reason.startswith("the source does not say its")


def test_of_two_protocols_the_sources_own_is_taken(trials: Trials) -> None:
    facts: dict[str, Any] = {"at": 3.0, "values": {"perplexity": 5.0}}
    metric, items = at_perplexity(6.0)
    other = metric.model_copy(update={"value": 5.0, "fingerprint": "g"})
    fingerprints = {"f": dict(PROTOCOL), "g": {**PROTOCOL, "context": 4096}}
    trials.add("rtn", (metric, items), (other, None), budget=THREE, fingerprints=fingerprints)
    assert cell(trials, printed("rtn", **facts)).measured == pytest.approx(6.0)
    found = cell(trials, printed("rtn", context=4096, **facts))
    assert (found.measured, found.outcome) == (5.0, "agrees")


def test_what_was_not_measured_says_why(trials: Trials) -> None:
    lost = Failure(kind="memory", stage="compress", message="more than 8 GiB")
    trials.add("aqlm", status="failed", failure=lost, ledger=None, protocol=PROTOCOL)
    trials.add("vptq", status="skipped", reason="no setting within 2", ledger=None, protocol=PROTOCOL)
    values = {"perplexity": 5.0, "arc_easy_acc": 50.0}
    rows = (
        printed(None, values=values),
        printed("qtip", values=values),
        printed("aqlm", values=values),
        printed("vptq", at=2.0, values=values),
        printed("gptq", at=3.0, values=values),
        printed("awq", values=values),
        printed("gptq", values={"c4_perplexity": 7.0}),
    )
    known = {name: {name} for name in ("gptq", "aqlm", "vptq", "awq")}
    found = [row.cells[0] for row in reproduce(published(*rows), table(trials), known=known).rows]
    assert [(one.outcome, one.reason) for one in found] == [
        ("published only", "no method here reproduces it"),
        ("published only", "the suite has no entry 'qtip'"),
        ("not measured", "aqlm failed: compress: memory: more than 8 GiB"),
        ("not measured", "vptq@2 skipped: no setting within 2"),
        ("not measured", "gptq@3: it was run at 2 alone"),
        ("not measured", "not run yet"),
        ("not measured", "the suite measured no c4_perplexity of it"),
    ]
    assert not failing(reproduce(published(*rows), table(trials), known=known))
    nothing = reproduce(published(*rows), None)
    assert {one.outcome for row in nothing.rows for one in row.cells} == {"published only", "not measured"}


def test_budgets_and_recovery_stages_are_told_apart(trials: Trials) -> None:
    trials.add("gptq", at_perplexity(5.5), budget=THREE, protocol=PROTOCOL)
    trials.add("gptq", at_perplexity(5.4), budget=THREE, recovery=("lora",), protocol=PROTOCOL)
    trials.add("rtn", at_perplexity(5.3), budget=THREE, recovery=("lora",), protocol=PROTOCOL)
    values = {"perplexity": 5.0}
    measured = {
        (label, at): cell(trials, printed(label, at=at, values=values))
        for label, at in (("gptq", 2.0), ("gptq", 3.0), ("gptq", None), ("gptq+lora", None), ("rtn", None))
    }
    assert [one.measured for one in measured.values()] == [
        pytest.approx(5.694), pytest.approx(5.5), None, pytest.approx(5.4), pytest.approx(5.3)
    ]  # fmt: skip
    assert measured["gptq", None].reason.startswith("'gptq' names several: gptq@2, gptq@3;")


def test_a_stage_never_stands_in_for_the_entry_that_failed(trials: Trials) -> None:
    lost = Failure(kind="memory", stage="compress", message="more than 8 GiB")
    trials.add("aqlm", status="failed", failure=lost, ledger=None, protocol=PROTOCOL)
    trials.add("aqlm", at_perplexity(5.0), recovery=("lora",), protocol=PROTOCOL)
    trials.add("awq", at_perplexity(5.0), recovery=("lora",), protocol=PROTOCOL)
    rows = [printed(label, values={"perplexity": 5.0}) for label in ("aqlm", "awq", "awq+lora")]
    known = names_of([("aqlm", ()), ("aqlm", ("lora",)), ("awq", ()), ("awq", ("lora",))])
    found = reproduce(published(*rows), table(trials), known=known).rows
    assert [one.cells[0].reason for one in found[:2]] == [
        "aqlm failed: compress: memory: more than 8 GiB",
        "not run yet",
    ]
    assert found[2].cells[0].outcome == "agrees"


def test_what_never_gates(trials: Trials) -> None:
    values = {"perplexity": 4.0, "arc_easy_acc": 50.0}
    rows = [printed("gptq", method=trust, trust=trust, values=values) for trust in ("V", "V2", "C", "S", "R", "X")]
    rows.append(printed("gptq", "tuned", method="advisory", values=values))
    rows.append(printed("gptq", method="mixed", values=values, mixed={"perplexity": "two eras"}))
    found = reproduce(published(*rows), table(trials))
    assert {one.outcome for row in found.rows for one in row.cells} == {"differs"}
    assert [one.what for one in failing(found)] == ["V (gptq)"] * 2 + ["V2 (gptq)"] * 2 + ["C (gptq)"] * 2 + [
        "mixed (gptq)"
    ]
    assert failing(found)[-1].metric == "arc_easy_acc"
    assert found.rows[-1].cells[0].reason.endswith("; in the source: two eras")
    assert summary_line(found).startswith("7 fail; 16 printed: 16 differ")


@pytest.mark.parametrize("size", [False, True])
def test_another_model_is_shown_and_never_compared(trials: Trials, size: bool) -> None:
    claim = Ordering(claim="dense first", metric="perplexity", first="dense", behind=("gptq",))
    worse = Ordering(claim="gptq first", metric="perplexity", first="gptq", behind=("dense",))
    row = printed("gptq", bits=2.0, values={"perplexity": 4.0})
    name, shapes = (MODEL.name, LLAMA2_7B) if size else ("Llama-2-7B", None)
    found = reproduce(published(row, orderings=(claim, worse), model=name), table(trials), shapes=shapes)
    assert not found.same_model
    bits, value = found.rows[0].cells
    assert (value.outcome, value.reason, value.difference) == ("not comparable", "another model", None)
    assert value.measured == pytest.approx(5.694)
    assert bits.outcome == "not comparable"
    assert [one.outcome for one in found.orderings] == ["agrees", "differs"]
    assert found.orderings[0].reason.startswith("on small, not the paper's model: ahead of gptq")
    assert not failing(found)


def test_a_local_copy_of_the_hubs_model_is_the_papers(trials: Trials) -> None:
    found = reproduce(published(printed("gptq", values={"perplexity": 5.69}), model="somebody/Small"), table(trials))
    assert found.same_model
    assert found.rows[0].cells[0].outcome == "agrees"


def test_a_class_without_a_stable_value(trials: Trials) -> None:
    trials.add("rtn", at_perplexity(40.0), at_accuracy(0.3), budget=THREE, protocol=PROTOCOL)
    row = printed("rtn", "scalar2", values={"perplexity": 4200.0, "arc_easy_acc": 27.0})
    found = cell(trials, row)
    assert (found.outcome, found.gates) == ("agrees", False)
    assert found.reason.startswith("7.31 times the dense model's, above 3")
    assert cell(trials, row, "arc_easy_acc").outcome == "not comparable"


def test_a_diverged_model_differs(trials: Trials) -> None:
    trials.add("rtn", perplexity(np.full(200, 800.0)), budget=THREE, protocol=PROTOCOL)
    found = cell(trials, printed("rtn", values={"perplexity": 5.0}))
    assert (found.outcome, found.reason) == ("differs", "the model diverged")
    assert cell(trials, printed("rtn", "scalar2", values={"perplexity": 5.0})).outcome == "agrees"
    shown = reproduce(published(printed("rtn", values={"perplexity": 5.0})), table(trials))
    assert json.loads(reproduction_json(shown))["rows"][0]["cells"][0]["measured"] is None


def test_a_share_of_the_dense_models_number(trials: Trials) -> None:
    """As LLM-Codebook claims: 99 % of dense; a source of such a claim need not say its protocol."""
    silent = Origin(source="an abstract", trust="V")
    row = printed("gptq", values={"arc_easy_acc vs dense": 93.0})
    found = cell(trials, row, "arc_easy_acc vs dense", origin=silent)
    assert found.measured == pytest.approx(100 * 0.65 / 0.70, abs=0.1)
    assert (found.outcome, found.low is not None) == ("agrees", True)


def test_bits_by_the_papers_formula_and_by_bytes_on_disk(trials: Trials) -> None:
    """gptq here is 2.14 by both; awq stores 3.15 where its formula says 3.125."""
    stored = ledger(3.15)
    paper = stored.model_copy(update={"bits": stored.bits.model_copy(update={"paper": 3.125})})
    trials.add("awq", at_perplexity(6.2), ledger=paper, budget=THREE, protocol=PROTOCOL)
    values = {"perplexity": 6.2}
    rows = (
        printed("awq", bits=3.13, values=values),
        printed("gptq", bits=2.0, values=values),
        printed("gptq", bits=2.0, values=values, mixed={"bits": "nominal"}),
        printed("dense", bits=16.0, values=values),
        printed(None, bits=2.0, values=values),
    )
    found = reproduce(published(*rows), table(trials)).rows
    assert [(one.cells[0].metric, one.cells[0].outcome) for one in found] == [
        ("bits", "agrees"), ("bits", "differs"), ("bits", "differs"), ("bits", "agrees"), ("bits", "published only")
    ]  # fmt: skip
    assert [one.cells[0].gates for one in found] == [True, True, False, True, True]
    assert (found[0].paper_bits, found[0].measured_bits, found[0].bits_note) == (
        3.125,
        3.15,
        "outside its budget's window",
    )
    assert found[1].bits_note == "2.140 bits on disk where 2 are printed (+0.140); outside its budget's window"
    assert found[3].bits_note == ""


def ordering(first: str, *behind: str, at_least: bool = False, metric: str = "arc_easy_acc", **facts: Any) -> Ordering:
    return Ordering(claim="C", metric=metric, first=first, behind=behind, at_least=at_least, **facts)


def test_orderings_by_the_rules_of_verdict(trials: Trials) -> None:
    trials.add("better", at_accuracy(0.68), linear=2.0, protocol=PROTOCOL)
    trials.add("equal", at_accuracy(0.65), linear=2.0, protocol=PROTOCOL)
    trials.add("nearly", at_accuracy(0.649), linear=2.0, protocol=PROTOCOL)
    trials.add("larger", at_accuracy(0.69), linear=2.5, protocol=PROTOCOL)
    trials.add("tuned", at_accuracy(0.69), linear=2.0, recovery=("lora",), protocol=PROTOCOL)
    trials.add("over", at_accuracy(0.72), linear=3.0, budget=THREE, protocol=PROTOCOL)
    claims = (
        (ordering("better", "gptq"), "agrees", "ahead of gptq (68.01 against 64.98; exact McNemar"),
        (ordering("equal", "better"), "differs", "behind better"),
        (ordering("equal", "gptq"), "not comparable", "not told apart from gptq"),
        (ordering("equal", "gptq", at_least=True), "agrees", "not told apart from gptq"),
        (ordering("larger", "gptq"), "not comparable", "larger is ahead with more bits (2.5000 against 2.1400)"),
        (ordering("gptq", "larger"), "not comparable", "point the other way"),
        (ordering("nearly", "gptq", at_least=True), "not comparable", "not told apart from gptq"),
        (ordering("tuned", "gptq"), "not comparable", "different recovery stages"),
        (ordering("over@3", "dense", at_least=True), "agrees", "ahead of dense"),
        (ordering("tuned+lora", "dense", at_least=True), "differs", "behind dense (68.98 against 69.99"),
        (ordering("better", "gptq", "equal"), "agrees", "; ahead of equal"),
        (ordering("better", "gptq", "over"), "not comparable", "ahead of gptq"),
        (ordering("better", "gptq", "none"), "not measured", "none: not run yet"),
        (ordering("gptq", "better", "none"), "differs", "behind better"),
        (ordering("better", "gptq", metric="piqa_acc"), "not measured", "no piqa_acc of better"),
        (ordering("better", "gptq", era="A"), "agrees", "lm-eval era B against A: ahead of gptq"),
    )
    found = reproduce(published(orderings=[one for one, _, _ in claims]), table(trials)).orderings
    for result, (claim, outcome, said) in zip(found, claims, strict=True):
        assert (claim.first, claim.behind, result.outcome) == (claim.first, claim.behind, outcome), result.reason
        assert said in result.reason
        assert result.gates == (claim.era is None)
    failed = failing(reproduce(published(orderings=[ordering("equal", "better", trust="S")]), table(trials)))
    assert not failed


def test_an_ordering_against_dense_needs_no_even_bits(trials: Trials) -> None:
    """Dense is ahead with more bits, and its calibration and stages are others: the claim fails all the same."""
    claim = ordering("gptq", "dense", at_least=True)
    (found,) = reproduce(published(orderings=(claim,)), table(trials)).orderings
    assert found.outcome == "differs"
    assert [one.what for one in failing(reproduce(published(orderings=(claim,)), table(trials)))] == ["C"]


def average(values: list[float], mean: float, **facts: Any) -> PublishedRow:
    names = tuple("abcde")
    named = {**dict(zip(names, values, strict=True)), "mean": mean}
    return printed(None, values=named, average="mean", average_of=names, **facts)


def test_printed_averages_are_computed_again() -> None:
    """PocketLLM at 2.02 bits; VPTQ at 2.02, printed 58.2; at 3.02 with its 4-bit HellaSwag, as PocketLLM prints it."""
    rows = (
        average([67.25, 76.71, 53.24, 69.07, 36.77], 60.61, bits=2.02),
        average([64.33, 75.19, 52.08, 63.8, 35.24], 58.2),
        average([68.0, 77.3, 56.0, 69.1, 39.3], 61.72),
        average([68.0, 77.3, 54.9, 69.1, 39.3], 61.72, mixed={"mean": "known"}),
    )
    found = reproduce(published(*rows), None).recomputed
    assert [one.outcome for one in found] == ["agrees", "differs", "differs", "agrees"]
    assert [one.computed for one in found] == pytest.approx([60.608, 58.128, 61.94, 61.72])
    assert found[0].what == "M, 2.02 bits: mean"
    assert found[3].note == "known"
    assert not any(one.gates for one in found)


def test_bit_formulas_on_llama_2_shapes(registry: Registry) -> None:
    options = {"codebooks": 1, "code_bits": 15, "group_size": 8}
    formulas = (
        Formula(method="aqlm", options=options, printed=2.02),
        Formula(method="aqlm", options=options, printed=2.01),
        Formula(method="qtip", printed=2.0),
    )
    found = reproduce(published(formulas=formulas), None, shapes=LLAMA2_7B, registry=registry)
    right, wrong, absent = found.recomputed
    assert right.outcome == "agrees"
    assert right.computed == pytest.approx(2.0234, abs=5e-5)
    assert (wrong.outcome, wrong.note) == ("differs", "outside ±0.005")
    assert (absent.outcome, absent.computed) == ("published only", None)
    assert absent.note.startswith("unknown method 'qtip'")
    assert [one.published for one in failing(found)] == [2.01]
    without = reproduce(published(formulas=formulas), None, registry=registry).recomputed
    assert {one.outcome for one in without} == {"not measured"}
    bad = published(formulas=(Formula(method="aqlm", options={"codebook": 1}, printed=2.0),))
    with pytest.raises(SuiteError, match=r"formula aqlm: options\.codebook: unknown option"):
        reproduce(bad, None, shapes=LLAMA2_7B, registry=registry)


SUITE = """
name = "tests"
methods = ["gptq", { name = "aqlm", label = "aqlm-2x8", recovery = ["lora"] }]
[model]
name = "small"
path = "${SMALL:-}"
"""
VALUES = """
title = "Table 1 of a paper"
model = "small"
notes = ["its ARC columns are of another era"]
[origin]
source = "a paper, Table 1"
context = 2048
era = "B"
trust = "V"
[[rows]]
method = "GPTQ [g128]"
label = "gptq"
bits = 2.14
stage = "none"
tolerance = "scalar4"
values = { perplexity = 5.69, arc_easy_acc = 50.0 }
[[rows]]
method = "AQLM"
label = "aqlm-2x8+lora"
bits = 2.0
stage = "lora"
tolerance = "tuned"
values = { perplexity = 6.59, arc_easy_acc = 63.68, c4_perplexity = 8.54 }
[[rows]]
method = "QuIP#"
stage = "block+e2e"
tolerance = "tuned"
trust = "S"
values = { perplexity = 6.19 }
[[orderings]]
claim = "GPTQ behind dense"
metric = "arc_easy_acc"
first = "dense"
behind = ["gptq"]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "tests.published.toml").write_text(VALUES)
    path = tmp_path / "tests.toml"
    path.write_text(SUITE)
    return path


def test_loaded_from_a_suite_and_a_results_folder(trials: Trials, suite: Path, registry: Registry) -> None:
    found = load_reproduction(suite, trials.store, registry)
    assert [row.cells[0].outcome for row in found.rows] == ["agrees", "not measured", "published only"]
    assert [(one.what, one.metric, one.published) for one in failing(found)] == [
        ("GPTQ [g128] (gptq)", "arc_easy_acc", 50.0)
    ]
    before = load_reproduction(suite, type(trials.store)(suite.parent / "nothing"), registry)
    assert [row.cells[0].outcome for row in before.rows] == ["not measured", "not measured", "published only"]
    suite.with_name("tests.published.toml").unlink()
    with pytest.raises(SuiteError, match=r"tests\.published\.toml: cannot be read"):
        load_reproduction(suite, trials.store, registry)


def shown(found: Reproduction, width: int) -> list[str]:
    target = io.StringIO()
    print_reproduction(found, Console(file=target, width=width, force_terminal=True, color_system=None))
    return [line.rstrip() for line in target.getvalue().splitlines()]


def test_what_a_terminal_shows(trials: Trials, suite: Path, registry: Registry) -> None:
    found = load_reproduction(suite, trials.store, registry)
    lines = shown(found, 110)
    assert max(map(len, lines)) <= 110
    assert lines[1] == "1 fails; 8 printed: 4 not measured, 2 agree, 1 differ, 1 published only; 1 claimed: 1 agree"
    assert lines[2].startswith("! GPTQ [g128] (gptq): arc_easy_acc: 50 printed, 64.98 here: outside ±1 points")
    text = "\n".join(lines)
    line = next(one for one in lines if "arc_easy_acc" in one and "±" in one and "!" not in one[:2])
    assert line.split()[1:] == ["50.0", "65.0", "[0.0,", "100.0]", "+15.0", "±1", "differs", "!", "(b)"]
    for said in ("its ARC columns are of another era", "(b) outside ±1 points", "(c) not run yet", "GPTQ behind dense"):
        assert said in text
    assert "[1] a paper, Table 1, context 2048, lm-eval era B, read in a primary source (V)" in text
    assert "a secondary note only (S), never gates" in text
    assert text.count("allowed: GPTQ or AWQ at 4 bits") == 1
    assert text.index("GPTQ behind dense") < text.index("printed and measured") < text.index("ARC columns")


def test_many_printed_columns_stand_in_parts() -> None:
    """Each part has the lines that have a number in it; a mixed number is marked where it stands."""
    values = {f"task_{number}_accuracy": 10.5 + number for number in range(12)}
    first = dict(list(values.items())[:3])
    rows = (
        printed(None, method="All", values=values, mixed={"task_11_accuracy": "of another era"}),
        printed(None, method="Few", values=first),
        printed(None, method="None", bits=2.5),
    )
    lines = shown(reproduce(published(*rows), None), 110)
    assert max(map(len, lines)) <= 110
    words = [line.split()[0] for line in lines if line.strip()]
    parts = words.count("All")
    assert parts > 1
    assert (words.count("Few"), words.count("None")) == (1, 1)
    (marked,) = (line for line in lines if "21.5" in line)
    assert "21.5 (b)" in marked
    assert "(b) of another era" in lines


def test_an_outline_that_is_wrong_is_told(suite: Path, trials: Trials, registry: Registry) -> None:
    suite.write_text(SUITE + 'outline = { hidden_size = 0, dtype = "float16" }\n')
    with pytest.raises(SuiteError, match=r"tests\.toml: model\.outline\.hidden_size: Input should be greater"):
        load_reproduction(suite, trials.store, registry)


def test_as_markdown_csv_and_json(trials: Trials, suite: Path, registry: Registry) -> None:
    found = load_reproduction(suite, trials.store, registry)
    text = reproduction_markdown(found)
    assert text.startswith("# Reproduction: Table 1 of a paper\n")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any(
        line.startswith("| GPTQ [g128] | gptq | none | scalar4 | [1] | perplexity | 5.69 | 5.69 |") for line in tables
    )
    lines = list(csv.DictReader(io.StringIO(reproduction_csv(found))))
    assert [line["kind"] for line in lines] == ["value"] * 8 + ["ordering"]
    wrong = next(line for line in lines if line["outcome"] == "differs")
    assert (wrong["entry"], wrong["gates"], wrong["trust"], wrong["context"]) == ("gptq", "True", "V", "2048")
    assert float(wrong["measured"]) - float(wrong["published"]) == pytest.approx(float(wrong["difference"]))
    data = json.loads(reproduction_json(found))
    assert data["same_model"] is True
    assert data["rows"][0]["cells"][2]["outcome"] == "differs"
    assert [one["metric"] for one in data["failing"]] == ["arc_easy_acc"]


def test_files_beside_the_report(trials: Trials, suite: Path, registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    found = load_reproduction(suite, trials.store, registry)
    names = {"reproduction.md", "reproduction.csv", "reproduction.json"}
    written = write_report(folder, trials.records, trials.folders, plots=False, reproduction=found)
    assert names <= {path.name for path in written}
    assert "## Reproduction: Table 1 of a paper" in (folder / "report.md").read_text()
    write_report(folder, trials.records, trials.folders, plots=False)
    assert not names & {path.name for path in folder.iterdir()}


def test_the_report_command(trials: Trials, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenbits.report._plots", lambda table: ({}, {}))  # they have tests of their own, and take time
    runner = CliRunner()

    def report(*arguments: str) -> str:
        done = runner.invoke(cli.app, ["report", str(suite), *arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    root = str(trials.store.root)
    text = report("--results", root)
    assert text.index("quality at even bits") < text.index("Reproduction: Table 1 of a paper")
    assert (trials.store.root / "runs/tests/report/reproduction.json").is_file()
    assert "## Reproduction: Table 1" in report("--results", root, "--format", "markdown")
    assert len(json.loads(report("--results", root, "--format", "json"))) == 2
    nothing = suite.parent / "nothing"
    text = report("--results", str(nothing))
    assert "not measured" in text
    assert "no run of suite 'tests'" in text
    assert not nothing.exists()
    suite.with_name("tests.published.toml").unlink()
    with pytest.raises(SuiteError, match="no run of suite 'tests'"):
        report("--results", str(nothing))
