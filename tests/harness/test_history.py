"""Nights kept as small files, and the series, table and plots that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness.trials import Trials, accuracy, cost, perplexity
from typer.testing import CliRunner

from evenbits.errors import ArtifactError
from evenbits.history import Series, as_json, series_of
from evenbits.nights import Night, NightMetric, NightRow, Reading, add_night, make_night, read_history, read_night

HERE = {
    "versions": {"torch": "2.13.0"}, "python": "3.11.7", "platform": "Linux", "processor": "A",
    "git": {"commit": "c" * 40, "dirty": False},
}  # fmt: skip
METRICS = {
    "perplexity": NightMetric(unit="perplexity", better="lower", protocol="p1", quality=True),
    "acc": NightMetric(unit="accuracy", better="higher", protocol="p2", quality=True),
    "latency_ms": NightMetric(unit="ms", better="lower", protocol="p3", volatile=True),
    "size_bytes": NightMetric(unit="bytes", better="lower", protocol="p4"),
}


def made_run(root: Path, seeds: Sequence[int] = (0,)) -> Trials:
    trials = Trials(root)
    facts = {"environment": {"git": {"commit": "b" * 40, "dirty": False}, "processor": "A"}}
    items = np.linspace(0.4, 0.6, 50)
    trials.add(
        "dense", perplexity(items), cost("latency_ms", 4.0, "ms", volatile=True), finished="2026-01-01T01:00:00+00:00",
        **facts,
    )  # fmt: skip
    for seed in seeds:
        trials.add(
            "gptq", perplexity(items + 0.1 + 0.01 * seed), accuracy(np.ones(50)),
            cost("latency_ms", 5.0 + seed, "ms", volatile=True), seed=seed, trial=f"gptq{seed}",
            finished=f"2026-01-01T02:0{seed}:00+00:00", **facts,
        )  # fmt: skip
    trials.add("nf4", status="skipped", reason="no setting within")
    return trials


def night(
    number: int,
    values: dict[str, float | None],
    *,
    measured: str | None = None,
    dense: float = 2.0,
    seeds: dict[str, tuple[float, ...]] | None = None,
    protocol: str = "p1",
    processor: str = "A",
    versions: dict[str, str] | None = None,
) -> Night:
    """One with a dense row and one of gptq. `measured`: of gptq, else the night's own date."""
    date = f"2026-{1 + number // 28:02d}-{1 + number % 28:02d}T00:00:00+00:00"
    readings = {
        name: Reading(
            value=value, low=value and value - 0.02, high=value and value + 0.02, by_seed=(seeds or {}).get(name, ())
        )
        for name, value in values.items()
    }
    facts: dict[str, Any] = {
        "model": "small",
        "linear_bits": 2.0,
        "model_bits": 3.0,
        "linear_bytes": 1,
        "model_bytes": 2,
    }
    base = {"perplexity": Reading(value=1.0), "latency_ms": Reading(value=dense)}
    return Night(
        suite="tests", id=f"{number:012x}", date=date, commit=f"{number:040x}", versions=versions or {"torch": "2.13"},
        metrics=METRICS | {"perplexity": METRICS["perplexity"].model_copy(update={"protocol": protocol})},
        rows=(
            NightRow(**facts, name="dense", trials=("d",), measured=measured or date, processor="A", readings=base),
            NightRow(**facts, name="gptq", budget="2 ±0.05", trials=("t",), measured=measured or date,
                     processor=processor, readings=readings),
        ),
    )  # fmt: skip


def only(nights: Sequence[Night], metric: str, name: str = "gptq") -> Series:
    (found,) = [series for series in series_of(nights) if (series.name, series.metric) == (name, metric)]
    return found


def test_a_night_holds_what_its_records_say(tmp_path: Path) -> None:
    trials = made_run(tmp_path, seeds=(0, 1, 2))
    found = make_night(trials.store, "tests", HERE)
    assert (found.commit, found.missing, found.versions) == ("c" * 40, 0, {"torch": "2.13.0"})
    dense, gptq = found.rows
    assert (dense.key, gptq.key) == (("small", "dense", ""), ("small", "gptq", "2 ±0.05"))
    assert gptq.trials == ("gptq0", "gptq1", "gptq2")
    assert gptq.artifacts == ("artifactgptq0", "artifactgptq1", "artifactgptq2")
    assert gptq.commits == ("b" * 40,)
    assert gptq.measured == "2026-01-01T02:02:00+00:00"
    reading = gptq.readings["perplexity"]
    assert reading.by_seed == pytest.approx(tuple(np.exp(0.6 + 0.01 * seed) for seed in range(3)), rel=1e-5)
    assert reading.low is not None
    assert reading.high is not None
    assert reading.low < reading.value < reading.high  # type: ignore[operator]
    assert found.metrics["perplexity"].quality
    assert found.metrics["latency_ms"].volatile
    assert [(failure.name, failure.status) for failure in found.failures] == [("nf4", "skipped")]


def test_the_same_run_twice_is_kept_once(tmp_path: Path) -> None:
    trials = made_run(tmp_path)
    folder = tmp_path / "history"
    first, new = add_night(make_night(trials.store, "tests", HERE), folder)
    assert new
    before = first.read_bytes()
    assert add_night(make_night(trials.store, "tests", HERE), folder) == (first, False)
    assert [path.name for path in folder.iterdir()] == [first.name]
    assert first.read_bytes() == before
    # the same records under the next commit are another night
    _, new = add_night(make_night(trials.store, "tests", HERE | {"git": {"commit": "d" * 40, "dirty": False}}), folder)
    assert new
    assert len(read_history(folder)) == 2


def test_what_is_kept_reads_back_and_is_small(tmp_path: Path) -> None:
    made = make_night(made_run(tmp_path).store, "tests", HERE)
    path, _ = add_night(made, tmp_path / "history")
    assert read_night(path) == made
    assert len(path.read_bytes()) < 600 + 700 * len(made.rows)
    assert path.read_text().count("\n") == len(made.rows) + 1  # a line a row, for diffs


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    trials = made_run(tmp_path)
    trials.store.write_plan("tests", [*trials.order, "never"])
    assert make_night(trials.store, "tests", HERE).missing == 1


def test_folders_are_not_mixed(tmp_path: Path) -> None:
    add_night(night(0, {}), tmp_path)
    with pytest.raises(ArtifactError, match="'tests'"):
        add_night(night(1, {}).model_copy(update={"suite": "other"}), tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not the record of a night"), ('{"schema_version": 9}', "upgrade"), ('{"schema_version": 1}', "suite")],
)
def test_damaged_nights_are_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "2026-01-01-abc.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=words) as error:
        read_history(tmp_path)
    assert str(path) in str(error.value)


def test_a_regression_is_a_step_with_what_changed() -> None:
    rng = np.random.default_rng(0)
    nights = [
        night(k, {"perplexity": 2 + 0.01 * rng.normal() + (0.2 if k >= 15 else 0)},
              versions={"torch": "2.13" if k < 15 else "2.14"})
        for k in range(20)
    ]  # fmt: skip
    series = only(nights, "perplexity")
    (step,) = series.steps
    assert (step.point, step.date[:10], step.worse) == (15, "2026-01-16", True)
    assert step.changed == ("torch 2.13 -> 2.14",)
    assert (step.commit_before, step.commit) == (nights[14].short_commit, nights[15].short_commit)
    assert step.step.relative == pytest.approx(0.1, abs=0.01)
    assert series.levels[0] == pytest.approx(2, abs=0.02)
    assert len(series.levels) == 20


def test_kept_records_are_no_new_draw() -> None:
    kept = [night(k, {"perplexity": 2.0}, measured="2026-01-01") for k in range(10)]
    assert [point.kept for point in only(kept, "perplexity").points] == [False] + [True] * 9
    assert not only(kept, "perplexity").steps
    # one change of code, kept since: noise from the items' interval, and large against it
    changed = [*kept, *(night(k, {"perplexity": 2.2}, measured="2026-01-11") for k in range(10, 14))]
    (step,) = only(changed, "perplexity").steps
    assert step.point == 10
    assert only(changed, "perplexity").noise_from == "floor"
    small = [*kept, *(night(k, {"perplexity": 2.004}, measured="2026-01-11") for k in range(10, 14))]
    assert not only(small, "perplexity").steps


def test_seeds_tell_the_noise() -> None:
    def one(k: int, value: float) -> Night:
        return night(k, {"perplexity": value}, seeds={"perplexity": (value - 0.003, value, value + 0.003)})

    series = only([*(one(k, 2.0) for k in range(5)), *(one(k, 2.03) for k in range(5, 10))], "perplexity")
    assert series.noise_from == "seeds"
    assert series.noise == pytest.approx(0.003 / 3**0.5)
    assert [step.point for step in series.steps] == [5]


def test_times_are_over_the_dense_models() -> None:
    nights = [night(k, {"latency_ms": 3.0 * (1 + k % 3)}, dense=2.0 * (1 + k % 3)) for k in range(12)]
    series = only(nights, "latency_ms")
    assert series.relative
    assert {point.value for point in series.points} == {1.5}
    assert not [s for s in series_of(nights) if s.name == "dense" and s.metric == "latency_ms"]
    # not over a number from another kind of processor
    assert len(only([*nights, night(12, {"latency_ms": 9.0}, processor="B")], "latency_ms").points) == 12


def test_one_slow_time_that_was_kept_is_no_step() -> None:
    usual = [night(k, {"latency_ms": 3.0 + 0.05 * (k % 2)}) for k in range(10)]
    slow = [night(k, {"latency_ms": 9.0}, measured="2026-01-11") for k in range(10, 16)]
    assert not only([*usual, *slow], "latency_ms").steps
    again = [night(k, {"latency_ms": 9.0}, measured=f"2026-02-{k}") for k in range(16, 18)]
    (step,) = only([*usual, *slow, *again], "latency_ms").steps
    assert step.worse


def test_sizes_are_exact() -> None:
    nights = [night(k, {"size_bytes": 1000.0 + (k >= 4)}, measured=f"m{k // 4}") for k in range(8)]
    (step,) = only(nights, "size_bytes").steps
    assert step.step.change == pytest.approx(1)


def test_another_protocol_starts_anew() -> None:
    nights = [night(k, {"perplexity": 2.0 if k < 6 else 5.0}, protocol="p1" if k < 6 else "p9") for k in range(12)]
    series = only(nights, "perplexity")
    assert (series.breaks, series.steps) == ((6,), ())
    assert series.levels == pytest.approx((2.0,) * 6 + (5.0,) * 6)


def test_diverged_and_absent_nights_leave_a_gap() -> None:
    nights = [
        night(0, {"perplexity": 2.0}),
        night(1, {"perplexity": None}),
        night(2, {}),
        night(3, {"perplexity": 2.1}),
    ]
    assert [point.night for point in only(nights, "perplexity").points] == [0, 3]


def test_json_is_whole() -> None:
    nights = [night(k, {"perplexity": 2.0 + (k > 4), "acc": 0.5}) for k in range(9)]
    found = json.loads(json.dumps(as_json(nights, series_of(nights)), allow_nan=False))
    assert [one["commit"] for one in found["nights"]] == [n.commit for n in nights]
    (series,) = [s for s in found["series"] if s["method"] == "gptq" and s["metric"] == "perplexity"]
    assert [step["point"] for step in series["steps"]] == [5]
    assert len(series["points"]) == 9


def test_the_command_keeps_shows_and_draws(tmp_path: Path) -> None:
    from evenbits.commands_history import app

    made_run(tmp_path / "results")
    suite = tmp_path / "tests.toml"
    suite.write_text('name = "tests"\n')
    command = ["add", str(suite), "--results", str(tmp_path / "results")]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.output.startswith("kept ")
    assert second.output.startswith("known already")
    folder = tmp_path / "results" / "history" / "tests"
    assert len(list(folder.iterdir())) == 1
    for k in range(12):
        add_night(night(k, {"perplexity": 2.0 + (k > 6), "latency_ms": 3.0}), folder)
    pytest.importorskip("matplotlib")
    shown = CliRunner().invoke(app, ["show", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "13 nights of tests" in shown.output
    assert "| 2026-01-08 |" in shown.output
    names = {path.name for path in (folder / "report").iterdir()}
    assert {"history.json", "history-small-perplexity.png", "history-small-latency_ms.svg"} <= names
    picture = (folder / "report" / "history-small-perplexity.svg").read_text()
    for words in ("gptq", "dense", "2026-01-08", "lower is better"):
        assert words in picture
    elsewhere = CliRunner().invoke(app, ["show", str(folder), "--out", str(tmp_path / "out"), "--no-plots"])
    assert elsewhere.exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["history.json"]


def test_models_are_told_apart_and_a_drift_is_told(tmp_path: Path) -> None:
    from evenbits.commands_history import app

    rng = np.random.default_rng(2)
    for k in range(40):
        one = night(k, {"perplexity": 2.0 + 0.05 * k + 0.02 * rng.normal()})
        other = [row.model_copy(update={"model": "large"}) for row in night(k, {"perplexity": 9.0}).rows]
        add_night(one.model_copy(update={"rows": (*one.rows, *other)}), tmp_path)
    shown = CliRunner().invoke(app, ["show", str(tmp_path), "--no-plots"])
    assert shown.exit_code == 0, shown.output
    for words in ("| large gptq 2 ±0.05 |", "| small gptq 2 ±0.05 |", "no steps"):
        assert words in shown.output
    (drift,) = [line for line in shown.output.splitlines() if line.startswith("drift: ")]
    assert drift.startswith("drift: small gptq 2 ±0.05 perplexity: +0.05")
    assert drift.endswith(" a measurement, worse")


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    from evenbits.commands_history import app
    from evenbits.errors import SuiteError

    found = CliRunner().invoke(app, ["show", str(tmp_path / "none")])
    assert isinstance(found.exception, SuiteError)
    assert "history add" in str(found.exception)
