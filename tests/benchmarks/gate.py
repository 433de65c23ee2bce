"""How often the gate raises an alarm where nothing changed, and how small a change it finds: by simulation.

    python tests/benchmarks/gate.py results/baselines/nightly.json --out results/bench

Seeds are drawn from those of a real baseline: an unseen seed of a row is the mean of its seeds plus a random
combination of what these depart from it by, item by item, in all metrics alike, so that its numbers scatter as the real
ones do. Combinations are normal, or of Student's t with 4 degrees of freedom where seeds have outliers. Each draw is a
baseline of as many seeds as the real one and nights of one seed; rows are independent of each other, which is the worst
case. Then one row of a night is made worse: by so much in all items of its perplexity, or in the error of one layer.
Writes gate.json and gate.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.gate import gate
from evenbits.gate_baseline import read_baseline
from evenbits.gate_snapshot import LAYER_ERROR, KeptItems, KeptMetric, KeptRow, NightRun, Snapshot
from evenbits.statistics import Floats, statistic_value

Draw = Callable[[tuple[int, int]], Floats]
CHANGES = (0.005, 0.01, 0.02)  # of a perplexity
JUMPS = (0.1, 0.3, 1.0)  # of one layer's error


def redraw(row: KeptRow, design: dict[str, Any], count: int, draw: Draw) -> KeptRow:
    """The row with `count` unseen seeds; a row that no seed changes stays as it is."""
    if len(row.seeds) < 2:
        return row
    mix = draw((count, len(row.seeds))) / np.sqrt(len(row.seeds) - 1)
    metrics = tuple(_redrawn(metric, design, mix) for metric in row.metrics)
    per_seed = {
        name: tuple(getattr(row, name)[0] for _ in range(count))
        for name in ("artifacts", "made_with", "bits", "linear_bytes", "model_bytes")
    }
    drawn = mix[:, 0].tolist()  # another trial each time: the same one would have to give the same number
    own = {"seeds": tuple(range(100, 100 + count)), "trials": tuple(f"drawn {one}" for one in drawn)}
    return row.model_copy(update={"metrics": metrics, **per_seed, **own})


def _redrawn(metric: KeptMetric, design: dict[str, Any], mix: Floats) -> KeptMetric:
    seeds = tuple(range(100, 100 + len(mix)))
    if metric.items is None or len(metric.seeds) != mix.shape[1]:
        values = np.asarray(metric.values)
        mix = mix[:, : len(values)]
        positive = values.min() > 0  # times scatter by a factor
        values = np.log(values) if positive else values
        drawn = values.mean() + mix @ (values - values.mean())
        return metric.model_copy(update={"seeds": seeds, "values": tuple(np.exp(drawn) if positive else drawn)})
    items = metric.items.array()
    items = items.mean(axis=0) + mix @ (items - items.mean(axis=0))
    return with_items(metric, items, seeds, design)


def with_items(metric: KeptMetric, items: Floats, seeds: tuple[int, ...], design: dict[str, Any]) -> KeptMetric:
    assert metric.items is not None
    weights = design[metric.design].weights if metric.design is not None else None
    shares = None if weights is None else np.asarray(weights)
    values = tuple(statistic_value(one, metric.items.statistic, shares) for one in items)
    data = base64.b64encode(zlib.compress(items.astype("<f4").tobytes(), 1)).decode()
    kept = KeptItems(seeds=len(items), items=items.shape[1], statistic=metric.items.statistic, data=data)
    return metric.model_copy(update={"seeds": seeds, "values": values, "items": kept})


def night_of(real: Snapshot, seeds: int, draw: Draw) -> Snapshot:
    rows = tuple(redraw(row, real.designs, seeds, draw) for row in real.rows)
    return real.model_copy(update={"rows": rows})


def worsened(night: Snapshot, place: str, change: float, layer: int | None = None) -> Snapshot:
    """With the perplexity of one row larger by that share, in all items alike, or the error of one of its layers."""

    def changed(metric: KeptMetric) -> KeptMetric:
        if metric.items is None or metric.items.statistic != "exp-mean":
            return metric
        items = metric.items.array()
        if (metric.name == LAYER_ERROR) != (layer is not None):
            return metric
        items[:, slice(None) if layer is None else layer % items.shape[1]] += np.log1p(change)
        return with_items(metric, items, metric.seeds, night.designs)

    rows = tuple(
        row.model_copy(update={"metrics": tuple(map(changed, row.metrics))}) if row.place == place else row
        for row in night.rows
    )
    return night.model_copy(update={"rows": rows})


def simulate(real: Snapshot, nights: int, per_baseline: int, tails: str) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    draw: Draw = generator.standard_normal
    if tails == "t":
        # of variance 1, as the normal ones
        draw = lambda shape: generator.standard_t(4, shape) / np.sqrt(2.0)  # noqa: E731
    seeds = max(len(row.seeds) for row in real.rows)
    varying = [row.place for row in real.rows if len(row.seeds) > 1]
    alarms, false = 0, list[str]()
    faults = [("perplexity", change) for change in CHANGES] + [("one layer", change) for change in JUMPS]
    found = {f"{what} +{100 * change:g} %": [0, 0] for what, change in faults}
    by_row: dict[str, list[int]] = {place: [0, 0] for place in varying}
    for number in range(nights):
        if number % per_baseline == 0:
            baseline = night_of(real, seeds, draw)
        night = night_of(real, 1, draw)
        result = gate(baseline, NightRun(night, ()))
        alarms += bool(result.regressions)
        false += [f"{check.row}: {check.what}" for check in result.regressions]
        if number % 10 == 0:
            place = varying[number // 10 % len(varying)]
            for what, change in faults:
                layer = int(generator.integers(10_000)) if what == "one layer" else None
                judged = gate(baseline, NightRun(worsened(night, place, change, layer), ())).checks
                # a single layer's fault need not be an alarm
                outcomes = ("regression",) if layer is None else ("regression", "advisory")
                checks = [check for check in judged if check.outcome in outcomes and not check.what.endswith("acc")]
                counts = [found[f"{what} +{100 * change:g} %"], *([by_row[place]] if change == 0.01 else [])]
                for one in counts:
                    one[0] += any(
                        check.row == place and (check.what == "layers") == (layer is not None) for check in checks
                    )
                    one[1] += 1
    return {
        "tails": tails,
        "nights": nights,
        "nights_with_alarm": alarms,
        "alarms": {text: false.count(text) for text in sorted(set(false))},
        "found": {fault: hits / total for fault, (hits, total) in found.items()},
        "found_of_one_percent_by_row": {place: f"{hits} of {total}" for place, (hits, total) in by_row.items()},
    }


def as_markdown(found: dict[str, Any]) -> str:
    command = f"tests/benchmarks/gate.py results/baselines/{found['suite']}.json --nights {found['runs'][0]['nights']}"
    lines = [
        "# The gate, simulated",
        "",
        f"Baseline of suite {found['suite']}, {found['rows']} rows, {found['seeds']} seeds; {found['made']}.",
        f"Written by `python {command} --out results/bench`.",
        "",
        "Share of faults found:",
        "",
        f"| seeds drawn | unchanged nights | with an alarm | {' | '.join(found['runs'][0]['found'])} |",
        "| :-- | --: | --: |" + " --: |" * len(found["runs"][0]["found"]),
    ]
    for one in found["runs"]:
        shares = " | ".join(f"{100 * share:.0f} %" for share in one["found"].values())
        lines.append(f"| {one['tails']} | {one['nights']} | {one['nights_with_alarm']} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--nights", type=int, default=1000)
    parser.add_argument("--per-baseline", type=int, default=5, help="nights judged by one drawn baseline")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    real = read_baseline(given.baseline)
    runs = [simulate(real, given.nights, given.per_baseline, tails) for tails in ("normal", "t")]
    found = {
        "suite": real.suite,
        "rows": len(real.rows),
        "seeds": max(len(row.seeds) for row in real.rows),
        "made": datetime.now(UTC).date().isoformat(),
        "environment": describe_environment(),
        "runs": runs,
    }
    print(as_markdown(found))
    for one in runs:
        print(json.dumps({"alarms": one["alarms"], "one percent": one["found_of_one_percent_by_row"]}, indent=1))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out / "gate.json", (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(given.out / "gate.md", as_markdown(found).encode())


if __name__ == "__main__":
    main()
