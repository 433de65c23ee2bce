"""The issue's goals, each against the rows that decide it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpu_parts.compress import BLOCKS
from gpu_parts.compress import SHAPES as MATRICES
from gpu_parts.formats import EXACT, FOLDED
from gpu_parts.linear import PREFILL, SHAPES
from gpu_parts.part import Row
from gpu_parts.runner import Result
from gpu_parts.search import AUTO, GOAL

MODEL_MINUTES = 30


@dataclass(frozen=True)
class Goal:
    """met: None where too little was measured to say."""

    wanted: str
    met: bool | None
    figure: str

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "not met"


def goals(results: Mapping[str, Result], small: bool) -> list[Goal]:
    """small: no time is held against a goal."""
    checks = _checks(results.get("check"))
    if small:
        return [checks, *(replace(goal, met=None, figure="tiny shapes") for goal in goals(results, False)[1:])]
    rows = {name: result.flat() for name, result in results.items()}
    return [
        checks,
        _search(rows.get("search", [])),
        _folded(rows.get("linear", [])),
        _exact(rows.get("linear", [])),
        _compress(results.get("compress")),
    ]


def _checks(result: Result | None) -> Goal:
    wanted = "every kernel and configuration agrees with float64"
    if result is None:
        return Goal(wanted, None, "the part did not run")
    rows = result.flat()
    wrong, missing = failures(result), unreached(result)
    figure = f"{sum('error' in row for row in rows)} comparisons, {len(wrong)} failed"
    if result.failures:
        figure += f", {len(result.failures)} cases broke off"
    if result.left_out:
        figure += f", {len(result.left_out)} cases left out for time"
    if not result.failures and not result.left_out:
        figure += f", {len(missing)} configurations never reached"
    if wrong or missing or result.failures:
        return Goal(wanted, False, figure)
    return Goal(wanted, None if result.left_out or not rows else True, figure)


def failures(result: Result) -> list[Row]:
    """Comparisons that did not hold."""
    return [row for row in result.flat() if row.get("ok") is False]


def unreached(result: Result) -> list[str]:
    """Kernel configurations that no comparison ran, of those there are; known once all cases ran."""
    if result.left_out or result.failures:
        return []
    listed: dict[str, None] = {}
    for row in result.flat():
        listed |= dict.fromkeys(row.get("exist", ()))
    ran = {name for row in result.flat() for name in row.get("ran", ())}
    return [name for name in listed if name not in ran]


def _search(rows: Sequence[Row]) -> Goal:
    wanted = f"search at {GOAL} at least 10 times torch's cdist + argmin"
    found = [row for row in rows if row["size"] == GOAL and row["road"] == AUTO]
    if not found:
        return Goal(wanted, None, "it did not run")
    row = found[0]
    figure = f"{row['over_cdist']:.1f} times, {row['over_addmm']:.1f} times torch's addmm + argmin; "
    return Goal(wanted, row["over_cdist"] >= 10, figure + f"{row['shown']:,.0f} million vectors/s")


def _folded(rows: Sequence[Row]) -> Goal:
    wanted = "folded matmul at batch 1 at least 2 times as fast as float16 dense, at every shape"
    ratios = {row["shape"]: row["over_float16"] for row in rows if row["format"] == FOLDED and row["rows"] == 1}
    return _at_every_shape(wanted, ratios, lambda ratio: ratio >= 2)


def _exact(rows: Sequence[Row]) -> Goal:
    wanted = f"exact decode at prefill {PREFILL} takes at most 2 times as long as folded, at every shape"
    took = {(row["format"], row["shape"]): row["best_us"] for row in rows if row["rows"] == PREFILL}
    both = [shape for kind, shape in took if kind == EXACT and (FOLDED, shape) in took]
    ratios = {shape: took[EXACT, shape] / took[FOLDED, shape] for shape in both}
    return _at_every_shape(wanted, ratios, lambda ratio: ratio <= 2)


def _at_every_shape(wanted: str, ratios: Mapping[str, float], holds: Callable[[float], bool]) -> Goal:
    """One shape that fails is enough to fail; to be met takes all of them."""
    missing = [f"{out}x{into}" for out, into in SHAPES if f"{out}x{into}" not in ratios]
    figure = ", ".join(f"{shape}: {ratio:.2f}" for shape, ratio in ratios.items())
    if missing:
        figure += f"{'; ' if ratios else ''}not measured: {', '.join(missing)}"
    failed = not all(holds(ratio) for ratio in ratios.values())
    return Goal(wanted, False if failed else None if missing else True, figure)


def _compress(result: Result | None) -> Goal:
    wanted = f"a 7B model compressed in under {MODEL_MINUTES} minutes"
    rows = result.flat() if result else []
    missing = {f"{out}x{into}" for (out, into), _ in MATRICES} - {row["matrix"] for row in rows}
    if missing:
        return Goal(wanted, None, f"not measured: {', '.join(sorted(missing))}")
    block = sum(row["block_seconds"] for row in rows)
    minutes = BLOCKS * block / 60
    figure = f"{block:.1f} s a block, {minutes:.1f} minutes for {BLOCKS} (extrapolated)"
    return Goal(wanted, minutes < MODEL_MINUTES, figure)
