"""What one training step of PocketLLM's autoencoder costs: ours against the way of the released code, in one run.

    python tests/benchmarks/pocketllm.py --out results/bench

The step is of 16,384 sub-vectors and 32,768 codewords, as in the released scripts. Their way, written here from its
description, holds the difference of every latent and every codeword, looks codewords up twice, and goes backward
through a one-hot matrix; it is measured on a small batch and scaled linearly, and the time of half that batch shows how
linear it is. Every measurement is of a fresh process with one thread, in CPU seconds. Writes pocketllm.json (all raw
figures, the environment) and pocketllm.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CODEWORDS, BATCH, COLUMNS = 1 << 15, 1 << 14, 4096
LENGTHS = (4, 8)
STEPS = 10
GOAL_RATIO, GOAL_BYTES = 50, 10**9


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_seconds(act: Callable[[], object]) -> float:
    begun = time.process_time()
    act()
    return time.process_time() - begun


def options_and_vectors(d: int, batch: int) -> tuple[Any, Tensor]:
    """The paper's settings, and whole rows of 4096 weights of deviation 0.02, (rows, chunks, d)."""
    import torch

    from evenbits_pocketllm.options import PocketOptions

    options = PocketOptions(recipe="paper", axis="in", d=d, codebook_size=CODEWORDS, schedule="constant")
    draw = torch.Generator().manual_seed(0)
    rows = batch * d // COLUMNS
    return options, 0.02 * torch.randn(rows, COLUMNS // d, d, generator=draw)


def measure_ours(d: int) -> dict[str, Any]:
    """CPU seconds a step, over ten; a training of one step is taken off, for what comes before and after."""
    import torch

    from evenbits_pocketllm.autoencoder import train

    options, vectors = options_and_vectors(d, BATCH)
    before = peak_bytes()

    def training(steps: int) -> None:
        train(vectors, options.model_copy(update={"epochs": steps}), torch.Generator().manual_seed(1))

    training(1)
    short = cpu_seconds(lambda: training(1))
    return {
        "batch": BATCH,
        "seconds": (cpu_seconds(lambda: training(1 + STEPS)) - short) / STEPS,
        "peak_before": before,
        "peak": peak_bytes(),
    }


def measure_released(d: int, batch: int) -> dict[str, Any]:
    """CPU seconds of one step, and how its indices and its codebook's gradient compare with ours."""
    import torch

    from evenbits.maths.nearest import nearest
    from evenbits_pocketllm.codewords import codebook_gradient
    from evenbits_pocketllm.decoding import decoder_network
    from evenbits_pocketllm.network import decode, encode, initial

    class LookUp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
            distances = (latents[:, :, None] - codebook).norm(dim=1)  # (n, d, K) -> (n, K)
            codes = distances.argmin(1)
            ctx.save_for_backward(codes, codebook)
            ctx.mark_non_differentiable(codes)
            return codebook.t()[codes], codes

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None]:
            codes, codebook = ctx.saved_tensors
            if not ctx.needs_input_grad[1]:
                return gradients[0], None
            one_hot = (codes[:, None] == torch.arange(codebook.shape[1])).float()  # (n, K)
            counts = one_hot.sum(0)
            return gradients[0], gradients[0].t() @ (one_hot / counts.clamp_min(1))

    options, vectors = options_and_vectors(d, batch)
    network = decoder_network(options, COLUMNS)
    generator = torch.Generator().manual_seed(1)
    encoder = initial(network, generator, "encoder").requires_grad_()
    decoder = initial(network, generator).requires_grad_()
    codebook = (torch.randn(d, CODEWORDS, generator=generator) * 2 / d**0.5).requires_grad_()
    optimizer = torch.optim.Adam([encoder, decoder, codebook], lr=options.learning_rate)
    start = codebook.detach().t().contiguous()
    latents = encode(vectors, encoder, network).detach().flatten(0, 1)
    before = peak_bytes()
    found: list[Tensor] = []

    def step() -> None:
        encoded = encode(vectors, encoder, network)
        codewords, codes = LookUp.apply(encoded.flatten(0, 1), codebook.detach())  # type: ignore[no-untyped-call]
        held, _ = LookUp.apply(encoded.detach().flatten(0, 1), codebook)  # type: ignore[no-untyped-call]
        error = (decode(codewords.view_as(encoded), decoder, network) - vectors).square().mean()
        pull = (held - encoded.detach().flatten(0, 1)).square().mean()
        (error.sqrt() + options.vq_weight * pull).backward()
        found.append(codes)
        optimizer.step()

    seconds = cpu_seconds(step)
    peak = peak_bytes()
    codes = nearest(latents, start)
    gradient, _ = codebook_gradient(latents, start, codes, options.vq_weight)
    assert codebook.grad is not None
    return {
        "batch": batch,
        "seconds": seconds,
        "peak_before": before,
        "peak": peak,
        "same_codes": int((codes == found[0]).sum()),
        "gradient_difference": float((gradient - codebook.grad.t()).abs().max() / gradient.abs().max()),
    }


def in_fresh_process(what: str, d: int, batch: int) -> dict[str, Any]:
    """One measurement by this file, with one thread."""
    command = [sys.executable, __file__, "--measure", what, str(d), str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(d: int, batch: int, runs: int) -> dict[str, Any]:
    """Ours and theirs by turns, `runs` times; theirs scaled from `batch` to 16,384."""
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(in_fresh_process("ours", d, BATCH))
        theirs.append(in_fresh_process("released", d, batch))
    half = in_fresh_process("released", d, batch // 2)
    scale = BATCH / batch
    seconds = statistics.median(run["seconds"] for run in ours)
    released = statistics.median(run["seconds"] for run in theirs)
    return {
        "d": d,
        "seconds": seconds,
        "released_seconds": released,
        "released_scaled": released * scale,
        "ratio": released * scale / seconds,
        "doubling": released / half["seconds"],
        "peak": max(run["peak"] for run in ours),
        "peak_over_start": max(run["peak"] - run["peak_before"] for run in ours),
        "released_peak": max(run["peak"] for run in theirs),
        "released_peak_scaled": max(run["peak_before"] + scale * (run["peak"] - run["peak_before"]) for run in theirs),
        "same_codes": [run["same_codes"] for run in theirs],
        "gradient_difference": max(run["gradient_difference"] for run in theirs),
        "runs": {"ours": ours, "released": theirs, "released_half": half},
    }


def render(result: dict[str, Any]) -> str:
    facts, batch = result["environment"], result["released_batch"]
    commit = (facts["git"] or {}).get("commit", "no git")[:12]
    lines = [
        "# One training step of PocketLLM's autoencoder",
        "",
        f"{result['date']}, commit {commit}{' (modified)' if (facts['git'] or {}).get('dirty') else ''}, "
        f"{facts['processor']}, one thread, Python {facts['python']}.",
        "Written by `python tests/benchmarks/pocketllm.py --out results/bench`.",
        "",
        f"{BATCH:,} sub-vectors, {CODEWORDS:,} codewords, 3 units of 16, rows of {COLUMNS:,} normalised; forward, "
        "backward and Adam. "
        f"The released way is measured on {batch:,} sub-vectors and scaled by {BATCH // batch}.",
        "",
        f"| d | ours CPU s | released CPU s, {batch:,} | scaled | ratio | ours peak MB (over the start) | "
        f"released peak GB, {batch:,} | scaled | same indices |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["comparisons"]:
        lines.append(
            f"| {row['d']} | {row['seconds']:.3f} | {row['released_seconds']:.1f} | {row['released_scaled']:.0f} | "
            f"{row['ratio']:.0f} | {row['peak'] / 1e6:.0f} ({row['peak_over_start'] / 1e6:.0f}) | "
            f"{row['released_peak'] / 1e9:.2f} | {row['released_peak_scaled'] / 1e9:.1f} | "
            f"{min(row['same_codes']):,} of {batch:,} |"
        )
    lines += [
        "",
        "Twice the batch takes the released way "
        + " and ".join(f"{row['doubling']:.2f} times as long (d = {row['d']})" for row in result["comparisons"])
        + "; the codebook's gradients differ by at most "
        + " and ".join(f"{row['gradient_difference']:.1e}" for row in result["comparisons"])
        + " of the largest number in them.",
        f"Goals: {GOAL_RATIO} times faster, and less than 1 GB: "
        + ("met." if all(meets(row) for row in result["comparisons"]) else "not met."),
    ]
    return "\n".join(lines) + "\n"


def meets(row: dict[str, Any]) -> bool:
    return bool(row["ratio"] >= GOAL_RATIO and row["peak"] < GOAL_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for pocketllm.json and pocketllm.md")
    parser.add_argument("--runs", type=int, default=3, help="fresh processes a figure")
    parser.add_argument("--batch", type=int, default=2048, help="sub-vectors on which the released way is measured")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "D", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, d, batch = arguments.measure
        print(json.dumps(measure_ours(int(d)) if what == "ours" else measure_released(int(d), int(batch))))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    if arguments.batch < 2 * COLUMNS // min(LENGTHS) or arguments.batch & (arguments.batch - 1):
        parser.error(f"--batch: a power of two from {2 * COLUMNS // min(LENGTHS)} on, so that half of it is whole rows")
    from evenbits.environment import describe_environment
    from evenbits.files import write_atomically

    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "released_batch": arguments.batch,
        "environment": describe_environment(),
        "comparisons": [compare(d, arguments.batch, arguments.runs) for d in LENGTHS],
    }
    write_atomically(arguments.out / "pocketllm.json", (json.dumps(result, indent=1) + "\n").encode())
    text = render(result)
    write_atomically(arguments.out / "pocketllm.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
