"""The command line. A known error is one line and exit 2; an unknown one keeps its traceback."""

from __future__ import annotations

import errno
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from evenbits import commands_check, commands_env, commands_export, commands_gate, commands_history, commands_new
from evenbits.errors import EvenbitsError, MissingExtra, SuiteError
from evenbits.plugins import Registry, load_plugins

app = typer.Typer(
    name="evenbits",
    help="Compare compressors of language models at even bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
WIDTH = 140  # where the output is no terminal: a table cut at 80 columns is of no use in a file

# in names such as a:b:c no word is to become a picture
out = Console(highlight=False, emoji=False)
if not out.is_terminal:
    out.width = WIDTH
err = Console(stderr=True, highlight=False, emoji=False)

SuitePath = Annotated[Path, typer.Argument(metavar="SUITE", help="path of a suite (*.toml)")]
ResultsOption = Annotated[Path, typer.Option("--results", metavar="DIR", help="results folder")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH",
        help="this folder (or a plugin's model) in place of the suite's own",
    ),
]
SeedOption = Annotated[
    list[int] | None,
    typer.Option("--seed", metavar="N", min=0, help="use this seed in place of the suite's; may be repeated"),
]
TrialName = Annotated[
    str,
    typer.Argument(
        metavar="TRIAL", help="id or its beginning, path of a record.json, or SUITE.toml:LABEL[@BUDGET][/SEED]"
    ),
]
DEFAULT_RESULTS = Path("results")


class Format(StrEnum):
    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"


class CompareFormat(StrEnum):
    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"


def _registry() -> Registry:
    return load_plugins()


def _warn(registry: Registry) -> None:
    for problem in registry.problems:
        err.print(f"[yellow]note[/] {escape(problem)}", soft_wrap=True)


def _read_suite(path: Path, registry: Registry, model: str | None, seeds: list[int] | None) -> tuple[Any, str | None]:
    """The suite with what the command line puts in place of its own, and what else gave way on another model."""
    from evenbits.devices import cuda_devices
    from evenbits.elsewhere import elsewhere
    from evenbits.published import published_path, read_published
    from evenbits.shapes import read_config
    from evenbits.suite import read_suite

    if published_path(path).is_file():
        read_published(published_path(path))  # a mistake there is told before the run, not after it
    overrides: dict[str, Any] = {"seeds": seeds} if seeds else {}
    if model is None:
        return read_suite(path, registry, overrides=overrides), None
    named = registry.models.get(model) if not Path(model).exists() else None
    overrides["model"] = {"path": model} if named is None else model
    suite = read_suite(path, registry, overrides=overrides)
    config = read_config(Path(model) if named is None else Path(named.value))
    changed = elsewhere(suite, config, cuda=bool(cuda_devices()))
    return changed.suite, changed.said


@app.command()
def run(
    suite: SuitePath,
    results: ResultsOption = DEFAULT_RESULTS,
    model: ModelOption = None,
    seed: SeedOption = None,
    report_after: Annotated[bool, typer.Option("--report/--no-report", help="print and write the report")] = True,
) -> None:
    """Compress, measure and compare; resumes where it stopped. Exits 1 when a trial failed."""
    from evenbits.display import TerminalDisplay
    from evenbits.executor import LocalExecutor
    from evenbits.plan import make_plan
    from evenbits.run import Run
    from evenbits.store import Results

    registry = _registry()
    registry.collect_all()
    _warn(registry)
    read, said = _read_suite(suite, registry, model, seed)
    store = Results(results)
    with store.lock():
        store.check_schema(create=True)
        plan = make_plan(read, registry, cache=store.cache, download=True)
        if read.executor == "local":
            executor: Any = LocalExecutor(read.limits.workers, _preload(plan, registry))
        else:
            executor = registry.find("executors", read.executor, "executor").value(read)
        try:
            display = TerminalDisplay(out)
            if said:
                display.notice(said)
            going = Run(plan, registry, store, executor, display)
            if report_after:
                going.conclude = lambda: _write_report(store, read.name, Format.TABLE, suite, registry)
            records = going.go()
        except KeyboardInterrupt:
            err.print("stopped; finished trials are kept, the same command goes on from here")
            raise typer.Exit(130) from None
        finally:
            executor.close()
    failed = sum(record.status == "failed" for record in records)
    if failed:
        err.print(f"{failed} of {len(records)} trials failed; the log of each is beside its record")
        raise typer.Exit(1)


def _preload(plan: Any, registry: Registry) -> tuple[str, ...]:
    """What the fork server imports once: the transformers module of each model, what evaluators ask for."""
    from evenbits.shapes import read_config

    kinds = {read_config(trial.model.source.folder).get("model_type") for trial in plan.trials}
    models = [f"transformers.models.{kind}.modeling_{kind}" for kind in sorted(map(str, kinds))]
    evaluators = [registry.find("evaluators", stage.name, "evaluator").value for stage in plan.suite.evaluators]
    return (*models, *(module for evaluator in evaluators for module in evaluator.preload))


@app.command()
def plan(
    suite: SuitePath,
    model: ModelOption = None,
    seed: SeedOption = None,
    results: ResultsOption = DEFAULT_RESULTS,
) -> None:
    """Show what would run, at what predicted bits and bytes, and what it will take; runs nothing."""
    from evenbits.plan import make_plan
    from evenbits.plan_text import print_plan
    from evenbits.store import Results

    registry = _registry()
    registry.collect_all()
    _warn(registry)
    read, said = _read_suite(suite, registry, model, seed)
    store = Results(results)
    if said:
        out.print(f"note {said}", soft_wrap=True, markup=False)
    made = make_plan(read, registry, cache=store.cache if store.root.is_dir() else None)
    known = sum(_is_done(store, read.name, trial.id) for trial in made.trials) if store.root.is_dir() else 0
    print_plan(made, known, registry, store, out)


def _is_done(store: Any, suite: str, trial: str) -> bool:
    """Whether a run would keep the trial's record: failed and damaged ones are tried again."""
    from evenbits.errors import ArtifactError

    try:
        record = store.record(suite, trial)
    except ArtifactError:
        return False
    return record is not None and record.status == "done"


def _write_report(
    store: Any,
    name: str,
    form: Format,
    suite: Path,
    registry: Registry | None = None,
    *,
    html: bool = False,
    nights: Path | None = None,
) -> None:
    """Of the suite's latest run; where expected values stand beside the suite, also of what it reproduces."""
    from evenbits.published import published_path
    from evenbits.report import (
        as_csv,
        as_json,
        as_markdown,
        as_terminal,
        gather,
        print_reproduction,
        reproduction_markdown,
        write_report,
    )
    from evenbits.reproduction import reproduce_suite

    expected = published_path(suite).is_file()
    # printed values can be shown, and recomputed, before anything was run
    started = not expected or name in store.suites()
    records, folders = store.records(name) if started else ([], {})
    if form is Format.JSON:
        sys.stdout.write(json.dumps(as_json(records), indent=1) + "\n")
        return
    table = gather(records, folders)
    if form is Format.CSV:
        sys.stdout.write(as_csv(table))
        return
    reproduction = reproduce_suite(suite, table, registry or _registry()) if expected else None
    if form is Format.MARKDOWN:
        sys.stdout.write(as_markdown(table))
        if reproduction is not None:
            sys.stdout.write("\n" + reproduction_markdown(reproduction, level=2))
        return
    if started:
        as_terminal(table, out)
    else:
        out.print(f"no run of suite {name!r} in {store.root}: nothing was measured, nothing is written", soft_wrap=True)
    if reproduction is not None:
        print_reproduction(reproduction, out)
    if not started:
        return
    folder = store.run_folder(name) / "report"
    try:
        written = write_report(folder, records, folders, table=table, reproduction=reproduction)
    except MissingExtra as error:
        err.print(f"[yellow]note[/] no plots: {escape(str(error))}", soft_wrap=True)
        written = write_report(folder, records, folders, plots=False, table=table, reproduction=reproduction)
    if html or (folder / "page.html").is_file():  # a page once asked for never lags behind its report
        from evenbits.history import read_history
        from evenbits.page import run_command, write_page

        nights = store.root / "history" / name if nights is None else nights
        history = read_history(nights) if nights.is_dir() else None
        command = run_command(suite, table, lambda: (registry or _registry()).models)
        written.append(write_page(folder, table, reproduction=reproduction, history=history, command=command))
    for path in written:
        out.print(f"wrote {path}", soft_wrap=True)


@app.command()
def report(
    suite: SuitePath,
    results: ResultsOption = DEFAULT_RESULTS,
    form: Annotated[
        Format, typer.Option("--format", help="what to print; `table` also writes the files")
    ] = Format.TABLE,
    html: Annotated[
        bool, typer.Option("--html", help="also write page.html: one page with all of it, for a browser")
    ] = False,
    nights: Annotated[
        Path | None,
        typer.Option("--history", metavar="FOLDER", help="nights for the page; else DIR/history/NAME, if there"),
    ] = None,
) -> None:
    """Show tables (terminal, Markdown, CSV, JSON) and write these and the Pareto plots beside the records.

    With expected values beside the suite (SUITE.published.toml) also what was printed beside what was measured.
    """
    from evenbits.named_trials import suite_name
    from evenbits.store import Results

    if form is not Format.TABLE and (html or nights is not None):
        raise SuiteError(f"--format {form} only prints: leave it out to write the page")
    if nights is not None and not (html and nights.is_dir()):
        raise SuiteError(f"--history {nights}: " + ("no such folder of nights" if html else "it needs --html"))
    _write_report(Results(results), suite_name(suite), form, suite, html=html, nights=nights)


@app.command()
def compare(
    a: TrialName,
    b: TrialName,
    results: ResultsOption = DEFAULT_RESULTS,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="only this metric; may be repeated")
    ] = None,
    form: Annotated[CompareFormat, typer.Option("--format", help="what to print")] = CompareFormat.TABLE,
    level: Annotated[float, typer.Option("--level", metavar="SHARE", help="of intervals and tests")] = 0.95,
) -> None:
    """Compare two trials, or two methods over their seeds, on the same items. Exits 2 where nothing can be compared."""
    from evenbits.compare import compare as compare_trials
    from evenbits.compare_text import as_json, as_markdown, as_terminal
    from evenbits.named_trials import find_trials
    from evenbits.store import Results

    store = Results(results)
    found = compare_trials(find_trials(a, store), find_trials(b, store), metric or (), level)
    if form is CompareFormat.JSON:
        sys.stdout.write(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    elif form is CompareFormat.MARKDOWN:
        sys.stdout.write(as_markdown(found))
    else:
        as_terminal(found, out)


@app.command()
def plugins() -> None:
    """List what is installed, from which distribution, with which hooks, and what is broken and why."""
    registry = _registry()
    registry.collect_all()
    for info in registry.plugins:
        mark = {"ok": "[green]ok[/]", "disabled": "[dim]disabled[/]", "broken": "[red]broken[/]"}[info.status]
        detail = ", ".join(info.hooks) if info.status == "ok" else escape(info.problem or "")
        out.print(f"{mark} [bold]{info.name}[/] ({info.distribution} {info.version}): {detail}", soft_wrap=True)
    for what in ("compressors", "recoveries", "evaluators", "profilers", "corpora", "models", "executors"):
        table = getattr(registry, what)
        if table:
            out.print(f"\n[bold]{what}[/]")
            width = max(map(len, table))
            for name, provided in sorted(table.items()):
                summary = getattr(provided.value, "summary", str(provided.value))
                out.print(f"  {name:{width}}  {escape(summary)} [dim]({provided.plugin.name})[/]", soft_wrap=True)
    if registry.problems:
        out.print("\n[bold]problems[/]")
        for problem in registry.problems:
            out.print(f"  [red]{escape(problem)}[/]", soft_wrap=True)


@app.command()
def clean(
    results: ResultsOption = DEFAULT_RESULTS,
    everything: Annotated[
        bool, typer.Option("--artifacts", help="remove all artifacts and caches; records stay")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
) -> None:
    """Remove what killed runs left, records outside each suite's latest plan, and artifacts no record refers to."""
    from evenbits.store import Results, remove, size_of

    store = Results(results)
    if not store.root.is_dir():
        raise SuiteError(f"{results}: no such results folder")
    with store.lock():
        store.check_schema()
        found = {*store.leftovers(), *store.stale()}
        if everything:
            found = {path for path in found if store.artifacts not in path.parents}
            found |= {path for path in (store.artifacts, store.cache) if path.exists()}
        freed = 0
        for path in sorted(found):
            freed += size_of(path)
            out.print(f"{'would remove' if dry_run else 'removed'} {path}", soft_wrap=True)
            if not dry_run:
                remove(path)
    out.print(f"{len(found)} removed, {freed:,} bytes" if not dry_run else f"{len(found)} to remove, {freed:,} bytes")


app.add_typer(commands_history.app)
app.add_typer(commands_env.app)
app.command()(commands_gate.gate)
app.command()(commands_check.check)
app.command()(commands_export.export)
app.command()(commands_new.new)


def main() -> None:
    """Entry point: commands of the harness, then those of plugins."""
    try:
        load_plugins().announce("extend_cli", lambda message: err.print(escape(message)), app=app)
        app()
    except EvenbitsError as error:
        err.print(f"[red]error[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        err.print(f"[red]error[/] {escape(str(error))}: free some space; finished trials are kept", soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
