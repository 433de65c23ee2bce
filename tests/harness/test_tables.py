"""What a cell says of seeds and items, recovery, and which marks a section gets; and the verdict on a pair."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness.trials import PROTOCOL, Trials, accuracy, cost, perplexity

from evenbits.cells import join_seeds
from evenbits.errors import ArtifactError
from evenbits.record import BudgetFacts
from evenbits.rows import Cell, Row
from evenbits.significance import exact_mcnemar, recovery
from evenbits.statistics import bootstrap_interval, paired_difference
from evenbits.tables import ModelTable, gather
from evenbits.verdict import verdict

HARD = np.random.default_rng(0).normal(2.0, 0.4, 100)  # nats per window, what all methods find hard


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    return Trials(tmp_path)


def worse_by(amount: float, seed: int = 1) -> np.ndarray[Any, Any]:
    return HARD + amount + np.random.default_rng(seed).normal(0.0, 0.01, len(HARD))


def table(trials: Trials) -> ModelTable:
    (model,) = gather(trials.records, trials.folders).models
    return model


def row(model: ModelTable, name: str) -> Row:
    return next(r for s in model.sections for r in (*s.rows, *s.outside) if r.name == name)


def cell(model: ModelTable, name: str) -> Cell:
    return row(model, name).cells[model.columns[0].key]


def marks(model: ModelTable) -> dict[str, str]:
    found, column = model.sections[0], model.columns[0]
    return {row.name: found.marks.get((i, column.key), "") for i, row in enumerate(found.rows)}


# -- cells --------------------------------------------------------------------------------------------------------


def test_one_seed_keeps_the_records_own_interval(trials: Trials) -> None:
    trials.add("rtn", perplexity(worse_by(0.1)))
    found = cell(table(trials), "rtn")
    assert (found.low, found.high) == (0.98 * found.value, 1.02 * found.value)
    again = join_seeds(trials.records, trials.folders, level=0.5).cells
    (narrow,) = again.values()
    assert (narrow.low, narrow.high) == bootstrap_interval(worse_by(0.1), "exp-mean", 0.5)


def test_several_seeds_get_an_interval_wider_than_items_or_seeds_alone(trials: Trials) -> None:
    shifts = (0.20, 0.24, 0.21)
    for seed, shift in enumerate(shifts):
        trials.add("rtn", perplexity(worse_by(shift, seed)), seed=seed)
    found = cell(table(trials), "rtn")
    assert found.value == pytest.approx(np.mean(found.by_seed))
    assert found.low is not None
    assert found.high is not None
    by_items = bootstrap_interval(np.mean([worse_by(s, i) for i, s in enumerate(shifts)], axis=0), "exp-mean")
    assert found.low < min(by_items[0], *found.by_seed)
    assert found.high > max(by_items[1], *found.by_seed)


def test_seeds_of_an_accuracy_stay_a_share(trials: Trials) -> None:
    for seed, share in enumerate((0.5, 0.99)):
        trials.add("rtn", accuracy((np.arange(100) < 100 * share).astype(float)), seed=seed)
    found = cell(table(trials), "rtn")
    assert (found.low, found.high) == (0.0, 1.0)


def test_costs_over_seeds_show_what_was_seen(trials: Trials) -> None:
    for seed, seconds in enumerate((3.0, 5.0, 4.0)):
        trials.add("rtn", cost("latency", seconds, "s", volatile=True), seed=seed)
    found = cell(table(trials), "rtn")
    assert (found.value, found.low, found.high) == (4.0, 3.0, 5.0)


def test_timings_are_never_paired(trials: Trials) -> None:
    """Repeat 3 of one model is not repeat 3 of another, though the mean of the repeats be the number."""
    metric, _ = cost("latency", 1.0, "s", volatile=True)
    trials.add("rtn", (metric, np.array([0.9, 1.0, 1.1])))
    assert cell(table(trials), "rtn").transform is None


@pytest.mark.parametrize(
    ("details", "said"), [({"strata": [3, 3]}, "sum to the 100 items"), ({"weights": [1]}, "for each of the 100")]
)
def test_a_record_that_contradicts_its_items_is_one_line(trials: Trials, details: Any, said: str) -> None:
    trials.add("rtn", perplexity(HARD, details=details))
    with pytest.raises(ArtifactError, match=said) as caught:
        table(trials)
    assert "perplexity" in str(caught.value)
    assert str(trials.folders[trials.order[0]]) in str(caught.value)


# -- recovery -----------------------------------------------------------------------------------------------------


def test_recovery_has_an_interval_from_the_same_items(trials: Trials) -> None:
    trials.add("dense", perplexity(HARD))
    trials.add("rtn", perplexity(worse_by(0.1)))
    model = table(trials)
    column = model.columns[0]
    found = model.recovery(row(model, "rtn"), column)
    assert found is not None
    assert found.value == model.against_dense(row(model, "rtn"), column) == pytest.approx(math.exp(0.1), rel=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.01  # the windows' common difficulty is no chance between two models
    of_dense = model.recovery(model.dense[0], column)
    assert of_dense is not None
    assert (of_dense.value, of_dense.low, of_dense.high) == (1.0, 1.0, 1.0)


def test_recovery_over_seeds_counts_the_seeds(trials: Trials) -> None:
    trials.add("dense", perplexity(HARD))
    for seed, shift in enumerate((0.1, 0.13, 0.11)):
        trials.add("rtn", perplexity(worse_by(shift)), seed=seed)
    model = table(trials)
    found = model.recovery(row(model, "rtn"), model.columns[0])
    assert found is not None
    a, dense = cell(model, "rtn"), model.dense[0].cells[model.columns[0].key]
    assert (found.value, found.low, found.high) == recovery(a.sampled(), dense.sampled())
    assert found.low is not None
    assert found.high is not None
    t_of_seeds = 4.303 * np.std(a.by_seed, ddof=1) / math.sqrt(3) / dense.value
    assert (found.high - found.low) / 2 == pytest.approx(t_of_seeds, rel=0.2)


def test_recovery_without_items_or_without_a_dense_model(trials: Trials) -> None:
    trials.add("rtn", cost("size", 10.0), perplexity(HARD))
    assert table(trials).recovery(row(table(trials), "rtn"), table(trials).columns[0]) is None
    trials.add("dense", cost("size", 40.0))
    model = table(trials)
    (size,) = (column for column in model.columns if column.name == "size")
    found = model.recovery(row(model, "rtn"), size)
    assert found is not None
    assert (found.value, found.low, found.high) == (0.25, None, None)


# -- verdicts and marks -------------------------------------------------------------------------------------------


def test_accuracy_is_judged_by_mcnemar(trials: Trials) -> None:
    a, b = np.repeat([1.0, 0.0, 1.0], [14, 3, 83]), np.repeat([0.0, 1.0, 1.0], [14, 3, 83])
    trials.add("good", accuracy(a))
    trials.add("bad", accuracy(b))
    model = table(trials)
    found = verdict(row(model, "good"), row(model, "bad"), model.columns[0])
    assert found.outcome == "better"
    p_value = exact_mcnemar(a, b)[2]
    assert found.reason == f"exact McNemar test on 100 items (14 against 3 discordant): p = {p_value:.3g}"
    at_one = verdict(row(model, "good"), row(model, "bad"), model.columns[0], level=0.99)
    assert at_one.outcome == "not distinguishable"


def test_a_mean_over_tasks_is_resampled_within_its_tasks(trials: Trials) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=100)
    better = base + np.repeat([1.0, -0.9], 50) + rng.normal(0.0, 0.05, 100)
    for method, items in (("good", better), ("bad", base)):
        trials.add(method, accuracy(items, details={"strata": [50, 50]}))
    model = table(trials)
    assert cell(model, "good").strata == (50, 50)
    found = verdict(row(model, "good"), row(model, "bad"), model.columns[0])
    expected = paired_difference(better, base, strata=(50, 50)).p_value
    assert found.outcome == "better"
    assert expected < 1e-6
    assert found.reason == "paired test on 100 items: p < 1e-06"
    assert paired_difference(better, base).p_value > 0.5


def test_documents_of_unlike_length_are_weighed(trials: Trials) -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(5, 400, 200)
    share = counts / counts.mean()
    losses = rng.normal(2.0, 0.1, 200)
    noise = rng.normal(0.0, 0.05, (2, 200))
    good, bad = share * (losses + noise[0]), share * (losses + 0.03 + noise[1])
    for method, items in (("good", good), ("bad", bad)):
        trials.add(method, perplexity(items, details={"weights": counts.tolist()}))
    model = table(trials)
    weights = cell(model, "good").weights
    assert weights is not None
    np.testing.assert_allclose(weights, share)
    found = verdict(row(model, "bad"), row(model, "good"), model.columns[0])
    p_value = paired_difference(bad, good, "exp-mean", weights=counts).p_value
    assert (found.outcome, found.reason) == ("worse", f"paired test on 200 items: p = {p_value:.3g}")


def test_seeds_that_scatter_are_not_told_apart_and_steady_ones_are(trials: Trials) -> None:
    for seed, lucky in enumerate((0.05, 0.30, 0.2)):
        trials.add("steady", perplexity(worse_by(0.20 + 0.001 * seed)), seed=seed)
        trials.add("lucky", perplexity(worse_by(lucky)), seed=seed)
        trials.add("bad", perplexity(worse_by(0.5 + 0.01 * seed)), seed=seed)
    model = table(trials)
    column = model.columns[0]
    found = verdict(row(model, "lucky"), row(model, "steady"), column)
    assert found.outcome == "not distinguishable"
    assert found.reason.startswith("t test over 3 and 3 seeds and 100 items: p = 0.")
    assert verdict(row(model, "steady"), row(model, "bad"), column).outcome == "better"
    assert verdict(row(model, "bad"), row(model, "steady"), column).outcome == "worse"


def test_marks_allow_for_how_many_are_compared_with_the_best(trials: Trials) -> None:
    """p = 0.04 against the best is a difference between two methods, and none among twenty."""
    rng = np.random.default_rng(3)
    best = (rng.random(400) < 0.9).astype(float)

    def flipped(losses: int, gains: int) -> np.ndarray[Any, Any]:
        items = best.copy()
        items[np.flatnonzero(best == 1)[:losses]] = 0
        items[np.flatnonzero(best == 0)[:gains]] = 1
        return items

    near = flipped(16, 5)
    assert 0.02 < exact_mcnemar(best, near)[2] < 0.05
    trials.add("best", accuracy(best))
    trials.add("near", accuracy(near))
    assert marks(table(trials)) == {"best": "*", "near": "-"}
    for number in range(8):
        trials.add(f"other{number}", accuracy(flipped(16 + number, 5)))
    model = table(trials)
    assert marks(model)["near"] == "~"
    assert verdict(row(model, "best"), row(model, "near"), model.columns[0]).outcome == "better"
    assert marks(model)["other7"] in ("~", "-")


def test_another_row_than_the_best_is_better_only_beyond_what_a_crowd_brings(trials: Trials) -> None:
    """The best has more bits; among thirty that are equal some pair always has p < 0.05."""
    rng = np.random.default_rng(5)
    trials.add("rich", perplexity(HARD - 1.0), linear=2.04)
    for number in range(30):
        trials.add(f"m{number}", perplexity(worse_by(0.0) + rng.normal(0.0, 0.05, len(HARD))))
    trials.add("bad", perplexity(worse_by(0.3)))
    model = table(trials)
    column = model.columns[0]
    pairs = [verdict(row(model, "m0"), row(model, f"m{n}"), column).outcome for n in range(1, 30)]
    assert {"better", "worse"} & set(pairs)
    found = marks(model)
    assert (found.pop("rich"), found.pop("bad")) == ("*", "-")
    assert set(found.values()) == {""}  # behind the best, which may not be called better, and no one else


def test_a_row_without_a_budget_is_held_to_the_same_bits(trials: Trials) -> None:
    """Model bits against model bits: 32 of the linear layers are no more than 33 of the model."""
    on_model = BudgetFacts(centre=5.0, window=5.0, on="model")
    trials.add("budgeted", perplexity(worse_by(0.3)), budget=on_model, linear=3.0)
    trials.add("free", perplexity(worse_by(0.1)), budget=None, linear=3.01)
    model = table(trials)
    budgeted, free = row(model, "budgeted"), row(model, "free")
    assert free.bits.linear < budgeted.bits.model  # what must not be compared
    found = verdict(free, budgeted, model.columns[0])
    assert found.reason == f"free is ahead with more bits ({free.bits.model:.4f} against {budgeted.bits.model:.4f})"


def test_seeds_that_change_nothing_prove_nothing_without_items(trials: Trials) -> None:
    for seed in range(2):
        for name, value in (("a", 5.0), ("b", 5.1)):
            metric = perplexity(HARD, value=value, low=0.98 * value, high=1.02 * value)[0]
            trials.add(name, (metric, None), seed=seed)
    model = table(trials)
    found = verdict(row(model, "a"), row(model, "b"), model.columns[0])
    assert (found.outcome, found.reason) == ("not distinguishable", "by intervals, no common per-item values")


def test_a_crowd_does_not_hide_what_is_clear(trials: Trials) -> None:
    """The least p-value that resampling gives must survive the adjustment for many methods."""
    for number in range(55):
        trials.add(f"m{number}", perplexity(worse_by(0.02 * number, number)[:20]))
    assert set(marks(table(trials)).values()) == {"*", "-"}


def test_other_calibration_or_recovery_shares_a_column_and_is_never_better(trials: Trials) -> None:
    trials.add("wiki", perplexity(worse_by(0.1)), calibration={"corpus": "wiki"})
    trials.add("c4", perplexity(worse_by(0.5)), calibration={"corpus": "c4"})
    trials.add("tuned", perplexity(worse_by(0.01)), recovery=("lora",), recovery_options=({},))
    model = table(trials)
    assert len(model.columns) == 1
    for first in ("wiki", "c4", "tuned"):
        for second in {"wiki", "c4", "tuned"} - {first}:
            assert verdict(row(model, first), row(model, second), model.columns[0]).outcome == "not comparable"
    assert marks(model) == {"wiki": "*", "c4": "", "tuned": ""}


def test_another_protocol_is_named_field_by_field(trials: Trials) -> None:
    trials.add("short", perplexity(worse_by(0.1)), protocol={**PROTOCOL, "context": 512, "bos": "none"})
    trials.add("long", perplexity(worse_by(0.2)))
    model = table(trials)
    for column in model.columns:
        found = verdict(row(model, "short"), row(model, "long"), column)
        assert found.outcome == "not comparable"
        assert found.reason == "different protocols: bos (none against (absent)), context (512 against 2048)"
    found = verdict(row(model, "long"), row(model, "short"), model.columns[0])
    assert "context (2048 against 512)" in found.reason


def test_notes_name_a_difference_inside_the_tasks_of_a_mean(trials: Trials) -> None:
    tasks = [{"task": name, "lm_eval": "0.4.13"} for name in ("piqa", "arc")]
    for version in ("0.4.13", "0.4.9"):
        protocol = {"tasks": [{**task, "lm_eval": version} for task in tasks]}
        trials.add(f"at {version}", accuracy(np.ones(4)), protocol=protocol)
    (note,) = gather(trials.records, trials.folders).notes
    assert note.endswith("never compared: [a] tasks.*.lm_eval=0.4.13; [b] tasks.*.lm_eval=0.4.9")


def test_bytes_are_counted_not_tested(trials: Trials) -> None:
    trials.add("small", cost("size", 10.0), linear=2.0)
    trials.add("large", cost("size", 12.0), linear=2.04)
    model = table(trials)
    found = verdict(row(model, "large"), row(model, "small"), model.columns[0])
    assert (found.outcome, found.reason) == ("worse", "counted exactly")
    assert verdict(row(model, "small"), row(model, "small"), model.columns[0]).outcome == "not distinguishable"
