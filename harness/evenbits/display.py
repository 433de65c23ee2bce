"""How a run looks on a terminal: one bar for the suite, one line for each trial at work, a line when one ends."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from evenbits.plan import Trial
from evenbits.record import Record
from evenbits.run import Display


class TerminalDisplay(Display):
    """Bars where the output is a terminal, lines everywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def notice(self, message: str) -> None:
        self._console.print(f"[yellow]note[/] {escape(message)}", soft_wrap=True)

    def begin(self, total: int, done: int) -> None:
        self._progress.start()
        self._all = self._progress.add_task("trials", total=total, completed=done)

    def stage(self, trial: Trial, stage: str, done: int, total: int, what: str) -> None:
        text = f"{escape(trial.title)}: {what if what == stage else f'{stage}, {what}'}"
        with self._lock:
            if trial.id not in self._tasks:
                self._tasks[trial.id] = self._progress.add_task(text, total=None)
            task = self._tasks[trial.id]
            self._progress.update(task, description=text, total=total or None, completed=done)

    def finished(self, record: Record, *, resumed: bool) -> None:
        with self._lock:
            if record.trial in self._tasks:
                self._progress.remove_task(self._tasks.pop(record.trial))
            if self._all is not None:
                self._progress.advance(self._all)
        if not resumed:
            self._console.print(line_of(record), soft_wrap=True, highlight=False)

    def end(self) -> None:
        self._progress.stop()


def line_of(record: Record) -> str:
    """One line on what a trial came to."""
    stages = "".join(f"+{name}" for name in record.recovery)
    budget = f" @ {record.budget.centre:g}" if record.budget else ""
    who = escape(f"{record.model.name} {record.label or record.method}{stages}{budget} seed {record.seed}")
    if record.status == "skipped":
        what = escape(f"{record.model.name} {record.label}{stages}{budget}: {record.reason or ''}")
        return f"[dim]skip[/] {what}"
    if record.failure is not None:
        return f"[red]fail[/] {who}: {record.failure.stage}: {escape(record.failure.message)}"
    figures = [f"{record.ledger.bits.linear:.3f} bits"] if record.ledger else []
    figures += [f"{metric.name} {metric.value:.4g}" for metric in record.metrics if not metric.volatile][:3]
    outside = " [yellow](outside the window, not ranked)[/]" if record.within_budget is False else ""
    return f"[green]done[/] {who}: {', '.join(figures)}{outside}"
