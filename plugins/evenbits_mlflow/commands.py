"""`evenbits push` and `evenbits ui`."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from evenbits.errors import ArtifactError, MissingExtra


def add_commands(app: typer.Typer) -> None:
    app.command()(push)
    app.command()(ui)


def push(
    target: Annotated[Path, typer.Argument(help="A suite (*.toml), or the folder of one of its runs.")],
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server or database; default: the suite's.")] = None,
    results: Annotated[Path | None, typer.Option(help="The results folder of a suite; default: results.")] = None,
) -> None:
    """Deliver records to MLflow that it does not have yet."""
    from evenbits_mlflow.deliver import push_run

    sent, known = push_run(target, tracking_uri, results)
    typer.echo(f"{sent} records delivered, {known} were there already")


def ui(
    results: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
) -> None:
    """Show MLflow's page on the runs of a results folder: a leaderboard, and charts of bits against quality."""
    if find_spec("mlflow") is None:
        raise MissingExtra("mlflow", "mlflow")
    from evenbits_mlflow.view import view_paths

    command = server_command(results, port)
    _check_free(port)
    for suite, number in suite_experiments(results):
        for what, path in view_paths(number).items():
            typer.echo(f"{suite}, {what}: http://127.0.0.1:{port}/{path}")
    typer.echo("there in some ten seconds; end it with Ctrl-C")
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a second process, for what this page has no use for
    }
    try:
        raise typer.Exit(subprocess.call(command, env=environment))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that just ended is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ArtifactError(f"port {port}: {error.strerror}; name another by --port") from None


def suite_experiments(results: Path) -> list[tuple[str, str]]:
    """Suites of the results folder's database, each with its experiment's id. Raises ArtifactError for another file."""
    from evenbits_mlflow.view import KEY, VIEW_PREFIX

    query = (
        "SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active' AND experiment_id IN "
        "(SELECT experiment_id FROM experiment_tags WHERE key = ?) ORDER BY name"
    )
    path = results / "mlflow.db"
    try:
        with contextlib.closing(sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True)) as database:
            found = database.execute(query, (VIEW_PREFIX + KEY,)).fetchall()
    except sqlite3.Error as error:
        raise ArtifactError(
            f"{path}: no database of MLflow ({error}); remove it, `evenbits push` fills a new one"
        ) from None
    return [(str(name), str(number)) for name, number in found]


def server_command(results: Path, port: int) -> list[str]:
    """The command line of MLflow's server on a results folder. Raises ArtifactError where no run was mirrored."""
    from evenbits_mlflow.tracking import default_uri

    database = results / "mlflow.db"
    if not database.exists():
        raise ArtifactError(
            f"{database}: no such file; `evenbits run SUITE` or `evenbits push RESULTS/runs/SUITE` makes it, "
            "or name another folder by --results"
        )
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    artifacts = (results / "mlartifacts").resolve().as_uri()
    stores = ["--backend-store-uri", default_uri(results), "--default-artifact-root", artifacts]
    return [sys.executable, "-m", "mlflow", "server", *address, *stores]
