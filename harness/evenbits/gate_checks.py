"""What the gate's parts share: the two sides of a comparison, what is said of each thing judged, and the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evenbits.fingerprints import Difference
from evenbits.gate_causes import causes_of, protocol_change
from evenbits.gate_snapshot import KeptMetric, KeptRow, NightRun, Snapshot

FALSE_ALARMS = 0.005
"""Chance of any alarm in a night in which nothing changed, all tests together."""

Kind = Literal["perplexity", "accuracy", "layers", "front", "size", "time"]

SHARES: Mapping[Kind, float] = {
    "perplexity": 0.3,
    "accuracy": 0.25,
    "layers": 0.25,
    "front": 0.1,
    "size": 0.05,
    "time": 0.05,
}
"""How that is shared out among kinds of tests. Perplexities are few beside accuracies, and tell most."""

MATERIAL = 0.001
"""Of a perplexity, 0.1 %: the smallest change that is worth a morning."""

MATERIAL_LAYERS = 0.01
"""Of the layers' error, or of one layer's, 1 %: below that nothing is seen in the model."""

MATERIAL_ACCURACY = 0.005
"""Half a point: one question of two hundred."""

Outcome = Literal["ok", "regression", "improvement", "advisory", "not judged"]


@dataclass(frozen=True)
class Check:
    """One thing judged of one row. what: a metric's name, "layers", "size", "row"; of a model "Pareto front: METRIC".

    before, now: as records have them, means over seeds. change, low, high: above 0 for a larger number; of an accuracy
    absolute, else relative. p_value: one-sided, adjusted for all tests of its kind. causes: what else changed there.
    main: what a page shows first; the rest (single tasks, sizes, times) is folded.
    """

    row: str
    what: str
    outcome: Outcome
    text: str
    before: float | None = None
    now: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    absolute: bool = False
    p_value: float | None = None
    causes: tuple[str, ...] = ()
    main: bool = False


@dataclass
class Comparison:
    """Both sides by row. level: of the intervals that are shown."""

    baseline: Snapshot
    run: NightRun
    level: float
    before: dict[str, KeptRow] = field(init=False)
    now: dict[str, KeptRow] = field(init=False)

    def __post_init__(self) -> None:
        self.before, self.now = self.baseline.rows_by_place(), self.night.rows_by_place()

    @property
    def night(self) -> Snapshot:
        return self.run.snapshot

    @property
    def common(self) -> list[str]:
        return [place for place in self.before if place in self.now]

    @property
    def several_seeds(self) -> bool:
        return max((len(row.seeds) for row in self.baseline.rows), default=1) > 1

    def is_dense(self, place: str) -> bool:
        row = self.before[place]
        return row.method == "dense" and not row.recovery

    def dense_of(self, place: str) -> str | None:
        """The place of the uncompressed model that both sides have beside this row."""
        model = self.before[place].model
        return next((p for p in self.common if self.is_dense(p) and self.before[p].model == model), None)

    def causes(self, place: str) -> tuple[str, ...]:
        return tuple(causes_of(self.before[place], self.now[place], self.baseline, self.night))

    def counterpart(
        self, place: str, before: KeptMetric
    ) -> tuple[KeptMetric | None, list[Difference], list[Difference]]:
        """(tonight's metric of that name, fields that make the two incomparable, fields that are only named)."""
        fields = self.baseline.protocols[before.protocol]
        best: tuple[KeptMetric | None, list[Difference], list[Difference]] = None, [], []
        for now in self.now[place].metrics:
            if now.name == before.name:
                apart, named = protocol_change(fields, self.night.protocols[now.protocol], volatile=before.volatile)
                if best[0] is None or len(apart) < len(best[1]):
                    best = now, apart, named
        return best


def mean_of(metric: KeptMetric) -> float:
    return float(np.mean(metric.values))


def budget_bits(row: KeptRow) -> float:
    """Those that the row's budget is on, mean over seeds."""
    on_model = row.budget is not None and row.budget.on == "model"
    return float(np.mean([bits.model if on_model else bits.linear for bits in row.bits]))
