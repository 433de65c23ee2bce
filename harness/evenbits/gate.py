"""`evenbits gate`: is tonight's run worse than the baseline, by more than chance and by more than nothing?

Pure functions of two snapshots: nothing is read, nothing is printed. What is judged, and how:

Quality       a change for the worse that is more than seeds make (t test, scatter pooled over rows: `gate_noise`), and
              more than chance among the items (paired test on the same items), and more than `MATERIAL`. A method
              without randomness has no such noise: there any material change for the worse is a regression. Where the
              dense model's own number is another, the share of it that is left (recovery) is judged as well.
Layers        the error that compression left in them, in the same way: it scatters far less between seeds. Single
              ones that stand out further than seeds make them are named; alone they raise no alarm.
Same trial    code, settings, seed and libraries equal, on the same kind of machine: the number must be the same.
Sizes         counted. Growth is a regression; so is a method that became smaller without an update, for the baseline's
              quality was measured at other bits. Where the size depends on the seed: beyond the scatter of seeds.
Time, memory  as ratios to the dense model of the same run; advisory, and an alarm beyond `WIDE` times only.
Pareto front  the best number at no more bits than each budget allows, whichever method gives it.
Protocol      numbers are compared under one protocol only. A field that changed is a regression by itself, but for
              versions of libraries, which are named beside what changed.
Rows          one that vanished, is skipped, or left its budget window is a regression. One that failed is no number:
              the run is incomplete.

All alarms of a night together are wrong with a chance below `FALSE_ALARMS`: a share for each kind of test, and within
it Holm's adjustment. tests/benchmarks/gate.py counts them, by simulation from real records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evenbits.gate_checks import FALSE_ALARMS, MATERIAL, Check, Comparison, budget_bits
from evenbits.gate_costs import WIDE, judge_ratios, judge_sizes
from evenbits.gate_front import judge_fronts
from evenbits.gate_layers import judge_layers
from evenbits.gate_quality import judge_qualities
from evenbits.gate_snapshot import Absence, NightRun, Snapshot

__all__ = ["FALSE_ALARMS", "MATERIAL", "WIDE", "Check", "Gated", "gate"]


@dataclass(frozen=True)
class Gated:
    """What a night came to. checks: everything that was judged, regressions first."""

    suite: str
    baseline: Snapshot
    night: Snapshot
    checks: tuple[Check, ...]
    incomplete: tuple[Absence, ...]
    notes: tuple[str, ...]
    level: float

    @property
    def regressions(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "regression"]

    @property
    def exit_code(self) -> int:
        """1 for a regression, even where the run is incomplete: what was measured is certain. Else 3 or 0."""
        return 1 if self.regressions else 3 if self.incomplete else 0


def gate(baseline: Snapshot, run: NightRun, level: float = 0.95) -> Gated:
    """Tonight's run against the baseline. level: of the intervals that are shown; alarms have a level of their own."""
    one = Comparison(baseline, run, level)
    qualities, pairs = judge_qualities(one)
    checks = [*_rows(one), *judge_sizes(one), *qualities, *judge_layers(one, pairs, qualities)]
    checks += [*judge_fronts(one, pairs), *judge_ratios(one)]
    order = ("regression", "improvement", "advisory", "not judged", "ok")
    checks.sort(key=lambda check: order.index(check.outcome))
    return Gated(baseline.suite, baseline, one.night, tuple(checks), run.incomplete, tuple(_notes(one, checks)), level)


def _rows(one: Comparison) -> Iterator[Check]:
    absent = {absence.place: absence for absence in one.run.absences}
    unknown = "" in absent  # no record says which row it was to be
    for place, before in one.before.items():
        if place in one.now:
            if before.within and not one.now[place].within:
                text = f"left its budget window: {budget_bits(before):.4f} -> {budget_bits(one.now[place]):.4f} bits"
                yield Check(place, "row", "regression", text, causes=one.causes(place))
            else:
                yield Check(place, "row", "ok", "measured")
        elif place in absent and absent[place].status == "skipped":
            yield Check(place, "row", "regression", f"now skipped: {absent[place].reason}")
        elif place in absent or unknown:
            reason = f"{absent[place].status}: {absent[place].reason}" if place in absent else "no record"
            yield Check(place, "row", "not judged", reason)
        else:
            yield Check(place, "row", "regression", "vanished: the run's plan has no such row")


def _notes(one: Comparison, checks: list[Check]) -> Iterator[str]:
    if not one.several_seeds:
        yield "the baseline has one seed: how much seeds scatter is not known, the items alone say what is chance"
    new = [place for place in one.now if place not in one.before]
    if new:
        yield f"not in the baseline: {', '.join(new)}; --update takes in what is meant to stay"
    told = {check.row for check in checks if check.outcome not in ("ok", "not judged")}
    quiet: dict[str, list[str]] = {}
    for place in one.common:
        for cause in one.causes(place) if place not in told else ():
            quiet.setdefault(cause, []).append(place)
    for cause, places in quiet.items():
        if cause.startswith(("settings", "budget window", "libraries")):
            rows = f"all {len(places)} rows" if len(places) == len(one.common) else ", ".join(places)
            yield f"without effect on {rows}: {cause}"
