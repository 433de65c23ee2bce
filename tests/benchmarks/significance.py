"""How often the tests call equal methods different, and how often an interval holds the truth: by simulation.

    python tests/benchmarks/significance.py --out results/bench

Two methods of equal true value are measured on the same items: an item's score is the item's own difficulty, a seed's
own luck, and noise. Seeds scatter 2.5 times the standard error over items. "No overlap" is the rule this project had
first: a paired test on the means over seeds, and ranges over seeds that do not overlap. Writes significance.json and
significance.md.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.significance import Sampled, against_best, difference, interval, p_value_of
from evenbits.statistics import paired_difference

ITEMS = 150
SCATTER = 2.5


def draw(generator: np.random.Generator, rows: int, seeds: int) -> list[Sampled]:
    """Methods of equal true value 0, measured on common items: (seeds, ITEMS) each."""
    difficulty = generator.normal(0, 1, ITEMS)
    found = []
    for _ in range(rows):
        luck = generator.normal(0, SCATTER / np.sqrt(ITEMS), (seeds, 1)) if seeds > 1 else np.zeros((1, 1))
        items = difficulty + luck + generator.normal(0, 1, (seeds, ITEMS))
        found.append(Sampled(items.mean(axis=1), items, "mean"))
    return found


def no_overlap(a: Sampled, b: Sampled) -> bool:
    assert a.items is not None
    assert b.items is not None
    test = paired_difference(a.items.mean(axis=0), b.items.mean(axis=0))
    apart = max(a.values) < min(b.values) or max(b.values) < min(a.values)
    return test.p_value <= 0.05 and apart


def pairs(seeds: int, draws: int) -> dict[str, Any]:
    generator = np.random.default_rng(seeds)
    first = now = spans = holds = 0
    for _ in range(draws):
        a, b = draw(generator, 2, seeds)
        first += no_overlap(a, b)
        now += difference(a, b).p_value <= 0.05
        limits = interval(a)
        assert limits is not None  # there are several seeds
        low, high = limits
        spans += min(a.values) <= 0 <= max(a.values)
        holds += low <= 0 <= high
    shares = {"no overlap": first, "now": now, "range holds": spans, "interval holds": holds}
    return {"seeds": seeds, **{name: count / draws for name, count in shares.items()}}


def sections(rows: int, draws: int) -> dict[str, Any]:
    """One seed; some row called worse than the best, by each way of adjusting for many rows."""
    generator = np.random.default_rng(rows)
    plain = by_holm = now = 0
    for _ in range(draws):
        best, *others = sorted(draw(generator, rows, 1), key=lambda one: float(one.values[0]))
        p_values = [p_value_of(best, other) for other in others]
        plain += min(p_values) <= 0.05
        by_holm += len(others) * min(p_values) <= 0.05  # the smallest decides whether any is
        now += min(against_best(p_values)) <= 0.05
    return {"rows": rows, "unadjusted": plain / draws, "Holm": by_holm / draws, "now": now / draws}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=1500)
    given = parser.parse_args()
    found = [pairs(seeds, given.draws) for seeds in (2, 3, 5)]
    marked = [sections(rows, max(1, given.draws // 5)) for rows in (10, 20)]
    environment = describe_environment()
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    date = datetime.now(UTC).date().isoformat()
    text = (
        f"# Equal methods, tested\n\n{date}, commit {git['commit'][:12]}{' (modified)' if git['dirty'] else ''}.\n"
        "Written by `python tests/benchmarks/significance.py --out results/bench`.\n\n"
        f"{given.draws} simulated pairs of equal methods on {ITEMS} common items: how often they are called different "
        "at 5 %, and how often the range over seeds, and the 95 % interval, hold the true value.\n\n"
        f"{table(found)}\n\n{max(1, given.draws // 5)} simulated sections of equal methods, one seed each: how often "
        f"some row is called worse than the best.\n\n{table(marked)}\n"
    )
    facts = {"date": date, "environment": environment, "draws": given.draws, "pairs": found, "sections": marked}
    write_atomically(given.out / "significance.json", json.dumps(facts, indent=1).encode())
    write_atomically(given.out / "significance.md", text.encode())
    print(text)


def table(lines: list[dict[str, Any]]) -> str:
    """The first column counts, the others are shares."""
    head = list(lines[0])
    rows = [[str(line[head[0]]), *(f"{100 * line[name]:.1f} %" for name in head[1:])] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["--:"] * len(head), *rows])


if __name__ == "__main__":
    main()
