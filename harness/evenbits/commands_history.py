"""`evenbits history`: nights added to a folder, and what they come to together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evenbits.history import Series

app = typer.Typer(
    name="history",
    help="Keep what each night measured, and show how it changed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
COLUMNS = 4  # quality metrics in the table; all stand in history.json


@app.command()
def add(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="path of a suite (*.toml)")],
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="results folder")] = Path("results"),
    into: Annotated[
        Path | None,
        typer.Option("--into", metavar="FOLDER", help="where nights are kept; else DIR/history/NAME"),
    ] = None,
) -> None:
    """Keep the latest run of a suite as one night: a small JSON file. The same run twice is kept once."""
    from evenbits.history import add_night, make_night
    from evenbits.named_trials import suite_name
    from evenbits.store import Results

    store = Results(results)
    name = suite_name(suite)
    night = make_night(store, name)
    path, new = add_night(night, results / "history" / name if into is None else into)
    rows = f"{len(night.rows)} rows at {night.short_commit}"
    failed = sum(failure.status == "failed" for failure in night.failures)
    trouble = "".join(f", {count} {what}" for count, what in ((failed, "failed"), (night.missing, "missing")) if count)
    typer.echo(f"{'kept' if new else 'known already:'} {path}: {rows}{trouble}")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where `evenbits history add` keeps nights")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="for plots and history.json; else FOLDER/report"),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="draw a figure a metric, PNG and SVG")] = True,
) -> None:
    """Print the latest night, every step and drift, and write history.json and a plot for each metric."""
    from evenbits.errors import MissingExtra, SuiteError
    from evenbits.files import write_atomically
    from evenbits.history import as_json, read_history, series_of
    from evenbits.markdown import table_lines

    nights = read_history(folder)
    if not nights:
        raise SuiteError(f"{folder}: no nights here; `evenbits history add SUITE --into {folder}` keeps one")
    found = series_of(nights)
    last = nights[-1]
    count = f"{len(nights)} night{'s' if len(nights) > 1 else ''} of {last.suite}"
    typer.echo(f"{count}, {nights[0].date[:10]} to {last.date[:10]} at {last.short_commit}\n")
    typer.echo(table_lines(_latest(found, len(nights) - 1), 1) + "\n")
    steps = _steps(found)
    typer.echo(table_lines(steps, 4) if len(steps) > 1 else "no steps")
    for series in found:
        if series.drift is not None:
            away = "worse" if (series.drift > 0) == (series.better == "lower") else "better"
            typer.echo(f"drift: {_row(series, found)} {series.metric}: {series.drift:+.2g} a measurement, {away}")
    target = folder / "report" if out is None else out
    files = {"history.json": (json.dumps(as_json(nights, found), allow_nan=False) + "\n").encode()}
    if plots:
        try:
            from evenbits.plots_history import draw_history

            files |= draw_history(nights, found)
        except MissingExtra as error:
            typer.echo(f"note: no plots: {error}", err=True)
    for name, data in files.items():
        write_atomically(target / name, data)
    for path in target.glob("history-*.*"):  # of metrics that no night has any more
        if path.suffix in (".png", ".svg") and path.name not in files and plots:
            path.unlink()
    typer.echo(f"\nwrote {len(files)} files into {target}")


def _latest(found: Sequence[Series], night: int) -> list[list[str]]:
    """The latest night: a line a row, its first quality metrics."""
    from evenbits.report_format import format_number

    metrics = list(dict.fromkeys(series.metric for series in found if series.quality))[:COLUMNS]
    lines = [["row", *metrics]]
    for row in dict.fromkeys(_row(series, found) for series in found):
        own = {s.metric: s for s in found if _row(s, found) == row and s.latest.night == night}
        if own:
            cells = [own.get(metric) for metric in metrics]
            lines.append([row, *("" if s is None else format_number(s.latest.value) for s in cells)])
    return lines


def _row(series: Series, found: Sequence[Series]) -> str:
    """Method and budget, with the model in front where there are several."""
    several = any(other.model != series.model for other in found)
    return " ".join(filter(None, (series.model if several else "", series.name, series.budget)))


def _steps(found: Sequence[Series]) -> list[list[str]]:
    """Every step, the latest first."""
    from evenbits.report_format import format_number

    lines = [["date", "commit", "row", "metric", "before", "after", "change", "deviations", "", "changed too"]]
    steps = [(series, step) for series in found for step in series.steps]
    for series, one in sorted(steps, key=lambda pair: (pair[1].date, pair[1].step.deviations), reverse=True):
        step = one.step
        lines.append(
            [one.date[:10], f"{one.commit_before}..{one.commit}", _row(series, found),
             series.metric + (", x dense" if series.relative else ""), format_number(step.before),
             format_number(step.after), f"{100 * step.relative:+.2g} %", f"{min(step.deviations, 999):.1f}",
             "worse" if one.worse else "better", "; ".join(one.changed)]
        )  # fmt: skip
    return lines
