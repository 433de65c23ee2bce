"""Read documents from local files. Line ends become "\\n"; the hash in the identity is of the bytes as they lie."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evenbits.errors import MissingExtra, SuiteError, TrialFailed
from evenbits.measure import Text
from evenbits_corpora.options import TextOptions

ROW_SUFFIXES = (".json", ".jsonl", ".parquet")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def read_text(options: TextOptions) -> Text:
    """Documents of the named files, in order.

    Raises SuiteError when a file is missing or cannot be read as what its name says, TrialFailed when it is empty.
    """
    paths = text_files(options)
    documents: list[str] = []
    for path in paths:
        if is_rows(path):
            documents += (row_text(row, options.field, path) for row in read_rows(path))
        else:
            documents += split_documents(read_file(path), options.split)
    if options.straight_quotes:
        documents = [document.translate(_STRAIGHT) for document in documents]
    refuse_empty(documents, "text", paths)
    join = options.join if options.join is not None else ("\n" if options.split == "lines" else "\n\n")
    identity: dict[str, Any] = {
        "name": "text",
        "files": [path.name for path in paths],
        "sha256": [hash_file(path) for path in paths],
        "split": "rows" if all(map(is_rows, paths)) else options.split,
        "join": join,
    }
    if any(map(is_rows, paths)):
        identity["field"] = options.field
    if options.straight_quotes:
        identity["straight_quotes"] = True
    return Text(documents, join, identity, options.sampling)


def text_files(options: TextOptions) -> list[Path]:
    """The files that the options name. Raises SuiteError when one is missing or a folder, or none is named."""
    names = [options.path] if isinstance(options.path, str) else list(options.path)
    if not names:
        raise SuiteError("corpus 'text': path names no file")
    paths = [locate(name, "text") for name in names]
    for path in paths:
        if path.is_dir():
            raise SuiteError(f"corpus 'text': {path} is a folder; give its files, path = [...]")
    return paths


def split_documents(content: str, split: str) -> list[str]:
    """Documents of one file by the rule `split` (see TextOptions)."""
    if split == "none":
        return [content]
    if split == "lines":
        return content.removesuffix("\n").split("\n")
    parts = re.split(r"\n[^\S\n]*\n", content) if split == "blank-lines" else content.split(split)
    return [part.strip() for part in parts if part.strip()]


def locate(name: str, corpus: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise SuiteError(f"corpus {corpus!r}: no file {name}")
    return path


def is_rows(path: Path) -> bool:
    return _suffix(path) in ROW_SUFFIXES


def is_text(path: Path) -> bool:
    """Whether a file found in a folder is taken for text by its name."""
    return _suffix(path) in (*ROW_SUFFIXES, *TEXT_SUFFIXES)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_file(path: Path) -> str:
    """The file as UTF-8 text with "\\n" line ends, unpacked when its name ends in .gz."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return file.read()
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read {path} as text: {_first_line(error)}") from error


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a .jsonl or .json file (one object a line, or one list of objects), packed or not, or of .parquet.

    Raises SuiteError naming file and line; MissingExtra when .parquet cannot be read here.
    """
    if _suffix(path) == ".parquet":
        try:
            from pyarrow import ArrowException, parquet  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise MissingExtra("pyarrow", "hub") from error
        try:
            yield from parquet.read_table(path).to_pylist()
        except (OSError, ArrowException) as error:
            raise SuiteError(f"cannot read {path} as parquet: {_first_line(error)}") from error
        return
    content = read_file(path)
    if content.lstrip().startswith("["):
        yield from _objects(_parse(content, f"{path}"), f"{path}")
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield from _objects([_parse(line, where)], where)


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise SuiteError(f"{where}: not JSON: {error.msg}") from error


def _objects(rows: list[Any], where: str) -> list[Mapping[str, Any]]:
    if not all(isinstance(row, dict) for row in rows):
        raise SuiteError(f"{where}: rows must be JSON objects")
    return rows


def row_text(row: Mapping[str, Any], field: str, where: object) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise SuiteError(f"{where}: a row has no text in field {field!r}; it has: {', '.join(row)}")
    return text


def refuse_empty(documents: list[str], corpus: str, where: object) -> None:
    if not any(document.strip() for document in documents):
        names = ", ".join(map(str, where)) if isinstance(where, list) else where
        raise TrialFailed(f"corpus {corpus!r} is empty: no text in {names}")


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
