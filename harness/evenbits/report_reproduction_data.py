"""What a paper prints beside what was measured, as CSV and as JSON: every number unrounded."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from evenbits.published import Origin
from evenbits.reproduced import ReproducedCell, ReproducedRow, Reproduction, failing


def reproduction_csv(found: Reproduction) -> str:
    """A line for each printed number, claim and re-computed number; numbers unrounded."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        "kind method entry stage metric published measured low high difference allowed outcome gates reason "
        "linear_bits paper_bits tolerance source version context era trust".split()
    )
    for row in found.rows:
        tail = [row.measured_bits, row.paper_bits, row.tolerance, *_origin_fields(row.origin)]
        for cell in row.cells:
            numbers = [cell.published, cell.measured, cell.low, cell.high, cell.difference, cell.allowed]
            said = [cell.outcome, cell.gates, full_reason(row, cell)]
            writer.writerow(["value", row.method, row.entry, row.stage, cell.metric, *numbers, *said, *tail])
    for claim in found.orderings:
        said = [claim.outcome, claim.gates, claim.reason]
        blank = [None] * 6
        tail = [None, None, "", *_origin_fields(claim.origin)]
        writer.writerow(["ordering", claim.claim, "", "", claim.metric, *blank, *said, *tail])
    for one in found.recomputed:
        difference = None if one.computed is None else one.computed - one.printed
        numbers = [one.printed, one.computed, None, None, difference, None]
        tail = [None, None, "", *_origin_fields(one.origin)]
        writer.writerow(["recomputed", one.what, "", "", "", *numbers, one.outcome, one.gates, one.note, *tail])
    return target.getvalue()


def reproduction_json(found: Reproduction) -> str:
    """An object: title, paper_model, model, same_model, notes, rows, orderings, recomputed, failing. Numbers that JSON
    has no form for are null."""
    facts = {
        "title": found.published.title,
        "paper_model": found.published.model,
        "model": found.model,
        "same_model": found.same_model,
        "notes": found.published.notes,
        "rows": found.rows,
        "orderings": found.orderings,
        "recomputed": found.recomputed,
        "failing": failing(found),
    }
    return json.dumps(_jsonable(facts), indent=1, allow_nan=False) + "\n"


def full_reason(row: ReproducedRow, cell: ReproducedCell) -> str:
    """A cell's reason; that of the bits says what lies on disk, too."""
    return f"{cell.reason}; {row.bits_note}" if cell.metric == "bits" and row.bits_note else cell.reason


def _origin_fields(origin: Origin) -> list[Any]:
    return [origin.source, origin.version, origin.context, origin.era, origin.trust]


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _jsonable(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "__dataclass_fields__"):
        return _jsonable({name: getattr(value, name) for name in value.__dataclass_fields__})
    return value
