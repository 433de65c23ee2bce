"""Every kernel in every configuration against float64, at round and awkward shapes, on poisoned memory, and twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.forced import Launches, all_kernels, forced, label, names, no_room, poisoned
from gpu_parts.part import Column, Item, Part, Row, Setting

Judge = Callable[[Tensor], float]

# Largest |out - ref| over s, the root of sum (x w)^2 of its sum, for all numbers of an output. With u half the type's
# spacing (2^-11, 2^-8): an output reaches six s among tens of millions and is rounded once, at most 6 u; roundings of
# weights are independent, s u / sqrt 3 together, of which six more are 3.5 u. Twelve u are allowed, float32 more for
# sums of 17,408 terms in any order; tf32 in its place comes to 2e-4, one wrong term of 17,408 to 1 / 132, which float16
# and float32 show
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4.8e-2}
_MOST_CONFIGURATIONS = 32


def items(setting: Setting) -> Iterable[Item]:
    from gpu_parts import check_cases

    yield Item("what there is", lambda: [{"exist": names(all_kernels())}])
    yield from check_cases.cases(setting)


def compare(
    setting: Setting, kernel: str, case: str, dtype: torch.dtype, run: Callable[[], Tensor], judge: Judge,
    tolerance: float, configurations: int = _MOST_CONFIGURATIONS,
) -> list[Row]:  # fmt: skip
    """A row for each configuration that the kernels of `run` may choose, or for so many of them.

    judge: the error of what run returns, NaN or inf where it is no answer at all. Each configuration runs twice, on
    memory poisoned before; results must agree to the bit.
    """
    rows: list[Row] = []
    place, most = 0, 1
    while place < min(most, configurations):
        launches, note, error = Launches(), "", math.inf
        try:
            with poisoned(), forced(place) as offered, launches.watched():
                found, again = run(), run()
            error = judge(found)
            if not _same(found, again):
                error, note = math.inf, "two runs differ"
            most = max(most, *offered) if offered else most
        except Exception as problem:
            if setting.cuda:
                _survived(f"{case}, choice {place} of {kernel}")
            if no_room(problem):
                place += 1
                continue
            note = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        rows.append(
            {
                "kernel": kernel, "case": case, "dtype": str(dtype).removeprefix("torch."),
                "configuration": label(launches, most > 1), "ran": list(launches.ran),
                "error": error if math.isfinite(error) else 1e30, "tolerance": tolerance,
                "ok": bool(error <= tolerance), "note": note,
            }
        )  # fmt: skip
        place += 1
    return rows


def _survived(what: str) -> None:
    """Raises RuntimeError where the CUDA context is lost: then this process is at its end."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise RuntimeError(f"{what}: {error}") from error


def _same(found: Tensor, again: Tensor) -> bool:
    return found.shape == again.shape and bool(((found == again) | (found.isnan() & again.isnan())).all())


def of_products(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Judge:
    """inputs (rows, in) as the kernel is given them, weight (out, in) float64 before it is rounded to their type."""
    wide = inputs.double()
    reference = wide @ weight.t()
    if bias is not None:
        reference = reference + bias.double()
    scale = (wide.square() @ weight.square().t()).sqrt().clamp_min(1e-30)

    def judge(found: Tensor) -> float:
        if found.shape != reference.shape or found.dtype != inputs.dtype:
            return math.inf
        return float(((found.double() - reference).abs() / scale).max())  # NaN where any is NaN: not <= anything

    return judge


def linear(
    setting: Setting, kernel: str, case: str, dtype: torch.dtype, module: Any, weight: Tensor, rows: Iterable[int],
    configurations: int = _MOST_CONFIGURATIONS,
) -> list[Row]:  # fmt: skip
    """A packed module against its weight in float64, at each of these numbers of rows."""
    found: list[Row] = []
    for count in rows:
        inputs = setting.normal(count, weight.shape[1], dtype=dtype, seed=count)
        found += compare(
            setting, kernel, f"{case}, {count} rows", dtype, partial(_call, module, inputs),
            of_products(inputs, weight), TOLERANCE[dtype], configurations,
        )  # fmt: skip
    return found


@torch.inference_mode()
def _call(module: Any, inputs: Tensor) -> Tensor:
    found: Tensor = module(inputs)
    return found


PART = Part(
    "check",
    "Checks",
    "Every kernel, in each of its configurations, against float64: round and awkward shapes, random data, "
    "uninitialised memory filled with NaN before each run, two runs that must agree to the bit. The error of a "
    "product is its largest distance from float64 over the root of the sum of its squared terms; of a search, "
    "how much farther the centre found is than the nearest, over (|v| + |c|)^2, or the share of indices that "
    "differ where all sums are exact. The table has the largest of each kernel and type; gpu.json has all.",
    120,
    (
        Column("kernel", "kernel"),
        Column("dtype", "type"),
        Column("comparisons", "comparisons", "d"),
        Column("failed", "failed", "d"),
        Column("error", "largest error", ".2e"),
        Column("tolerance", "allowed", ".2e"),
    ),
    items,
    shards=15,
    item_seconds=75,
)
