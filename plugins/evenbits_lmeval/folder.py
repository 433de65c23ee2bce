"""A folder of YAML tasks as the plan sees it: which files a task is made of, and which local data it names.

Follows lm-eval's rules for names, groups, tags and includes, without lm-eval: functions are not resolved, rows are
checked as JSON alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from evenbits.errors import SuiteError
from evenbits.plugins import did_you_mean
from evenbits_lmeval.rows import check_json_lines

FORMATS = ("json", "csv", "text", "parquet", "arrow", "pandas")
"""As `dataset_path`: not a data set of the hub but the format of local files."""


@dataclass(frozen=True)
class Described:
    """What one YAML file says, includes merged. sources: that file and what it includes."""

    sources: tuple[Path, ...]
    config: Mapping[str, Any]


@dataclass
class Folder:
    """named: tasks and groups by name. tags: the tasks that have each. unread: files that are no such YAML, and why."""

    path: Path
    named: dict[str, Described] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def read_folder(path: Path) -> Folder:
    """Raises SuiteError where two files describe one name: lm-eval would take the first without a word."""
    folder = Folder(path)
    for file in sorted(path.rglob("*.yaml")):
        if "__pycache__" in file.parts or ".ipynb_checkpoints" in file.parts:
            continue
        try:
            described = _described(file.resolve(), ())
        except (OSError, ValueError, import_module("yaml").YAMLError) as error:
            folder.unread.append(f"{file} ({' '.join(str(error).split())[:200]})")
            continue
        config = described.config
        name = config.get("group", config.get("task"))
        if not isinstance(name, str):  # lm-eval passes over it, too: a part that others include
            continue
        if name in folder.named:
            raise SuiteError(f"lm-eval: {name} is described twice: in {folder.named[name].sources[0]} and in {file}")
        folder.named[name] = described
        if "group" not in config:
            for tag in _several(config.get("tag")):
                folder.tags.setdefault(str(tag), []).append(name)
    return folder


def folder_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Every file of the folder, and what the named tasks include or read from outside it.

    Raises SuiteError for a name that is not there, for a data file that is not there, and for a row of JSON lines that
    is no object.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    folder = read_folder(path)
    for task in asked(folder, names):
        files += [*task.sources, *data_files(task)]
    unique: dict[Path, Path] = {}
    for file in files:
        unique.setdefault(file.resolve(), file)
    for file in unique.values():
        if file.suffix == ".jsonl":
            check_json_lines(file)
    return list(unique.values())


def asked(folder: Folder, names: Sequence[str], above: tuple[str, ...] = ()) -> Iterator[Described]:
    """The tasks behind names of tasks, groups and tags. above: the groups on the way to them.

    Raises SuiteError for names that are not there and for a group inside itself.
    """
    for name in names:
        if name in above:
            raise SuiteError(f"lm-eval: {folder.path}: the group {name} is a member of itself")
        if name in folder.named:
            yield from _behind(folder, folder.named[name], (*above, name))
        elif name in folder.tags:
            yield from asked(folder, folder.tags[name], (*above, name))
        else:
            raise _unknown(folder, name)


def _behind(folder: Folder, described: Described, above: tuple[str, ...]) -> Iterator[Described]:
    if "group" not in described.config:
        yield described
        return
    for member in _several(described.config.get("task")):
        if isinstance(member, str):
            yield from asked(folder, [member], above)
        elif isinstance(member, Mapping):  # a group written out in its place, or a task with settings of its own
            base = folder.named.get(str(member.get("task"))) if "group" not in member else None
            merged = {**({} if base is None else base.config), **member}
            yield from _behind(folder, Described(described.sources if base is None else base.sources, merged), above)


def data_files(task: Described) -> list[Path]:
    """The local files that `datasets` reads for a task. Raises SuiteError where there is none of a name."""
    given = task.config.get("dataset_kwargs")
    if task.config.get("dataset_path") not in FORMATS or not isinstance(given, Mapping):
        return []
    files: list[Path] = []
    splits = given.get("data_files")
    for split in splits.values() if isinstance(splits, Mapping) else [splits]:
        for name in _several(split):
            if "://" in str(name):
                continue
            pattern = Path(str(given.get("data_dir") or ".")) / str(name)
            root = Path(pattern.anchor or ".")
            found = [pattern] if pattern.is_file() else sorted(root.glob(str(pattern.relative_to(pattern.anchor))))
            if not found:
                where = "" if pattern.is_absolute() else "; lm-eval looks for it where evenbits is started"
                raise SuiteError(f"lm-eval: {task.sources[0]}: no data file {pattern}{where}")
            files += [file for file in found if file.is_file()]
    return files


def only_local_data(path: Path, names: Sequence[str]) -> bool:
    """Whether no named task reads a data set of the hub (or of the user's cache of it)."""
    tasks = asked(read_folder(path), names)
    return all(task.config.get("dataset_path") in (*FORMATS, None) for task in tasks)


def _unknown(folder: Folder, name: str) -> SuiteError:
    known = [*folder.named, *folder.tags]
    near = did_you_mean(name, known)
    there = f"{near if 'did you mean' in near else ''}; there are: {', '.join(known[:12]) or 'none'}"
    unread = f"; not to be read: {folder.unread[0]}" if folder.unread else ""
    return SuiteError(f"lm-eval: no task {name} in {folder.path}{there}{unread}")


def _several(given: Any) -> Sequence[Any]:
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def _described(file: Path, above: tuple[Path, ...]) -> Described:
    """Raises OSError, ValueError or YAMLError for what is no YAML of a task, group or part of one."""
    if file in above:
        raise ValueError(f"it includes itself through {above[-1]}")
    config = import_module("yaml").load(file.read_bytes(), Loader=_loader())
    if not isinstance(config, dict):
        raise ValueError("it has no keys")
    merged: dict[str, Any] = {}
    sources = [file]
    for name in _several(config.pop("include", None)):
        part = _described((file.parent / str(name)).resolve(), (*above, file))
        merged.update(part.config)
        sources += part.sources
    return Described(tuple(sources), {**merged, **config})


def _loader() -> Any:
    """YAML in which `!function` and other tags say no more than that something stands there."""
    yaml = import_module("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc,name-defined]
        pass

    yaml.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix}", Loader=Loader)
    return Loader
