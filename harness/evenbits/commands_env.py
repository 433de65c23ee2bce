"""`evenbits env`: the environments of other people's libraries, made beside evenbits' own."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evenbits.environments import Listed
    from evenbits.plugins import Registry

app = typer.Typer(
    name="env",
    help="Make, check and remove the environments that other people's libraries run in.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="as `evenbits env list` has it")]


class Tool(StrEnum):
    UV = "uv"
    PIP = "pip"


def _registry() -> Registry:
    from evenbits.plugins import load_plugins

    return load_plugins()


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What plugins declare, what of it is made, its size, and what no plugin asks for any more."""
    from evenbits.environment_files import declared_environments
    from evenbits.environments import listed, root
    from evenbits.footprint import shown_bytes

    declared, problems = declared_environments(_registry())
    lines = listed(declared)
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=1))
    else:
        rows = [["name", "plugin", "state", "python", "size", "made", "summary"]]
        rows += [
            [
                line.name, line.package, line.state, line.python or line.asks,
                "" if line.bytes is None else shown_bytes(line.bytes), (line.made or "")[:10],
                line.summary + (" (CUDA)" if line.device == "cuda" else ""),
            ]
            for line in lines
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows if lines else []:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if not lines:
            typer.echo("no plugin declares an environment")
        typer.echo(f"in {root()}")
    for problem in problems:
        typer.echo(f"note {problem}", err=True)


@app.command()
def create(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="as `evenbits env list` has it")] = None,
    everything: Annotated[bool, typer.Option("--all", help="all that can do something on this machine")] = False,
    tool: Annotated[Tool | None, typer.Option("--tool", help="else uv where there is one")] = None,
    cuda_torch: Annotated[
        bool, typer.Option("--cuda-torch", help="torch as the index has it, gigabytes of CUDA, also without a GPU")
    ] = False,
) -> None:
    """Make environments; those that are there stay as they are. Exits 1 when one could not be made."""
    from evenbits.devices import cuda_devices
    from evenbits.environment_files import declared_environments, named_environments
    from evenbits.environments import find, make
    from evenbits.errors import SuiteError, TrialFailed
    from evenbits.footprint import shown_bytes

    if bool(names) == everything:
        raise SuiteError("evenbits env create: give names, or --all; `evenbits env list` shows them")
    registry = _registry()
    declared, problems = declared_environments(registry) if everything else ([], [])
    wanted = declared if everything else list(named_environments(registry, names or []))
    for problem in problems:
        typer.echo(f"failed: {problem}", err=True)
    failed = len(problems)
    for one in wanted:
        if everything and one.device == "cuda" and not cuda_devices():
            typer.echo(f"skip {one.name}: needs a CUDA device, and there is none here")
            continue
        if (there := find(one)) is not None:
            typer.echo(f"made already: {one.name} in {there.folder}")
            continue
        try:
            made = make(
                one, tool=None if tool is None else tool.value, cuda_torch=cuda_torch, again=True, say=typer.echo
            )
        except TrialFailed as error:
            failed += 1
            typer.echo(f"failed: {error}", err=True)
            continue
        facts = made.facts
        figures = [f"{len(facts['versions'])} packages", shown_bytes(facts["bytes"]), f"{facts['seconds']:.0f} s"]
        typer.echo(f"made {one.name}: {', '.join(figures)}, by {facts['tool']}, Python {facts['python']}")
    if failed:
        raise typer.Exit(1)


@app.command()
def check(names: Names) -> None:
    """Compare what is installed with what is pinned and with what was made, and import it. Exits 1 where it differs."""
    from evenbits.environment_files import named_environments
    from evenbits.environments import check as differences
    from evenbits.environments import find

    failed = False
    for one in named_environments(_registry(), names):
        wrong = differences(one)
        failed |= bool(wrong)
        for problem in wrong:
            typer.echo(f"{one.name}: {problem}")
        made = find(one)
        if not wrong and made is not None:
            versions, pins = made.facts["versions"], one.pins()
            said = [f"{len(pins)} packages as pinned"] + [f"{name} imports" for name in one.imports]
            said += [f"torch {versions['torch']}"] if "torch" in versions else []
            typer.echo(f"{one.name}: ok: {', '.join(said)}, Python {made.facts['python']}")
    if failed:
        raise typer.Exit(1)


@app.command()
def remove(names: Names) -> None:
    """Remove environments, outdated ones of the same name too, and what was made for plugins that are gone."""
    from evenbits.environments import remove as remove_all

    for name in names:
        package, own = _one(name)
        for folder in remove_all(package, own):
            typer.echo(f"removed {folder}")


def _one(name: str) -> tuple[str, str]:
    """Package and name of what is declared, or was. Raises SuiteError where nothing or several are called so."""
    from evenbits.environment_files import declared_environments
    from evenbits.environments import listed
    from evenbits.errors import SuiteError
    from evenbits.plugins import did_you_mean

    lines: list[Listed] = listed(declared_environments(_registry())[0])
    found = {(line.package, line.name) for line in lines if name in (line.name, f"{line.package}:{line.name}")}
    if not found:
        raise SuiteError(f"unknown environment {name!r}{did_you_mean(name, {line.name for line in lines})}")
    if len(found) > 1:
        said = " or ".join(sorted(":".join(one) for one in found))
        raise SuiteError(f"two plugins have an environment {name!r}: say {said}")
    return next(iter(found))
