"""What a table's rows are made of: one method at one setting, with its numbers by metric and protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evenbits.record import Bits, BudgetFacts, ModelFacts, Record
from evenbits.significance import Sampled
from evenbits.statistics import Floats, Statistic

COST_UNITS = frozenset({"B", "byte", "bytes", "bit", "bits", "s", "ms", "seconds", "J", "W", "Wh", "tokens/s", "x"})


@dataclass(frozen=True)
class Column:
    """One metric under one protocol. `letter` tells apart several protocols of one metric, "" where there is one."""

    name: str
    protocol: str
    unit: str
    better: Literal["lower", "higher"]
    volatile: bool
    letter: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.protocol

    @property
    def title(self) -> str:
        return f"{self.name} [{self.letter}]" if self.letter else self.name

    @property
    def quality(self) -> bool:
        """Whether it says how good the model is; else what it costs."""
        return not self.volatile and self.unit not in COST_UNITS

    def ahead(self, a: float, b: float) -> bool:
        """Whether a is the better number."""
        return a < b if self.better == "lower" else a > b


@dataclass(frozen=True)
class Cell:
    """A number of a row: the mean over seeds with its interval.

    low, high: one seed, or all alike: the record's own interval, over items. Several seeds of a quality: the interval
    of their mean, from the variance of seeds and of items. Several of a cost: the smallest and the largest.
    items: (seeds, items) or None where a seed keeps none; transform: how items make the value. strata, weights: as in
    `evenbits.statistics`. fixed: the dense model's, which no seed changes (but a time is measured anew).
    """

    value: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    items: Floats | None = None
    transform: Statistic | None = None
    strata: tuple[int, ...] | None = None
    weights: Floats | None = None
    fixed: bool = False

    def sampled(self, *, items: bool = True) -> Sampled:
        """What statistics know of it; `items` False: the seeds' values alone."""
        values = np.asarray(self.by_seed, dtype=np.float64)
        if not items or self.items is None or self.transform is None:
            return Sampled(values, fixed=self.fixed)
        return Sampled(values, self.items, self.transform, self.strata, self.weights, self.fixed)


@dataclass(frozen=True)
class Recovered:
    """A number over the dense model's under the same protocol; low and high None where no items or seeds give them."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """One method with one setting under one budget and recovery stage, all its seeds together."""

    model: ModelFacts
    name: str
    options: Mapping[str, Any]
    budget: BudgetFacts | None
    recovery: tuple[str, ...]
    records: tuple[Record, ...]
    bits: Bits
    linear_bytes: float
    model_bytes: float
    cells: Mapping[tuple[str, str], Cell]
    within: bool
    settings: str = ""

    @property
    def method(self) -> str:
        return self.records[0].method

    @property
    def stage(self) -> str:
        return " + ".join(self.recovery) or "none"

    @property
    def stage_key(self) -> str:
        """Equal for the same recovery stages with the same options."""
        return json.dumps([self.recovery, self.records[0].recovery_options], sort_keys=True)

    @property
    def full_name(self) -> str:
        """Its name and its recovery stages, as `evenbits plan` and `evenbits compare` write them."""
        return "+".join([self.name, *self.recovery])

    @property
    def budget_bits(self) -> float:
        """The number its budget is matched on."""
        return self.bits.model if self.budget is not None and self.budget.on == "model" else self.bits.linear

    @property
    def ratios(self) -> dict[str, float]:
        """How many times smaller: linear layers and whole model, against fp32 and against the stored dtype."""
        linear_fp32 = 4 * self.model.linear_weights / self.linear_bytes
        model_fp32 = 4 * self.model.parameters / self.model_bytes
        stored = self.model.stored_bits / 32
        return {
            "linear_fp32": linear_fp32,
            "linear_stored": linear_fp32 * stored,
            "model_fp32": model_fp32,
            "model_stored": model_fp32 * stored,
        }


def dense_bits(model: ModelFacts) -> Bits:
    """The bits of the uncompressed model at the dtype it is evaluated in."""
    linear = 8 * model.linear_bytes / model.linear_weights
    return Bits(index=linear, paper=linear, linear=linear, model=8 * model.model_bytes / model.parameters)


def why(record: Record) -> str:
    """Why a trial was skipped or failed; "" for one that is done."""
    if record.failure is not None:
        failure = record.failure
        kind = failure.signal or failure.kind
        return f"{failure.stage}: {kind}: {failure.message}"
    return record.reason or ""
