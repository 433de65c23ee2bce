"""`evenbits check`: the contract of one plugin, check by check, in a process that it may take down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of a method, recovery stage, evaluator or profiler")],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--options", metavar="JSON|KEY=VALUE", help="its options; dots go deeper (corpus.name=c4); may be repeated"
        ),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="auto: a GPU too, where there is one")] = Device.AUTO,
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="of a stage: try it on this model, not a tiny Llama")
    ] = None,
    upper_bound: Annotated[
        bool, typer.Option("--upper-bound", help="of a method: its bits depend on the data, predict is what they reach")
    ] = False,
) -> None:
    """Hold an installed plugin to its contract, check by check. Exits 1 where one failed."""
    from evenbits.plugins import load_plugins
    from evenbits.testing.contract import find_target

    registry = load_plugins()
    find_target(name, registry)  # said before anything heavy is imported
    named = None if model is None or Path(model).exists() else registry.models.get(model)
    request = {
        "name": name,
        "options": parsed(options or []),
        "exact": not upper_bound,
        "model": model if named is None else str(Path(named.value)),
        "device": device.value,
    }
    out = Console(highlight=False, emoji=False)
    counts = dict.fromkeys(COLOURS, 0)
    for title, says, status, message, seconds in run_checks(request):
        counts[status] += 1
        word = "FAILED" if status == "failed" else status
        told = says if status == "passed" else message
        line = f"[{COLOURS[status]}]{word:8}[/]{title:14} {escape(told)} [dim]{seconds:.1f} s[/]"
        out.print(line, soft_wrap=True)
    out.print(f"{name}: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if counts["failed"]:
        raise typer.Exit(1)


def parsed(given: Sequence[str]) -> dict[str, Any]:
    """Options from the command line: JSON objects, or KEY=VALUE with a value as JSON where it is, else as text.

    Raises SuiteError for what is neither.
    """
    from evenbits.errors import SuiteError

    found: dict[str, Any] = {}
    for text in given:
        if text.lstrip().startswith("{"):
            try:
                found |= json.loads(text)
            except json.JSONDecodeError as error:
                raise SuiteError(f"--options {text}: not JSON ({error})") from None
            continue
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise SuiteError(f'--options {text!r}: give KEY=VALUE, such as bits=4, or JSON, such as {{"bits": 4}}')
        *path, last = key.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise SuiteError(f"--options {text!r}: {part!r} has a value already")
        try:
            place[last] = json.loads(value)
        except json.JSONDecodeError:
            place[last] = value
    return found


def run_checks(request: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float]]:
    """(name, what it says, status, message, seconds) of each check; one that ends its process has failed.

    Raises SuiteError where there is nothing to check.
    """
    from evenbits.errors import SuiteError

    done, listed = 0, None
    while listed is None or done < len(listed):
        # what a child that was ended by force cannot take away goes with the folder
        with tempfile.TemporaryFile() as said, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            begun: int | None = None
            with _start({**request, "done": done}, said, scratch) as child:
                assert child.stdout is not None
                try:
                    for line in child.stdout:
                        event = json.loads(line)
                        if "error" in event:
                            raise SuiteError(event["error"])
                        listed = event.get("checks", listed)
                        begun = event.get("begin", begun)
                        if "end" in event:
                            assert listed is not None
                            yield (*listed[event["end"]], event["status"], event["message"], event["seconds"])
                            done, begun = event["end"] + 1, None
                finally:
                    if child.poll() is None and sys.exc_info()[0] is not None:
                        child.kill()
                code = child.wait()
            if begun is not None:
                assert listed is not None
                yield (*listed[begun], "failed", f"{listed[begun][0]}: {_how_it_ended(code, said)}", 0.0)
                done = begun + 1
            elif listed is None or done < len(listed):
                raise SuiteError(f"{request['name']}: the checks did not begin: {_how_it_ended(code, said)}")


def _start(request: dict[str, Any], said: IO[bytes], scratch: str) -> subprocess.Popen[str]:
    # -P: a folder named like a module, where the user happens to be, is not imported instead of it
    command = [sys.executable, "-P", "-m", "evenbits.testing.child", json.dumps(request)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True,
        env={**os.environ, "TMPDIR": scratch},
    )  # fmt: skip


def _how_it_ended(code: int, said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    last = f" ({' '.join(lines[-1].split())[:300]})" if lines else ""
    if code < 0:
        what = f"the process was killed by {signal.Signals(-code).name}"
    else:
        what = f"the process ended with exit code {code}"
    return f"{what}{last}: raise evenbits.errors.TrialFailed with a reason, and leave the process alone"
