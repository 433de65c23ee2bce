"""Mirrors records into MLflow: an experiment per suite, a parent run per run of it, a child run per trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evenbits.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from evenbits.compressor import Options
    from evenbits.record import Record
    from evenbits.run import RunContext


@hookimpl
def provide_options() -> type[Options]:
    from evenbits_mlflow.options import MlflowOptions

    return MlflowOptions


@hookimpl
def on_plan(context: RunContext) -> None:
    from evenbits_mlflow.deliver import begin

    begin(context)


@hookimpl
def on_record(record: Record, folder: Path, context: RunContext) -> None:
    from evenbits_mlflow.deliver import deliver

    deliver(record, folder, context)


@hookimpl
def on_finish(records: Sequence[Record], context: RunContext) -> None:
    from evenbits_mlflow.deliver import finish

    finish(records, context)


@hookimpl
def extend_cli(app: typer.Typer) -> None:
    from evenbits_mlflow.commands import add_commands

    add_commands(app)
