"""Error and bits of every layer, gathered from a table's rows: seeds joined, layers named by block and kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evenbits.record import BudgetFacts, LayerFacts
from evenbits.rows import Row
from evenbits.tables import ModelTable


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its block (None outside the blocks) and its kind, the path inside the block."""

    name: str
    block: int | None
    kind: str


@dataclass(frozen=True)
class LayerCell:
    """A layer of a row; numbers are means over the seeds that know them.

    error: relative squared error of the weights; calibrated: weighted by the layer's inputs. None where not known.
    left_dense: the method did not touch it in any seed, so that its error says nothing of the method.
    """

    place: Place
    bits: float
    error: float | None
    calibrated: float | None
    left_dense: bool


@dataclass(frozen=True)
class LayerRow:
    """A row with what is known of its layers, in the model's order."""

    row: Row
    budget: BudgetFacts | None
    cells: tuple[LayerCell, ...]


def place_of(name: str) -> Place:
    """ "model.layers.3.mlp.up_proj": block 3, kind "mlp.up_proj". The first number of a path is the block's."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None or number + 1 == len(parts):
        return Place(name, None, name)
    return Place(name, int(parts[number]), ".".join(parts[number + 1 :]))


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Kind -> its last word without "_proj" where that is still its own: q, k, v, o, gate, up, down."""
    last = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    brief = {kind: word.removesuffix("_proj") or word for kind, word in last.items()}
    for names in (brief, last):
        if len(set(names.values())) == len(set(kinds)):
            return names
    return {kind: kind for kind in kinds}


def every_row(model: ModelTable) -> Iterator[tuple[Row, BudgetFacts | None]]:
    """Each row with its budget: the dense model, then by budget the ranked rows and those outside the window."""
    for row in model.dense:
        yield row, None
    for section in model.sections:
        for row in (*section.rows, *section.outside):
            yield row, section.budget


def layer_rows(model: ModelTable) -> list[LayerRow]:
    """Rows with layers, in the table's order: dense rows after a recovery, then each budget, off-window rows last."""
    return [LayerRow(row, budget, cells) for row, budget in every_row(model) if (cells := _cells(row))]


def compressed_only(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Without rows whose every layer is left dense: there is no error of theirs to look at."""
    return [found for found in rows if not all(cell.left_dense for cell in found.cells)]


def by_budget(rows: Sequence[LayerRow]) -> list[list[LayerRow]]:
    groups: dict[str, list[LayerRow]] = {}
    for row in rows:
        groups.setdefault("" if row.budget is None else row.budget.model_dump_json(), []).append(row)
    return list(groups.values())


def pages_of(rows: Sequence[LayerRow], size: int) -> Iterator[list[LayerRow]]:
    """Whole budgets together as long as a page of `size` rows holds them; a budget of more rows than that is cut."""
    page: list[LayerRow] = []
    for group in by_budget(rows):
        if page and len(page) + len(group) > size:
            yield page
            page = []
        page += group
        while len(page) > size:
            yield page[:size]
            page = page[size:]
    if page:
        yield page


def places(rows: Sequence[LayerRow]) -> list[Place]:
    """Every layer of any row, once, by kind in order of appearance and then by block."""
    found = list({cell.place.name: cell.place for row in rows for cell in row.cells}.values())
    kinds = list(dict.fromkeys(place.kind for place in found))
    return sorted(found, key=lambda p: (kinds.index(p.kind), -1 if p.block is None else p.block))


def _cells(row: Row) -> tuple[LayerCell, ...]:
    by_name: dict[str, list[LayerFacts]] = {}
    dense: set[str] | None = None
    for record in row.records:
        for facts in record.layers:
            by_name.setdefault(facts.name, []).append(facts)
        if record.layers:
            own = set() if record.ledger is None else set(record.ledger.left_dense)
            dense = own if dense is None else dense & own
    return tuple(
        LayerCell(
            place=place_of(name),
            bits=math.fsum(f.bits for f in facts) / len(facts),
            error=_mean([f.error for f in facts]),
            calibrated=_mean([f.calibrated_error for f in facts]),
            left_dense=name in (dense or ()),
        )
        for name, facts in by_name.items()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
