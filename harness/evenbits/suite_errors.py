"""What is wrong with a suite, said in one line: file, line, key, what was expected, what is near."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from evenbits.compressor import Options
from evenbits.errors import SuiteError
from evenbits.plugins import did_you_mean
from evenbits.suite_spec import (
    BudgetSpec,
    CalibrationSpec,
    ElsewhereSpec,
    Limits,
    MethodSpec,
    ModelOutline,
    ModelSpec,
    StageSpec,
    Suite,
)

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-\"'.]+?)\s*=")


def locate(text: str, loc: Sequence[Any]) -> int:
    """Line (from 1) of the deepest part of `loc` that the TOML text names; inline tables count as their line."""
    path: list[Any] = []
    counts: dict[tuple[Any, ...], int] = {}
    best, depth = 1, 0
    # one model is a table, several are a list: pydantic sees a list in both
    target = ("model", *loc[2:]) if tuple(loc[:2]) == ("model", 0) and "[[model]]" not in text else tuple(loc)
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            path = [part.strip("\"' ") for part in header[2].split(".")]
            if header[1] == "[[":
                key = tuple(path)
                counts[key] = counts.get(key, -1) + 1
            resolved: list[Any] = []
            for part in path:
                resolved.append(part)
                if tuple(p for p in resolved if isinstance(p, str)) in counts:
                    resolved.append(counts[tuple(p for p in resolved if isinstance(p, str))])
            path, here = resolved, tuple(resolved)
        elif key_match := _KEY.match(line):
            here = (*path, *(part.strip("\"'") for part in key_match[1].split(".")))
        else:
            continue
        shared = min(len(here), len(target))  # a dotted key names what lies above it too
        if shared > depth and here[:shared] == target[:shared]:
            best, depth = number, shared
    return best


def _known_keys(loc: Sequence[Any]) -> list[str]:
    """Keys allowed beside the last part of `loc`, for "did you mean"."""
    models: dict[str, type[BaseModel]] = {
        "model": ModelSpec,
        "outline": ModelOutline,
        "budgets": BudgetSpec,
        "methods": MethodSpec,
        "evaluators": StageSpec,
        "profilers": StageSpec,
        "recovery": StageSpec,
        "calibration": CalibrationSpec,
        "limits": Limits,
        "elsewhere": ElsewhereSpec,
    }
    names = [part for part in loc[:-1] if part in models]
    return list((models[names[-1]] if names else Suite).model_fields)


def refuse(source: str, text: str, loc: Sequence[Any], message: str) -> SuiteError:
    where = ".".join(str(part) for part in loc)
    return SuiteError(f"{source}:{locate(text, loc)}: {where}: {message}" if where else f"{source}: {message}")


# by pydantic's type of error or, where a table is expected, by our class: its own words name Python's types
_EXPECTED = {
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "BudgetSpec": "a number of bits, or a table with centre and window",
    "ModelOutline": "a table with the sizes of the model's config",
    "ElsewhereSpec": "a table with window and context",
    "ModelSpec": "a name, or a table with path, or with id and revision",
    "MethodSpec": "a name, or a table with name and options",
    "StageSpec": "a name, or a table with name and options",
}


def _first(error: ValidationError) -> ErrorDetails:
    """The error to tell: an unknown key before a missing one, since a mistyped key is both."""
    errors = error.errors()
    return next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])


def _said(error: ErrorDetails) -> str:
    """What is wrong, and with which value."""
    kind = str(error.get("ctx", {}).get("class_name"))
    expected = _EXPECTED.get(kind, _EXPECTED.get(error["type"]))
    message = f"expected {expected}" if expected else error["msg"].removeprefix("Value error, ")
    return message + (f" (got {error['input']!r})" if isinstance(error["input"], str | int | float | bool) else "")


def from_validation(source: str, text: str, error: ValidationError, prefix: Sequence[Any] = ()) -> SuiteError:
    first = _first(error)
    loc = (*prefix, *first["loc"])
    if first["type"] == "extra_forbidden":
        return refuse(source, text, loc, f"unknown key{did_you_mean(str(loc[-1]), _known_keys(loc))}")
    if first["type"] == "missing":
        return refuse(source, text, loc, "missing")
    return refuse(source, text, loc, _said(first))


def check_options(model: type[Options], given: Mapping[str, Any], where: str) -> Options:
    """Options of a plugin's object. Raises SuiteError with near names; `where` leads the message."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = _first(error)
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = did_you_mean(str(first["loc"][-1]), _fields_beside(model, first["loc"]))
            raise SuiteError(f"{where}.{key}: unknown option{near}") from None
        raise SuiteError(f"{where}{'.' + key if key else ''}: {_said(first)}") from None


def _fields_beside(model: type[BaseModel], loc: Sequence[Any]) -> Iterable[str]:
    """Options allowed beside the last part of `loc`: of the model, or of the table inside it that `loc` leads to."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return ()
        model = inner
    return model.model_fields
