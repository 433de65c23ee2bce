"""Runs the paper suites whole on models that are not the papers': the embedded reference model and stories260K.

    python tests/paper_elsewhere.py [--results DIR] [--only NAME ...] [--model MODEL ...] [--limit 20] [--windows 8]
        [--samples 8]

Needs EVENBITS_DATA: its task sets, the first lines of its WikiText-2 and its C4 rows stand in for the hub's, the C4
rows in halves, one to calibrate on, one to test on. limit, windows and samples are the suites' variables
EVENBITS_LIMIT, EVENBITS_WINDOWS and EVENBITS_SAMPLES; every method, stage, evaluator and profiler of a suite runs.
Exits 1 where a trial failed or a command ended otherwise than with 0; what is skipped is told with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ".published.toml"


def paper_suites(folder: Path = ROOT / "suites" / "paper") -> list[Path]:
    """The suites with a model of a paper; the synthetic one needs none."""
    found = (path for path in sorted(folder.glob("*.toml")) if not path.name.endswith(PUBLISHED))
    return [path for path in found if path.stem != "synthetic"]


def local_data(data: Path, folder: Path) -> dict[str, str]:
    """The suites' variables, for texts and task sets in `data`; C4's two halves and the first lines of WikiText-2 are
    written to `folder`: the whole of it takes a small vocabulary seconds a trial, for windows that nobody asks for."""
    rows = (data / "text" / "c4_demo.jsonl").read_text().splitlines(keepends=True)
    halves = {"calibration": rows[: len(rows) // 2], "c4": rows[len(rows) // 2 :]}
    for name, half in halves.items():
        (folder / f"{name}.jsonl").write_text("".join(half))
    lines = (data / "text" / "wiki.test.raw").read_text().splitlines(keepends=True)
    (folder / "wiki.test.raw").write_text("".join(lines[:300]))
    return {
        "EVENBITS_WIKITEXT2": str(folder / "wiki.test.raw"),
        "EVENBITS_C4": str(folder / "c4.jsonl"),
        "EVENBITS_CALIBRATION": str(folder / "calibration.jsonl"),
        "EVENBITS_TASKS": str(data / "tasks"),
    }


def run_elsewhere(suite: Path, model: str, results: Path, environment: Mapping[str, str]) -> tuple[int, str, float]:
    """Exit code, what was said, seconds of wall clock."""
    command = [sys.executable, "-c", "from evenbits.cli import main; main()", "run", str(suite)]
    command += ["--model", model, "--results", str(results), "--no-report"]
    begin = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - begin


def outcomes(results: Path) -> Iterator[tuple[str, str, str]]:
    """(status, name, reason) of every record of the one suite in `results`."""
    for path in sorted(results.glob("runs/*/*/record.json")):
        record = json.loads(path.read_text())
        budget = record.get("budget")
        name = "+".join([record.get("label") or record["method"], *record["recovery"]])
        name += "" if budget is None else f"@{budget['centre']:g}"
        failure = record.get("failure")
        yield record["status"], name, failure["message"] if failure else record.get("reason") or ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=None, help="folder; a temporary one without it")
    parser.add_argument("--only", nargs="*", default=None, help="names of suites")
    parser.add_argument("--model", nargs="*", default=None, help="model folders, or names of models")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    given = parser.parse_args(arguments)
    data = Path(os.environ["EVENBITS_DATA"]).resolve()
    models = given.model or ["reference", str(data / "models" / "stories260K")]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        environment = local_data(data, Path(scratch))
        environment |= {
            "EVENBITS_LIMIT": str(given.limit),
            "EVENBITS_WINDOWS": str(given.windows),
            "EVENBITS_SAMPLES": str(given.samples),
            "EVENBITS_OTHER_TEXT": "true",  # the texts are parts of what their names say
            "EVENBITS_DISABLE": "mlflow",  # what is mirrored is tested by itself
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        for suite in paper_suites():
            if given.only and suite.stem not in given.only:
                continue
            for model in models:
                results = (given.results or Path(scratch)) / f"{suite.stem}-{Path(model).name}"
                code, said, seconds = run_elsewhere(suite, model, results, environment)
                found = list(outcomes(results))
                counts = Counter(status for status, _, _ in found)
                told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
                print(
                    f"{suite.stem} on {Path(model).name}: exit {code}, {told or 'no record'}, {seconds:.0f} s",
                    flush=True,
                )
                for status, entry, reason in found:
                    if status != "done":
                        print(f"    {status} {entry}: {reason}", flush=True)
                if code != 0:
                    failed += 1
                    print("    " + "\n    ".join(said.strip().splitlines()[-8:]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
