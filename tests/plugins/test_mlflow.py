"""Records into MLflow: what is mirrored, each once, and what happens when the server is not there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from evenbits.errors import ArtifactError, MissingExtra, SuiteError
from evenbits.record import (
    Bits,
    BudgetFacts,
    Failure,
    LayerFacts,
    Ledger,
    MetricFacts,
    ModelFacts,
    Record,
    SampleFacts,
    write_record,
)
from evenbits.report import write_report
from evenbits.store import Results
from evenbits_mlflow import extend_cli, on_finish, on_plan, on_record
from evenbits_mlflow.commands import server_command, suite_experiments
from evenbits_mlflow.deliver import push_run
from evenbits_mlflow.tracking import LEDGER, Mirror, default_uri

pytest.importorskip("mlflow", reason='needs pip install "evenbits[mlflow]"')

pytestmark = [
    # MLflow's own table definitions use what SQLAlchemy 2.1 deprecates
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

DEAD = "http://127.0.0.1:9"
WHOLE = {"record.json", "manifest.json", "ledger.json", "ledger.md", "protocols.json"}
MODEL = ModelFacts(
    name="small", revision="sha256:1", dtype="float16", parameters=1_200_000, linear_weights=1_000_000,
    stored_bits=16, linear_bytes=2_000_000, model_bytes=2_400_000,
)  # fmt: skip
LEDGER_FACTS = Ledger(
    bits=Bits(index=2, paper=2.1, linear=2.125, model=4.4), roles={"code": 250_000, "scale": 15_625},
    linear_bytes=265_625, rest_bytes=400_000, model_bytes=665_800, ratios={}, compressed_weights=1_000_000,
)  # fmt: skip


@dataclass
class About:
    description: str = "a night's work"


@dataclass
class Context:
    """What a run tells its plugins."""

    results: Path
    suite_name: str = "night"
    options: Mapping[str, object] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    suite: About = field(default_factory=About)
    environment: Mapping[str, Any] = field(
        default_factory=lambda: {"versions": {"torch": "2.13.0"}, "git": {"commit": "abc", "dirty": False}}
    )

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.suite_name

    def plugin_options(self, name: str) -> Mapping[str, object]:
        assert name == "mlflow"
        return self.options

    def artifact_folder(self, record: Record) -> Path | None:
        return None if record.artifact is None else self.results / "artifacts" / record.artifact

    def notice(self, message: str) -> None:
        self.notices.append(message)


def record(trial: str, **facts: Any) -> Record:
    return Record(
        **{
            "trial": trial,
            "artifact": f"a-{trial}",
            "suite": "night",
            "model": MODEL,
            "method": "gptq",
            "distribution": "evenbits 0.1.0",
            "options": {"bits": 2, "group": 128, "grid": {"symmetric": True}},
            "budget": BudgetFacts(centre=2.1, window=0.05),
            "within_budget": True,
            "seed": 3,
            "recovery": ("lora",),
            "recovery_options": ({"rank": 8},),
            "status": "done",
            "ledger": LEDGER_FACTS,
            "metrics": (
                MetricFacts(
                    name="perplexity", value=7.5, low=7.25, high=7.75, unit="perplexity", better="lower",
                    source="perplexity", fingerprint="f1",
                ),
            ),
            "fingerprints": {"f1": {"context": 2048}},
            "seconds": {"compress": 1.5},
            "environment": {"versions": {"torch": "2.13.0"}, "git": {"commit": "abc", "dirty": True}},
            "started": "2026-01-02T03:04:05+00:00",
            "finished": "2026-01-02T03:05:05+00:00",
            **facts,
        }
    )  # fmt: skip


FAILED = record(
    "t2", status="failed", metrics=(), ledger=None, failure=Failure(kind="memory", stage="compress", message="full")
)
SKIPPED = record("t3", status="skipped", metrics=(), ledger=None, artifact=None, reason="nothing fits")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing costs more than all else that is mirrored; one test has it done."""
    monkeypatch.setattr("evenbits_mlflow.reports.find_spec", lambda name: None)


@pytest.fixture
def context(tmp_path: Path, empty_database: Path) -> Context:
    found = Context(tmp_path / "results")
    found.folder.mkdir(parents=True)
    shutil.copy(empty_database, found.results / "mlflow.db")
    return found


def store(context: Context, made: Record) -> Path:
    folder = context.folder / made.trial
    write_record(folder, made)
    if made.artifact is not None:
        manifest = context.results / "artifacts" / made.artifact / "manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text('{"schema": 1}')
    return folder


def run(context: Context, *records: Record) -> None:
    """What the harness does around a run."""
    Results(context.results).write_plan(context.suite_name, [made.trial for made in records])
    on_plan(context=context)  # type: ignore[arg-type]
    for made in records:
        on_record(record=made, folder=store(context, made), context=context)  # type: ignore[arg-type]
    on_finish(records=records, context=context)  # type: ignore[arg-type]


def client(context: Context, uri: str | None = None) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri or default_uri(context.results))


def runs(context: Context, uri: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The only parent run, and its children by trial; fails when a trial has two."""
    found_client = client(context, uri)
    experiment = found_client.get_experiment_by_name(context.suite_name)
    found = found_client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in found if "evenbits.run" in r.data.tags]
    children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    by_trial = {r.data.tags["evenbits.trial"]: r for r in children}
    assert len(by_trial) == len(children)
    return parent, by_trial


def artifacts(context: Context, run_id: str, folder: str | None = None) -> set[str]:
    return {found.path for found in client(context).list_artifacts(run_id, folder)}


def test_a_run_is_mirrored_whole(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setattr("evenbits_mlflow.reports.find_spec", find_spec)
    before, uri = dict(os.environ), mlflow.get_tracking_uri()
    run(context, record("t1"), FAILED, SKIPPED)
    assert context.notices == []
    # the process's own MLflow is left alone
    assert dict(os.environ) == before
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == uri
    parent, children = runs(context)
    assert parent.info.run_name == "night"
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mlflow.source.git.commit"] == "abc"
    reported = artifacts(context, parent.info.run_id, "report")
    assert reported >= {"report/report.json", "report/report.md", "report/report.csv", "report/page.html"}
    plots = {Path(path).suffix for path in reported if "pareto" in path}
    assert plots == ({".svg"} if find_spec("matplotlib") else set())
    assert children.keys() == {"t1", "t2", "t3"}

    done = children["t1"]
    assert done.info.run_name == "gptq+lora @ 2.1 seed 3"
    assert done.info.status == "FINISHED"
    assert done.info.end_time - done.info.start_time == 60_000
    assert done.data.params.items() >= {
        "method": "gptq", "model": "small", "budget": "2.1", "seed": "3", "recovery": "lora", "options.bits": "2",
        "options.grid.symmetric": "true", "recovery.lora.rank": "8",
    }.items()  # fmt: skip
    assert done.data.metrics == {
        "perplexity": 7.5, "interval/perplexity.low": 7.25, "interval/perplexity.high": 7.75,
        "bits.index": 2.0, "bits.paper": 2.1, "bits.linear": 2.125, "bits.model": 4.4,
        "bytes/code": 250_000, "bytes/scale": 15_625, "bytes/linear": 265_625, "bytes/model": 665_800,
        "seconds/compress": 1.5,
    }  # fmt: skip
    assert done.data.tags.items() >= {
        "evenbits.status": "done", "evenbits.artifact": "a-t1", "version.torch": "2.13.0", "git.dirty": "true",
        "fingerprint.perplexity": "f1",
    }.items()  # fmt: skip
    assert artifacts(context, done.info.run_id) == WHOLE
    assert children["t2"].info.status == "FAILED"
    assert children["t2"].data.tags["evenbits.failure"] == "full"
    assert children["t3"].data.tags["evenbits.reason"] == "nothing fits"
    assert artifacts(context, children["t3"].info.run_id) == {"record.json"}
    assert (context.results / "mlartifacts").is_dir()


def test_a_resumed_run_goes_on_where_it_was(context: Context) -> None:
    run(context, record("t1"))
    first, children = runs(context)
    ended = children["t1"].info.run_id
    run(context, record("t1"), record("t4"))
    second, children = runs(context)
    assert second.info.run_id == first.info.run_id
    assert second.info.status == "FINISHED"
    assert children.keys() == {"t1", "t4"}
    assert children["t1"].info.run_id == ended


def test_killed_at_any_step_of_a_delivery(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each call but the last a run is half a run, and replaced; after the last it is whole, and kept."""
    from mlflow import MlflowClient

    steps = {"t1": "create_run", "t2": "log_batch", "t3": "log_artifacts", "t4": "set_terminated", "t5": "set_tag"}
    records = [record(trial) for trial in steps]
    on_plan(context=context)  # type: ignore[arg-type]
    for made in records:
        step = getattr(MlflowClient, steps[made.trial])

        def killed(*args: Any, step: Any = step, **kwargs: Any) -> None:
            step(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, steps[made.trial], killed)
            with pytest.raises(KeyboardInterrupt):
                on_record(record=made, folder=store(context, made), context=context)  # type: ignore[arg-type]
    assert not (context.folder / LEDGER).exists()
    _, half = runs(context)
    assert [half[trial].info.status for trial in steps] == ["RUNNING"] * 3 + ["FINISHED"] * 2
    run(context, *records)
    _, whole = runs(context)
    assert [trial for trial in steps if whole[trial].info.run_id == half[trial].info.run_id] == ["t5"]
    for found in whole.values():
        assert found.info.status == "FINISHED"
        assert artifacts(context, found.info.run_id) == WHOLE
    assert json.loads((context.folder / LEDGER).read_text())["own"]["delivered"].keys() == steps.keys()


def test_a_push_beside_a_run(context: Context) -> None:
    """Neither knows what the other sent, but the server does."""
    Results(context.results).write_plan("night", ["t1", "t2", "t3"])
    on_plan(context=context)  # type: ignore[arg-type]
    for trial, sent in {"t1": 1, "t2": 1}.items():
        folder = store(context, record(trial))
        assert push_run(context.folder) == (sent, int(trial == "t2"))
        on_record(record=record(trial), folder=folder, context=context)  # type: ignore[arg-type]
    assert push_run(context.folder) == (0, 2)
    on_finish(records=[record("t1"), record("t2")], context=context)  # type: ignore[arg-type]
    assert context.notices == []
    parent, children = runs(context)
    assert parent.info.status == "FINISHED"
    assert children.keys() == {"t1", "t2"}


def test_a_failed_trial_that_succeeds_later_replaces_its_run(context: Context) -> None:
    run(context, FAILED)
    run(context, record("t2"))
    _, children = runs(context)
    assert children["t2"].data.tags["evenbits.status"] == "done"
    assert children["t2"].data.metrics["perplexity"] == 7.5


def test_a_deleted_database_is_filled_again(context: Context, empty_database: Path) -> None:
    run(context, record("t1"))
    shutil.copy(empty_database, context.results / "mlflow.db")
    run(context, record("t1"))
    assert runs(context)[1].keys() == {"t1"}


def test_what_an_older_evenbits_mirrored_is_replaced(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    run(context, record("t1"))
    _, before = runs(context)
    for module in ("mirror", "tracking"):
        monkeypatch.setattr(f"evenbits_mlflow.{module}.FORMAT", "next")
    assert push_run(context.folder) == (1, 0)
    assert push_run(context.folder) == (0, 1)
    _, after = runs(context)
    assert after["t1"].info.run_id != before["t1"].info.run_id


def test_a_copied_results_folder(context: Context, tmp_path: Path, empty_database: Path) -> None:
    """Its database points at artifacts of another place: said in one line; a new one is filled from the records."""
    run(context, record("t1"))
    copy = Context(Path(shutil.copytree(context.results, tmp_path / "copy")))
    with pytest.raises(ArtifactError, match=r"copy/mlflow\.db: a copy, its artifacts lie in file:.*; remove this file"):
        push_run(copy.folder)
    shutil.copy(empty_database, copy.results / "mlflow.db")
    assert push_run(copy.folder) == (1, 0)
    _, children = runs(copy)
    assert children["t1"].info.artifact_uri.startswith((copy.results / "mlartifacts").as_uri())


def test_the_report_of_the_run_is_taken_and_only_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    made = record("t1")
    store(context, made)
    write_report(context.folder / "report", [made], plots=False)
    (context.folder / "report" / "note.md").write_text("kept beside the report")
    drawn: list[object] = []
    monkeypatch.setattr("evenbits_mlflow.reports.write_report", lambda *args, **kwargs: drawn.append(args))
    run(context, made)
    assert drawn == []
    parent, _ = runs(context)
    assert artifacts(context, parent.info.run_id, "report") >= {"report/note.md", "report/page.html"}
    assert "a night's work" in parent.data.tags["mlflow.note.content"]
    sent: list[object] = []
    monkeypatch.setattr("mlflow.MlflowClient.log_artifacts", lambda *args: sent.append(args))
    assert push_run(context.folder) == (0, 1)
    assert sent == []
    run(context, made, FAILED)
    assert len(drawn) == 1  # the report beside the records is of fewer of them


def test_a_dead_server_costs_one_line_and_push_delivers_all_once(
    context: Context, tmp_path: Path, empty_database: Path
) -> None:
    context.options = {"tracking_uri": DEAD, "timeout_seconds": 1}
    run(context, record("t1"), FAILED, SKIPPED)
    (line,) = context.notices
    assert "\n" not in line
    assert line.startswith("mlflow: runs are not mirrored: ")
    assert f"evenbits push {context.folder}" in line
    with pytest.raises(ArtifactError, match="0 of 3 records delivered"):
        push_run(context.folder, DEAD)

    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    shutil.copy(empty_database, tmp_path / "elsewhere.db")
    assert push_run(context.folder, elsewhere) == (3, 0)
    assert push_run(context.folder, elsewhere) == (0, 3)
    assert runs(context, elsewhere)[1].keys() == {"t1", "t2", "t3"}
    assert push_run(context.folder) == (3, 0)  # its own database has not seen them yet
    parent, children = runs(context)
    assert children.keys() == {"t1", "t2", "t3"}
    assert artifacts(context, children["t1"].info.run_id) == WHOLE
    assert parent.info.status == "FAILED"


def test_a_server_that_never_answers_costs_the_timeout(context: Context) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        context.options = {"tracking_uri": f"http://127.0.0.1:{silent.getsockname()[1]}", "timeout_seconds": 1}
        begun = time.monotonic()
        run(context, record("t1"), FAILED)
    assert len(context.notices) == 1
    assert time.monotonic() - begun < 60  # by MLflow's own settings it would be a quarter of an hour


def test_a_server_that_fails_costs_one_line_that_says_so(context: Context) -> None:
    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            context.options = {"tracking_uri": f"http://127.0.0.1:{server.server_port}"}
            run(context, record("t1"), FAILED)
        finally:
            server.shutdown()
    (line,) = context.notices
    assert "too many 500 error responses" in line


def test_push_reads_the_suite_for_where_to(context: Context, tmp_path: Path, empty_database: Path) -> None:
    context.options = {"enabled": False}
    run(context, record("t1"))
    shutil.copy(empty_database, tmp_path / "shared.db")
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    suite = tmp_path / "night.toml"
    suite.write_text(
        f'name = "night"\nmodel = {{ path = "nowhere" }}\nmethods = [{{ name = "rtn", budget = "free" }}]\n'
        f'[plugins.mlflow]\ntracking_uri = "{uri}"\n'
    )
    assert push_run(suite, results=context.results) == (1, 0)
    assert runs(context, uri)[1].keys() == {"t1"}


def test_a_server_that_dies_in_the_middle_costs_one_line(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    Results(context.results).write_plan("night", ["t1", "t5", "t6"])
    on_plan(context=context)  # type: ignore[arg-type]
    made = record("t1")
    on_record(record=made, folder=store(context, made), context=context)  # type: ignore[arg-type]

    def refused(*args: Any, **kwargs: Any) -> None:
        raise ConnectionRefusedError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_send", refused)
        for trial in ("t5", "t6"):
            made = record(trial)
            on_record(record=made, folder=store(context, made), context=context)  # type: ignore[arg-type]
    on_finish(records=[], context=context)  # type: ignore[arg-type]
    assert len(context.notices) == 1
    assert "trial t5 and later ones are not mirrored: connection refused" in context.notices[0]
    assert push_run(context.folder) == (2, 1)


def test_without_mlflow_the_run_goes_on(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenbits_mlflow.tracking.find_spec", lambda name: None)
    run(context, record("t1"))
    (line,) = context.notices
    assert 'mlflow is not installed: pip install "evenbits[mlflow]"' in line
    with pytest.raises(MissingExtra):
        push_run(context.folder)


def test_it_can_be_switched_off(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    context.options = {"enabled": False}
    run(context, record("t1"))
    assert context.notices == []
    assert not (context.folder / LEDGER).exists()


def test_a_wrong_option_is_named(context: Context) -> None:
    context.options = {"traking_uri": "x"}
    with pytest.raises(SuiteError, match=r"plugins\.mlflow\.traking_uri: .*known keys: enabled, tracking_uri"):
        on_plan(context=context)  # type: ignore[arg-type]


def test_files_samples_and_remarks_are_mirrored(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files go along, a large and a missing one are named; two metrics share a file, which goes once."""
    monkeypatch.setattr("evenbits_mlflow.tracking.LARGEST_FILE", 300)

    def metric(name: str, *attachments: str) -> MetricFacts:
        return MetricFacts(
            name=name, value=1.0, unit="", better="higher", source="t", fingerprint="f1", items=f"items-{name}.npy",
            attachments=attachments,
        )  # fmt: skip

    made = record(
        "t1",
        metrics=(metric("acc", "choices.jsonl", "large.jsonl"), metric("norm", "choices.jsonl", "lost.jsonl")),
        samples=(SampleFacts(source="samples", prompt="Once ```", text=" upon"),),
        remarks=("energy: no meter", "samples: short"),
    )
    items = {f"items-{name}.npy": np.ones(3) for name in ("acc", "norm")}
    Results(context.results).write_plan("night", ["t1"])
    on_plan(context=context)  # type: ignore[arg-type]
    folder = store(context, made)
    write_record(folder, made, items, {"choices.jsonl": b"{}", "large.jsonl": bytes(301)})
    on_record(record=made, folder=folder, context=context)  # type: ignore[arg-type]
    assert context.notices == []
    done = runs(context)[1]["t1"]
    assert artifacts(context, done.info.run_id) == {*WHOLE, "samples.md", "items"}
    assert artifacts(context, done.info.run_id, "items") == {
        "items/choices.jsonl", "items/items-acc.npy", "items/items-norm.npy",
    }  # fmt: skip
    assert done.data.tags["evenbits.not_mirrored"] == "large.jsonl (301 bytes), lost.jsonl (not there)"
    assert done.data.tags["evenbits.remarks"] == "energy: no meter\nsamples: short"
    page = Path(client(context).download_artifacts(done.info.run_id, "samples.md", str(context.results)))
    assert "````text\nOnce ```| upon\n````\n" in page.read_text()


def test_what_a_server_would_refuse_is_made_acceptable(context: Context) -> None:
    """Else each push would end at that trial, and none after it be delivered."""

    def metric(name: str, value: float = 1.0) -> MetricFacts:
        return MetricFacts(name=name, value=value, unit="", better="higher", source="t", fingerprint="f1")

    context.suite.description = "d" * 30_000
    names = ["acc,norm@x", "acc_norm@x", "a//b", "../up", "/", "", "Größe\n", "y" * 120]
    layers = tuple(
        LayerFacts(name=f"model.layers.{i // 7}.mlp.x{i % 7}_proj", bits=2, error=error, calibrated_error=1e308)
        for i, error in enumerate((0.1, float("nan"), float("inf")) + (0.1,) * 332)
    )
    made = record(
        "t1", label="L" * 900, metrics=(*map(metric, names), metric("far", float("inf"))), layers=layers,
        options={"text": "x" * 9000, "k" * 300: 1, **{f"option {i}": i for i in range(150)}},
        calibration={"corpus": {"name": "c" * 900}, "items": list(range(20_000))}, started="", finished="soon",
    )  # fmt: skip
    run(context, made)
    assert context.notices == []
    done = runs(context)[1]["t1"]
    quality = {name for name in done.data.metrics if "/" not in name and "." not in name}
    assert {"acc_norm_x", "up", "_", "Größe_", "y" * 120} <= quality
    assert "a/b" in done.data.metrics
    assert len(quality) == len(names) - 1  # no two have become one; a/b is not among them
    assert done.data.tags["nonfinite.far"] == "inf"
    assert done.data.tags["nonfinite.layer/error"] == "layer 1: nan, layer 2: inf"
    assert done.data.tags["nonfinite.error/worst"] == "nan"
    assert done.data.metrics["calibrated_error/all"] == pytest.approx(1e308)
    assert len(client(context).get_metric_history(done.info.run_id, "layer/error")) == len(layers) - 2
    assert len(done.data.params["options.text"]) == 5001
    assert sum(name.startswith("options.") for name in done.data.params) == 152
    assert len(done.info.run_name) == 250


def test_the_commands_are_there(context: Context, tmp_path: Path) -> None:
    app = typer.Typer()
    extend_cli(app=app)
    run(context, record("t1"))
    suite = CliRunner().invoke(app, ["push", str(context.folder), "--results", str(context.results)])
    assert suite.output == "0 records delivered, 1 were there already\n"
    nothing = CliRunner().invoke(app, ["push", str(tmp_path)])
    assert isinstance(nothing.exception, ArtifactError)
    missing = CliRunner().invoke(app, ["ui", "--results", str(tmp_path / "nowhere")])
    assert isinstance(missing.exception, ArtifactError)
    command = server_command(context.results, 5005)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert command[command.index("--backend-store-uri") + 1] == default_uri(context.results)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    experiment = client(context).get_experiment_by_name("night")
    assert suite_experiments(context.results) == [("night", experiment.experiment_id)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["ui", "--results", str(context.results), "--port", str(taken.getsockname()[1])]
        busy = CliRunner().invoke(app, arguments)
    assert isinstance(busy.exception, ArtifactError)
    (tmp_path / "mlflow.db").write_text("something else entirely, of more than a hundred bytes" * 4)
    with pytest.raises(ArtifactError, match="no database of MLflow"):
        suite_experiments(tmp_path)


def test_listing_the_plugin_imports_no_mlflow() -> None:
    import subprocess

    code = "import evenbits_mlflow as m, sys, typer; m.extend_cli(app=typer.Typer()); print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
