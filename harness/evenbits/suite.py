"""Read and check a suite: TOML -> frozen models. An error names file, line, key and near names.

Strings may hold ${NAME} or ${NAME:-default}; what is "${NAME:-}" alone is left out where NAME is not set. Relative
paths are relative to where evenbits is started.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evenbits.compressor import Options
from evenbits.errors import SuiteError
from evenbits.plugins import Registry, did_you_mean
from evenbits.suite_errors import check_options, from_validation, locate, refuse
from evenbits.suite_spec import SUITE_NAME, Limits, MethodSpec, ModelSpec, StageSpec, Suite

__all__ = [
    "SUITE_NAME",
    "Limits",
    "MethodSpec",
    "ModelSpec",
    "StageSpec",
    "Suite",
    "check_options",
    "check_suite",
    "locate",
    "read_suite",
]

_LEFT_OUT = object()
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _expand(value: Any, environment: Mapping[str, str], loc: tuple[Any, ...] = ()) -> Any:
    """Replace variables in every string; a key of which "${NAME:-}" leaves nothing is left out.

    Raises KeyError((name, loc)) for an undefined one.
    """
    if isinstance(value, dict):
        expanded = {key: _expand(item, environment, (*loc, key)) for key, item in value.items()}
        return {key: item for key, item in expanded.items() if item is not _LEFT_OUT}
    if isinstance(value, list):
        items = [_expand(item, environment, (*loc, index)) for index, item in enumerate(value)]
        return [item for item in items if item is not _LEFT_OUT]
    if not isinstance(value, str):
        return value
    whole = _VARIABLE.fullmatch(value)
    if whole is not None and whole[2] == "" and not environment.get(whole[1]):
        return _LEFT_OUT

    def replace(match: re.Match[str]) -> str:
        found = environment.get(match[1]) or match[2]
        if found is None:
            raise KeyError(match[1], loc)
        return found

    return _VARIABLE.sub(replace, value)


def _check_names(suite: Suite, source: str, text: str) -> None:
    """What tables tell apart by its name has a name of its own. Raises SuiteError."""
    for field, what in (("evaluators", "evaluator"), ("profilers", "profiler")):
        stages = [(stage.name, stage.label) for stage in getattr(suite, field)]
        for index, stage in enumerate(stages):
            if stage in stages[:index]:
                message = f"{what} {stage[0]!r} stands here twice, and each would give metrics of the same names; "
                message += "give one a label"
                raise refuse(source, text, (field, index), message)
    models = [model.shown for model in suite.model]
    for index, name in enumerate(models):
        if name in models[:index]:
            raise refuse(source, text, ("model", index), f"two models are called {name!r}; give one another name")
    rows: dict[tuple[Any, ...], MethodSpec] = {}
    for index, method in enumerate(suite.methods):
        # the row of a table also says its budget and its recovery stages
        for budget in method.budgets(suite.budgets):
            row = (method.shown, budget, *(stage.name for stage in method.recovery))
            other = rows.setdefault(row, method)
            if (other.name, other.given, other.recovery) != (method.name, method.given, method.recovery):
                message = f"another entry with other settings is called {method.shown!r} too; give one a label"
                raise refuse(source, text, ("methods", index), message)


def _check_budgets(suite: Suite, source: str, text: str) -> None:
    """Budgets that methods ask for, and windows elsewhere, go with the suite's budgets. Raises SuiteError."""
    centres = [spec.centre for spec in suite.budgets]
    known = ", ".join(f"{centre:g}" for centre in sorted(set(centres))) or "none"
    for index, method in enumerate(suite.methods):
        strange = [one for one in method.budget if one not in centres] if isinstance(method.budget, tuple) else []
        if strange:
            message = f"{strange[0]:g} is the centre of no budget of this suite; its centres: {known}"
            raise refuse(source, text, ("methods", index, "budget"), message)
    window = None if suite.elsewhere is None else suite.elsewhere.window
    if window is not None and centres and window >= min(centres):
        message = f"{window:g} is not below the smallest centre, {min(centres):g}"
        raise refuse(source, text, ("elsewhere", "window"), message)


def check_suite(suite: Suite, registry: Registry, source: str = "suite", text: str = "") -> None:
    """Every name and option against what is installed. Raises SuiteError with file, line, key and near names."""

    def check(
        kind: str, what: str, name: str, options: Mapping[str, Any], loc: tuple[Any, ...], held: str = "options"
    ) -> tuple[Any, Options]:
        """The descriptor and its checked options, which stand under the key `held`, or beside the name for ""."""
        inner: tuple[Any, ...] = (*loc, "name")
        try:
            provided = registry.find(kind, name, what)
            inner = (*loc, held) if held else loc
            for key in options:
                if key not in provided.value.options.model_fields:
                    inner = (*inner, key)
                    break
            return provided.value, check_options(provided.value.options, options, "options")
        except SuiteError as error:
            raise SuiteError(f"{source}:{locate(text, inner)}: {'.'.join(map(str, loc))}: {error}") from None

    def check_corpus(reference: Mapping[str, Any], loc: tuple[Any, ...]) -> None:
        options = {key: value for key, value in reference.items() if key != "name"}
        check("corpora", "corpus", str(reference.get("name", "")), options, loc, held="")

    _check_names(suite, source, text)
    _check_budgets(suite, source, text)
    for index, method in enumerate(suite.methods):
        loc: tuple[Any, ...] = ("methods", index)
        check("compressors", "method", method.name, method.given, loc)
        for stage_index, stage in enumerate(method.recovery):
            check("recoveries", "recovery stage", stage.name, stage.options, (*loc, "recovery", stage_index))
    for index, evaluator in enumerate(suite.evaluators):
        loc = ("evaluators", index)
        descriptor, checked = check("evaluators", "evaluator", evaluator.name, evaluator.options, loc)
        for reference in descriptor.corpora(checked):
            key = [key for key, value in evaluator.options.items() if value == reference]
            check_corpus(reference, (*loc, "options", *key[:1]))
    for index, profiler in enumerate(suite.profilers):
        check("profilers", "profiler", profiler.name, profiler.options, ("profilers", index))
    for stages in suite.dense_recovery:
        for stage in stages:
            check("recoveries", "recovery stage", stage.name, stage.options, ("dense_recovery",))
    if suite.calibration is not None:
        check_corpus(suite.calibration.corpus, ("calibration", "corpus"))
    if suite.executor != "local":
        try:
            registry.find("executors", suite.executor, "executor")
        except SuiteError as error:
            raise SuiteError(f"{source}:{locate(text, ('executor',))}: executor: {error}") from None
    installed = {info.name for info in registry.plugins}
    for name in suite.plugins:
        if name not in installed:
            line = locate(text, ("plugins", name))
            raise SuiteError(f"{source}:{line}: plugins.{name}: no such plugin{did_you_mean(name, installed)}")
        if name not in registry.options:
            line = locate(text, ("plugins", name))
            raise SuiteError(f"{source}:{line}: plugins.{name}: this plugin takes no options")
        unknown = [key for key in suite.plugins[name] if key not in registry.options[name].model_fields]
        line = locate(text, ("plugins", name, *unknown[:1]))
        check_options(registry.options[name], suite.plugins[name], f"{source}:{line}: plugins.{name}")


def read_suite(
    path: Path,
    registry: Registry,
    *,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Suite:
    """Read, expand, validate. `overrides` replace top-level keys (the command line's --model).

    Raises SuiteError: "file:line: key: what is wrong; what is near".
    """
    source = str(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise SuiteError(f"{source}: cannot be read ({error.strerror}); give the path of a suite (*.toml)") from None
    except UnicodeDecodeError as error:
        raise SuiteError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{source}: not TOML: {error}") from None
    data.update(overrides or {})
    try:
        data = _expand(data, os.environ if environment is None else environment)
    except KeyError as error:
        name, loc = error.args
        raise refuse(source, text, loc, f"environment variable {name} is not set") from None
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        raise from_validation(source, text, error) from None
    check_suite(suite, registry, source, text)
    return suite
