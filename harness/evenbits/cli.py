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
    str | None, typer.Option("--model", metavar="PATH", help="use this model folder in place of the suite's model")
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


def _overrides(model: str | None) -> dict[str, Any]:
    return {} if model is None else {"model": {"path": model}}


@app.command()
def run(
    suite: SuitePath,
    results: ResultsOption = DEFAULT_RESULTS,
    model: ModelOption = None,
    report_after: Annotated[bool, typer.Option("--report/--no-report", help="print and write the report")] = True,
) -> None:
    """Compress, measure and compare; resumes where it stopped. Exits 1 when a trial failed."""
    from evenbits.display import TerminalDisplay
    from evenbits.executor import LocalExecutor
    from evenbits.plan import make_plan
    from evenbits.run import Run
    from evenbits.store import Results
    from evenbits.suite import read_suite

    registry = _registry()
    registry.collect_all()
    _warn(registry)
    read = read_suite(suite, registry, overrides=_overrides(model))
    store = Results(results)
    with store.lock():
        store.check_schema(create=True)
        plan = make_plan(read, registry, cache=store.cache, download=True)
        if read.executor == "local":
            executor: Any = LocalExecutor(read.limits.workers, _preload(plan, registry))
        else:
            executor = registry.find("executors", read.executor, "executor").value(read)
        try:
            records = Run(plan, registry, store, executor, TerminalDisplay(out)).go()
        except KeyboardInterrupt:
            err.print("stopped; finished trials are kept, the same command goes on from here")
            raise typer.Exit(130) from None
        finally:
            executor.close()
        if report_after:
            _write_report(store, read.name, Format.TABLE)
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
def plan(suite: SuitePath, model: ModelOption = None, results: ResultsOption = DEFAULT_RESULTS) -> None:
    """Show what would run, at what predicted bits and bytes; runs nothing."""
    from evenbits.plan import make_plan
    from evenbits.store import Results
    from evenbits.suite import read_suite

    registry = _registry()
    registry.collect_all()
    _warn(registry)
    read = read_suite(suite, registry, overrides=_overrides(model))
    store = Results(results)
    made = make_plan(read, registry, cache=store.cache if store.root.is_dir() else None)
    headings = ("model", "method", "budget", "seed", "linear bits", "model bits", "bytes", "settings")
    rows = [headings, *(_planned(trial) for trial in made.trials)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(headings) - 1)]
    for row in rows:
        cells = [c.rjust(w) if i > 3 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        # the settings give way where the terminal is narrow; no other cell does
        out.print("  ".join([*cells, row[-1]]), no_wrap=True, overflow="ellipsis", markup=False)
    for skip in made.skips:
        budget = f" @ {skip.budget.centre:g}" if skip.budget else ""
        out.print(f"skip {skip.model.facts.name} {skip.label}{budget}: {escape(skip.reason)}", soft_wrap=True)
    known = sum(_is_done(store, read.name, trial.id) for trial in made.trials) if store.root.is_dir() else 0
    out.print(f"{len(made.trials)} trials ({known} already recorded), {len(made.skips)} skipped")
    memory = max((trial.model.facts.model_bytes for trial in made.trials), default=0)
    out.print(f"largest model: {memory:,} bytes in memory when dense")


def _is_done(store: Any, suite: str, trial: str) -> bool:
    """Whether a run would keep the trial's record: failed and damaged ones are tried again."""
    from evenbits.errors import ArtifactError

    try:
        record = store.record(suite, trial)
    except ArtifactError:
        return False
    return record is not None and record.status == "done"


def _planned(trial: Any) -> tuple[str, ...]:
    """The cells of a trial in `evenbits plan`."""
    facts, bits = trial.model.facts, trial.predicted
    return (
        facts.name,
        "+".join([trial.label, *(stage.name for stage in trial.recovery)]),
        f"{trial.budget.centre:g}" if trial.budget else "",
        str(trial.seed),
        f"{bits.linear if bits else 8 * facts.linear_bytes / facts.linear_weights:.4f}",
        f"{bits.model if bits else 8 * facts.model_bytes / facts.parameters:.4f}",
        f"{trial.predicted_bytes or facts.model_bytes:,}",
        " ".join(f"{key}={value}" for key in trial.shown if (value := trial.options[key]) is not None),
    )


def _write_report(store: Any, name: str, form: Format) -> None:
    from evenbits.report import as_csv, as_json, as_markdown, as_terminal, gather, write_report

    records, folders = store.records(name)
    if form is Format.JSON:
        sys.stdout.write(json.dumps(as_json(records), indent=1) + "\n")
        return
    table = gather(records, folders)
    if form is Format.MARKDOWN:
        sys.stdout.write(as_markdown(table))
    elif form is Format.CSV:
        sys.stdout.write(as_csv(table))
    else:
        as_terminal(table, out)
        folder = store.run_folder(name) / "report"
        try:
            written = write_report(folder, records, folders, table=table)
        except MissingExtra as error:
            err.print(f"[yellow]note[/] no plots: {escape(str(error))}", soft_wrap=True)
            written = write_report(folder, records, folders, plots=False, table=table)
        for path in written:
            out.print(f"wrote {path}", soft_wrap=True)


@app.command()
def report(
    suite: SuitePath,
    results: ResultsOption = DEFAULT_RESULTS,
    form: Annotated[
        Format, typer.Option("--format", help="what to print; `table` also writes the files")
    ] = Format.TABLE,
) -> None:
    """Show tables (terminal, Markdown, CSV, JSON) and write these and the Pareto plots beside the records."""
    from evenbits.named_trials import suite_name
    from evenbits.store import Results

    _write_report(Results(results), suite_name(suite), form)


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
