"""Printed beside reproduced, cell by cell, with a verdict: a pure function of records and published values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from pydantic import ValidationError

from evenbits.compressor import ModelShapes
from evenbits.errors import EvenbitsError, SuiteError
from evenbits.named_trials import suite_name
from evenbits.plugins import Registry
from evenbits.published import NEVER_GATE, Formula, Published, PublishedRow, published_path, read_published
from evenbits.reproduced import (
    Failing,
    Outcome,
    RecomputedNumber,
    ReproducedCell,
    ReproducedOrdering,
    ReproducedRow,
    Reproduction,
    failing,
)
from evenbits.reproduced_cells import bits_note, judge_bits, judge_value
from evenbits.reproduced_entries import DENSE, Names, entries_of, find_entry, suite_data
from evenbits.reproduced_floors import judge_floor
from evenbits.reproduced_orderings import judge_ordering
from evenbits.store import Results
from evenbits.suite import check_options
from evenbits.suite_spec import ModelOutline
from evenbits.tables import ModelTable, Table, gather

__all__ = [
    "Failing", "Outcome", "RecomputedNumber", "ReproducedCell", "ReproducedOrdering", "ReproducedRow", "Reproduction",
    "failing", "load_reproduction", "reproduce",
]  # fmt: skip


def load_reproduction(suite: Path, results: Results, registry: Registry) -> Reproduction:
    """What the records of a suite's latest run reproduce of the values beside it; all "not measured" without a run.

    Raises SuiteError where there is no suite or nothing published beside it, ArtifactError for damaged records.
    """
    name = suite_name(suite)
    results.check_schema()
    records, folders = results.records(name) if name in results.suites() else ([], {})
    return reproduce_suite(suite, gather(records, folders), registry)


def reproduce_suite(suite: Path, table: Table, registry: Registry | None) -> Reproduction:
    """As `load_reproduction`, of records gathered already."""
    published = read_published(published_path(suite))
    return reproduce(
        published,
        model_of(published, table),
        shapes=shapes_of(suite),
        registry=registry,
        known=entries_of(suite),
    )


def reproduce(
    published: Published,
    table: ModelTable | None,
    *,
    shapes: ModelShapes | None = None,
    registry: Registry | None = None,
    known: Names | None = None,
) -> Reproduction:
    """Every printed row, claim, average and formula with its verdict.

    table: what was measured on one model, None where nothing was. shapes: of the paper's model, for its formulas, and
    to tell whether the one measured can be it. registry: of the plugins whose formulas are asked. known: `entries_of`
    the suite; a row of any other is "published only".
    """
    same = table is None or _is_same(published.model, table, shapes)
    rows = tuple(_row(published, row, table, known, same_model=same) for row in published.rows)
    orderings = tuple(
        judge_ordering(one, published.origin_of(one), table, known, same_model=same) for one in published.orderings
    )
    floors = tuple(judge_floor(one, published.origin_of(one), table, same_model=same) for one in published.floors)
    outlined = shapes if published.outline is None else published.outline.shapes()
    recomputed = (*_averages(published), *(_formula(published, one, outlined, registry) for one in published.formulas))
    return Reproduction(
        published, published.model if table is None else table.model.name, same, rows, (*orderings, *floors), recomputed
    )


def model_of(published: Published, table: Table) -> ModelTable | None:
    """The paper's model among those measured, else the first of them."""
    own = [model for model in table.models if _folder_name(model.model.name) == _folder_name(published.model)]
    return next(iter([*own, *table.models]), None)


def shapes_of(suite: Path) -> ModelShapes | None:
    """Of the first model for which the suite gives an outline. Raises SuiteError for one that is wrong."""
    models = suite_data(suite).get("model")
    for model in models if isinstance(models, list) else [models]:
        if isinstance(model, dict) and isinstance(model.get("outline"), dict):
            try:
                return ModelOutline.model_validate(model["outline"]).shapes()
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(["model.outline", *map(str, first["loc"])])
                raise SuiteError(f"{suite}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    return None


def _is_same(name: str, table: ModelTable, shapes: ModelShapes | None) -> bool:
    """By name, and by size where that is known: a folder may be called anything."""
    fits = shapes is None or shapes.weights == table.model.linear_weights
    return fits and _folder_name(name) == _folder_name(table.model.name)


def _folder_name(name: str) -> str:
    """Of "meta-llama/Llama-2-7b-hf" a local copy is called "Llama-2-7b-hf"."""
    return name.rstrip("/").rpartition("/")[2].casefold()


def _row(
    published: Published,
    printed: PublishedRow,
    table: ModelTable | None,
    known: Names | None,
    *,
    same_model: bool,
) -> ReproducedRow:
    origin = published.origin_of(printed)
    entry = find_entry(table, printed.label, printed.at, known)
    bits = judge_bits(printed, origin, entry, same_model=same_model)
    cells = [judge_value(printed, origin, name, entry, table, same_model=same_model) for name in printed.values]
    row = entry.row
    return ReproducedRow(
        method=printed.method,
        label=printed.label,
        at=printed.at,
        stage=printed.stage,
        tolerance=printed.tolerance,
        origin=origin,
        printed_bits=printed.bits,
        measured_bits=None if row is None else row.bits.linear,
        paper_bits=None if row is None or row.method == DENSE else row.bits.paper,
        bits_note=bits_note(printed, row),
        cells=(*([] if bits is None else [bits]), *cells),
        note=printed.note,
    )


def _averages(published: Published) -> Iterator[RecomputedNumber]:
    for row in (*published.rows, *published.averaged):
        if row.average is None:
            continue
        parts = [row.values[name] for name in row.average_of]
        value = row.values[row.average]
        computed = fmean(parts)
        # each number was rounded once: the parts by half a last digit each, and so was what is printed for their mean
        rounding = [0.5 * 10.0 ** -row.decimals_of(name) for name in (*row.average_of, row.average)]
        near = abs(computed - value) <= fmean(rounding[:-1]) + rounding[-1] + 1e-9
        note = row.mixed.get(row.average, "")
        yield RecomputedNumber(
            f"{row.method}{'' if row.bits is None else f', {row.bits:g} bits'}: {row.average}",
            value,
            computed,
            "agrees" if near else "differs",
            published.origin_of(row),
            note or ("" if near else f"the mean of the row's {len(parts)} printed values is another number"),
        )


def _formula(
    published: Published, formula: Formula, shapes: ModelShapes | None, registry: Registry | None
) -> RecomputedNumber:
    """The paper's bits of these options on the model's shapes, by the plugin that knows the formula."""
    origin = published.origin_of(formula)
    options = " ".join(f"{key}={value}" for key, value in formula.options.items())
    stored = ", all that is stored" if formula.bits == "linear" else ""
    what = f"{formula.method}{' ' if options else ''}{options}: bits{stored}"
    if shapes is None or registry is None:
        missing = (
            "neither the suite nor this file gives an outline of the model"
            if shapes is None
            else "no plugins were loaded"
        )
        return RecomputedNumber(what, formula.printed, None, "not measured", origin, missing)
    try:
        compressor = registry.find("compressors", formula.method, "method").value
    except EvenbitsError as error:
        return RecomputedNumber(what, formula.printed, None, "published only", origin, str(error))
    checked = check_options(compressor.options, formula.options, f"formula {formula.method}: options")
    estimate = compressor.predict(checked, shapes)
    computed = float(estimate.paper_bits if formula.bits == "paper" else estimate.linear_bits(shapes))
    near = abs(computed - formula.printed) <= formula.tolerance + 1e-9
    gates = origin.trust is not None and origin.trust not in NEVER_GATE
    note = formula.note or ("" if near else f"outside ±{formula.tolerance:g}")
    return RecomputedNumber(what, formula.printed, computed, "agrees" if near else "differs", origin, note, gates)
