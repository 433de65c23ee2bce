"""Which entry of a suite a printed row or a claim names: "LABEL", "LABEL+STAGE" or either with "@BUDGET"."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenbits.errors import SuiteError
from evenbits.fingerprints import protocol_of
from evenbits.layers import every_row
from evenbits.measure import fingerprint_id
from evenbits.record import BudgetFacts, Record
from evenbits.reproduced import Outcome
from evenbits.rows import Column, Row, why
from evenbits.tables import ModelTable

DENSE = "dense"

Names = Mapping[str, Collection[str]]
"""What a row may be called -> the entries that this names."""


@dataclass(frozen=True)
class Entry:
    """row: None where it was not measured; then outcome and reason say why not."""

    row: Row | None
    outcome: Outcome = "agrees"
    reason: str = ""


def find_entry(table: ModelTable | None, label: str | None, at: float | None, known: Names | None = None) -> Entry:
    """The row that `label` names. known: `entries_of` the suite; None: what was run is all there is.

    It takes the suite to tell what a name means: where "aqlm" failed, "aqlm+lora" is not what it names.
    """
    if label is None:
        return Entry(None, "published only", "no method here reproduces it")
    rows = [] if table is None else [row for row, _ in every_row(table)]
    records = () if table is None else (*table.failed, *table.skipped)
    if known is None:
        known = names_of([*((row.name, row.recovery) for row in rows), *((_label(r), r.recovery) for r in records)])
    elif label not in known and label != DENSE:
        return Entry(None, "published only", f"the suite has no entry {label!r}")
    meant = known.get(label, {label})
    found = [row for row in rows if row.full_name in meant]
    here = [row for row in found if at is None or _at(row.budget, at)]
    if len(here) == 1:
        return Entry(here[0])
    if here:
        names = ", ".join(row.full_name + ("" if row.budget is None else f"@{row.budget.centre:g}") for row in here)
        return Entry(None, "not measured", f"{label!r} names several: {names}; the published file has to say which")
    named = label if at is None else f"{label}@{at:g}"
    tried = [r for r in records if "+".join([_label(r), *r.recovery]) in meant and (at is None or _at(r.budget, at))]
    if tried:
        return Entry(None, "not measured", f"{named} {tried[0].status}: {why(tried[0])}")
    others = sorted({row.budget.centre for row in found if row.budget is not None})
    if others:
        return Entry(None, "not measured", f"{named}: it was run at {', '.join(f'{b:g}' for b in others)} alone")
    return Entry(None, "not measured", "not run yet")


def split_name(name: str) -> tuple[str, float | None]:
    """("LABEL", budget) of "LABEL@BUDGET"; the label itself may hold an @."""
    label, at, budget = name.rpartition("@")
    try:
        return (label, float(budget)) if at else (name, None)
    except ValueError:
        return name, None


def entries_of(suite: Path) -> Names:
    """What rows of this suite may be called; needs no plugin. Raises SuiteError."""
    return names_of(_entry(method) for method in suite_data(suite).get("methods", ()))


def names_of(entries: Iterable[tuple[str, Iterable[str]]]) -> Names:
    """What may be written -> the entries, "LABEL+STAGE", that it names. entries: label and recovery stages of each.

    A label alone is the entry without stages; where there is none, all that have any.
    """
    labels = {"+".join([label, *stages]): label for label, stages in entries}
    names = {entry: {entry} for entry in labels}
    for entry, label in labels.items():
        if label not in labels:
            names.setdefault(label, set()).add(entry)
    return names


def suite_data(suite: Path) -> dict[str, Any]:
    """The suite as TOML says it, unchecked. Raises SuiteError."""
    try:
        return tomllib.loads(suite.read_text())
    except OSError as error:
        raise SuiteError(f"{suite}: cannot be read ({error.strerror}); give the path of a suite (*.toml)") from None
    except ValueError as error:
        raise SuiteError(f"{suite}: not a suite: {error}") from None


def columns_of(table: ModelTable, row: Row, metric: str) -> list[Column]:
    """The protocols under which a row has this metric."""
    return [column for column in table.columns if column.name == metric and column.key in row.cells]


def fields_of(row: Row, column: Column) -> Mapping[str, Any]:
    """The fields of the protocol under which the row's number in this column was measured."""
    for record in row.records:
        for metric in record.metrics:
            fields = protocol_of(record, metric)
            if metric.name == column.name and fingerprint_id(fields) == column.protocol:
                return fields
    return {}


def _at(budget: BudgetFacts | None, centre: float) -> bool:
    return budget is not None and abs(budget.centre - centre) < 1e-9


def _label(record: Record) -> str:
    return record.label or record.method


def _entry(method: Any) -> tuple[str, list[str]]:
    if not isinstance(method, dict):
        return str(method), []
    stages = [s.get("name", "") if isinstance(s, dict) else s for s in method.get("recovery", ())]
    return str(method.get("label") or method.get("name", "")), list(map(str, stages))
