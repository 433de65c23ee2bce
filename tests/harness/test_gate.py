"""`evenbits gate`: what it calls a regression, what it does not, and which cause it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness.trials import PROTOCOL, Trials, accuracy, cost, perplexity

from evenbits.gate import Check, Gated, gate
from evenbits.gate_snapshot import Snapshot, take_run
from evenbits.record import Failure, LayerFacts

HARD = np.random.default_rng(0).normal(0.6, 0.4, 150)
SURE = np.random.default_rng(1).random(200)
LOSSES = {"rtn": 0.30, "gptq": 0.12, "gptq-act": 0.08, "kmeans": 0.05, "aqlm": 0.04, "vptq": 0.03}
SEEDLESS = frozenset({"dense", "rtn"})
SCATTER = 0.04  # of a loss, between seeds
MADE: Mapping[str, Any] = {
    "versions": {"evenbits": "0.1.0", "torch": "2.13.0"}, "python": "3.11", "processor": "x", "cores": 2,
    "git": {"commit": "a" * 40, "dirty": False},
}  # fmt: skip


def losses(method: str, seed: int, extra: float = 0.0) -> np.ndarray[Any, Any]:
    """Of each window: what the text is worth, what the method loses there, and a seed's luck."""
    draw = np.random.default_rng([seed, sum(map(ord, method))])
    lost = (
        LOSSES.get(method, 0.0) * (1 + SCATTER * draw.normal()) if method not in SEEDLESS else LOSSES.get(method, 0.0)
    )
    own = draw.normal(0, 0.2 * lost, len(HARD)) if method not in SEEDLESS else 0.0
    return np.asarray(HARD + lost + own + extra, dtype=np.float32).astype(float)


def answers(method: str, seed: int, wrong: float = 0.0) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng([seed, 7, sum(map(ord, method))])
    unsure = 0.0 if method in SEEDLESS else 0.01 * draw.normal()
    return (0.1 + 0.4 * LOSSES.get(method, 0.0) + unsure + wrong < SURE).astype(float)


class Night:
    """A made-up run of the suite, with one thing changed of one method."""

    def __init__(self, root: Path, name: str = "nightly") -> None:
        self.trials = Trials(root, name)
        self.extra: dict[str, float] = {}  # added to each loss
        self.wrong: dict[str, float] = {}
        self.factor: dict[str, float] = {}  # of times
        self.linear: dict[str, float] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.protocol: Mapping[str, Any] = PROTOCOL
        self.made: Mapping[str, Any] = MADE
        self.left_out: set[str] = set()
        self.code: Mapping[str, str] = {}  # goes into the keys

    @cached_property
    def snapshot(self) -> Snapshot:
        run = take_run(self.trials.store, "nightly")
        assert not run.absences
        return run.snapshot

    def run(self, seeds: tuple[int, ...] = (0,), *, machine: int = 0) -> Night:
        for method in ("dense", *LOSSES):
            if method in self.left_out:
                continue
            for seed in seeds if method not in SEEDLESS else seeds[:1]:
                key = f"{method}{seed}{self.code.get(method, '')}".replace("-", "")
                jitter = np.random.default_rng([machine, seed, sum(map(ord, method))]).normal(0, 0.1)
                milliseconds = 5 * np.exp(jitter) * self.factor.get(method, 1.0)
                facts: dict[str, Any] = {
                    "label": method, "seed": seed, "environment": dict(self.made), "options": {"bits": 2},
                    "artifact": None if method == "dense" else f"artifact{key}", **self.facts.get(method, {}),
                }  # fmt: skip
                self.trials.add(
                    method,
                    perplexity(losses(method, seed, self.extra.get(method, 0.0))),
                    accuracy(answers(method, seed, self.wrong.get(method, 0.0))),
                    cost("latency_ms", float(milliseconds), "ms", volatile=True),
                    linear=self.linear.get(method, 2.0),
                    protocol=self.protocol,
                    trial=f"trial{key}",
                    **facts,
                )
        return self


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Night:
    return Night(tmp_path_factory.mktemp("base")).run((0, 1, 2, 3, 4))


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def judge(base: Night, night: Night) -> Gated:
    return gate(base.snapshot, take_run(night.trials.store, "nightly"))


def only(found: Gated) -> Check:
    (check,) = found.regressions
    return check


def of(found: Gated, method: str, what: str) -> Check:
    row = f"small {method}" + ("" if method == "dense" else " @ 2")
    (check,) = [check for check in found.checks if (check.row, check.what) == (row, what)]
    return check


# -- nothing changed ----------------------------------------------------------------------------------------------


def test_the_same_run_passes(base: Night) -> None:
    found = judge(base, base)
    assert found.exit_code == 0
    assert {check.outcome for check in found.checks} == {"ok"}


def test_other_seeds_raise_no_alarm(base: Night, tmp_path: Path) -> None:
    """Without the seeds' scatter, each of these nights would differ from the baseline on every row."""
    alarms = []
    for seed in range(20, 32):
        found = judge(base, Night(tmp_path / str(seed)).run((seed,), machine=seed))
        alarms += [(seed, check.row, check.what) for check in found.regressions]
        assert found.exit_code == 0, alarms


def test_a_single_seed_in_the_baseline_leaves_the_items(tmp_path: Path) -> None:
    alone = Night(tmp_path / "base").run((0,))
    night = Night(tmp_path / "night")
    night.extra, night.code = {"kmeans": 0.02}, {"kmeans": "x"}
    found = judge(alone, night.run((0,)))
    check = only(found)
    assert (check.row, check.what) == ("small kmeans @ 2", "perplexity")
    assert "the baseline has one seed" in found.notes[0]


# -- quality ------------------------------------------------------------------------------------------------------


def test_a_worse_method_is_named_with_size_interval_and_cause(base: Night, night: Night) -> None:
    night.extra, night.code = {"kmeans": 0.03}, {"kmeans": "x"}
    found = judge(base, night.run())
    assert found.exit_code == 1
    check = of(found, "kmeans", "perplexity")
    assert check.outcome == "regression"
    assert check.change is not None
    assert check.change == pytest.approx(np.expm1(0.03), abs=0.006)
    assert check.low is not None
    assert check.high is not None
    assert check.p_value is not None
    assert 0 < check.low < check.change < check.high
    assert check.p_value < 0.003
    assert re.fullmatch(r"worse, \d+\.\d times the scatter of seeds, and on the same items", check.text)
    assert (
        "artifactkmeans0 -> artifactkmeans0x with equal settings: the code of the method changed, " in check.causes[0]
    )
    assert {c.row for c in found.regressions} <= {"small kmeans @ 2", "small"}


def test_less_than_a_thousandth_is_no_alarm_even_where_it_is_certain(base: Night, night: Night) -> None:
    night.extra, night.code = {"rtn": 0.0009}, {"rtn": "x"}
    assert judge(base, night.run()).exit_code == 0


def test_without_randomness_two_thousandths_are_one(base: Night, night: Night) -> None:
    night.extra, night.code = {"rtn": 0.002}, {"rtn": "x"}
    check = only(judge(base, night.run()))
    assert (check.row, check.text) == ("small rtn @ 2", "worse: no seed changes this number")


def test_one_trial_must_give_one_number(base: Night, night: Night) -> None:
    """Better by 0.2 %, far inside the scatter of seeds, but of the same code, settings, seed and libraries."""
    night.extra = {"gptq": -0.002}
    check = only(judge(base, night.run()))
    assert check.text == "not reproduced: trial trialgptq0 gave another number on the same kind of machine"


def test_another_machine_may_round_otherwise(base: Night, night: Night) -> None:
    night.extra, night.made = {"gptq": -0.002}, {**MADE, "processor": "y"}
    assert judge(base, night.run()).exit_code == 0


def test_better_is_told_and_no_alarm(base: Night, night: Night) -> None:
    night.extra, night.code = {"aqlm": -0.03}, {"aqlm": "x"}
    found = judge(base, night.run())
    assert found.exit_code == 0
    assert of(found, "aqlm", "perplexity").outcome == "improvement"


def test_wrong_answers_are_a_regression(base: Night, night: Night) -> None:
    night.wrong, night.code = {"vptq": 0.25}, {"vptq": "x"}
    check = of(judge(base, night.run()), "vptq", "acc")
    assert check.outcome == "regression"
    assert check.absolute
    assert check.change == pytest.approx(-0.25, abs=0.08)


def test_recovery_is_judged_where_the_dense_model_changed(base: Night, night: Night) -> None:
    """The evaluator got better by 3 %, and kmeans alone did not follow."""
    night.extra = {method: -0.03 for method in ("dense", *LOSSES) if method != "kmeans"}
    night.code = dict.fromkeys(("dense", *LOSSES), "x")
    found = judge(base, night.run())
    assert of(found, "dense", "perplexity").outcome == "improvement"
    assert of(found, "kmeans", "perplexity").outcome == "ok"
    check = of(found, "kmeans", "perplexity over dense")
    assert check.outcome == "regression"
    assert check.before is not None
    assert check.now is not None
    assert check.now > check.before > 1
    assert of(found, "gptq", "perplexity over dense").outcome == "ok"


def test_the_front_as_a_whole(base: Night, night: Night) -> None:
    """The best method became 6 % worse: the front falls back to the next best, which is less."""
    night.extra, night.code = {"vptq": 0.06}, {"vptq": "x"}
    found = judge(base, night.run())
    (check,) = [check for check in found.checks if check.what == "Pareto front: perplexity"]
    assert check.row == "small"
    assert "the best at no more than 2.05 bits (small vptq @ 2, now small aqlm @ 2)" in check.text
    assert check.change is not None
    assert 0 < check.change < 0.03


# -- costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "begins"), [(2.04, "grew: linear bytes 250,000 -> 255,000"), (1.96, "size changed: linear")]
)
def test_sizes_are_counted(base: Night, night: Night, bits: float, begins: str) -> None:
    night.linear, night.code = {"kmeans": bits}, {"kmeans": "x"}
    check = only(judge(base, night.run()))
    assert (check.row, check.what) == ("small kmeans @ 2", "size")
    assert check.text.startswith(begins)


def test_a_size_that_depends_on_the_seed(tmp_path: Path) -> None:
    """SpQR keeps as many outliers as it finds."""

    def sized(folder: str, *linear: float) -> Night:
        made = Night(tmp_path / folder)
        made.trials.add("dense", perplexity(HARD), trial=f"dense{folder}")
        for seed, bits in enumerate(linear):
            facts: dict[str, Any] = {"seed": seed, "environment": dict(MADE)}
            made.trials.add("spqr", perplexity(losses("gptq", seed)), trial=f"{folder}{seed}", linear=bits, **facts)
        return made

    base = sized("base", 2.001, 2.004, 2.002, 2.003, 2.0)
    assert judge(base, sized("near", 2.005)).exit_code == 0
    assert "grew: linear bytes" in only(judge(base, sized("far", 2.04))).text


def test_times_are_ratios_and_advisory_up_to_twice(base: Night, tmp_path: Path) -> None:
    """The whole machine four times slower is nothing; one method is an alarm where it is six times slower."""

    def at(name: str, factor: dict[str, float]) -> Gated:
        made = Night(tmp_path / name)
        made.factor = factor
        return judge(base, made.run())

    assert at("all", dict.fromkeys(("dense", *LOSSES), 4.0)).exit_code == 0
    check = of(at("six", {"aqlm": 6.0}), "aqlm", "latency_ms over dense")
    assert (check.outcome, check.text) == ("regression", "worse, more than 2 times")
    assert of(at("odd", {"aqlm": 1.9}), "aqlm", "latency_ms over dense").outcome in ("ok", "advisory")


def test_a_dense_model_of_another_night_is_no_measure_of_time(base: Night, tmp_path: Path) -> None:
    """What has not changed is not measured again, so the dense model's time may be of a machine with less to do."""
    made = Night(tmp_path / "later")
    made.factor = {"aqlm": 6.0}
    made.facts = {"dense": {"finished": "2026-11-22T21:00:00+00:00"}, "gptq": {"finished": "2026-11-22T21:40:00+00:00"},
                  "aqlm": {"finished": "2026-11-23T02:00:00+00:00"}}  # fmt: skip
    found = judge(base, made.run())
    check = of(found, "aqlm", "latency_ms")
    said = "this time the dense model was measured 5 hours away: no ratio of one run"
    assert (check.outcome, check.text) == ("not judged", said)
    assert of(found, "gptq", "latency_ms over dense").outcome == "ok"
    assert found.exit_code == 0


# -- protocols, rows, settings ------------------------------------------------------------------------------------


def test_another_protocol_is_a_regression_with_both_values(base: Night, night: Night) -> None:
    night.protocol = {**PROTOCOL, "tokenizer": {"sha256": "ef"}, "context": 1024}
    found = judge(base, night.run())
    assert found.exit_code == 1
    check = of(found, "gptq", "perplexity")
    assert check.text.startswith("protocol changed: context 2048 -> 1024, tokenizer (absent) -> ")
    assert check.text.endswith('{"sha256": "ef"}; if meant, --update')
    assert len(found.regressions) == 2 * (1 + len(LOSSES))  # perplexity and accuracy of every row


def test_a_library_version_is_compared_across_and_named(base: Night, night: Night) -> None:
    night.protocol = {**PROTOCOL, "torch": "2.14.0"}
    night.made = {**MADE, "versions": {**MADE["versions"], "torch": "2.14.0"}}
    night.code = dict.fromkeys(("dense", *LOSSES), "x")
    night.extra = {"gptq": 0.1}
    found = judge(base, night.run())
    check = of(found, "gptq", "perplexity")
    assert check.outcome == "regression"
    assert "libraries: torch 2.13.0 -> 2.14.0" in check.causes
    assert any("without effect on" in note and "torch 2.13.0 -> 2.14.0" in note for note in found.notes)


def test_other_settings_and_commits_are_named(base: Night, night: Night) -> None:
    night.facts = {"kmeans": {"options": {"bits": 3}}}
    night.made = {**MADE, "git": {"commit": "b" * 40, "dirty": True}}
    night.extra, night.code = {"kmeans": 0.05}, {"kmeans": "x"}
    check = of(judge(base, night.run()), "kmeans", "perplexity")
    assert check.causes == ("settings: bits 2 -> 3", f"commit {'a' * 9} -> {'b' * 9} with changes")


def test_rows_that_vanish_are_skipped_or_leave_their_window(base: Night, night: Night) -> None:
    night.left_out = {"kmeans", "aqlm"}
    night.facts = {"gptq": {"within_budget": False}}
    night.run()
    night.trials.add("aqlm", label="aqlm", status="skipped", reason="no setting within 2", ledger=None)
    found = judge(base, night)
    said = {check.row: check.text for check in found.regressions if check.what == "row"}
    assert said["small kmeans @ 2"] == "vanished: the run's plan has no such row"
    assert said["small aqlm @ 2"] == "now skipped: no setting within 2"
    assert said["small gptq @ 2"] == "left its budget window: 2.0000 -> 2.0000 bits"


def test_failed_and_missing_trials_leave_the_run_incomplete(base: Night, night: Night, tmp_path: Path) -> None:
    night.left_out = {"kmeans", "aqlm"}
    night.run()
    failure = Failure(kind="memory", stage="compress", message="8 GB were not enough")
    night.trials.add("aqlm", label="aqlm", status="failed", failure=failure, ledger=None)
    night.trials.store.write_plan("nightly", [*night.trials.order, "neverran"])
    found = judge(base, night)
    assert found.exit_code == 3
    assert [(one.place, one.trial, one.status) for one in found.incomplete][1] == ("", "neverran", "missing")
    assert found.incomplete[0].reason == "compress: memory: 8 GB were not enough"
    # what was measured is certain, whatever is missing
    worse = Night(tmp_path / "worse")
    worse.left_out, worse.extra, worse.code = {"kmeans"}, {"gptq": 0.2}, {"gptq": "x"}
    worse.run()
    worse.trials.store.write_plan("nightly", [*worse.trials.order, "neverran"])
    assert judge(base, worse).exit_code == 1


# -- layers -------------------------------------------------------------------------------------------------------

LAYERS = 24


def with_layers(root: Path, seeds: tuple[int, ...], fault: dict[int, float], *, jumpy: bool = False) -> Night:
    """Five rows with errors of layers. fault: factors of layers of gptq. jumpy: some layer of each seed doubles."""
    made = Night(root)
    made.trials.add("dense", perplexity(HARD), trial=f"dense{root.name}")
    for method in ("gptq", "awq", "aqlm", "spqr", "vptq"):
        for seed in seeds:
            draw = np.random.default_rng([seed, sum(map(ord, method))])
            errors = 0.06 * np.exp(draw.normal(0, 0.01, LAYERS) + draw.normal(0, 0.012))
            if jumpy:
                errors[draw.integers(LAYERS)] *= 2
            for index, factor in fault.items() if method == "gptq" else ():
                errors[index] *= factor
            layers = tuple(
                LayerFacts(name=f"layer {index}", bits=2, error=0.5, calibrated_error=error)
                for index, error in enumerate(errors.tolist())
            )
            facts: dict[str, Any] = {"seed": seed, "environment": dict(MADE), "layers": layers}
            made.trials.add(method, perplexity(losses(method, seed)), trial=f"{root.name}{method}{seed}", **facts)
    return made


def test_a_faulty_block_is_named(tmp_path: Path) -> None:
    """Where three layers lose more the perplexity hardly moves; of one alone the mean over layers does not show it."""
    base = with_layers(tmp_path / "base", (0, 1, 2, 3, 4), {})
    for seed in range(20, 25):
        assert judge(base, with_layers(tmp_path / f"good{seed}", (seed,), {})).exit_code == 0
    found = judge(base, with_layers(tmp_path / "block", (7,), {3: 2.0, 4: 3.0, 5: 1.5}))
    assert [(check.row, check.what) for check in found.regressions] == [
        ("small gptq @ 2", "layer_error"),
        ("small gptq @ 2", "layers"),
    ]
    check = of(found, "gptq", "layers")
    assert check.text.startswith("worse in 3 of 24: layer 4 +")
    assert [int(name) for name in re.findall(r"layer (\d+) \+", check.text)] == [4, 3, 5]
    assert (check.before, check.now) == pytest.approx((0.06, 0.18), rel=0.08)
    found = judge(base, with_layers(tmp_path / "one", (7,), {3: 1.7}))
    one = of(found, "gptq", "layers")
    assert (found.exit_code, one.outcome) == (0, "advisory")
    assert "worse in 1 of 24: layer 3 +" in one.text


def test_layers_that_jump_by_chance_raise_no_alarm(tmp_path: Path) -> None:
    base = with_layers(tmp_path / "base", (0, 1, 2, 3, 4), {}, jumpy=True)
    for seed in range(20, 30):
        found = judge(base, with_layers(tmp_path / f"{seed}", (seed,), {}, jumpy=True))
        told = [(seed, check.row, check.text) for check in found.checks if check.outcome != "ok"]
        assert not [one for one in told if "worse" in one[2]], told


def test_two_seeds_say_nothing_of_single_layers(tmp_path: Path) -> None:
    base = with_layers(tmp_path / "base", (0, 1), {})
    found = judge(base, with_layers(tmp_path / "night", (7,), {3: 1.4}))
    assert of(found, "gptq", "layers").outcome == "not judged"


def test_layers_that_no_seed_changes(tmp_path: Path) -> None:
    def exact(name: str, error: float) -> Night:
        made = Night(tmp_path / name)
        for seed in (0, 1, 2):
            facts: dict[str, Any] = {"seed": seed, "environment": dict(MADE)}
            made.trials.add("gptq", perplexity(losses("gptq", seed)), trial=f"{name}gptq{seed}", **facts)
        layers = (LayerFacts(name="a", bits=2, error=0.1), LayerFacts(name="b", bits=2, error=error))
        made.trials.add("rtn", perplexity(losses("rtn", 0)), trial=f"{name}rtn", environment=dict(MADE), layers=layers)
        return made

    base = exact("base", 0.1)
    assert judge(base, exact("same", 0.1005)).exit_code == 0
    check = of(judge(base, exact("other", 0.102)), "rtn", "layers")
    assert (check.outcome, check.text) == ("regression", "worse in 1 of 2: b +2 %; no seed changes them")
