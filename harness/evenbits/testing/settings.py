"""What a descriptor and its options must be like, whatever it describes. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from evenbits.compressor import Compressor, Options, Recovery
from evenbits.errors import SuiteError
from evenbits.measure import Evaluator, Profiler

Descriptor = Compressor | Recovery | Evaluator | Profiler


def settled(descriptor: Descriptor, given: Mapping[str, Any] | None, corpus: str | None = None) -> Options:
    """The options to check with: what is given, and where something must be given, `corpus` for an option of that name.

    Raises SuiteError for options that are wrong, or missing and not of a kind that can be made up.
    """
    fixed = dict(given or {})
    tries = [fixed]
    if corpus is not None and "corpus" in descriptor.options.model_fields and fixed.get("corpus") is None:
        tries.append({**fixed, "corpus": {"name": corpus}})
    first: ValidationError | None = None
    for each in tries:
        try:
            return descriptor.options.model_validate(each)
        except ValidationError as error:
            first = first or error
    assert first is not None
    wrong = first.errors()[0]
    where = ".".join(map(str, wrong["loc"]))
    message = wrong["msg"].removeprefix("Value error, ")
    raise SuiteError(
        f"{descriptor.name}: options{f': {where}' if where else ''}: {message}; "
        f"give it as options={{...}}, or by evenbits check {descriptor.name} --options {where or 'KEY'}=VALUE"
    )


def check_descriptor(descriptor: Descriptor) -> None:
    """A name that a suite and a file can hold, and a summary of one line."""
    name = descriptor.name
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), (
        f"{name!r} cannot be a name: use letters, digits, dots and dashes, such as my-method"
    )
    summary = descriptor.summary
    assert len(summary.strip().splitlines()) == 1, (
        f"{name}: the summary must be one line that says what it does: `evenbits plugins` shows it"
    )


def check_options(descriptor: Descriptor, options: Options) -> None:
    """Frozen, unknown keys refused, every field described, and the same again from JSON."""
    model = descriptor.options
    assert issubclass(model, Options), f"{descriptor.name}: options must derive from evenbits.compressor.Options"
    for name, field in model.model_fields.items():
        assert field.description, f"{descriptor.name}: option {name!r} has no description: use Field(description=...)"
        try:
            setattr(options, name, getattr(options, name))
        except ValidationError:
            continue
        raise AssertionError(f"{descriptor.name}: option {name!r} can be set: keep the options frozen")
    again = model.model_validate(json.loads(options.model_dump_json()))
    assert again == options, f"{descriptor.name}: options differ after JSON: {again} != {options}"
    try:
        model.model_validate({**options.model_dump(mode="json"), "no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError(f'{descriptor.name}: an unknown option is accepted: keep extra="forbid"')
