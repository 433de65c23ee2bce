"""From the seconds of repeats to latency and throughput, with what they say of the machine's steadiness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from evenbits.measure import Measurement

BOOTSTRAP_DRAWS = 2000


def bootstrap_median(timings: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    """95 % percentile interval of the median of `timings` (repeats, steps).

    Whole repeats are drawn: the steps of one repeat share what disturbed it, so they are not independent.
    """
    generator = np.random.default_rng(seed)
    repeats = timings.shape[0]
    drawn = generator.integers(repeats, size=(BOOTSTRAP_DRAWS, repeats))
    medians = [np.median(timings[rows]) for rows in drawn]  # one by one: all at once may be gigabytes
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def drift(timings: np.ndarray[Any, Any]) -> float:
    """Median of the later half of the repeats (repeats, steps) over that of the earlier half: 1 in a steady state."""
    half = timings.shape[0] // 2
    return float(np.median(timings[-half:]) / np.median(timings[:half]))


def time_and_rate(
    phase: str,
    unit: str,
    seconds: list[list[float]],
    tokens: int,
    fingerprint: Mapping[str, Any],
    seed: int,
    suffix: str = "",
    more: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Latency `latency_{phase}_{unit}` and rate `{phase}_tokens_per_second` of one batch size.

    seconds: (repeats, steps), at least two repeats. tokens: of one step, over all sequences of the batch. The latency
    is the median over all steps, in milliseconds; the rate is tokens over that latency, its interval likewise.
    more: further details of both.
    """
    timings = 1000 * np.asarray(seconds, dtype=np.float64)
    low, high = bootstrap_median(timings, seed)
    p50, p90, p99 = (float(value) for value in np.percentile(timings, [50, 90, 99]))
    details = {
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "p90_over_p50": p90 / p50,
        "drift": drift(timings),
        "tokens_per_step": tokens,
        "ms_per_token_over_batch": p50 / tokens,
        "interval": "95 % bootstrap of the median over repeats",
        **(more or {}),
    }
    latency = Measurement(
        name=f"latency_{phase}_{unit.replace('/', '_per_')}{suffix}",
        value=p50,
        unit=unit,
        better="lower",
        low=low,
        high=high,
        fingerprint=fingerprint,
        details=details,
        items=timings.reshape(-1),
        volatile=True,
    )
    rate = Measurement(
        name=f"{phase}_tokens_per_second{suffix}",
        value=1000 * tokens / p50,
        unit="tokens/s",
        better="higher",
        low=1000 * tokens / high,
        high=1000 * tokens / low,
        fingerprint=fingerprint,
        details={
            "tokens_per_step": tokens,
            "milliseconds_per_step": p50,
            "interval": "the latency's, inverted",
            **(more or {}),
        },
        volatile=True,
    )
    return [latency, rate]
