"""How long the quickstart takes, and how much memory: the README's promise of minutes.

    python tests/benchmarks/quickstart.py --out results/bench

Runs suites/quickstart.toml whole in a fresh results folder, report and all. Writes quickstart.json and quickstart.md.
--results DIR keeps what was measured, in a folder that must not be there yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.store import Results

ROOT = Path(__file__).resolve().parents[2]
EVENBITS = Path(sys.executable).with_name("evenbits")
LOOK_SECONDS = 1.0  # a look reads the page tables of every process: more of them slow down what they look at


def resident(process: psutil.Popen) -> int:
    """Bytes that a process and all below it hold of their own (PSS where the system tells: forks share pages)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            memory = one.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            continue
    return total


def measure(suite: Path, results: Path) -> dict[str, Any]:
    """Run the suite; wall seconds, peak memory of the process tree, and the seconds of all stages."""
    command = [EVENBITS, "run", suite, "--results", results]
    begun = time.perf_counter()
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(LOOK_SECONDS)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"{suite} exited {process.returncode}")
    name = next(iter(Results(results).suites()))
    records, _ = Results(results).records(name)
    stages: dict[str, float] = {}
    for record in records:
        for stage, spent in record.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "trials": sum(record.status == "done" for record in records),
        "skipped": sum(record.status == "skipped" for record in records),
        "stage_seconds": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--suite", type=Path, default=ROOT / "suites" / "quickstart.toml")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if arguments.results is not None and arguments.results.exists():
        parser.error(f"{arguments.results} exists: what is measured must start from nothing")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.suite, arguments.results or Path(folder))
    environment = describe_environment()
    row = {"date": datetime.now(UTC).date().isoformat(), "environment": environment, **found}
    git = environment["git"] or {"commit": "unknown", "dirty": False}
    stages = ", ".join(f"{name} {spent:.0f} s" for name, spent in sorted(found["stage_seconds"].items()))
    text = (
        f"# The quickstart\n\n{row['date']}, commit {git['commit'][:12]}{' (modified)' if git['dirty'] else ''}, "
        f"{environment['processor']}, {environment['cores']} cores.\n"
        f"Written by `python tests/benchmarks/quickstart.py --out results/bench`.\n\n"
        f"{found['trials']} trials, {found['skipped']} skipped: {found['seconds'] / 60:.1f} minutes, "
        f"{found['peak_bytes'] / 2**30:.2f} GiB at most. Stages, summed: {stages}.\n"
    )
    write_atomically(arguments.out / "quickstart.json", json.dumps(row, indent=1).encode())
    write_atomically(arguments.out / "quickstart.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
