"""Rows of data files: JSON lines that name file and row when one is broken. Imports neither torch nor lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evenbits.errors import SuiteError

Row = dict[str, Any]
Check = Callable[[Mapping[str, Any]], str | None]
"""What is wrong with a row and what is expected, or None."""


def read_rows(path: Path, check: Check) -> list[Row]:
    """Every row of a file, each checked. Raises SuiteError naming file and row, counted from 1."""
    rows = check_json_lines(path)
    for number, row in enumerate(rows, start=1):
        fault = check(row)
        if fault is not None:
            raise SuiteError(f"lm-eval: {path}, row {number}: {fault}")
    return rows


def check_json_lines(path: Path) -> list[Row]:
    """Raises SuiteError where a line is no JSON object."""
    try:
        # not str.splitlines: that also cuts at U+2028 and the like, which JSON allows inside a string
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise SuiteError(f"lm-eval: {path}: not to be read ({error})") from None
    if lines == [b""]:
        raise SuiteError(f"lm-eval: {path}: no rows")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SuiteError(f"lm-eval: {path}, row {number}: not UTF-8 text ({error})") from None
        except ValueError as error:
            raise SuiteError(f"lm-eval: {path}, row {number}: not JSON ({error}); one object a line") from None
        if not isinstance(row, dict):
            raise SuiteError(f"lm-eval: {path}, row {number}: expected a JSON object, not {type(row).__name__}")
        rows.append(row)
    return rows


def text_fault(row: Mapping[str, Any], *names: str) -> str | None:
    """The first of the named fields that is missing, no text, or blank."""
    for name in names:
        value = row.get(name)
        if name not in row:
            return f"no field {name!r}; there are: {', '.join(sorted(row)) or 'none'}"
        if not isinstance(value, str):
            return f"{name} is {value!r}, expected text"
        if not value.strip():
            return f"{name} is empty"
        if not _encodes(value):
            return f"{name} is {value!r}, half of a surrogate pair in it"
    return None


def texts_fault(values: Any, name: str, at_least: int = 2) -> str | None:
    """Whether `values` is no list of at least so many texts, none of them blank."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return f"{name} is {values!r}, expected a list of texts"
    if len(values) < at_least:
        return f"{name} has {len(values)} entries, expected at least {at_least}"
    for index, value in enumerate(values):
        if not value.strip():
            return f"{name}[{index}] is empty"
        if not _encodes(value):
            return f"{name}[{index}] is {value!r}, half of a surrogate pair in it"
    return None


def _encodes(text: str) -> bool:
    """JSON can escape what is no character and has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def index_fault(row: Mapping[str, Any], name: str, choices: int) -> str | None:
    """Whether the field is no index into so many choices: a whole number, or its digits as the hub has them."""
    if name not in row:
        return f"no field {name!r}; there are: {', '.join(sorted(row)) or 'none'}"
    value = row[name]
    whole = isinstance(value, int) and not isinstance(value, bool)
    digits = isinstance(value, str) and value.isascii() and value.isdigit()
    if not (whole or digits) or not 0 <= int(value) < choices:
        return f"{name} is {value!r}, expected 0 to {choices - 1}"
    return None
