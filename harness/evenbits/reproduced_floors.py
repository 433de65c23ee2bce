"""A bound of theory that no entry may undercut: what does has a fault, in its bits or in its number."""

from __future__ import annotations

from evenbits.layers import every_row
from evenbits.published import NEVER_GATE, Floor, Origin
from evenbits.report_format import format_number
from evenbits.reproduced import Outcome, ReproducedOrdering
from evenbits.reproduced_entries import DENSE, columns_of
from evenbits.rows import Cell
from evenbits.tables import ModelTable


def judge_floor(floor: Floor, origin: Origin, table: ModelTable | None, *, same_model: bool) -> ReproducedOrdering:
    """ "agrees" where every measured row keeps to the bound, "differs" where the 95 % interval of one lies below it.

    The reason names the row that comes nearest to the bound.
    """
    gates = same_model and origin.trust is not None and origin.trust not in NEVER_GATE

    def found(outcome: Outcome, reason: str) -> ReproducedOrdering:
        return ReproducedOrdering(floor.claim, floor.metric, outcome, reason, origin, gates, floor.note)

    if table is None:
        return found("not measured", "not run yet")
    judged = [
        (cell.value / bound, row, cell, bound)
        for row, _ in every_row(table)
        if row.method != DENSE
        for bound in (floor.base**-row.bits.linear,)
        for cell in (row.cells[column.key] for column in columns_of(table, row, floor.metric))
    ]
    if not judged:
        return found("not measured", f"no entry has a {floor.metric}")
    if not same_model:
        return found("not comparable", f"{table.model.name} is not what the bound is of")
    below = [one for one in judged if _upper(one[2]) < one[3]]
    ratio, row, cell, bound = min(below or judged, key=lambda one: one[0])
    said = f"{row.full_name}: {format_number(cell.value)} is {ratio:.3f} times {format_number(bound)}"
    said += f", the least at {row.bits.linear:.3f} bits"
    if below:
        return found("differs", f"{len(below)} of {len(judged)} rows lie below it; {said}")
    return found("agrees", f"all {len(judged)} rows keep to it; the nearest, {said}")


def _upper(cell: Cell) -> float:
    return cell.value if cell.high is None else cell.high
