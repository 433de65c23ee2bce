"""How tables, plots and pages write a number, a size, a budget and a row's name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evenbits.record import BudgetFacts
from evenbits.rows import Row


def format_number(value: float) -> str:
    """Four significant digits, in full up to a million."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3e}"


def format_bytes(count: float) -> str:
    """Decimal units, as disks and papers count."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 100 else f"{count:.0f} GB"


def format_budget(budget: BudgetFacts | None) -> str:
    if budget is None:
        return "none"
    return f"{budget.centre:g} ±{budget.window:g}" + (" model" if budget.on == "model" else "")


def name_among(row: Row, others: Sequence[Row]) -> str:
    """Method and recovery, and the settings too where another row of the same budget has the same name."""
    name = " + ".join([row.name, *row.recovery])
    alike = [o for o in others if (o.budget, o.name, o.recovery) == (row.budget, row.name, row.recovery)]
    return f"{name} ({row.settings})" if len(alike) > 1 and row.settings else name
