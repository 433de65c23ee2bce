"""What is installed in an environment, as its own interpreter says it, and what of that is not as pinned. No torch."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement

from evenbits.environment_files import Environment
from evenbits.errors import TrialFailed

# run in the environment's own interpreter: what is installed, and what of sys.argv does not import; in this order, for
# setuptools puts what it carries with it on the path
LOOK = """
import importlib, importlib.metadata as m, json, platform, re, sys
found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in m.distributions()}
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
print("\\n" + json.dumps({"python": platform.python_version(), "versions": found, "failed": failed}))
"""


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def look(folder: Path, imports: Sequence[str] = ()) -> dict[str, Any]:
    """What its own interpreter says: python, versions by canonical name, failed: why which import does not work."""
    env = clean_variables()
    command = [str(interpreter(folder)), "-c", LOOK, *imports]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except OSError as error:
        raise TrialFailed(f"{command[0]} does not run: {error.strerror}; remove the environment") from None
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TrialFailed(f"{command[0]} does not run: {last}; remove the environment") from None
    return found


def clean_variables() -> dict[str, str]:
    """Those of this process, without what would lead another interpreter to this one's packages."""
    leading = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in leading}
    return {**kept, "PYTHONNOUSERSITE": "1"}


def off_pins(environment: Environment, found: dict[str, Any]) -> list[str]:
    """What is not installed as pinned. A pin says nothing of a local version, such as +cpu, unless it names one."""
    wrong = []
    for name, pin in environment.pins().items():
        if not _asked(pin.marker, found["python"]):
            continue
        installed = found["versions"].get(name)
        if installed is None:
            wrong.append(f"{name} is not installed, {_pinned(pin)} is asked for")
        elif not pin.specifier.contains(installed, prereleases=True):
            wrong.append(f"{name} is {installed}, {_pinned(pin)} is asked for")
    return wrong


def _asked(marker: Marker | None, python: str) -> bool:
    versions = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
    return marker is None or marker.evaluate(versions)


def _pinned(pin: Requirement) -> str:
    return str(pin.specifier) if pin.specifier else str(pin.url)
