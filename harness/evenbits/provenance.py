"""Digests of source code: a version number does not change when code does, a digest does. Imports no torch."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def _root(package: str) -> Path | None:
    """Folder of a top-level package or file of a top-level module, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def package_folder(package: str) -> Path | None:
    """Folder of a package, by path as `_sources`; None for a module of one file, and for what is not there."""
    top, *inside = package.split(".")
    root = _root(top)
    return None if root is None or root.is_file() else root.joinpath(*inside)


@cache
def _sources(name: str) -> tuple[tuple[str, Path], ...]:
    """(module name, file) of a module, or of a package with all that is inside it; () for what is no module.

    Works on paths: `find_spec` of a dotted name would import its parents, and with them torch.
    """
    top, *inside = name.split(".")
    root = _root(top)
    if root is None:
        return ()
    if root.is_file():
        return () if inside else ((name, root),)
    folder = root.joinpath(*inside)
    file = folder.with_suffix(".py")
    if inside and file.is_file():
        return ((name, file),)
    if not (folder / "__init__.py").is_file():
        return ()
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found.append((".".join((name, *(part for part in parts if part != "__init__"))), path))
    return tuple(found)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def _harness_imports(file: Path) -> frozenset[str]:
    """Modules of evenbits that a file imports at run time, at any depth of nesting."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("evenbits."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "evenbits":
            found.update({node.module} | {f"{node.module}.{alias.name}" for alias in node.names})
        pending.extend(child for child in ast.iter_child_nodes(node) if not _typing_only(child))
    return frozenset(found - {"evenbits"})


@cache
def source_digest(*roots: str) -> str:
    """sha256 over the files of the given modules and packages and of the harness modules they reach.

    A plugin's package counts whole; of the harness, only what is imported counts.
    """
    return _digest(roots)


@cache
def module_digest(*names: str) -> str:
    """sha256 over the files of the named modules alone: for glue, whose own imports are accounted for elsewhere."""
    digest = hashlib.sha256()
    for name in sorted(names):
        for module, file in _sources(name):
            digest.update(module.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _digest(roots: Iterable[str]) -> str:
    files: dict[str, Path] = {}
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name in files:
            continue
        whole_package = not name.startswith("evenbits.")
        for module, file in _sources(name):
            if module in files or (module != name and not whole_package):
                continue
            files[module] = file
            pending.extend(_harness_imports(file) - files.keys())
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    return digest.hexdigest()
