"""`evenbits new`: a package with a plugin that works, its tests and a suite, from the templates beside this module."""

from __future__ import annotations

import keyword
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from evenbits import compressor
from evenbits.errors import PluginError
from evenbits.plugins import Registry, load_plugins

TEMPLATES = Path(__file__).with_name("templates")
ENDING = ".txt"  # a template is no module: nothing may import, type or format it
STEM = "evenbits_"
LONGEST = 24  # letters of a name; the templates keep to 120 columns with as many
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


class Kind(StrEnum):
    COMPRESSOR = "compressor"
    RECOVERY = "recovery"
    EVALUATOR = "evaluator"
    PROFILER = "profiler"


# in which of a registry's tables a name of that kind must be free
TABLES: Mapping[Kind, tuple[str, str]] = {
    Kind.COMPRESSOR: ("compressors", "method"),
    Kind.RECOVERY: ("recoveries", "recovery stage"),
    Kind.EVALUATOR: ("evaluators", "evaluator"),
    Kind.PROFILER: ("profilers", "profiler"),
}


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the method, the stage or the measure")],
    kind: Annotated[Kind, typer.Option("--kind", help="what it is")] = Kind.COMPRESSOR,
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="where its folder is made")] = Path(),
) -> None:
    """Start a plugin: a package that works as it is, with its tests and a suite."""
    check_name(name, kind, load_plugins())
    folder = write_project(name, kind, into)
    python, evenbits = _commands()
    for line in (
        f"wrote {folder}; it works as it is, put your own {kind} into {folder / (STEM + name) / f'{kind}.py'}; next:",
        f"  {python} -m pip install -e {_typed(folder)}",
        f"  {evenbits} check {name}",
        f"  {evenbits} run {_typed(folder / 'suite.toml')}",
    ):
        typer.echo(line)


def check_name(name: str, kind: Kind, registry: Registry) -> None:
    """Raises PluginError for a name that no package can have, or that something installed has."""
    if name.startswith(STEM):
        raise PluginError(f"{name!r}: leave {STEM} out, the package is called {STEM}NAME anyway")
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise PluginError(f"{name!r} is no plugin's name: small letters and digits, a letter first, _ between words")
    if len(name) > LONGEST:
        raise PluginError(f"{name!r} has {len(name)} letters: take a name of at most {LONGEST}")
    if hasattr(compressor, f"{_class(name)}Compressor") or hasattr(compressor, f"{_class(name)}Stage"):
        raise PluginError(f"{name!r}: evenbits has classes of that name: take another one")
    table, what = TABLES[kind]
    taken = getattr(registry, table).get(name) or getattr(registry, table).get(name.replace("_", "-"))
    if taken is not None:
        raise PluginError(f"{name!r} is already the {what} of {taken.plugin.origin}: take another name")
    for info in registry.plugins:
        if info.name == name:
            raise PluginError(f"{name!r} is already the plugin {info.origin}: take another name")
    if find_spec(STEM + name) is not None:
        raise PluginError(f"a package {STEM + name} can already be imported: take another name")


def write_project(name: str, kind: Kind, into: Path) -> Path:
    """The folder `into`/evenbits_NAME with all its files, or none of them.

    Raises PluginError where `into` is no folder or holds something of that name.
    """
    package = STEM + name
    folder = into / package
    if not into.is_dir():
        raise PluginError(f"{into}: no such folder to write {package} into")
    if folder.exists():
        raise PluginError(f"{folder} exists: nothing is written over; move it, or give another place with --into DIR")
    try:
        folder.mkdir()
        for place, text in project_files(name, kind).items():
            path = folder / place
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PluginError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder


def project_files(name: str, kind: Kind) -> dict[str, str]:
    """What `evenbits new` writes: text by place inside the folder."""
    package = STEM + name
    words = {
        "name": name,
        "package": package,
        "distribution": package.replace("_", "-"),
        "Class": _class(name),
        "kind": str(kind),
        "article": "an" if kind is Kind.EVALUATOR else "a",
    }
    places = {f"project/{file}": file for file in ("pyproject.toml", "README.md")}
    places |= {f"{kind}/{file}.py": f"{package}/{file}.py" for file in ("__init__", "options", kind)}
    places |= {f"{kind}/test.py": f"tests/test_{name}.py", f"{kind}/suite.toml": "suite.toml"}
    return {
        place: Template((TEMPLATES / f"{file}{ENDING}").read_text(encoding="utf-8")).substitute(words)
        for file, place in places.items()
    }


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _commands() -> tuple[str, str]:
    """What to type for this Python and for `evenbits`, so that the plugin lands in the environment it was begun in."""
    here = Path(sys.executable).parent
    if shutil.which("evenbits") == str(here / "evenbits"):
        return "python", "evenbits"
    try:
        shown = here.relative_to(Path.cwd())
    except ValueError:
        shown = here
    return _typed(shown / "python", dot=False), _typed(shown / "evenbits", dot=False)


def _typed(path: Path, *, dot: bool = True) -> str:
    """As a shell takes it; pip takes a bare name for one of its index, so a folder begins with a dot or a slash."""
    text = path.as_posix()
    if dot and not path.is_absolute() and not text.startswith("."):
        text = f"./{text}"
    return shlex.quote(text)
