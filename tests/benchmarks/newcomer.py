"""A newcomer's road, by the clock: from nothing to a first table, and to a row of one's own method.

    python tests/benchmarks/newcomer.py --out results/bench

Types what README.md says, in a fresh clone of this repository and a fresh virtual environment, and notes when each
command ends. What pip takes depends on the network and on its cache. Writes newcomer.json and newcomer.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evenbits.environment import describe_environment
from evenbits.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
CLONE = "evenbits"
NAME = "halves"  # of the method that is begun
# what is typed, and what is there after it
ROAD = (
    (f"git clone -q {shlex.quote(str(ROOT))} {CLONE}", "the source"),
    (f"{sys.executable} -m venv .venv", "a virtual environment"),
    ('.venv/bin/pip install -q -c constraints.txt -e ".[all]"', "evenbits and all it needs"),
    (".venv/bin/evenbits run suites/first.toml", "**the first table**, seven rows"),
    (f".venv/bin/evenbits new {NAME}", "a method of one's own, with its tests and a suite"),
    (f".venv/bin/python -m pip install -q -e ./evenbits_{NAME}", "it is a method in every suite"),
    (f".venv/bin/evenbits check {NAME}", "it keeps the contract"),
    (f".venv/bin/evenbits run ./evenbits_{NAME}/suite.toml", "**its row** beside rtn and the dense model"),
)
MINE = ("EVENBITS_", "HF_", "OMP_", "MLFLOW_", "PYTHONPATH", "VIRTUAL_ENV")  # a newcomer has set none of these


def walk(folder: Path) -> list[dict[str, Any]]:
    """Every command in turn. Raises SystemExit with what a failed one said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(MINE)}
    done: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for number, (command, after) in enumerate(ROAD):
        place = folder / CLONE if number else folder
        ran = subprocess.run(command, shell=True, cwd=place, env=environment, text=True, capture_output=True)
        if ran.returncode:
            raise SystemExit(f"{command}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
        passed = time.perf_counter() - begun
        typed = command.replace(shlex.quote(str(ROOT)), "URL").replace(sys.executable, "python3")
        done.append({"command": typed, "after": after, "at_seconds": passed})
        print(f"{passed:6.0f} s  {command}", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = walk(Path(folder))
    environment = describe_environment()
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    row = {"date": datetime.now(UTC).date().isoformat(), "environment": environment, "road": done}
    lines = [
        "# From nothing to a row",
        "",
        f"{row['date']}, commit {git['commit'][:12]}, {environment['processor']}, {environment['cores']} cores. "
        "Written by `python tests/benchmarks/newcomer.py --out results/bench`; pip's part depends on the network.",
        "",
        "| after | command | what is there |",
        "| --: | :-- | :-- |",
    ]
    for step in done:
        lines.append(f"| {step['at_seconds']:.0f} s | `{step['command']}` | {step['after']} |")
    write_atomically(arguments.out / "newcomer.json", json.dumps(row, indent=1).encode())
    write_atomically(arguments.out / "newcomer.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
