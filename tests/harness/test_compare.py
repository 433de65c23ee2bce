"""`evenbits compare`: which trials a name stands for, what is compared, what is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.harness.trials import PROTOCOL, TWO, Trials, accuracy, cost, perplexity

from evenbits.compare import Comparison, compare
from evenbits.compare_text import as_json, as_markdown, as_terminal, verdict_words
from evenbits.errors import ArtifactError, SuiteError
from evenbits.named_trials import find_trials
from evenbits.record import BudgetFacts, Failure
from evenbits.significance import exact_mcnemar
from evenbits.statistics import paired_difference, recovery_interval
from evenbits.store import Results

HARD = np.random.default_rng(0).normal(2.0, 0.4, 100)
RIGHT = (np.random.default_rng(1).random(200) < 0.9).astype(float)


def worse_by(amount: float, seed: int = 1) -> np.ndarray[Any, Any]:
    return HARD + amount + np.random.default_rng(seed).normal(0.0, 0.01, len(HARD))


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    return Trials(tmp_path / "results")


def versus(trials: Trials, a: str, b: str, **options: Any) -> Comparison:
    return compare(find_trials(a, trials.store), find_trials(b, trials.store), **options)


def one_line(message: str) -> bool:
    return "\n" not in message


# -- what is compared ---------------------------------------------------------------------------------------------


def test_two_trials_on_the_same_items(trials: Trials) -> None:
    worse = RIGHT.copy()
    worse[:30] = 0
    trials.add("dense", perplexity(HARD), accuracy(RIGHT))
    trials.add("good", perplexity(worse_by(0.1)), accuracy(RIGHT))
    trials.add("bad", perplexity(worse_by(0.3)), accuracy(worse))
    found = versus(trials, "tests:good", "tests:bad")
    of_text, of_items = found.metrics
    assert found.refused == ()

    expected = paired_difference(worse_by(0.1), worse_by(0.3), "exp-mean")
    assert of_text.difference == expected
    assert verdict_words(of_text) == "A is better than B at no more bits"
    recovered = recovery_interval(worse_by(0.3), HARD, "exp-mean")
    assert of_text.recovery_b is not None
    assert (of_text.recovery_b.low, of_text.recovery_b.high) == recovered[1:]
    assert of_text.recovery_b.value == pytest.approx(recovered[0])

    assert of_items.difference is not None
    only_a, only_b, p_value = exact_mcnemar(RIGHT, worse)
    assert of_items.difference.discordant == (only_a, only_b) == (int(RIGHT[:30].sum()), 0)
    assert of_items.difference.p_value == p_value
    assert of_items.recovery_a is not None
    assert (of_items.recovery_a.value, of_items.recovery_a.low) == (1.0, 1.0)


def test_a_label_joins_its_seeds_and_a_seed_stands_alone(trials: Trials) -> None:
    for seed, shift in enumerate((0.1, 0.14, 0.12)):
        trials.add("good", perplexity(worse_by(shift)), seed=seed)
        trials.add("bad", perplexity(worse_by(0.5 + shift)), seed=seed)
    joined = versus(trials, "tests:good@2", "tests:bad")
    assert [record.seed for record in joined.a.records] == [0, 1, 2]
    (metric,) = joined.metrics
    assert metric.difference is not None
    assert metric.difference.test == "t test over seeds and items"
    assert verdict_words(metric) == "A is better than B at no more bits"
    (single,) = versus(trials, "tests:good/1", "tests:bad@2/2").metrics
    assert single.difference is not None
    assert single.difference.test == "paired bootstrap"
    assert single.a.by_seed == (math.exp(worse_by(0.14).mean()),)
    within = versus(trials, "tests:good/0", "tests:good/1")  # two seeds of one row stay two sides
    assert [record.seed for record in (*within.a.records, *within.b.records)] == [0, 1]


def test_level_reaches_intervals_and_verdict(trials: Trials) -> None:
    a, b = np.repeat([1.0, 0.0, 1.0], [14, 3, 83]), np.repeat([0.0, 1.0, 1.0], [14, 3, 83])
    trials.add("a", accuracy(a))
    trials.add("b", accuracy(b))
    wide, narrow = (versus(trials, "tests:a", "tests:b", level=level).metrics[0] for level in (0.999, 0.9))
    assert wide.verdict.outcome == "not distinguishable"
    assert narrow.verdict.outcome == "better"
    for side in (wide, narrow):
        assert side.difference is not None
        assert side.a.low is not None
    assert wide.difference.low < narrow.difference.low  # type: ignore[union-attr]
    assert wide.a.low < narrow.a.low  # type: ignore[operator]


def test_more_bits_other_tuning_or_calibration_are_never_better(trials: Trials) -> None:
    trials.add("plain", perplexity(worse_by(0.3)), calibration={"corpus": "wiki"})
    trials.add("rich", perplexity(worse_by(0.1)), linear=2.04)
    trials.add("plain", perplexity(worse_by(0.1)), recovery=("lora",), recovery_options=({},))
    trials.add("other", perplexity(worse_by(0.1)), calibration={"corpus": "c4"})

    def say(b: str) -> str:
        (metric,) = versus(trials, "tests:plain", b).metrics
        return verdict_words(metric)

    assert say("tests:rich") == "not comparable: rich is ahead with more bits (2.0400 against 2.0000)"
    assert say("tests:plain+lora") == "not comparable: different recovery stages: none and lora"
    assert say("tests:other@2/0") == "not comparable: different calibration tokens"


def test_costs_are_compared_where_the_same_was_metered(trials: Trials) -> None:
    def energy(joules: float) -> Any:
        return cost("energy", joules, "J", volatile=True, low=joules - 1, high=joules + 1)

    meter = {"meter": "RAPL", "kernel": "dense-restored"}
    for seed in range(3):
        trials.add("a", energy(10.0 + 0.1 * seed), cost("size", 5.0), protocol=meter, seed=seed)
        trials.add("b", energy(20.0 + 0.1 * seed), cost("size", 5.0), protocol=meter, linear=2.04, seed=seed)
    trials.add("c", energy(10.0), cost("size", 5.0), protocol={**meter, "meter": "NVML"})
    found = versus(trials, "tests:b", "tests:a")
    assert {one.column.name: verdict_words(one) for one in found.metrics} == {
        "energy": "B is lower",
        "size": "the same",
    }
    assert found.notes == (
        "energy: both ran on weights restored to dense ones, so what these differ by is not what the methods' own "
        "kernels would",
    )
    kernels = {"phases": {"decode": {"rows": 1, "ran": [{"kernel": "gemv", "config": "", "reason": "x", "layers": 5}]}}}
    for name, details in (("p", {"kernels": kernels}), ("q", {"kernels": {"whole": "as it is"}})):
        metric = cost("energy", 10.0, "J", volatile=True, details=details)
        trials.add(name, metric, protocol={**meter, "kernel": "packed"})
    assert versus(trials, "tests:p", "tests:q").notes == (
        "energy: with packed weights, tests:p: decode of 1 row: 5 layers by gemv (x); tests:q: as it is",
    )
    with pytest.raises(SuiteError, match=r"energy: different protocols: meter \(RAPL against NVML\)"):
        versus(trials, "tests:a", "tests:c", metrics=["energy"])


def test_a_time_of_one_process_is_no_faster(trials: Trials) -> None:
    """The repeats of one process agree with each other more than processes do; the dense model's time is one too."""
    for name in ("a", "b"):
        trials.add(name, cost("latency", 10.0 if name == "a" else 12.0, "ms", volatile=True, low=9.9, high=12.1))
    trials.add("dense", cost("latency", 20.0, "ms", volatile=True, low=19.0, high=21.0))
    trials.add("many", cost("latency", 9.0, "ms", volatile=True))
    trials.add("many", cost("latency", 9.1, "ms", volatile=True), seed=1)
    for one, other in (("a", "b"), ("a", "dense"), ("many", "dense")):
        (metric,) = versus(trials, f"tests:{one}", f"tests:{other}").metrics
        assert verdict_words(metric).startswith("not comparable: one process on a side")
        assert metric.difference is None


def test_other_protocols_are_refused_by_field_beside_what_is_compared(trials: Trials) -> None:
    elsewhere = {"g": {**PROTOCOL, "context": 512}}
    trials.add("a", perplexity(worse_by(0.1)), accuracy(RIGHT))
    trials.add(
        "b", perplexity(worse_by(0.1), fingerprint="g"), accuracy(RIGHT), cost("size", 1.0),
        fingerprints={"f": dict(PROTOCOL), **elsewhere},
    )  # fmt: skip
    found = versus(trials, "tests:a", "tests:b")
    assert [one.column.name for one in found.metrics] == ["acc"]
    assert [(one.name, one.reason) for one in found.refused] == [
        ("perplexity", "different protocols: context (2048 against 512)"),
        ("size", "not measured for tests:a"),
    ]
    assert found.refused[0].fields == (("context", "2048", "512"),)
    with pytest.raises(SuiteError, match="no number to compare: perplexity: different protocols: context") as caught:
        versus(trials, "tests:a", "tests:b", metrics=["perplexity"])
    assert one_line(str(caught.value))


def test_dense_of_another_protocol_is_no_measure_of_recovery(trials: Trials) -> None:
    trials.add("dense", perplexity(HARD), protocol={**PROTOCOL, "context": 512})
    trials.add("a", perplexity(worse_by(0.1)))
    (metric,) = versus(trials, "tests:a", "tests:a").metrics
    assert metric.recovery_a is None
    assert verdict_words(metric) == "not distinguishable"
    trials.add("dense", perplexity(HARD))
    (metric,) = versus(trials, trials.order[1], "tests:a").metrics
    assert metric.recovery_a is not None
    assert metric.recovery_a == metric.recovery_b


# -- names --------------------------------------------------------------------------------------------------------


def test_ids_paths_and_labels_name_the_same_trial(trials: Trials, tmp_path: Path) -> None:
    trials.add("dense", perplexity(HARD))
    record = trials.add("gptq", perplexity(HARD), label="my gptq")
    suite = tmp_path / "s.toml"
    suite.write_text('name = "tests"\n')
    folder = trials.folders[record.trial]
    for name in (
        record.trial, record.trial[:3], str(folder), f"{folder}/record.json", "tests:my gptq", "tests:my gptq@2.0",
        f"{suite}:my gptq", f"{suite}:small:my gptq@2/0",
    ):  # fmt: skip
        named = find_trials(name, trials.store)
        assert named.records == (record,), name
        assert [dense.method for dense in named.around] == ["dense"]


def test_what_matches_several_is_listed(trials: Trials) -> None:
    trials.add("gptq", perplexity(HARD), trial="aa1")
    trials.add("gptq", perplexity(HARD), trial="aa2", budget=BudgetFacts(centre=3.0, window=0.1))
    with pytest.raises(SuiteError, match=r"several match: tests:gptq@2, tests:gptq@3; give one"):
        find_trials("tests:gptq", trials.store)
    with pytest.raises(SuiteError, match=r"several trials begin so: aa1, aa2; give more"):
        find_trials("aa", trials.store)
    elsewhere = Trials(trials.store.root, "second")
    elsewhere.add("gptq", perplexity(HARD), trial="aa1")
    with pytest.raises(SuiteError, match=r"aa1: it is in the runs of second, tests; give SUITE:LABEL or a path"):
        find_trials("aa1", trials.store)
    other = trials.records[0].model.model_copy(update={"name": "other"})
    trials.add("gptq", perplexity(HARD), model=other)
    with pytest.raises(SuiteError, match=r"several match: tests:small:gptq@2, tests:other:gptq@2; give one"):
        find_trials("tests:gptq@2", trials.store)
    assert find_trials("tests:other:gptq", trials.store).records[0].model.name == "other"


def test_unknown_names_say_what_is_near(trials: Trials, tmp_path: Path) -> None:
    trials.add("gptq", perplexity(HARD), trial="abcdef")
    (tmp_path / "bad.toml").write_text("name = 3")
    for name, said in (
        ("tests:gtpq", "no 'gtpq' in the run of suite 'tests'; near it: gptq"),
        ("tests:zzz", "there are: gptq, gptq@2"),
        ("test:gptq", "no run of suite 'test'"),
        ("abcdee", "no trial of this id in .*; near it: abcdef"),
        (str(tmp_path / "none.toml:gptq"), "cannot be read"),
        (str(tmp_path / "bad.toml:gptq"), "is not a suite's name"),
        ("what is this?", "no trial of this id"),
        ("a" * 5000, "no trial of this id"),
        (f"{'a' * 5000}.toml:b", "cannot be read"),
        (f"{'a' * 5000}:b", "no run of suite"),
        ("tests:gptq@two", "no 'gptq@two'"),
        ("tests:gptq/7", "no 'gptq/7'"),
        ("", "no trial of this id"),
        (":", "no run of suite ''"),
    ):
        with pytest.raises(SuiteError, match=said) as caught:
            find_trials(name, trials.store)
        assert one_line(str(caught.value))
    with pytest.raises(SuiteError, match=r"no trial of this id .*; there is none"):
        find_trials("abc", Results(tmp_path / "nothing"))
    with pytest.raises(SuiteError, match=r"--metric perplexty: .*; near it: perplexity"):
        versus(trials, "abcdef", "abcdef", metrics=["perplexty"])


def test_a_trial_that_failed_says_why(trials: Trials) -> None:
    failure = Failure(kind="error", stage="compress", message="not positive definite")
    trials.add("gptq", perplexity(HARD))
    trials.add("gptq", status="failed", failure=failure, seed=1)
    named = find_trials("tests:gptq", trials.store)
    assert len(named.records) == 1
    assert compare(named, named).notes[0] == "tests:gptq: seed 1 failed: compress: error: not positive definite"
    with pytest.raises(SuiteError, match="failed, nothing was measured: compress: error: not positive definite"):
        find_trials("tests:gptq/1", trials.store)


def test_a_damaged_neighbour_is_no_obstacle_and_a_damaged_trial_is_one_line(trials: Trials) -> None:
    first, second = (trials.add(method, perplexity(HARD)) for method in ("a", "b"))
    (trials.folders[second.trial] / "record.json").write_text("{")
    assert find_trials(first.trial, trials.store).records == (first,)
    with pytest.raises(ArtifactError, match="not a readable record"):
        find_trials(second.trial, trials.store)


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(trials: Trials) -> Comparison:
    trials.add("dense", perplexity(HARD), accuracy(RIGHT))
    trials.add("a|b", perplexity(worse_by(0.1)), accuracy(RIGHT), cost("size_bytes", 5e6), calibration={"c": {"n": 1}})
    trials.add("b", perplexity(worse_by(600.0)), accuracy(RIGHT), cost("size_bytes", 6e6))
    return versus(trials, "tests:a|b", "tests:b")


def test_json_is_strict_and_says_all(shown: Comparison) -> None:
    found = json.loads(json.dumps(as_json(shown), allow_nan=False))
    text, items, size = found["metrics"]
    assert found["a"]["trials"] == ["01tests"]
    assert found["a"]["budget"]["centre"] == TWO.centre
    assert text["b"]["value"] > 1e250
    assert text["test"]["p_value"] < 0.001
    assert text["verdict"]["words"] == "A is better than B at no more bits"
    assert items["test"] == {
        "test": "exact McNemar", "p_value": 1.0, "items": 200, "discordant": {"only_a": 0, "only_b": 0},
    }  # fmt: skip
    assert items["a"]["recovery"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert size["verdict"] == {"outcome": "better", "reason": "counted exactly", "words": "A is lower"}
    assert size["difference"] == {"value": -1e6, "low": None, "high": None}


def test_tables_read_alike_in_a_terminal_and_in_markdown(shown: Comparison) -> None:
    target = io.StringIO()
    as_terminal(shown, Console(file=target, width=80, force_terminal=False))
    terminal, markdown = target.getvalue(), as_markdown(shown)
    assert max(map(len, terminal.splitlines())) <= 120
    for text in (terminal, markdown.replace("\\", "")):
        for part in ("a|b @ 2", "c.n=1", "2.0000", "5 MB", "-1 MB", "95 % intervals", "1.000", "paired bootstrap, 100"):
            assert part in text
    assert "exact McNemar, 200 items, 0 only A right, 0 only B" in markdown
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command(evenbits: Any, trials: Trials) -> None:
    trials.add("dense", perplexity(HARD))
    trials.add("good", perplexity(worse_by(0.1)))
    trials.add("bad", perplexity(worse_by(0.3)))
    trials.add("far", perplexity(HARD), protocol={**PROTOCOL, "context": 512})
    where = ("--results", trials.store.root)
    done = evenbits("compare", "tests:good", "tests:bad", *where)
    assert done.returncode == 0, done.stderr
    assert "A is better than B at no more bits" in done.stdout
    as_data = evenbits("compare", "tests:good", "02", "--format", "json", "--metric", "perplexity", *where)
    assert json.loads(as_data.stdout)["metrics"][0]["test"]["items"] == 100
    wrong = evenbits("compare", "tests:good", "tests:far", *where)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert "perplexity: different protocols: context (2048 against 512)" in wrong.stderr
    coloned = evenbits("compare", "x:b", "x:b:y", *where)
    assert "error x:b: no run of suite 'x'" in coloned.stderr  # no picture in place of ":b:"


@pytest.mark.parametrize("level", [95.0, 1.0, 0.0, 0.9999, math.nan, -math.inf])
def test_a_level_is_a_share(trials: Trials, level: float) -> None:
    trials.add("a", perplexity(HARD))
    with pytest.raises(SuiteError, match=f"--level {level:g}: a share between 0.5 and 0.999, such as 0.95"):
        versus(trials, "tests:a", "tests:a", level=level)


def test_a_metric_named_twice_is_shown_once(trials: Trials) -> None:
    trials.add("a", perplexity(HARD), accuracy(RIGHT))
    assert len(versus(trials, "tests:a", "tests:a", metrics=["acc", "acc"]).metrics) == 1


def test_missing_items_are_said_and_damaged_ones_are_one_line(trials: Trials) -> None:
    """Without its items a record is compared by its interval, which tells less: the reader hears of it."""
    a, _ = (trials.add(name, perplexity(worse_by(0.1))) for name in ("a", "b"))
    items = trials.folders[a.trial] / "items-perplexity.npy"
    whole = items.read_bytes()
    for damaged in (b"", b"no numpy", whole[: len(whole) // 2]):
        items.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"items-perplexity\.npy: not per-item values") as caught:
            versus(trials, "tests:a", "tests:b")
        assert one_line(str(caught.value))
    items.unlink()
    found = versus(trials, "tests:a", "tests:b")
    assert found.notes == (f"tests:a: seed 0: per-item values of perplexity are missing in {items.parent}",)
    assert found.metrics[0].verdict.reason == "by intervals, no common per-item values"


def test_after_a_real_run(here: Any, suites: Any) -> None:
    """Two bit widths of one method on a tiny model, and its dense model, through compress, measure and record."""
    methods = """[
        { name = "rtn", label = "two", budget = "free", options.bits = 2, options.group_size = 16 },
        { name = "rtn", label = "four", budget = "free", options.bits = 4, options.group_size = 16 },
    ]"""
    here.run(suites.text(methods))
    store = Results(here.folder / "results")
    found = compare(find_trials(f"{here.folder}/suite.toml:two", store), find_trials("tiny:four", store))
    (metric,) = [one for one in found.metrics if one.column.name == "perplexity"]
    assert found.a.bits.linear < found.b.bits.linear
    assert metric.difference is not None
    assert metric.difference.items > 10
    assert metric.difference.difference == pytest.approx(metric.a.value - metric.b.value)
    assert metric.recovery_b is not None
    assert metric.recovery_b.low is not None
    assert metric.recovery_b.low <= metric.recovery_b.value
    assert not found.refused
