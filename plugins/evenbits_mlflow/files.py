"""Files that are made for a trial's run from its record: readable in MLflow's page, and for a program."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping

from evenbits.layers import place_of
from evenbits.markdown import plain, table_lines
from evenbits.record import Ledger, Record
from evenbits.report_format import format_bytes
from evenbits_mlflow.layer_plot import draw_layers
from evenbits_mlflow.notes import ledger_of


def trial_files(record: Record) -> dict[str, bytes]:
    """File name -> bytes: samples, ledger, layers and protocols, as far as the trial has them."""
    found: dict[str, str] = {}
    if record.samples:
        found["samples.md"] = samples_page(record)
    if (ledger := ledger_of(record)) is not None:
        found["ledger.json"] = ledger.model_dump_json(indent=1) + "\n"
        found["ledger.md"] = ledger_page(record, ledger)
    if record.layers:
        found["layers.csv"] = layers_csv(record)
        if (plot := draw_layers(record)) is not None:
            found["layers.svg"] = plot
    if record.metrics:
        found["protocols.json"] = json.dumps(_protocols(record), indent=1) + "\n"
    return {name: text.encode() for name, text in found.items()}


def samples_page(record: Record) -> str:
    """What the model wrote, as Markdown; fenced, as the text may be anything."""
    blocks = []
    for sample in record.samples:
        text = f"{sample.prompt}|{sample.text}"
        fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
        blocks.append(f"{fence}text\n{text}\n{fence}\n")
    return "Prompts, and after the bar what the model wrote.\n\n" + "\n".join(blocks)


def ledger_page(record: Record, ledger: Ledger) -> str:
    """Bytes and bits by role, then the four bit numbers and the ratios, as Markdown."""
    model = record.model
    lines = [["role", "bytes", "share", "bits a linear weight"]]
    for role, count in sorted(ledger.roles.items(), key=lambda pair: -pair[1]):
        share = count / ledger.linear_bytes if ledger.linear_bytes else 0.0
        lines.append([role, f"{count:,}", f"{100 * share:.2f} %", f"{8 * count / model.linear_weights:.4f}"])
    bits = f"{8 * ledger.linear_bytes / model.linear_weights:.4f}"
    lines.append(["linear layers", f"{ledger.linear_bytes:,}", "100 %", bits])
    lines.append(["rest of the model", f"{ledger.rest_bytes:,}", "", ""])
    lines.append(["files of the model", f"{ledger.model_bytes:,}", "", ""])
    dense = ", ".join(map(plain, ledger.left_dense)) or "none"
    numbers = [["bits", "value"], *([name, f"{value:.4f}"] for name, value in ledger.bits.model_dump().items())]
    ratios = [["times smaller", "value"], *([name, f"{value:.3f}"] for name, value in ledger.ratios.items())]
    parts = [
        f"# Ledger of {plain(record.label or record.method)} on {plain(model.name)}",
        f"Bytes on disk by what they are for; {format_bytes(ledger.model_bytes)} in all.",
        table_lines(lines, left=1),
        "Bits: index, paper and linear by linear weight, model by parameter.",
        table_lines(numbers, left=1),
        *([table_lines(ratios, left=1)] if ledger.ratios else []),
        f"Linear layers left dense: {dense}.",
    ]
    return "\n\n".join(parts) + "\n"


def layers_csv(record: Record) -> str:
    """One line per layer; "step" is that of the layer metrics. "noted": what the method noted, as JSON."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        ["step", "layer", "block", "kind", "bits", "error", "calibrated error", "left dense", "noted"]
    )  # fmt: skip
    dense = set() if record.ledger is None else set(record.ledger.left_dense)
    for step, layer in enumerate(record.layers):
        place = place_of(layer.name)
        numbers = ["" if value is None else value for value in (layer.bits, layer.error, layer.calibrated_error)]
        noted = json.dumps(layer.meta, sort_keys=True) if layer.meta else ""
        block = "" if place.block is None else place.block
        writer.writerow([step, layer.name, block, place.kind, *numbers, int(layer.name in dense), noted])
    return target.getvalue()


def _protocols(record: Record) -> Mapping[str, object]:
    """Protocol by fingerprint, each with the metrics that were measured under it."""
    return {
        key: {"metrics": [m.name for m in record.metrics if m.fingerprint == key], "protocol": protocol}
        for key, protocol in record.fingerprints.items()
    }
