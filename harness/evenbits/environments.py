"""Environments of other people's libraries on disk: made on demand beside the project's own, checked, removed.

    ROOT/PACKAGE/NAME-DIGEST/              a virtual environment; with complete.json in it, it is whole
    ROOT/PACKAGE/NAME-DIGEST.log           what the installer said
    ROOT/PACKAGE/NAME-DIGEST.failed.json   why it could not be made: no other trial waits for the same for some minutes
    ROOT/PACKAGE/.NAME-DIGEST.lock         held alone while it is made or removed, shared while something runs in it
    ROOT/wheels/                           torch for the CPU

ROOT is EVENBITS_ENVIRONMENTS, or evenbits/environments in the user's cache folder. A virtual environment cannot be
moved: it is made in place, and its marker is written last. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from evenbits.environment_files import DIGITS, Environment
from evenbits.errors import EvenbitsError, SuiteError, TrialFailed
from evenbits.files import write_atomically
from evenbits.installed import interpreter, look, off_pins
from evenbits.installing import Installer

MARKER = "complete.json"
RETRY_SECONDS = 600.0  # after a failure; an installer without a network takes minutes to give up, for every trial
MADE = re.compile(rf"(?P<name>.+)-(?P<digest>[0-9a-f]{{{DIGITS}}})")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """An environment that is there. facts: complete.json."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return interpreter(self.folder)


@dataclass(frozen=True)
class Listed:
    """One line of `evenbits env list`. state "outdated": what is asked for has changed since it was made;
    "undeclared": no plugin asks for it any more."""

    name: str
    package: str
    state: Literal["made", "not made", "outdated", "undeclared"]
    summary: str = ""
    asks: str = ""  # versions of Python
    device: str = "any"
    folder: str | None = None
    python: str | None = None
    bytes: int | None = None
    made: str | None = None


def root() -> Path:
    """Raises SuiteError where it lies in the environment that runs evenbits: that one stays as it is."""
    given = os.environ.get("EVENBITS_ENVIRONMENTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (Path(given).expanduser() if given else cache / "evenbits" / "environments").absolute()
    if folder.is_relative_to(Path(sys.prefix).absolute()):
        raise SuiteError(f"EVENBITS_ENVIRONMENTS={folder} lies in evenbits' own environment; give it another folder")
    return folder


def folder_of(environment: Environment) -> Path:
    return root() / environment.package / f"{environment.name}-{environment.digest}"


def find(environment: Environment) -> Made | None:
    """What is made and whole."""
    return _read(folder_of(environment))


def _read(folder: Path) -> Made | None:
    try:
        facts = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return Made(folder, facts) if isinstance(facts, dict) and interpreter(folder).exists() else None


def _digested(package: str, name: str) -> list[Path]:
    """All folders of this name, whole or not, whatever their digest."""
    here = sorted((root() / package).glob(f"{name}-*"))
    return [path for path in here if path.is_dir() and (m := MADE.fullmatch(path.name)) and m["name"] == name]


# -- making --------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold an environment; the lock dies with the process. Raises SuiteError where another has it and none waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise SuiteError(f"{folder}: in use by another run; end that first") from None
        yield


def make(
    environment: Environment,
    *,
    tool: Literal["uv", "pip"] | None = None,
    cuda_torch: bool = False,
    again: bool = False,
    say: Say = lambda line: None,
) -> Made:
    """Find it, or make it; who comes while another makes it waits and takes that one, or its failure.

    tool: None takes uv where there is one. cuda_torch: torch as the package index has it, also where no GPU is.
    again: also where that failed less than RETRY_SECONDS ago.
    Raises TrialFailed with the reason in one line; nothing half-made is left.
    """
    if made := find(environment):
        return made
    folder = folder_of(environment)
    try:
        with locked(folder):
            if made := find(environment):
                return made
            if not again:
                _raise_failure(environment, folder)
            return _make(environment, folder, tool, cuda_torch, say)
    except OSError as error:
        raise TrialFailed(f"environment {environment.name!r}: {folder}: {error.strerror or error}") from None


def _make(environment: Environment, folder: Path, tool: str | None, cuda_torch: bool, say: Say) -> Made:
    begun = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted one left
    installer = Installer(environment, folder, interpreter(folder), root() / "wheels", tool, cuda_torch)
    say(f"making environment {environment.title} with {installer.tool} in {folder}")
    try:
        installer.install(say)
        found = look(folder)
        if wrong := off_pins(environment, found):
            raise TrialFailed(f"environment {environment.name!r}: {wrong[0]}; log: {installer.log}")
        facts = {
            "name": environment.name,
            "package": environment.package,
            "digest": environment.digest,
            "python": found["python"],
            "versions": found["versions"],
            "tool": installer.tool_version(),
            "bytes": _size(folder),
            "seconds": round(time.monotonic() - begun, 1),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_atomically(folder / MARKER, (json.dumps(facts, indent=1) + "\n").encode())
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, TrialFailed):
            told = {"reason": str(error), "at": time.time()}
            write_atomically(_failure_of(folder), (json.dumps(told) + "\n").encode())
        raise
    _failure_of(folder).unlink(missing_ok=True)
    return Made(folder, facts)


def _failure_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.failed.json")


def _raise_failure(environment: Environment, folder: Path) -> None:
    """TrialFailed with the reason that an attempt of the last minutes left."""
    try:
        told = json.loads(_failure_of(folder).read_text())
        reason, age = str(told["reason"]), time.time() - float(told["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if 0 <= age < RETRY_SECONDS:
        raise TrialFailed(
            f"{reason} (that was {age:.0f} s ago, and is tried again after {RETRY_SECONDS:.0f} s; "
            f"`evenbits env create {environment.name}` tries now)"
        )


def _size(folder: Path) -> int:
    """Bytes as they are counted file by file; those that uv shares with its cache count too."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


# -- looking -------------------------------------------------------------------------------------------------


def check(environment: Environment) -> list[str]:
    """What differs from what was asked for and from what was made, and what does not import; [] where all is well."""
    made = find(environment)
    if made is None:
        return [f"not made; `evenbits env create {environment.name}` makes it"]
    try:
        found = look(made.folder, environment.imports)
    except EvenbitsError as error:
        return [str(error)]
    wrong = off_pins(environment, found)
    was, now = made.facts.get("versions", {}), found["versions"]
    named = environment.pins()
    wrong += [
        f"{name} is {now.get(name, 'gone')}, it was {was.get(name, 'not there')} when the environment was made"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and name not in named
    ]
    return wrong + [f"import {name}: {reason}" for name, reason in found["failed"].items()]


def listed(environments: Sequence[Environment]) -> list[Listed]:
    """Those declared, then those that are there and that no plugin declares."""
    lines = []
    known: set[tuple[str, str]] = set()
    for one in environments:
        known.add((one.package, one.name))
        there = [made for folder in _digested(one.package, one.name) if (made := _read(folder))]
        states: list[tuple[Made | None, str]] = [
            (made, "made" if made.folder == folder_of(one) else "outdated") for made in there
        ]
        lines += [_line(one.package, one.name, state, made, one) for made, state in states or [(None, "not made")]]
    for folder in sorted(root().glob("*/*")):
        match, made = MADE.fullmatch(folder.name), _read(folder)
        if match and made and (folder.parent.name, match["name"]) not in known:
            lines.append(_line(folder.parent.name, match["name"], "undeclared", made, None))
    return lines


def _line(package: str, name: str, state: Any, made: Made | None, one: Environment | None) -> Listed:
    facts = {} if made is None else made.facts
    return Listed(
        name=name,
        package=package,
        state=state,
        summary=one.summary if one else "",
        asks=one.python if one else "",
        device=one.device if one else "any",
        folder=str(made.folder) if made else None,
        python=facts.get("python"),
        bytes=facts.get("bytes"),
        made=facts.get("made"),
    )


# -- removing ------------------------------------------------------------------------------------------------


def remove(package: str, name: str) -> list[Path]:
    """Remove every environment of this name, also unfinished and outdated ones; the wheels where no other is left.

    Raises SuiteError where there is none, or where one is in use.
    """
    gone = _digested(package, name)
    if not gone:
        raise SuiteError(f"environment {package}:{name} is not made: nothing to remove")
    for folder in gone:
        with locked(folder, wait=False):
            (folder / MARKER).unlink(missing_ok=True)  # first: what is left of it is not taken for whole
            shutil.rmtree(folder)
            folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
            _failure_of(folder).unlink(missing_ok=True)
    if not any(MADE.fullmatch(path.name) and path.is_dir() for path in root().glob("*/*")):  # nor one being made
        shutil.rmtree(root() / "wheels", ignore_errors=True)
    return gone
