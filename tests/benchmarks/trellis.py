"""What a search over a bit-shift trellis takes: the numba kernel against torch, in microseconds a step.

    python tests/benchmarks/trellis.py --out results/bench

Both search the same sequences in turn, in one process, and must find the same symbols. Torch is also timed on a batch,
where it is at its best. Writes trellis.json (all raw timings, the environment) and trellis.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenbits.environment import describe_environment
from evenbits.files import write_atomically
from evenbits.maths import trellis
from evenbits.maths.trellis import Trellis

# state bits, symbol bits, numbers a step
SETTINGS = ((8, 2, 1), (12, 1, 1), (12, 2, 1), (12, 3, 1), (12, 4, 2), (12, 8, 8), (14, 2, 1), (16, 2, 1), (16, 4, 2))
STEPS, TORCH_STEPS, BATCH = 4096, 256, 16


def seconds_a_step(lattice: Trellis, sequences: Tensor, numba: bool) -> tuple[float, Tensor]:
    trellis._numba_is_here = lambda: numba  # type: ignore[assignment]
    begun = time.perf_counter()
    symbols = lattice.search(sequences)
    return (time.perf_counter() - begun) / symbols.numel(), symbols


def measure(state_bits: int, symbol_bits: int, d: int, runs: int) -> dict[str, Any]:
    """Seconds a step and sequence, of each run, interleaved; the first of each is not counted."""
    generator = torch.Generator().manual_seed(0)
    lattice = Trellis(torch.randn(1 << state_bits, d, generator=generator), symbol_bits)
    long = torch.randn(1, STEPS, d, generator=generator)
    short = long[:, :TORCH_STEPS]
    batch = torch.randn(BATCH, TORCH_STEPS, d, generator=generator)
    timings: dict[str, list[float]] = {"numba": [], "torch": [], "torch batch": []}
    for run in range(runs + 1):
        taken = {
            "numba": seconds_a_step(lattice, long, True)[0],
            "torch": seconds_a_step(lattice, short, False)[0],
            "torch batch": seconds_a_step(lattice, batch, False)[0],
        }
        if run:
            for name, seconds in taken.items():
                timings[name].append(seconds)
    equal = torch.equal(seconds_a_step(lattice, batch, True)[1], seconds_a_step(lattice, batch, False)[1])
    if not equal:
        raise SystemExit(f"numba and torch disagree at {state_bits} state bits, {symbol_bits} bits a symbol, d = {d}")
    return {"state_bits": state_bits, "symbol_bits": symbol_bits, "d": d, "seconds": timings}


def measure_call(runs: int) -> list[float]:
    """Seconds of a call that has next to nothing to search: 4 states, one step."""
    lattice, sequence = Trellis(torch.randn(4, 1), 1), torch.randn(1, 1, 1)
    return [seconds_a_step(lattice, sequence, True)[0] for _ in range(100 * runs + 1)][1:]


def render(result: dict[str, Any]) -> str:
    facts = result["environment"]
    git = facts["git"] or {}
    lines = [
        "# Search over a bit-shift trellis",
        "",
        f"{result['date']}, commit {git.get('commit', 'no git')[:12]}{' (modified)' if git.get('dirty') else ''}, "
        f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}; "
        f"torch on {result['threads']} of them, numba on one.",
        "Written by `python tests/benchmarks/trellis.py --out results/bench`.",
        "",
        f"Medians of {result['runs']} runs, microseconds a step. A search of T steps takes T and "
        f"{2 * trellis.WINDOW_MEMORIES} ceil(state bits / symbol bits) more, which are counted in the time but not in "
        f"the steps. numba: one sequence of {STEPS} steps; torch: one of {TORCH_STEPS}; batch: {BATCH} of those "
        "at once, per sequence.",
        "",
        "| state bits | bits a step | numbers a step | numba | torch | torch batch | torch / numba | batch / numba |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["settings"]:
        numba, plain, batch = (1e6 * statistics.median(row["seconds"][name]) for name in row["seconds"])
        lines.append(
            f"| {row['state_bits']} | {row['symbol_bits']} | {row['d']} | {numba:.2f} | {plain:.0f} | {batch:.1f} "
            f"| {plain / numba:.0f} | {batch / numba:.0f} |"
        )
    call = 1e6 * statistics.median(result["call"])
    lines += ["", f"A call with one step to search: {call:.0f} µs (median of {len(result['call'])})."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for trellis.json and trellis.md")
    parser.add_argument("--runs", type=int, default=5, help="runs of each setting")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "runs": arguments.runs,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
        "call": measure_call(arguments.runs),
        "settings": [measure(*setting, arguments.runs) for setting in SETTINGS],
    }
    write_atomically(arguments.out / "trellis.json", (json.dumps(result, indent=1) + "\n").encode())
    text = render(result)
    write_atomically(arguments.out / "trellis.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
