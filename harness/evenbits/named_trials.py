"""Which records a name on the command line stands for: an id, a path, or a suite's label, budget and seed."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evenbits.errors import SuiteError
from evenbits.record import Record, read_record
from evenbits.rows import why
from evenbits.store import Results
from evenbits.suite import SUITE_NAME

MANY = 6  # names that a message lists


@dataclass(frozen=True)
class Named:
    """What a name on the command line stands for: the records of one row, and where each lies.

    around: the uncompressed models measured beside them, for recovery. left_out: seeds that failed or were skipped.
    """

    name: str
    records: tuple[Record, ...]
    folders: Mapping[str, Path]
    around: tuple[Record, ...]
    left_out: tuple[Record, ...] = ()


def find_trials(name: str, store: Results) -> Named:
    """The done records that a name stands for.

    name: a trial's id or its unique beginning; the path of a record.json or of its folder; or
    SUITE[.toml]:[MODEL:]LABEL[+STAGE...][@BUDGET][/SEED], without a seed all of a row's seeds together.
    Raises SuiteError, naming what is near or what matches, unless it stands for records of one row that are done.
    """
    if (folder := _folder(Path(name))) is not None:
        return _of_folders(name, [folder])
    store.check_schema()
    if ":" in name:
        return _of_suite(name, store)
    folders = sorted(found.parent for found in store.root.glob("runs/*/*/record.json"))
    if re.fullmatch(r"[0-9a-z]+", name):
        matching = [folder for folder in folders if folder.name.startswith(name)]
        ids = sorted({folder.name for folder in matching})
        if len(ids) > 1:
            raise SuiteError(f"{name}: several trials begin so: {some_of(ids)}; give more of the id")
        if len(matching) > 1:
            runs = some_of([folder.parent.name for folder in matching])
            raise SuiteError(f"{name}: it is in the runs of {runs}; give SUITE:LABEL or a path")
        if matching:
            return _of_folders(name, matching)
    near = near_names(name, [folder.name for folder in folders])
    raise SuiteError(
        f"{name}: no trial of this id in {store.root}{near}; give an id, the path of a record.json, or "
        "SUITE.toml:LABEL[@BUDGET][/SEED]"
    )


def _folder(path: Path) -> Path | None:
    """The folder of a record that a path names."""
    try:
        if path.name == "record.json" and path.is_file():
            return path.parent
        return path if (path / "record.json").is_file() else None
    except OSError:
        return None  # no name of a file, too long: what else it may be is seen later


def _of_folders(name: str, folders: Sequence[Path]) -> Named:
    records = [read_record(folder / "record.json") for folder in folders]
    places = {record.trial: folder for record, folder in zip(records, folders, strict=True)}
    return _named(name, records, places, _beside(records[0], folders[0], places))


def _beside(record: Record, folder: Path, places: dict[str, Path]) -> list[Record]:
    """The uncompressed model's records in the same run; their folders go into `places`."""
    found: list[Record] = []
    for path in sorted(folder.parent.glob("*/record.json")):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # another trial's damage is none of ours
        if isinstance(facts, dict) and facts.get("method") == "dense" and not facts.get("recovery"):
            other = read_record(path)
            if other.status == "done" and _model(other) == _model(record):
                found.append(other)
                places.setdefault(other.trial, path.parent)
    return sorted(found, key=lambda other: other.finished, reverse=True)


def _of_suite(name: str, store: Results) -> Named:
    if ".toml:" in name:
        file, _, wanted = name.partition(".toml:")
        suite = suite_name(Path(file + ".toml"))
    else:
        suite, _, wanted = name.partition(":")
    if suite not in store.suites():
        raise SuiteError(f"{name}: no run of suite {suite!r} in {store.root}{near_names(suite, store.suites())}")
    records, folders = store.records(suite)
    wanted = re.sub(r"@(\d+(?:\.\d+)?)(?=$|/)", lambda found: f"@{float(found[1]):g}", wanted)
    groups: dict[str, list[Record]] = {}  # by row
    known: dict[str, None] = {}
    for record in records:
        spellings = _spellings(record)
        known |= dict.fromkeys(spellings[:2])
        if wanted in spellings:
            row = json.dumps([_model(record), spellings[1], record.options], sort_keys=True)
            groups.setdefault(row, []).append(record)
    if not groups:
        raise SuiteError(f"{name}: no {wanted!r} in the run of suite {suite!r}{near_names(wanted, list(known))}")
    if len(groups) > 1:
        several = len({_model(group[0]) for group in groups.values()}) > 1
        found = [_full_name(group[0], model=several) for group in groups.values()]
        raise SuiteError(f"{name}: several match: {some_of([f'{suite}:{one}' for one in found])}; give one of these")
    (group,) = groups.values()
    dense = [r for r in records if _model(r) == _model(group[0]) and r.method == "dense" and not r.recovery]
    return _named(name, group, folders, [record for record in dense if record.status == "done"])


def _named(name: str, records: Sequence[Record], folders: Mapping[str, Path], around: Sequence[Record]) -> Named:
    done = tuple(record for record in records if record.status == "done")
    if not done:
        first = records[0]
        raise SuiteError(f"{name}: trial {first.trial} {first.status}, nothing was measured: {why(first)}")
    left_out = tuple(record for record in records if record.status != "done")
    return Named(name, done, folders, tuple(around), left_out)


def suite_name(suite: Path) -> str:
    """The name in a suite file, without checking the rest: reading results needs no plugins and no model."""
    try:
        name = tomllib.loads(suite.read_text())["name"]
    except OSError as error:
        raise SuiteError(f"{suite}: cannot be read ({error.strerror}); give the path of a suite (*.toml)") from None
    except (ValueError, KeyError) as error:
        raise SuiteError(f"{suite}: not a suite: {error}") from None
    if not isinstance(name, str) or not re.fullmatch(SUITE_NAME, name):
        raise SuiteError(f"{suite}: name {name!r} is not a suite's name")
    return name


def _model(record: Record) -> tuple[str, str, str]:
    return record.model.name, record.model.revision, record.model.dtype


def _spellings(record: Record) -> list[str]:
    """All that may stand after "SUITE:" for this record, the shortest and the fullest without seed first."""
    label = "+".join([record.label or record.method, *record.recovery])
    full = _full_name(record)
    plain = list(dict.fromkeys([label, full]))
    plain = [label, full, *(f"{one}/{record.seed}" for one in plain)]
    return [*plain, *(f"{record.model.name}:{one}" for one in plain)]


def _full_name(record: Record, *, model: bool = False) -> str:
    label = "+".join([record.label or record.method, *record.recovery])
    budget = "" if record.budget is None or record.method == "dense" else f"@{record.budget.centre:g}"
    return (f"{record.model.name}:" if model else "") + label + budget


def near_names(name: str, known: Iterable[str]) -> str:
    """'; near: ...' or what there is."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"; near it: {', '.join(near)}"
    return f"; there are: {some_of(names)}" if names else "; there is none"


def some_of(names: Sequence[str]) -> str:
    more = len(names) - MANY
    return ", ".join(names[:MANY]) + (f" and {more} more" if more > 0 else "")
