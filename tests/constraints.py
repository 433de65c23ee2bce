"""Print the exact versions installed here of everything that evenbits' extras reach: the content of constraints.txt.

    python tests/constraints.py > constraints.txt      in a fresh environment whose tests pass

Walks the requirements of pyproject.toml through the metadata of what is installed, markers evaluated for this machine.
Local version tags (torch's +cpu) are dropped, so that the pins also resolve where only CUDA builds are on offer.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SELF = "evenbits"


def declared() -> list[Requirement]:
    """What pyproject.toml asks for: the build system, the dependencies and every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        lines += extra
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != SELF]


def reached(*, missing_ok: bool = False) -> dict[str, str]:
    """Name -> version of every installed distribution that `declared` reaches.

    Raises PackageNotFoundError for one that is not installed, unless `missing_ok` (the test extra alone, say).
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(r.name, extra) for r in declared() for extra in ("", *r.extras)]
    while todo:
        name, extra = todo.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            if missing_ok:
                continue
            raise
        found[name] = Version(package.version).public
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, e) for e in ("", *requirement.extras)]
    return found


if __name__ == "__main__":
    print("# The exact versions that are tested; written by tests/constraints.py")
    for name, number in sorted(reached().items()):
        print(f"{name}=={number}")
