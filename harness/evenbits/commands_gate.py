"""`evenbits gate`: tonight's run against a baseline, or a paper's suite against what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

BaselinePath = Annotated[
    Path, typer.Argument(metavar="BASELINE", help="results/baselines/NAME.json, or a suite's NAME.published.toml")
]


def gate(
    baseline: BaselinePath,
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="SUITE", help="name or path of the suite; else the baseline's own")
    ] = None,
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="results folder")] = Path("results"),
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="write a summary in Markdown")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="write JUnit XML")] = None,
    level: Annotated[float, typer.Option("--level", metavar="SHARE", help="of the intervals shown")] = 0.95,
    update: Annotated[
        str | None, typer.Option("--update", metavar="REASON", help="make this run the baseline, and say why")
    ] = None,
) -> None:
    """Compare the latest run of a suite with a baseline. Exits 1 for a regression, 3 where the run is incomplete."""
    from evenbits.errors import SuiteError
    from evenbits.published import ENDING

    if not 0.5 <= level <= 0.999:
        raise SuiteError(f"--level {level:g}: a share between 0.5 and 0.999, such as 0.95")
    if baseline.name.endswith(ENDING):
        code = _gate_published(baseline, results, markdown, junit, update)
    else:
        code = _gate_baseline(baseline, suite, results, markdown, junit, level, update)
    if code:
        raise typer.Exit(code)


def _gate_baseline(
    path: Path,
    suite: str | None,
    results: Path,
    markdown: Path | None,
    junit: Path | None,
    level: float,
    update: str | None,
) -> int:
    from evenbits.errors import SuiteError
    from evenbits.gate import gate as compare
    from evenbits.gate_baseline import read_baseline, update_baseline
    from evenbits.gate_snapshot import take_run
    from evenbits.gate_text import as_junit, as_markdown, as_terminal, findings
    from evenbits.named_trials import suite_name
    from evenbits.store import Results

    kept = read_baseline(path) if update is None or path.exists() else None
    if suite is not None:
        name = suite_name(Path(suite)) if suite.endswith(".toml") else suite
    elif kept is not None:
        name = kept.suite
    else:
        raise SuiteError(f"{path}: there is no baseline yet: say by --suite whose run it is to be made of")
    if kept is not None and kept.suite != name:
        raise SuiteError(f"{path}: the baseline of suite {kept.suite!r}, not of {name!r}")
    run = take_run(Results(results), name)
    out = Console(highlight=False, emoji=False)
    found = None if kept is None else compare(kept, run, level)
    if found is not None:
        for file, text in ((markdown, as_markdown), (junit, as_junit)):
            if file is not None:
                _write(file, text(found))
        as_terminal(found, out)
    if update is None:
        return found.exit_code if found is not None else 0
    accepted = [line for one in findings(found.regressions) for line in one.lines] if found is not None else []
    written = update_baseline(path, kept, run, update, accepted)
    size = path.stat().st_size
    words = f"{len(written.rows)} rows, {size / 1000:.0f} kB" + (
        f", {len(accepted)} alarms accepted" if accepted else ""
    )
    out.print(f"wrote {escape(str(path))}: {words}", soft_wrap=True)
    return 0


def _write(path: Path, text: str) -> None:
    from evenbits.errors import SuiteError
    from evenbits.files import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise SuiteError(f"{path}: cannot be written ({error.strerror})") from None


def _gate_published(path: Path, results: Path, markdown: Path | None, junit: Path | None, update: str | None) -> int:
    """Exit code 1 where a printed number that gates is not reproduced, 3 where trials are missing or failed."""
    from evenbits.errors import SuiteError
    from evenbits.gate_snapshot import take_run
    from evenbits.gate_text import Case
    from evenbits.gate_text import junit as as_junit
    from evenbits.named_trials import suite_name
    from evenbits.plugins import load_plugins
    from evenbits.published import ENDING
    from evenbits.report_reproduction import print_reproduction, reproduction_markdown
    from evenbits.reproduction import failing, load_reproduction
    from evenbits.store import Results

    if update is not None:
        raise SuiteError(f"{path}: what papers print is no run's to update; --update is for a baseline (*.json)")
    suite = path.with_name(path.name.removesuffix(ENDING) + ".toml")
    store = Results(results)
    registry = load_plugins()
    registry.collect_all()
    found = load_reproduction(suite, store, registry)
    name = suite_name(suite)
    if any(row.label for row in found.rows) and name not in store.suites():
        raise SuiteError(f"{results}: no run of suite {name!r} here; `evenbits run {suite}` makes one")
    absent = take_run(store, name).incomplete if name in store.suites() else ()
    failed = failing(found)
    out = Console(highlight=False, emoji=False)
    print_reproduction(found, out)
    for absence in absent:
        where = absence.place or f"trial {absence.trial}"
        out.print(f"without numbers: {escape(f'{where}: {absence.status}: {absence.reason}')}", soft_wrap=True)
    if markdown is not None:
        _write(markdown, reproduction_markdown(found))
    if junit is not None:
        told = {(one.what, one.metric) for one in failed}
        cases = [Case(one.what, one.metric, "failure", one.reason) for one in failed]
        for row in found.rows:
            for cell in row.cells:
                if cell.outcome == "agrees" or (cell.outcome == "differs" and not cell.gates):
                    text = f"{cell.outcome}: {cell.reason}"
                    cases.append(Case(f"{row.method} {row.entry}".strip(), cell.metric, "ok", text=text))
                elif (row.method, cell.metric) not in told and cell.outcome != "differs":
                    cases.append(Case(f"{row.method} {row.entry}".strip(), cell.metric, "skipped", cell.outcome))
        for claim in found.orderings:
            if not (claim.gates and claim.outcome == "differs"):
                kind = "ok" if claim.outcome in ("agrees", "differs") else "skipped"
                cases.append(Case(claim.claim, claim.metric, kind, claim.outcome, claim.reason))  # type: ignore[arg-type]
        cases += [Case(one.place or one.trial, "row", "error", f"{one.status}: {one.reason}") for one in absent]
        _write(junit, as_junit(name, cases))
    return 1 if failed else 3 if absent else 0
