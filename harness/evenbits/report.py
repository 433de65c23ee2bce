"""Reports from records, and from nothing else: tables, plots and the machine-readable list can always be made again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evenbits.record import LayerFacts, Record, write_atomically
from evenbits.report_csv import as_csv
from evenbits.report_layers import has_layers, layers_csv, layers_markdown
from evenbits.report_reproduction import print_reproduction, reproduction_markdown
from evenbits.report_reproduction_data import reproduction_csv, reproduction_json
from evenbits.report_samples import has_samples, samples_markdown
from evenbits.report_text import as_markdown, as_terminal
from evenbits.reproduced import Reproduction
from evenbits.rows import dense_bits, why
from evenbits.tables import Table, gather
from evenbits.verdict import Verdict, verdict

__all__ = [
    "Reproduction", "Table", "Verdict", "as_csv", "as_json", "as_markdown", "as_terminal", "gather",
    "print_reproduction", "reproduction_markdown", "verdict", "write_report",
]  # fmt: skip


_OURS = re.compile(r"layers\.(md|csv)|reproduction\.(md|csv|json)|samples\.md|(pareto|recovery|layers)-.*\.(png|svg)")


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One object per trial, the dense model too. Bits and bytes are null and empty unless it is done.

    A metric measured under several protocols in one trial: the second stands as "name@fingerprint". Numbers that
    JSON has no form for (a diverged model's inf or nan) are null. "reason" only for skipped and failed trials.
    """
    return [_one(record) for record in records]


def write_report(
    folder: Path,
    records: Sequence[Record],
    folders: Mapping[str, Path] | None = None,
    *,
    plots: bool = True,
    table: Table | None = None,
    reproduction: Reproduction | None = None,
) -> list[Path]:
    """Write report.md, report.csv, report.json, and where trials have them layers.md, layers.csv and samples.md; with a
    reproduction also reproduction.md, .csv and .json, the first at the end of report.md too.

    Unless told not to, the plots too (PNG and SVG): Pareto, recovery, and heat maps of the layers. Pages and plots of
    an earlier report that this one does not have are removed. Returns the paths. table: what `gather` made of the
    same records and folders, where that is at hand.
    Raises MissingExtra, before anything is written, when plots are wanted and matplotlib is absent.
    """
    table = gather(records, folders) if table is None else table
    shown, maps = _plots(table) if plots else ({}, {})
    files = shown | maps
    links: list[str] = []
    if has_layers(table):
        links.append("- [error and bits of every layer](layers.md), [as CSV](layers.csv)")
        files["layers.md"] = layers_markdown(table, _vector(maps)).encode()
        files["layers.csv"] = layers_csv(table).encode()
    if has_samples(table):
        links.append("- [what the models write: sample continuations beside the dense model's](samples.md)")
        files["samples.md"] = samples_markdown(table).encode()
    more = ["## Plots", *(f"![{name[:-4]}]({name})" for name in _vector(shown))] if shown else []
    more += ["## More", "\n".join(links)] if links else []
    text = as_markdown(table, more)
    if reproduction is not None:
        text += "\n" + reproduction_markdown(reproduction, level=2)
        files["reproduction.md"] = reproduction_markdown(reproduction).encode()
        files["reproduction.csv"] = reproduction_csv(reproduction).encode()
        files["reproduction.json"] = reproduction_json(reproduction).encode()
    files |= {
        "report.md": text.encode(),
        "report.csv": as_csv(table).encode(),
        "report.json": (json.dumps(as_json(records), indent=1, allow_nan=False) + "\n").encode(),
    }
    for name, data in files.items():
        write_atomically(folder / name, data)
    for path in folder.iterdir():
        if path.name not in files and _OURS.fullmatch(path.name):
            path.unlink()
    return [folder / name for name in sorted(files)]


def _plots(table: Table) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The pictures of the report's own page, and those of the layers' page."""
    from evenbits.plots import draw_pareto
    from evenbits.plots_layers import draw_layers
    from evenbits.plots_recovery import draw_recovery

    return draw_pareto(table) | draw_recovery(table), draw_layers(table)


def _vector(files: Mapping[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith(".svg")]


def _one(record: Record) -> dict[str, Any]:
    bits: dict[str, float] | None = None
    sizes: dict[str, int] = {}
    if record.ledger is not None:
        ledger = record.ledger
        bits = ledger.bits.model_dump()
        sizes = {**ledger.roles, "linear": ledger.linear_bytes, "model": ledger.model_bytes}
    elif record.method == "dense" and record.status == "done":
        model = record.model
        bits = dense_bits(model).model_dump()
        sizes = {"dense": model.linear_bytes, "linear": model.linear_bytes, "model": model.model_bytes}
    metrics: dict[str, dict[str, Any]] = {}
    fingerprints: dict[str, str] = {}
    for metric in record.metrics:
        name = metric.name if metric.name not in metrics else f"{metric.name}@{metric.fingerprint}"
        metrics[name] = {
            "value": _finite(metric.value),
            "low": _finite(metric.low),
            "high": _finite(metric.high),
            "unit": metric.unit,
            "better": metric.better,
        }
        fingerprints[name] = metric.fingerprint
    found: dict[str, Any] = {
        "model": record.model.name,
        "method": record.method,
        "options": record.options,
        "budget": None if record.budget is None else record.budget.model_dump(),
        "seed": record.seed,
        "recovery": list(record.recovery),
        "status": record.status,
        "bits": bits,
        "bytes": sizes,
        "seconds": record.seconds,
        "metrics": metrics,
        "fingerprint": fingerprints,
        "layers": [_layer(layer) for layer in record.layers],
        "samples": [sample.model_dump(mode="json") for sample in record.samples],
        "remarks": list(record.remarks),
    }
    if record.status != "done":
        found["reason"] = why(record)
    return found


def _layer(facts: LayerFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "bits": _finite(facts.bits),
        "error": _finite(facts.error),
        "calibrated_error": _finite(facts.calibrated_error),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
