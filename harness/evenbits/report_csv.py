"""A gathered table as CSV: every number unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from evenbits.record import Record
from evenbits.rows import Column, Row, why
from evenbits.tables import ModelTable, Section, Table


def as_csv(table: Table) -> str:
    """One line per row (seeds joined) and per skipped or failed trial; columns per metric and protocol."""
    columns = list({c.key: c for model in table.models for c in model.columns}.values())
    facts = ["model", "revision", "dtype", "method", "label", "options", "budget", "window", "on", "recovery", "seeds"]
    sizes = ["index_bits", "paper_bits", "linear_bits", "model_bits", "linear_bytes", "model_bytes"]
    ratios = ["linear_ratio_fp32", "linear_ratio_stored", "model_ratio_fp32", "model_ratio_stored"]
    of_metric = ["", " low", " high", " vs dense", " vs dense low", " vs dense high", " mark", " protocol"]
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        [*facts, "status", *sizes, *ratios, *(c.title + part for c in columns for part in of_metric), "reason"]
    )
    for model in table.models:
        for row, status, section, index in _csv_rows(model):
            line: list[object] = [*_facts(row.records[0], row.settings), " ".join(str(r.seed) for r in row.records)]
            line += [status, row.bits.index, row.bits.paper, row.bits.linear, row.bits.model]
            line += [row.linear_bytes, row.model_bytes, *row.ratios.values()]
            for column in columns:
                cell = row.cells.get(column.key)
                if cell is None:
                    line += [""] * len(of_metric)
                    continue
                mark = section.marks.get((index, column.key), "") if section is not None else ""
                line += [cell.value, _blank(cell.low), _blank(cell.high), *_ratio(model, row, column)]
                line += [mark, column.protocol]
            writer.writerow([*line, ""])
        for record in (*model.skipped, *model.failed):
            blank = [""] * (len(sizes) + len(ratios) + len(of_metric) * len(columns))
            writer.writerow([*_facts(record, ""), record.seed, record.status, *blank, why(record)])
    return target.getvalue()


def _csv_rows(model: ModelTable) -> Iterator[tuple[Row, str, Section | None, int]]:
    for row in model.dense:
        yield row, "done", None, 0
    for section in model.sections:
        for index, row in enumerate(section.rows):
            yield row, "done", section, index
        for row in section.outside:
            yield row, "outside the window", None, 0


def _facts(record: Record, settings: str) -> list[object]:
    model, budget = record.model, record.budget
    shown = settings or " ".join(f"{k}={v}" for k, v in record.options.items())
    where: list[object] = ["", "", ""] if budget is None else [budget.centre, budget.window, budget.on]
    return [
        *(model.name, model.revision, model.dtype, record.method, record.label, shown),
        *where,
        "+".join(record.recovery) or "none",
    ]


def _ratio(model: ModelTable, row: Row, column: Column) -> list[float | str]:
    """Value, low and high against dense; a cost has no interval, its items are no pairs."""
    if not column.quality or (row.method == "dense" and not row.recovery):
        return [_blank(model.against_dense(row, column)), "", ""]
    found = model.recovery(row, column)
    return ["", "", ""] if found is None else [found.value, _blank(found.low), _blank(found.high)]


def _blank(value: float | None) -> float | str:
    return "" if value is None else value
