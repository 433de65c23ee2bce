"""What a trial looks like in MLflow: numbers of its layers, ledger, plot, descriptions, the saved view. No server."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import zlib
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from evenbits.record import Bits, LayerFacts, Ledger, MetricFacts, ModelFacts, Record
from evenbits.report import gather
from evenbits_mlflow.files import trial_files
from evenbits_mlflow.layer_plot import draw_layers
from evenbits_mlflow.mirror import Point, mirror
from evenbits_mlflow.notes import run_note, trial_note
from evenbits_mlflow.view import chart_filter, view_paths, views

MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float16", parameters=1_200_000, linear_weights=1_000_000,
    stored_bits=16, linear_bytes=2_000_000, model_bytes=2_400_000,
)  # fmt: skip
NAMES = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def trial(**facts: Any) -> Record:
    layers = [
        LayerFacts(name=name, bits=2.0 + i, error=0.01 * (i + 1), calibrated_error=None if i < 2 else 0.001 * (i + 1))
        for i, name in enumerate(NAMES)
    ]
    quality: dict[str, Any] = {"low": None, "high": None, "better": "lower", "source": "t", "fingerprint": "f1"}
    return Record(
        **{
            "trial": "t1", "artifact": "a1", "suite": "night", "model": MODEL, "method": "gptq", "status": "done",
            "ledger": Ledger(
                bits=Bits(index=2, paper=2.1, linear=2.125, model=4.4), roles={"scale": 15_625, "code": 250_000},
                linear_bytes=265_625, rest_bytes=400_000, model_bytes=665_800, ratios={"linear_fp32": 15.06},
                compressed_weights=1_000_000, left_dense=(NAMES[-1],),
            ),
            "layers": tuple(layers),
            "metrics": (
                MetricFacts(name="perplexity", value=7.5, unit="perplexity", **quality),
                MetricFacts(name="decode", value=3.0, unit="ms", volatile=True, **quality),
            ),
            "fingerprints": {"f1": {"corpus": {"name": "wiki", "split": "test", "sha256": "ab" * 32}}},
            "calibration": {"corpus": {"name": "c4"}, "samples": 8},
            **facts,
        }
    )  # fmt: skip


def test_layers_are_curves_and_means_by_kind() -> None:
    seen = mirror(trial())
    curves: dict[str, dict[int, float]] = {}
    for point in seen.metrics:
        if point.name.startswith("layer/"):
            curves.setdefault(point.name, {})[point.step] = point.value
    assert curves["layer/bits"] == {i: 2.0 + i for i in range(6)}
    assert curves["layer/error"] == {i: pytest.approx(0.01 * (i + 1)) for i in range(5)}  # the last is left dense
    assert curves["layer/calibrated_error"] == {i: pytest.approx(0.001 * (i + 1)) for i in (2, 3, 4)}
    single = {point.name: point.value for point in seen.metrics if not point.name.startswith("layer/")}
    assert single["error/all"] == pytest.approx(0.03)
    assert single["error/worst"] == pytest.approx(0.05)
    assert single["error/q"] == pytest.approx(0.03)
    assert single["error/down"] == pytest.approx(0.03)
    assert single["calibrated_error/down"] == pytest.approx(0.004)
    assert {"perplexity", "cost/decode", "bits.linear", "bytes/code"} <= single.keys()
    assert "decode" not in single


def test_a_second_protocol_of_one_metric_does_not_replace_the_first() -> None:
    again = MetricFacts(name="perplexity", value=9.0, unit="", better="lower", source="t", fingerprint="f2")
    seen = mirror(trial(metrics=(*trial().metrics, again)))
    assert Point("perplexity", 7.5) in seen.metrics
    assert Point("perplexity_f2", 9.0) in seen.metrics


def test_texts_and_calibration_are_inputs() -> None:
    data = {found.context: found for found in mirror(trial()).data}
    assert (data["evaluation"].name, data["evaluation"].digest) == ("wiki test", ("ab" * 32)[:36])
    assert data["calibration"].name == "c4"
    assert json.loads(data["calibration"].source)["samples"] == 8


def test_the_same_names_whatever_the_method() -> None:
    """What a comparison puts on its axes is there for every trial, the dense model too."""
    names = [{point.name for point in mirror(record).metrics} for record in (trial(), dense())]
    for name in ("perplexity", "bits.linear", "bits.model", "bytes/linear", "bytes/model"):
        assert all(name in found for found in names)
    for name in ("budget", "recovery", "label", "method", "seed"):
        assert all(name in mirror(record).params for record in (trial(), dense()))


def dense() -> Record:
    return trial(trial="t0", method="dense", artifact=None, ledger=None, layers=(), calibration=None)


def test_files_of_a_trial() -> None:
    files = trial_files(trial())
    assert files.keys() == {"ledger.json", "ledger.md", "layers.csv", "layers.svg", "protocols.json"}
    assert Ledger.model_validate_json(files["ledger.json"]) == trial().ledger
    page = files["ledger.md"].decode()
    assert "| code | 250,000 | 94.12 % | 2.0000 |\n| scale | 15,625 | 5.88 % | 0.1250 |" in page
    lines = list(csv.DictReader(io.StringIO(files["layers.csv"].decode())))
    assert [line["step"] for line in lines] == list("012345")
    assert (lines[5]["layer"], lines[5]["left dense"], lines[0]["calibrated error"]) == (NAMES[-1], "1", "")
    assert json.loads(files["protocols.json"])["f1"]["metrics"] == ["perplexity", "decode"]
    assert trial_files(dense()).keys() == {"ledger.json", "ledger.md", "protocols.json"}
    assert json.loads(trial_files(dense())["ledger.json"])["bits"]["linear"] == 16


def test_the_plot_of_the_layers() -> None:
    svg = draw_layers(trial(label="a<b"))
    assert svg is not None
    root = ElementTree.fromstring(svg)
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(circles) == 5 + 3  # errors of five layers, calibrated ones of three; one layer is left dense
    heights = {float(circle.get("cy", "nan")) for circle in circles}
    assert all(0 < height < float(root.get("height", "0")) for height in heights)
    assert len(heights) > 6
    one = trial(layers=(LayerFacts(name=NAMES[0], bits=2, error=0.0),))
    assert draw_layers(one) is not None
    assert draw_layers(trial(layers=(LayerFacts(name=NAMES[0], bits=2, error=float(np.nan)),))) is None


def test_descriptions() -> None:
    note = trial_note(trial(within_budget=False))
    assert note.startswith("**gptq** on small, seed 0.")
    assert "2.1250 bits a linear weight, outside its budget" in note
    assert "- perplexity 7.500" in note
    assert "decode" not in note
    records = [dense(), trial(budget={"centre": 2.1, "window": 0.05}, within_budget=True)]
    about = run_note("night", "what *stars* do", records, gather(records))
    assert "**Suite night**: what \\*stars\\* do" in about
    assert "Trials: 2 done." in about
    assert re.search(r"\| 2.1 \| gptq \| none \| 2.1250 \| 7.500 \|", about)
    assert "(dense 7.500)" in about
    assert "evenbits run night.toml" in about


def test_the_saved_views_are_a_leaderboard_and_charts() -> None:
    found = views(gather([trial()]))
    assert found.keys() == {"mlflow.sharedViewState.evenbits", "mlflow.sharedViewState.evenbits-charts"}
    listed, charts = (
        json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;")))) for text in found.values()
    )
    assert (listed["searchFilter"], listed["orderByKey"], listed["orderByAsc"]) == ("", "metrics.`perplexity`", True)
    assert charts["searchFilter"] == "params.method != 'dense'"
    scatter = next(chart for chart in charts["compareRunCharts"] if chart["type"] == "SCATTER")
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("bits.linear", "perplexity")
    assert all(len(text) < 5000 for text in found.values())  # of an experiment's tag
    assert views(gather([trial(metrics=())])) == {}
    odd = trial(metrics=(trial().metrics[0].model_copy(update={"name": "acc,none"}),))
    for text in views(gather([odd])).values():
        assert "metrics.`acc_none`" in zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))).decode()


def test_another_mlflow_may_not_know_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "viewStateShareKey=evenbits-charts&compareRunsMode=CHART" in view_paths("7")["charts"]
    monkeypatch.setattr("evenbits_mlflow.view.version", lambda name: "4.0.1")
    assert view_paths("7") == {"no saved views, these are for MLflow 3": "#/experiments/7"}


def test_charts_leave_out_what_would_stretch_them() -> None:
    def measured(name: str, value: float) -> Record:
        metric = trial().metrics[0].model_copy(update={"value": value})
        return trial(trial=name, label=name, metrics=(metric,))

    def condition(*records: Record) -> str:
        table = gather(records)
        return chart_filter(table, table.models[0].columns[0])

    near, far, broken = measured("near", 30.0), measured("far", 7000.0), measured("broken", float("inf"))
    assert condition(dense(), near) == condition(near, broken) == "params.method != 'dense'"
    assert condition(dense(), near, far) == "params.method != 'dense' and metrics.`perplexity` < 150"
    assert condition(near, far) == "params.method != 'dense' and metrics.`perplexity` < 600"
