"""The sets that papers report, as local data files: their names, known row counts, and what each row must have.

Fields are the hub's. Two sets may also have the names of a re-laid file: OpenBookQA's `question` for `question_stem`,
and HellaSwag's `query` ("activity: context") for its three fields. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evenbits.errors import SuiteError
from evenbits.plugins import did_you_mean
from evenbits_lmeval.fields import (
    check_hellaswag,
    check_lambada,
    check_lettered,
    check_openbookqa,
    check_pair,
    check_piqa,
    check_winogrande,
    only,
    prepare_arc,
    prepare_hellaswag,
    prepare_openbookqa,
    prepare_piqa,
)
from evenbits_lmeval.rows import Check, Row, read_rows

if TYPE_CHECKING:
    from evenbits_lmeval.options import LmEvalOptions

KNOWN_ROWS = {
    "winogrande": 1267,
    "piqa": 1838,
    "hellaswag": 10042,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "lambada_openai": 5153,
}
YAML = Path(__file__).resolve().parent / "tasks"
BLIMP = "blimp"
PARADIGMS = 67  # of BLiMP as published, 1000 pairs each


@dataclass(frozen=True)
class LocalSet:
    """file: below the data folder. few_shot: the file that examples are drawn from, where there is one.
    yaml: the task that scores it. prepare: a row of the file -> the fields that the YAML names."""

    name: str
    file: str
    few_shot: str | None
    yaml: Path
    check: Check
    prepare: Callable[[Row], Row]

    def read(self, folder: Path, file: str | None = None) -> list[Row]:
        """Raises SuiteError naming file and row."""
        return [self.prepare(row) for row in read_rows(folder / (file or self.file), self.check)]


def local_sets(options: LmEvalOptions) -> dict[str, list[LocalSet]]:
    """For each name asked for the sets behind it: one, or BLiMP's paradigms that have a file in `data`.

    Raises SuiteError for unknown names and files that are not there.
    """
    folder = data_folder(options)
    paradigms = {path.stem: path for path in sorted((folder / BLIMP).glob("*.jsonl"))}
    found = {}
    for name in options.names:
        if name == BLIMP:
            if not paradigms:
                raise SuiteError(f"lm-eval: no blimp/PARADIGM.jsonl in {folder}")
            found[name] = [_paradigm(paradigm) for paradigm in paradigms]
        elif name.startswith(f"{BLIMP}_") and name.removeprefix(f"{BLIMP}_") in paradigms:
            found[name] = [_paradigm(name.removeprefix(f"{BLIMP}_"))]
        elif name in SETS:
            found[name] = [SETS[name]]
        else:
            known = [*SETS, BLIMP, *(f"{BLIMP}_{paradigm}" for paradigm in paradigms)]
            near = did_you_mean(name, known)
            raise SuiteError(f"lm-eval: no task {name!r} over local data{near}; there are: {', '.join(known[:9])}")
    return found


def data_folder(options: LmEvalOptions) -> Path:
    folder = Path(str(options.data)).expanduser()
    if not folder.is_dir():
        raise SuiteError(f"lm-eval: no folder of data files at {folder}")
    return folder


def local_files(options: LmEvalOptions) -> list[Path]:
    """The data files and the YAML that scores them, after every row and the numbers of rows were checked.

    Raises SuiteError naming file and row.
    """
    folder = data_folder(options)
    files: dict[Path, None] = {}
    named: dict[str, str] = {}
    for listed, several in local_sets(options).items():
        for each in several:
            if (other := named.setdefault(each.name, listed)) != listed:
                raise SuiteError(f"lm-eval: {each.name} is scored twice: in {other!r} and in {listed!r}")
            names = [each.file]
            if options.few_shot:
                if each.few_shot is None:
                    raise SuiteError(
                        f"lm-eval: few_shot = {options.few_shot}, but {each.name} is scored without examples; "
                        "give few_shot = 0 or leave it out"
                    )
                names.append(each.few_shot)
            for name in names:
                path = folder / name
                if not path.is_file():
                    purpose = "" if name == each.file else f" for the examples of few_shot = {options.few_shot}"
                    raise SuiteError(f"lm-eval: no file {name} in {folder}, which {each.name} needs{purpose}")
                rows = read_rows(path, each.check)
                if name == each.file:
                    check_count(each.name, len(rows), options, str(path))
                files[path] = None
            files[each.yaml] = None
    return list(files)


def check_count(name: str, rows: int, options: LmEvalOptions, where: str) -> None:
    """Raises SuiteError where a set that papers report has not the number of rows that they are scored on."""
    known = KNOWN_ROWS.get(name)
    if options.rows == "known" and known is not None and rows != known:
        raise SuiteError(f'lm-eval: {where}: {rows} rows, {name} has {known}; rows = "any" allows other numbers')


def _set(name: str, split: str, few_shot: str | None, check: Check, prepare: Callable[[Row], Row]) -> LocalSet:
    return LocalSet(name, f"{name}.{split}.jsonl", few_shot, YAML / f"{name}.yaml", check, prepare)


SETS: dict[str, LocalSet] = {
    each.name: each
    for each in (
        _set("winogrande", "validation", "winogrande.train.jsonl", check_winogrande,
             only("sentence", "option1", "option2", "answer")),
        _set("piqa", "validation", "piqa.train.jsonl", check_piqa, prepare_piqa),
        _set("hellaswag", "validation", "hellaswag.train.jsonl", check_hellaswag, prepare_hellaswag),
        _set("arc_easy", "test", "arc_easy.train.jsonl", check_lettered("question"), prepare_arc),
        _set("arc_challenge", "test", "arc_challenge.train.jsonl", check_lettered("question"), prepare_arc),
        _set("openbookqa", "test", "openbookqa.train.jsonl", check_openbookqa, prepare_openbookqa),
        _set("lambada_openai", "test", None, check_lambada, only("text")),
    )
}  # fmt: skip


def _paradigm(name: str) -> LocalSet:
    fields = only("sentence_good", "sentence_bad")
    return LocalSet(f"{BLIMP}_{name}", f"{BLIMP}/{name}.jsonl", None, YAML / f"{BLIMP}.yaml", check_pair, fields)
