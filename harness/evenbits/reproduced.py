"""What became of a paper's printed numbers, as plain data: every cell, claim and re-computed number with a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evenbits.published import Origin, Published

Outcome = Literal["agrees", "differs", "published only", "not measured", "not comparable"]


def in_source(mixed: str) -> str:
    """The end of a reason."""
    return f"; in the source: {mixed}" if mixed else ""


@dataclass(frozen=True)
class ReproducedCell:
    """One printed number. Accuracies, and shares of the dense model's number, in per cent on both sides.

    metric: as records name it, or "bits", where `measured` is by the method's own formula. low, high: of the measured
    value, 95 %. difference: measured - published, None where the two are not compared; allowed: how much of it is.
    decimals: of the printed number. reason: in which tolerance it agrees, or why it is not compared, and `mixed`: what
    is wrong with it in the source, or "". gates: whether "differs" here is a failed reproduction.
    """

    metric: str
    published: float
    measured: float | None
    low: float | None
    high: float | None
    difference: float | None
    outcome: Outcome
    reason: str
    gates: bool
    allowed: float | None = None
    mixed: str = ""
    decimals: int = 2

    @property
    def why(self) -> str:
        """The reason without what is mixed in the source."""
        return self.reason.removesuffix(in_source(self.mixed))


@dataclass(frozen=True)
class ReproducedRow:
    """A printed row. label, at: the suite's entry and its budget; label None for "published only".

    measured_bits: linear bits from bytes on disk; paper_bits: by the method's own formula; bits_note: where printed and
    measured bits part, or "". tolerance: its class, a key of `published.TOLERANCES`.
    """

    method: str
    label: str | None
    stage: str
    origin: Origin
    printed_bits: float | None
    measured_bits: float | None
    paper_bits: float | None
    bits_note: str
    cells: tuple[ReproducedCell, ...]
    note: str
    at: float | None = None
    tolerance: str = ""

    @property
    def entry(self) -> str:
        """The suite's entry with its budget, "" where there is none."""
        return "" if self.label is None else self.label + ("" if self.at is None else f"@{self.at:g}")

    @property
    def measured(self) -> bool:
        """Whether any of its numbers was."""
        return self.measured_bits is not None or any(cell.measured is not None for cell in self.cells)


@dataclass(frozen=True)
class ReproducedOrdering:
    """A claimed ordering. outcome "agrees": it holds, by the rules of `verdict`; "differs": the other way round;
    "not comparable": not told apart, or the rules of a fair comparison forbid it. The reason says which, and which way
    the numbers point."""

    claim: str
    metric: str
    outcome: Outcome
    reason: str
    origin: Origin
    gates: bool
    note: str = ""


@dataclass(frozen=True)
class RecomputedNumber:
    """A printed average or what a bit formula gives, computed again without any run. computed: None where that needs
    what is not here (the note says what). An average that does not recompute is the source's fault and never gates."""

    what: str
    printed: float
    computed: float | None
    outcome: Outcome
    origin: Origin
    note: str = ""
    gates: bool = False


@dataclass(frozen=True)
class Reproduction:
    """model: what was measured; same_model: whether that is the paper's, else values are shown and never compared."""

    published: Published
    model: str
    same_model: bool
    rows: tuple[ReproducedRow, ...]
    orderings: tuple[ReproducedOrdering, ...]
    recomputed: tuple[RecomputedNumber, ...]


@dataclass(frozen=True)
class Failing:
    """A part that gates and differs. what: the row, claim or formula; published, measured: None for an ordering."""

    what: str
    metric: str
    published: float | None
    measured: float | None
    reason: str


def failing(reproduction: Reproduction) -> list[Failing]:
    """What makes a reproduction fail: cells, orderings and formulas that gate and differ, in the order of the file."""
    found = [
        Failing(_named(row), cell.metric, cell.published, cell.measured, cell.reason)
        for row in reproduction.rows
        for cell in row.cells
        if cell.gates and cell.outcome == "differs"
    ]
    found += [
        Failing(one.claim, one.metric, None, None, one.reason)
        for one in reproduction.orderings
        if one.gates and one.outcome == "differs"
    ]
    found += [
        Failing(one.what, "bits", one.printed, one.computed, one.note)
        for one in reproduction.recomputed
        if one.gates and one.outcome == "differs"
    ]
    return found


def _named(row: ReproducedRow) -> str:
    """The printed name, and the suite's entry where that reads otherwise."""
    return row.method if row.entry in ("", row.method) else f"{row.method} ({row.entry})"
