"""`evenbits push` and `evenbits ui`."""

from __future__ import annotations

import os
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
    from evenbits_mlflow.push import push_run

    sent, known = push_run(target, tracking_uri, results)
    typer.echo(f"{sent} records delivered, {known} were there already")


def ui(
    results: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Show MLflow's page on the runs of a results folder."""
    if find_spec("mlflow") is None:
        raise MissingExtra("mlflow", "mlflow")
    command = server_command(results, port)
    typer.echo(f"http://127.0.0.1:{port}  (end it with Ctrl-C)")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    try:
        raise typer.Exit(subprocess.call(command, env=environment))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def server_command(results: Path, port: int) -> list[str]:
    """The command line of MLflow's server on a results folder. Raises ArtifactError where no run was mirrored."""
    from evenbits_mlflow.deliver import default_uri

    database = results / "mlflow.db"
    if not database.exists():
        raise ArtifactError(f"{database}: no such file; run a suite first, or name its folder by --results")
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    artifacts = (results / "mlartifacts").resolve().as_uri()
    stores = ["--backend-store-uri", default_uri(results), "--default-artifact-root", artifacts]
    return [sys.executable, "-m", "mlflow", "server", *address, *stores]
