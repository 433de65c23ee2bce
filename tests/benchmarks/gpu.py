"""Check and time every kernel on a GPU: what a session with one runs, and nothing to install.

    python tests/benchmarks/gpu.py --out DIR [--parts machine,check,...] [--device cpu --small]

Needs torch, Triton, transformers and numpy, and takes under nine minutes on an H200. Each part runs in processes of its
own: a crash or a hang costs the item it happened in. Writes DIR/gpu.json and DIR/gpu.md, anew every few seconds: a run
that is killed leaves all it found. A second run takes over what DIR/gpu.json holds of the same commit, sources and
machine, and runs only what is missing; what is of others is set aside as DIR/gpu-before.json.
Exit status 0: every part ran and every check holds; 1 otherwise. Parts that time cut short say so, and count as run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOTAL_SECONDS = 530.0  # for all parts together


def prepare(device: str) -> None:
    """Paths and environment, before torch or Triton are imported. Triton interprets on a CPU, and only there."""
    sys.path[:0] = [str(HERE)] if str(HERE) not in sys.path else []
    from gpu_parts.facts import add_paths

    add_paths()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--parts", help="names with commas between them; default all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, one repeat: shows that all of it runs")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # a part's process, told by its input
    arguments = parser.parse_args(words)
    if arguments.child:
        told = json.load(sys.stdin)
        prepare(told["device"])
        from gpu_parts import child

        return child.main(told)
    prepare(arguments.device)
    from gpu_parts import NAMES

    wanted = arguments.parts.split(",") if arguments.parts else list(NAMES)
    if unknown := [name for name in wanted if name not in NAMES]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if arguments.out is None:
        parser.error("--out DIR is needed")
    if arguments.device == "cpu" and not arguments.small:
        parser.error("--device cpu goes with --small: Triton's interpreter is no machine to measure")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA device; --device cpu --small runs everything through without measuring")
    return bench(arguments.out, wanted, arguments.device, arguments.small, arguments.seconds)


def bench(out: Path, wanted: list[str], device: str, small: bool, seconds: float) -> int:
    """Run the wanted parts, and report these and what earlier runs left of the others."""
    from gpu_parts import NAMES, facts, runner
    from gpu_parts.part import Ceilings, Part, load

    begun = time.monotonic()
    made_with = {"commit": facts.commit(), "sources": facts.source_digest(), "small": small, **facts.machine(device)}
    results = runner.read(out / "gpu.json", made_with)
    parts: dict[str, Part | str] = {}
    for name in NAMES:
        try:
            parts[name] = load(name)
        except Exception as error:  # whatever its imports do: the other parts must run
            parts[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name}: failed to load: {parts[name]}", flush=True)
    known: dict[str, Any] = {
        "made_with": made_with, "date": datetime.now(UTC).date().isoformat(), "clocks": {"before": facts.smi()},
        "command": " ".join(["python tests/benchmarks/gpu.py --out DIR", *(["--device cpu --small"] if small else [])]),
    }  # fmt: skip

    def keep(result: runner.Result | None = None) -> None:
        if result is not None:
            results[result.part] = result
        ordered = {name: results[name] for name in NAMES if name in results}
        write(out, known | {"seconds": time.monotonic() - begun}, parts, ordered)

    keep()
    for name in wanted:
        part, before = parts[name], results.get(name)
        if isinstance(part, str):
            continue
        if before is not None and before.status == "done":
            print(f"{name}: taken over from {out / 'gpu.json'}", flush=True)
            continue
        left = seconds - (time.monotonic() - begun)
        later = [parts[other] for other in wanted[wanted.index(name) + 1 :]]
        # what parts before have spared, with all that comes later still having its own
        granted = max(left - sum(one.seconds for one in later if isinstance(one, Part)), min(part.seconds, left))
        print(f"{name}: {granted:.0f} s", flush=True)
        ceilings = Ceilings.of(results["machine"].flat()) if "machine" in results else Ceilings()
        read = facts.smi()
        result = runner.run_part(part, before, ceilings, granted, device, small, keep)
        result.clocks = {"before": read, "after": facts.smi()}
        keep(result)
        print(f"{name}: {result.status} in {result.seconds:.0f} s", flush=True)
        for item, line in result.failures.items():
            print(f"  failed: {item}: {line}", flush=True)
    known["clocks"] |= {"after": facts.smi()}
    keep()
    return say(out, parts, results, wanted, small)


def write(out: Path, known: dict[str, Any], parts: dict[str, Any], results: dict[str, Any]) -> None:
    """Both files, each whole or not at all."""
    from gpu_parts import goals as goal
    from gpu_parts import report, runner

    found = goal.goals(results, known["made_with"]["small"])
    state = (
        known
        | {"goals": [asdict(one) | {"verdict": one.verdict} for one in found]}
        | {"not_loaded": {name: part for name, part in parts.items() if isinstance(part, str)}}
        | {"parts": {name: asdict(result) for name, result in results.items()}}
    )
    out.mkdir(parents=True, exist_ok=True)
    runner.write(out / "gpu.json", runner.dumped(state))
    runner.write(out / "gpu.md", report.text(known, found, parts, results))


def say(out: Path, parts: dict[str, Any], results: dict[str, Any], wanted: list[str], small: bool) -> int:
    """Print goals and failures; returns the exit status."""
    from gpu_parts import goals as goal

    for one in goal.goals(results, small):
        print(f"{one.verdict}: {one.wanted}: {one.figure}", flush=True)
    if "check" in results:
        for row in goal.failures(results["check"]):
            print(
                f"  wrong: {row['kernel']}, {row['case']}, {row['dtype']}, {row['configuration']}: {row['error']:.3g}"
            )
        for name in goal.unreached(results["check"]):
            print(f"  never reached: {name}")
    bad = [name for name in wanted if isinstance(parts[name], str) or results[name].status == "failed"]
    check = results.get("check") if "check" in wanted else None
    wrong = check is not None and bool(goal.failures(check) or goal.unreached(check) or check.left_out)
    print(f"{out / 'gpu.md'}; " + ("failed: " + ", ".join(bad) if bad else "all parts ran"), flush=True)
    return 1 if bad or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
