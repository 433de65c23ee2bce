"""The layers of hand-made records as rows, pages, CSV and heat maps."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evenbits.layers import LayerRow, layer_rows, pages_of, place_of, places, short_kinds
from evenbits.plots_layers import WORST, draw_layers
from evenbits.record import Bits, BudgetFacts, LayerFacts, Ledger, ModelFacts, Record
from evenbits.report import gather, write_report
from evenbits.report_layers import bits_range, layers_csv, layers_markdown
from evenbits.tables import ModelTable, Table

MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float16", parameters=1_200_000, linear_weights=1_000_000,
    stored_bits=16, linear_bytes=2_000_000, model_bytes=2_400_000,
)  # fmt: skip
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"


def layer(block: int, kind: str, error: float | None, bits: float = 2.0, **facts: Any) -> LayerFacts:
    return LayerFacts(name=f"model.layers.{block}.{kind}", bits=bits, error=error, **facts)


def record(
    method: str, layers: Sequence[LayerFacts], *, left_dense: Sequence[str] = (), bits: float = 2.0, **facts: Any
) -> Record:
    size = round(bits * MODEL.linear_weights / 8)
    ledger = Ledger(
        bits=Bits(index=bits, paper=bits, linear=bits, model=bits), roles={"code": size}, linear_bytes=size,
        rest_bytes=0, model_bytes=size, ratios={}, compressed_weights=1, left_dense=tuple(left_dense),
    )  # fmt: skip
    given = {"budget": BudgetFacts(centre=2.0, window=0.05), **facts}
    trial = f"{method}{given.get('seed', 0)}{given['budget']}"
    return Record(
        trial=trial, artifact=trial, suite="t", model=MODEL, method=method, status="done", ledger=ledger,
        layers=tuple(layers), **given,
    )  # fmt: skip


def small() -> Table:
    """Two blocks of two kinds; gptq with two seeds, mixed leaves a layer dense and has mixed bits."""
    gptq = [[layer(b, k, 0.1 * (b + 1) + 0.02 * seed, calibrated_error=0.01) for k in (Q, DOWN) for b in (0, 1)]
            for seed in (0, 1)]  # fmt: skip
    gptq[1][0] = gptq[1][0].model_copy(update={"meta": {"damping": 0.1}})
    mixed = [layer(0, Q, 0.0, 16.0), layer(1, Q, 0.4), layer(0, DOWN, None, 3.0), layer(1, DOWN, 0.2)]
    return gather(
        [
            record("gptq", gptq[0]),
            record("gptq", gptq[1], seed=1),
            record("mixed", mixed, left_dense=["model.layers.0.self_attn.q_proj"]),
            record("dense", [layer(0, Q, 0.0, 16.0)], left_dense=["model.layers.0.self_attn.q_proj"], budget=None,
                   recovery=("lora",), recovery_options=({},)),
        ]
    )  # fmt: skip


def rows(table: Table) -> dict[str, LayerRow]:
    (model,) = table.models
    return {found.row.name: found for found in layer_rows(model)}


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj", 3, "mlp.up_proj"),
        ("transformer.h.11.attn.c_proj", 11, "attn.c_proj"),
        ("model.decoder.layers.0.fc1", 0, "fc1"),
        ("lm_head", None, "lm_head"),
        ("model.layers.2.block_sparse_moe.experts.5.w1", 2, "block_sparse_moe.experts.5.w1"),
        ("adapters.7", None, "adapters.7"),
    ],
)
def test_places(name: str, block: int | None, kind: str) -> None:
    found = place_of(name)
    assert (found.name, found.block, found.kind) == (name, block, kind)


def test_kinds_are_short_while_they_differ() -> None:
    assert short_kinds([Q, DOWN]) == {Q: "q", DOWN: "down"}
    assert short_kinds(["attn.c_proj", "mlp.c_proj"]) == {"attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj"}
    assert short_kinds(["a.x", "b.x_proj"]) == {"a.x": "x", "b.x_proj": "x_proj"}


def test_seeds_are_averaged_and_what_is_dense_is_told() -> None:
    found = rows(small())
    gptq = {cell.place.name: cell for cell in found["gptq"].cells}
    assert gptq["model.layers.0.self_attn.q_proj"].error == pytest.approx(0.11)
    assert gptq["model.layers.1.mlp.down_proj"].error == pytest.approx(0.21)
    assert not any(cell.left_dense for cell in gptq.values())
    mixed = {cell.place.name: cell for cell in found["mixed"].cells}
    assert [cell.left_dense for cell in mixed.values()] == [True, False, False, False]
    assert mixed["model.layers.0.mlp.down_proj"].error is None
    assert bits_range(found["mixed"].cells) == "2.00 to 3.00"
    assert bits_range(found["gptq"].cells) == "2.00"
    assert bits_range(found["dense"].cells) == "dense"
    order = places(list(found.values()))
    assert [(place.kind, place.block) for place in order] == [(Q, 0), (Q, 1), (DOWN, 0), (DOWN, 1)]


def test_markdown_never_calls_a_dense_layer_the_best() -> None:
    text = layers_markdown(small())
    means, calibrated, every = (part.split("\n\n")[1] for part in text.split("### ")[1:])
    assert "| method | q | down | all | worst layer | its error | bits |" in means
    assert "| gptq | 0.1600 | 0.1600 | 0.1600 | model.layers.1.self_attn.q_proj | 0.2100 | 2.00 |" in means
    # over the layers that it did compress and whose error is known
    assert "| mixed | 0.4000 | 0.2000 | 0.3000 | model.layers.1.self_attn.q_proj | 0.4000 | 2.00 to 3.00 |" in means
    assert "| mixed | - | - | - | - | - | 2.00 to 3.00 |" in calibrated
    assert "| 0 | q | 0.1100 (2.00) | dense (16.00) |" in every
    assert "| 0 | down | 0.1100 (2.00) | - (3.00) |" in every
    assert "lora" not in text  # every layer dense: there is nothing to compare


def test_csv_has_every_layer_of_every_row() -> None:
    found = list(csv.DictReader(io.StringIO(layers_csv(small()))))
    assert [line["method"] for line in found] == ["dense"] + 4 * ["gptq"] + 4 * ["mixed"]
    gptq = found[1]
    assert (gptq["seeds"], gptq["block"], gptq["kind"], gptq["layer"]) == ("0 1", "0", Q, f"model.layers.0.{Q}")
    assert float(gptq["error"]) == pytest.approx(0.11)
    assert gptq["noted"] == '{"damping": 0.1}'
    assert [line["left dense"] for line in found[5:]] == ["1", "0", "0", "0"]
    assert found[7]["error"] == ""


def test_a_report_has_its_page_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [record for model in small().models for s in model.sections for r in s.rows for record in r.records]
    first = write_report(tmp_path / "1", records)
    second = write_report(tmp_path / "2", records)
    names = [f"layers-small-{what}.{kind}" for what in ("bits", "calibrated-error", "error") for kind in ("png", "svg")]
    assert [p.name for p in first if p.name.startswith("layers")] == [*names, "layers.csv", "layers.md"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert "(layers.md)" in (tmp_path / "1/report.md").read_text()
    assert "![layers-small-error](layers-small-error.svg)" in (tmp_path / "1/layers.md").read_text()
    plain = write_report(tmp_path / "3", records, plots=False)
    assert {p.name for p in plain} == {"report.md", "report.csv", "report.json", "layers.md", "layers.csv"}
    assert "![" not in (tmp_path / "3/layers.md").read_text()


def texts(svg: bytes) -> list[str]:
    return [text.strip() for text in re.findall(r">([^<>]+)</text>", svg.decode())]


def test_heat_maps_name_rows_kinds_and_blocks() -> None:
    pytest.importorskip("matplotlib")
    files = draw_layers(small())
    shown = texts(files["layers-small-error.svg"])
    assert {"gptq", "mixed", "q", "down", "2 ±0.05 bits", "left dense", "not known"} <= set(shown)
    assert "2.00\u20133.00" in shown
    assert "not known" in texts(files["layers-small-calibrated-error.svg"])
    assert "layers-small-bits.svg" in files  # 3 over 2 bits; a scale's share of a percent would not be worth a map


def test_alike_bits_get_no_map_and_odd_errors_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    strange = [0.0, 1e-12, math.inf, 50.0, 0.1]
    table = gather([record("odd", [layer(b, Q, e) for b, e in enumerate(strange)])])
    files = draw_layers(table)
    assert sorted(files) == ["layers-small-error.png", "layers-small-error.svg"]
    ticks = [float(text) for text in texts(files["layers-small-error.svg"]) if re.fullmatch(r"[0-9.]*\.?[0-9]+", text)]
    assert max(ticks) <= max(WORST, len(strange))  # neither inf nor 50 stretches the colours
    assert draw_layers(gather([record("zero", [layer(0, Q, 0.0)])]))
    assert draw_layers(gather([])) == {}


def test_hundreds_of_rows_go_on_further_pages() -> None:
    cells = [layer(0, Q, 0.1)]
    table = gather(
        [
            record(f"m{i}", cells, budget=BudgetFacts(centre=bits, window=0.05), bits=bits)
            for bits, methods in ((2.0, 25), (3.0, 25), (4.0, 130))
            for i in range(methods)
        ]
    )
    model: ModelTable = table.models[0]
    pages = list(pages_of(layer_rows(model), 60))
    assert [len(page) for page in pages] == [50, 60, 60, 10]
    assert [row for page in pages for row in page] == layer_rows(model)
