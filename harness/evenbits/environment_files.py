"""Environments of other people's libraries as plugins declare them: a file of exact pins each.

`environments/NAME.txt` in the package of the plugin whose method names it in its Needs. A requirements file as pip
reads it, whose comments say the rest:

    # summary: GPTQModel 7.6.0 on torch 2.13
    # python: >=3.11,<3.14
    # imports: gptqmodel
    # device: cuda
    # set: NAME=VALUE

imports: modules that must import there. device: only where it can do nothing without. set: a variable for what runs
there; may be repeated. Read by path: nothing of the plugin is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from evenbits.errors import PluginError, SuiteError
from evenbits.plugins import Registry, did_you_mean
from evenbits.provenance import package_folder

FOLDER = "environments"
DIGITS = 12  # of the digest, in folders' names
HEADER = re.compile(r"#\s*(summary|python|imports|device|set)\s*:\s*(.*)")
ELSEWHERE = ("--requirement", "--constraint", "--editable")  # of pip's options: another file says what is installed
COMMIT = re.compile(r"@[0-9a-f]{40}(#|$)")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True)
class Environment:
    """A pinned set of requirements.

    package: of the plugin that declares it. python: versions that will do, such as ">=3.11,<3.14"; "" for any.
    requirements: lines as pip reads them. variables: for what runs in it.
    """

    name: str
    package: str
    file: Path
    requirements: tuple[str, ...]
    summary: str = ""
    python: str = ""
    imports: tuple[str, ...] = ()
    device: Literal["any", "cuda"] = "any"
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of what decides a result made in it: neither its summary nor its comments."""
        facts = {"python": self.python, "requirements": self.requirements, "variables": dict(self.variables)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:DIGITS]

    @property
    def title(self) -> str:
        return f"{self.package}:{self.name}"

    def pins(self) -> dict[str, Requirement]:
        """Requirements by canonical name, without pip's options."""
        found = (Requirement(line) for line in self.requirements if not line.startswith("-"))
        return {canonicalize_name(one.name): one for one in found}


def read_environment(file: Path, package: str) -> Environment:
    """Raises PluginError with the line that is no header, no option of pip and no exact pin."""
    headers: dict[str, list[str]] = {}
    requirements: list[str] = []
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise PluginError(f"{file}: cannot be read ({error})") from None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if header := HEADER.fullmatch(line):
            headers.setdefault(header[1], []).append(header[2].strip())
        elif line := re.sub(r"(^|\s)#.*", "", line).strip():
            if problem := _problem(line):
                raise PluginError(f"{file}:{number}: {problem}")
            requirements.append(line)
    python = "".join(headers.get("python", []))
    device = "".join(headers.get("device", ["any"]))
    try:
        SpecifierSet(python)
    except InvalidSpecifier:
        raise PluginError(f"{file}: '# python: {python}' is no range of versions; such as >=3.11,<3.14") from None
    if device not in ("any", "cuda"):
        raise PluginError(f"{file}: '# device: {device}' is neither any nor cuda")
    given = headers.get("set", [])
    if wrong := [text for text in given if not all(part.strip() for part in text.partition("=")[:2])]:
        raise PluginError(f"{file}: '# set: {wrong[0]}' should be NAME=VALUE")
    return Environment(
        name=file.stem,
        package=package,
        file=file,
        requirements=tuple(requirements),
        summary=" ".join(headers.get("summary", [])),
        python=python,
        imports=tuple(word for line in headers.get("imports", []) for word in line.replace(",", " ").split()),
        device="cuda" if device == "cuda" else "any",
        variables={key.strip(): value.strip() for key, _, value in (text.partition("=") for text in given)},
    )


def _problem(line: str) -> str | None:
    """Why a line is not exactly one version."""
    if line.startswith("-"):
        if line.startswith(ELSEWHERE):
            return f"{line!r}: what it names is neither pinned nor in the digest; list its requirements here"
        return None if line.startswith("--") else f"{line!r}: only pip's long options, such as --find-links"
    try:
        requirement = Requirement(line)
    except InvalidRequirement as error:
        return f"{line!r} is no requirement ({' '.join(str(error).split())})"
    if requirement.url is not None and requirement.url.startswith("git+") and not COMMIT.search(requirement.url):
        return f"{line!r} is not pinned: give a commit after @, all 40 digits of it"
    exact = [one for one in requirement.specifier if one.operator in ("==", "===") and not one.version.endswith("*")]
    if requirement.url is None and not exact:
        return f"{line!r} is not pinned: give one version, {requirement.name}==..."
    return None


def environments_of(package: str) -> dict[str, Environment]:
    """Those that the package of a plugin declares, by name. Raises PluginError for one that does not read."""
    folder = package_folder(package)
    files = sorted((folder / FOLDER).glob("*.txt")) if folder is not None else []
    if wrong := [file for file in files if not NAME.fullmatch(file.stem)]:
        raise PluginError(f"{wrong[0]}: an environment's name has lower-case letters, digits, '-', '_' and '.' alone")
    return {file.stem: read_environment(file, package) for file in files}


def find_environment(package: str, name: str) -> Environment:
    """What a method of this package calls `name`. Raises SuiteError where it is not declared, or does not read."""
    try:
        declared = environments_of(package)
    except PluginError as error:
        raise SuiteError(f"environment {name!r}: {error}") from None
    if name not in declared:
        raise SuiteError(f"{package} declares no environment {name!r}{did_you_mean(name, declared)}")
    return declared[name]


def declared_environments(registry: Registry) -> tuple[list[Environment], list[str]]:
    """Of all plugins that work, and what is wrong with the others'."""
    found: list[Environment] = []
    problems: list[str] = []
    for package in dict.fromkeys(info.module for info in registry.plugins if info.status == "ok"):
        try:
            found += environments_of(package).values()
        except PluginError as error:
            problems.append(f"{error}; the environments of {package} are not available")
    return found, problems


def named_environments(registry: Registry, names: list[str]) -> Iterator[Environment]:
    """By NAME, or PACKAGE:NAME where two plugins have one of that name. Raises SuiteError."""
    declared, problems = declared_environments(registry)
    for name in names:
        matching = [one for one in declared if name in (one.name, one.title)]
        if len(matching) > 1:
            raise SuiteError(f"two plugins have an environment {name!r}: say {' or '.join(m.title for m in matching)}")
        if not matching:
            wrong = "".join(f"; {problem}" for problem in problems)
            raise SuiteError(f"unknown environment {name!r}{did_you_mean(name, {d.name for d in declared})}{wrong}")
        yield matching[0]
