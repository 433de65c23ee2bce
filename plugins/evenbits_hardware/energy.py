"""Joules per token of prefill and of decode, by a meter whose kind is part of the fingerprint.

Three stretches: at rest with the model loaded, prefills alone, and prefills with the decoding that follows. What
decoding took is the third less the second at the same number of prefills: a decoding step is far shorter than any
meter's update, and needs the cache that a prefill leaves. The value is all that the meter counted; the share above
rest stands in the details.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evenbits.errors import TrialFailed
from evenbits.measure import Finding, Measurement, ProfileSubject, Remark
from evenbits_hardware.absent import NoMeter
from evenbits_hardware.meters import Meter, open_meter
from evenbits_hardware.options import AUTO, EnergyOptions
from evenbits_hardware.workload import (
    check_device,
    left_dense,
    open_subject,
    prepare,
    was_cut,
    what_ran,
    which_kernels,
)

REST_SECONDS = 0.01  # between two looks at rest
STALL_SECONDS = 30.0
BLIND = 1.02  # work that raises an estimate by less has not been seen by it


@dataclass(frozen=True)
class Stretch:
    """What a meter counted over whole repeats."""

    joules: float
    seconds: float
    repeats: int
    updates: int
    parts: Mapping[str, float]

    @property
    def watts(self) -> float:
        return self.joules / self.seconds

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "joules": self.joules,
            "seconds": self.seconds,
            "watts": self.watts,
            "repeats": self.repeats,
            "updates": self.updates,
            **self.parts,
        }


def meter_stretch(meter: Meter, work: Callable[[], object], seconds: float, updates: int) -> Stretch:
    """Repeat `work` for at least `seconds` in which the meter was renewed at least `updates` times.

    Where the reading itself shows its updates, only what lies between the first and the last one seen counts, so that
    nothing is lost at the ends. Raises NoMeter for a meter that does not move.
    """
    meter.begin()
    start = changed = time.perf_counter()
    marks: list[tuple[int, float, float]] = []  # repeats, seconds and joules when the reading had changed
    before: float | None = 0.0
    repeats = 0
    try:
        while True:
            work()
            repeats += 1
            joules, now = meter.look(), time.perf_counter()
            if meter.period is not None:
                if now - start >= seconds and int((now - start) / meter.period) >= updates:
                    break
            elif joules != before:
                marks.append((repeats, now - start, joules or 0.0))
                before, changed = joules, now
                if marks[-1][1] - marks[0][1] >= seconds and len(marks) > updates:
                    break
            elif now - changed > STALL_SECONDS:
                raise NoMeter(f"the reading of {meter.name} did not change in {STALL_SECONDS:g} s of work")
    except BaseException:
        with contextlib.suppress(NoMeter):  # what went wrong first is what is told
            meter.end()
        raise
    length, total = time.perf_counter() - start, meter.end()
    if meter.period is not None:
        return Stretch(total, length, repeats, int(length / meter.period), dict(meter.parts))
    first, last = marks[0], marks[-1]
    return Stretch(last[2] - first[2], last[1] - first[1], last[0] - first[0], len(marks) - 1, dict(meter.parts))


def meter_rest(meter: Meter, seconds: float) -> Stretch | None:
    """What the meter counts while nothing runs; None where it does not move in that time."""
    if meter.period is not None:
        return meter_stretch(meter, lambda: time.sleep(REST_SECONDS), seconds, 2)
    meter.begin()
    start = time.perf_counter()
    looks, before, updates = 0, 0.0, 0
    while time.perf_counter() - start < seconds:
        time.sleep(REST_SECONDS)
        joules = meter.look() or 0.0
        looks, updates, before = looks + 1, updates + (joules != before), joules
    total, length = meter.end(), time.perf_counter() - start
    return Stretch(total, length, looks, updates, {}) if updates else None


class EnergyProfiler:
    """Meters rest, prefill, and prefill with decoding, in this order."""

    def __init__(self, options: EnergyOptions) -> None:
        self.options = options

    def profile(self, subject: ProfileSubject) -> Sequence[Finding]:
        """A remark in place of figures where "auto" finds no meter, or the batch does not fit the GPU's memory.

        Raises TrialFailed for a meter asked for by name that is not there, on a device other than CPU and CUDA, and
        for a model without KV cache.
        """
        options = self.options
        check_device(subject, "energy")
        try:
            meter = open_meter(options.meter, subject.device)
            return self._metered(meter, subject)
        except NoMeter as error:
            if options.meter != AUTO:
                raise TrialFailed(f"energy: meter {options.meter!r} cannot be used here: {error}") from None
            return [Remark(f"no energy was measured: {error}")]
        except torch.cuda.OutOfMemoryError:
            return [Remark(f"no energy was measured: too little GPU memory for batch size {options.batch_size}")]

    def _metered(self, meter: Meter, subject: ProfileSubject) -> Sequence[Finding]:
        options = self.options
        model = open_subject(subject, options.weights)
        work = prepare(model, options, options.batch_size, subject)
        tick = subject.progress(4, "energy")
        work.wait()
        rest = meter_rest(meter, options.seconds)
        tick(1)
        for _ in range(options.warmup):
            work.repeat()
        tick(1)
        prefill = meter_stretch(meter, work.prefill, options.seconds, options.updates)
        tick(1)
        both = meter_stretch(meter, work.repeat, options.seconds, options.updates)
        tick(1)
        fingerprint = {
            **what_ran("energy", subject, options.weights),
            **work.facts,
            "cut_to_context": was_cut(work, options),
            "meter": {"name": meter.name, "kind": meter.kind, "scope": meter.scope, **meter.facts},
            "seconds": options.seconds,
            "updates": options.updates,
        }
        kernels = which_kernels(model, work)
        found = per_token(work.prompt.shape, work.decode_tokens, rest, prefill, both, fingerprint, kernels)
        remark = blind(meter, rest, both)
        return [*found, *([] if remark is None else [remark]), *left_dense(model)]


def blind(meter: Meter, rest: Stretch | None, work: Stretch) -> Remark | None:
    """A remark where an estimate is the same at rest and at work: it then says no more than the latency does."""
    if meter.kind != "estimate" or rest is None or work.watts > BLIND * rest.watts:
        return None
    return Remark(
        f"{meter.name} does not see the work here ({work.watts:.1f} W at work, {rest.watts:.1f} W at rest): "
        "its joules are no more than seconds at a constant power"
    )


def per_token(
    prompt: tuple[int, ...],
    decode_tokens: int,
    rest: Stretch | None,
    prefill: Stretch,
    both: Stretch,
    fingerprint: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Sequence[Finding]:
    """From what three stretches took to joules per token. prompt: (batch, tokens); decode_tokens: of one sequence;
    more: further details."""
    batch, prompt_tokens = prompt
    resting = 0.0 if rest is None else rest.watts
    once = prefill.joules / prefill.repeats
    once_above = (prefill.joules - resting * prefill.seconds) / prefill.repeats
    decode = both.joules / both.repeats - once
    decode_above = (both.joules - resting * both.seconds) / both.repeats - once_above
    stretches = {
        "rest": None if rest is None else rest.facts,
        "prefill": prefill.facts,
        "prefill_and_decode": both.facts,
    }

    def measured(phase: str, joules: float, above: float, tokens: int, updates: int) -> Measurement:
        return Measurement(
            name=f"energy_{phase}_J_per_token",
            value=joules / tokens,
            unit="J/token",
            better="lower",
            fingerprint=fingerprint,
            details={
                "gross_J_per_token": joules / tokens,
                "above_rest_J_per_token": None if rest is None else above / tokens,
                "rest_watts": None if rest is None else rest.watts,
                "tokens_per_repeat": tokens,
                "resolution": 1 / updates,  # of a stretch: one update of the meter
                "stretches": stretches,
                **(more or {}),
            },
            volatile=True,
        )

    found: list[Finding] = [measured("prefill", once, once_above, batch * prompt_tokens, prefill.updates)]
    if decode > 0:
        updates = min(prefill.updates, both.updates)
        found.append(measured("decode", decode, decode_above, batch * decode_tokens, updates))
    else:
        found.append(Remark("decoding took less energy than the meter can tell from none; raise seconds and updates"))
    return found
