"""A real run that is mirrored over HTTP to a server which is killed in the middle, and what `evenbits push` mends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evenbits.executor import Report, StageOutcome
from evenbits.job import Job
from evenbits.plan import make_plan
from evenbits.plugins import load_plugins
from evenbits.record import Record
from evenbits.run import Display, Run
from evenbits.stages import run_stage
from evenbits.store import Results
from evenbits.suite import read_suite
from evenbits.tiny import tiny_model, tiny_text
from evenbits_mlflow.deliver import push_run

pytest.importorskip("mlflow", reason='needs pip install "evenbits[mlflow]"')

pytestmark = [
    # MLflow's own table definitions use what SQLAlchemy 2.1 deprecates
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

SERVE = """
import os, signal, sys

import mlflow.server as server
from werkzeug.serving import make_server

os.environ[server.BACKEND_STORE_URI_ENV_VAR] = sys.argv[1]
os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = sys.argv[2]
os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
child = None
for line in sys.stdin:
    if line == "start\\n":
        child = os.fork()
        if child == 0:
            http = make_server("127.0.0.1", 0, server.app, threaded=True)
            print(http.port, flush=True)
            http.serve_forever()
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
os.killpg(0, signal.SIGKILL)  # the test is gone
"""


class Server:
    """MLflow's own server application on loopback. Its imports take as long as all else here, so a process that has
    them waits beside it, and forks it again after a kill. It takes a free port itself: nobody else can come between."""

    def __init__(self, folder: Path, database: Path) -> None:
        shutil.copy(database, folder / "tracking.db")
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, f"sqlite:///{folder / 'tracking.db'}", str(folder / "artifacts")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def start(self) -> str:
        """Its address, once it listens."""
        return f"http://127.0.0.1:{int(self._say('start'))}"

    def kill(self) -> None:
        assert self._say("kill") == "killed"

    def close(self) -> None:
        """Whatever became of the test, nothing of it goes on."""
        with self._process:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _say(self, word: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer, self._log.read_text()
        return answer


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    found = Server(tmp_path, empty_database)
    try:
        yield found
    finally:
        found.close()


class InThisProcess:
    """An executor without children: torch is loaded here already, and their deaths are tested elsewhere."""

    workers = 1

    def run(self, job: Job, log: Path, report: Report) -> StageOutcome:
        return StageOutcome(run_stage(job, report), None, 0.0, 0)

    def close(self) -> None: ...


class Notes(Display):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, message: str) -> None:
        self.notices.append(message)


def run_suite(folder: Path, uri: str) -> tuple[list[Record], list[str]]:
    """Three trials on a tiny model: the dense one and two methods."""
    tiny_model(folder / "model")
    (folder / "text.txt").write_text(tiny_text(600))
    suite = folder / "served.toml"
    suite.write_text(f"""
name = "served"
description = "two methods over HTTP"
model = {{ path = "{folder / "model"}", name = "tiny" }}
dtype = "float32"
methods = [
    {{ name = "rtn", budget = "free", options.bits = 3, options.group_size = 16 }},
    {{ name = "kmeans", budget = "free", options.d = 2, options.codebook_size = 16 }},
]
[[evaluators]]
name = "perplexity"
options.corpus = {{ name = "text", path = "{folder / "text.txt"}" }}
options.context = 32
[plugins.mlflow]
tracking_uri = "{uri}"
timeout_seconds = 30
""")
    registry, notes, store = load_plugins(), Notes(), Results(folder / "results")
    plan = make_plan(read_suite(suite, registry), registry)
    with store.lock():
        store.check_schema(create=True)
        return Run(plan, registry, store, InThisProcess(), notes).go(), notes.notices


def test_a_server_killed_in_mid_run_and_push(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    numbers_of_trials = 0
    log_batch = MlflowClient.log_batch

    def killing(self: Any, run_id: str, *args: Any, **kwargs: Any) -> None:
        """The server dies between the second trial's run and its numbers."""
        nonlocal numbers_of_trials
        numbers_of_trials += 1
        if numbers_of_trials == 2:
            server.kill()
        log_batch(self, run_id, *args, **kwargs)

    uri = server.start()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", killing)
        records, notices = run_suite(tmp_path, uri)

    assert [record.status for record in records] == ["done"] * 3
    stored = Results(tmp_path / "results").records("served")[0]
    assert [record.trial for record in stored] == [record.trial for record in records]
    (line,) = notices
    assert "\n" not in line
    folder = tmp_path / "results" / "runs" / "served"
    assert line.startswith("mlflow: trial ")
    assert "and later ones are not mirrored: " in line
    assert f"evenbits push {folder}" in line

    uri = server.start()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("served")
    assert experiment.tags["mlflow.note.content"] == "two methods over HTTP"

    def children() -> list[Any]:
        return [r for r in client.search_runs([experiment.experiment_id]) if "evenbits.trial" in r.data.tags]

    before = {run.info.run_id: run.data.tags for run in children()}
    assert len(before) == 2
    assert sum("evenbits.record" in tags for tags in before.values()) == 1  # the other was cut short

    assert push_run(folder, uri) == (2, 1)
    assert push_run(folder, uri) == (0, 3)
    moved = tmp_path / "elsewhere" / "results"
    shutil.copytree(tmp_path / "results", moved)
    (moved / "runs" / "served" / "mlflow.json").unlink()
    assert push_run(moved / "runs" / "served", uri) == (0, 3)

    (parent,) = [r for r in client.search_runs([experiment.experiment_id]) if "evenbits.run" in r.data.tags]
    assert parent.info.status == "FINISHED"
    reported = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert reported >= {"report/report.md", "report/page.html"}
    found = {run.data.tags["evenbits.trial"]: run for run in children()}
    assert len(children()) == 3
    for record in records:
        run = found[record.trial]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        metric = record.metric("perplexity")
        assert metric is not None
        assert run.data.metrics["perplexity"] == pytest.approx(metric.value)
        errors = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "layer/error")}
        assert errors == {i: pytest.approx(layer.error) for i, layer in enumerate(record.layers)}
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert names >= {"record.json", "ledger.json", "ledger.md", "protocols.json"}
        path = Path(client.download_artifacts(run.info.run_id, "record.json", str(tmp_path)))
        assert json.loads(path.read_text())["trial"] == record.trial
    assert sum(len(record.layers) for record in records) == 28
