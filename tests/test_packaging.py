"""The wheel holds what it should and nothing else; every plugin folder has its entry point."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

GROUP = "evenbits"


def plugin_folders(root: Path) -> set[str]:
    return {path.parent.name for path in (root / "plugins").glob("*/__init__.py")}


def project(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return loaded


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without isolation, so without network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(root)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_has_the_harness_the_plugins_and_nothing_else(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = project(root)["version"]
    expected = {"evenbits", f"evenbits-{version}.dist-info"} | plugin_folders(root)
    assert {name.split("/")[0] for name in names} == expected
    sources = {
        path.relative_to(base).as_posix()
        for base in (root / "harness", root / "plugins")
        for path in base.glob("*/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_the_wheel_names_its_entry_points_and_licence(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    for name, target in project(root)["entry-points"][GROUP].items():
        assert f"{name} = {target}" in points.splitlines()
    assert "evenbits = evenbits.cli:main" in points.splitlines()
    assert metadata["Requires-Python"] == ">=3.11"


def test_every_plugin_folder_is_declared(root: Path) -> None:
    declared = project(root)["entry-points"][GROUP]
    assert set(declared.values()) == plugin_folders(root), "plugin folders and [project.entry-points.evenbits] differ"
    for name, target in declared.items():
        assert target == f"evenbits_{name}"


def test_every_plugin_is_installed(root: Path) -> None:
    """An editable install sees new code at once, but a new entry point only after installing again."""
    installed = {point.value for point in entry_points(group=GROUP)}
    missing = plugin_folders(root) - installed
    assert not missing, f'{sorted(missing)} have no installed entry point; reinstall: pip install -e ".[all]"'


def test_the_version_stands_in_one_place(root: Path) -> None:
    import evenbits

    assert evenbits.__version__ == project(root)["version"]
    assert f"## {evenbits.__version__}" in (root / "CHANGELOG.md").read_text()


def test_constraints_pin_everything_that_is_reached(root: Path) -> None:
    """A dependency without its pin would drift: what CI tests tomorrow is not what was tested today."""
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[^\s+]+", line), f"{line!r}: one exact version without a local tag"
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    tools = runpy.run_path(str(root / "tests" / "constraints.py"))
    asked = {canonicalize_name(requirement.name) for requirement in tools["declared"]()}
    assert asked <= pinned, f"not pinned: {sorted(asked - pinned)}; python tests/constraints.py > constraints.txt"
    reached = set(tools["reached"](missing_ok=True))
    assert reached <= pinned, f"not pinned: {sorted(reached - pinned)}; python tests/constraints.py > constraints.txt"


def test_ci_finds_its_command_in_the_readme(root: Path) -> None:
    """.ci/run runs the fenced block under the marker; it must set up from constraints.txt and run pytest."""
    found = re.search(r"^<!-- ci:test -->\n+```\w*\n(.*?)^```", (root / "README.md").read_text(), re.M | re.S)
    assert found, "README.md has no fenced block under <!-- ci:test -->"
    assert "-c constraints.txt" in found[1]
    assert "pytest" in found[1]
