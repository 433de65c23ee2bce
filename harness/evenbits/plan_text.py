"""What `evenbits plan` prints: what the run will take, the trials, and what each number rests on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from evenbits.devices import CudaDevice, cuda_devices
from evenbits.effort import Cost, Effort, Estimator
from evenbits.environments import find
from evenbits.footprint import Amount, compress_memory, disk, downloads, known_bytes, needs_of
from evenbits.footprint import shown_bytes as shown
from evenbits.plan import Plan, Skip, Trial
from evenbits.plugins import Registry
from evenbits.store import Results

HEADINGS = ("model", "method", "budget", "seed", "linear bits", "model bits", "bytes", "settings")
INDENT = 10
IMPORTS = 500_000_000  # torch and transformers, once for all workers


@dataclass(frozen=True)
class Takings:
    """What a plan takes: answers by heading, and below each what it rests on."""

    answers: dict[str, str]
    reasons: dict[str, list[str]]


def print_plan(plan: Plan, done: int, registry: Registry, store: Results, out: Console) -> None:
    """Download, disk, memory, device and hours first; then the trials; then what the numbers rest on."""
    takings = take(plan, registry, store, cuda_devices())
    for heading, answer in takings.answers.items():
        out.print(heading.ljust(INDENT) + answer, soft_wrap=True, markup=False)
    out.print()
    print_trials(plan, done, out)
    if reasons := {heading: lines for heading, lines in takings.reasons.items() if lines}:
        out.print("\nWhat these numbers rest on:")
        for heading, lines in reasons.items():
            for index, line in enumerate(lines):
                out.print(("" if index else heading).ljust(INDENT) + line, soft_wrap=True, markup=False)


def print_trials(plan: Plan, done: int, out: Console) -> None:
    rows = [HEADINGS, *(_cells(trial) for trial in plan.trials)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(HEADINGS) - 1)]
    for row in rows:
        cells = [c.rjust(w) if i > 3 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        # the settings give way where the terminal is narrow; no other cell does
        out.print("  ".join([*cells, row[-1]]).rstrip(), no_wrap=True, overflow="ellipsis", markup=False)
    for skip in plan.skips:
        budget = f" @ {skip.budget.centre:g}" if skip.budget else ""
        out.print(f"skip {skip.model.facts.name} {_name(skip)}{budget}: {escape(skip.reason)}", soft_wrap=True)
    out.print(f"{len(plan.trials)} trials ({done} already recorded), {len(plan.skips)} skipped")


def _cells(trial: Trial) -> tuple[str, ...]:
    facts, bits = trial.model.facts, trial.predicted
    return (
        facts.name,
        _name(trial),
        f"{trial.budget.centre:g}" if trial.budget else "",
        str(trial.seed),
        f"{bits.linear if bits else 8 * facts.linear_bytes / facts.linear_weights:.4f}",
        f"{bits.model if bits else 8 * facts.model_bytes / facts.parameters:.4f}",
        f"{trial.predicted_bytes or facts.model_bytes:,}",
        " ".join(f"{key}={value}" for key in trial.shown if (value := trial.options[key]) is not None),
    )


def _name(trial: Trial | Skip) -> str:
    return "+".join([trial.label, *(stage.name for stage in trial.recovery)])


def take(plan: Plan, registry: Registry, store: Results, devices: Sequence[CudaDevice]) -> Takings:
    wanted = plan.suite.device
    cuda = wanted.startswith("cuda") or (wanted == "auto" and bool(devices))
    effort = Estimator(plan, registry, store, "cuda" if cuda else "cpu").effort()
    fetched, written = downloads(plan, registry), disk(plan, registry, store)
    memory, held = _memory(plan, effort, registry, devices if cuda else None)
    made = _environments(effort)
    return Takings(
        {
            "download": _fetching(fetched),
            "disk": _writing(written, store.root),
            "memory": memory,
            "device": _device(wanted, devices),
            "hours": _hours(effort),
            **({"making": made} if made else {}),
        },
        {"download": _amounts(fetched), "disk": _amounts(written), "memory": held, "hours": list(_parts(effort))},
    )


def shown_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    hours = seconds / 3600
    if hours < 1.5:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < 9.95 else f"{float(f'{hours:.3g}'):,.0f} h"


# -- bytes ---------------------------------------------------------------------------------------------------


def _amounts(amounts: Sequence[Amount]) -> list[str]:
    """Those that are something, the unknown ones of one reason together."""
    unknown = [amount for amount in amounts if amount.bytes is None]
    lines = [f"{amount.what}: {shown(amount.bytes)} ({amount.why})" for amount in amounts if amount.bytes]
    for why in dict.fromkeys(amount.why for amount in unknown):
        names = ", ".join(amount.what for amount in unknown if amount.why == why)
        lines.append(f"{names}: size not known ({why})")
    return lines


def _fetching(amounts: Sequence[Amount]) -> str:
    known, unknown = known_bytes(amounts), sum(amount.bytes is None for amount in amounts)
    sets = f"{unknown} data set{'s' if unknown > 1 else ''} of unknown size" if unknown else ""
    return " and ".join(filter(None, (shown(known) if known else "", sets))) or "nothing"


def _writing(amounts: Sequence[Amount], root: Path) -> str:
    folder = root.resolve()
    while not folder.exists():
        folder = folder.parent
    needed, free = known_bytes(amounts), shutil.disk_usage(folder).free
    return f"{shown(needed)}; {shown(free)} free" + (": NOT ENOUGH" if needed > free else "")


def _memory(
    plan: Plan, effort: Effort, registry: Registry, devices: Sequence[CudaDevice] | None
) -> tuple[str, list[str]]:
    """The answer, and what it rests on. devices: those of CUDA, where model and hidden states lie; None: in RAM."""
    needed, answers, lines = 0, [], []
    if effort.compress:
        most = max((compress_memory(trial, needs_of(trial, registry)) for trial, _ in effort.compress), key=_size)
        needed = _size(most)
        answers.append(f"about {shown(needed)} to compress ({most.what})")
        lines.append(f"{most.what}: {most.why}")
        if stages := sorted({stage.name for trial, _ in effort.compress for stage in trial.recovery}):
            lines.append(f"{', '.join(stages)}: not known; comes on top of the model")
    if effort.evaluate or effort.profile:
        largest = max((trial.model.facts.model_bytes for trial in plan.trials), default=0)
        needed = max(needed, largest)
        answers.append(f"{shown(largest)} and more to measure")
    if not answers:
        return "nothing", []
    workers = plan.suite.limits.workers
    if workers > 1:
        answers[-1] += f", for each of {workers} workers"
    if devices is None:
        lines.append(f"torch and transformers, once: about {shown(IMPORTS)}")
        needed, here, where = needed * workers + IMPORTS, _ram(), "in this machine"
    else:
        needed, here, where = needed * workers, max((d.memory_bytes for d in devices), default=0), "on the GPU"
    held = f"{shown(here)} {where}" if here else f"no GPU here ({shown(_ram())} of RAM)"
    return f"{', '.join(answers)}; {held}" + (": NOT ENOUGH" if here and needed > here else ""), lines


def _size(amount: Amount) -> int:
    return amount.bytes or 0


def _ram() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _environments(effort: Effort) -> str:
    """Those of other libraries that the run will make first; "" where none is left to make."""
    needed = {one.title: one for trial, _ in effort.compress if (one := trial.environment) is not None}
    missing = [one.name for one in needed.values() if find(one) is None]
    if not missing:
        return ""
    several = len(missing) > 1
    what = f"environment{'s' if several else ''} {', '.join(missing)}"
    fetched = "which download what they pin" if several else "which downloads what it pins"
    return f"{what}, {fetched}; `evenbits env create {' '.join(missing)}` does it beforehand"


def _device(wanted: str, devices: Sequence[CudaDevice]) -> str:
    here = ", ".join(f"{device.name} with {shown(device.memory_bytes)}" for device in devices)
    if wanted == "cpu":
        return "cpu, as the suite asks"
    if wanted == "auto":
        return f"auto: {here or 'the CPU, as no CUDA device is here'}"
    return f"{wanted}: {here}" if here else f"{wanted}: NONE HERE; `evenbits run` ends each trial with an error"


# -- hours ---------------------------------------------------------------------------------------------------


def _hours(effort: Effort) -> str:
    costs = [cost for stage in effort.stages.values() for _, cost in stage]
    if not costs:
        return "nothing is left to do"
    missing = sum(cost.missing for cost in costs)
    unknown = f"; {missing} of {len(costs)} parts were never measured" if missing else ""
    if not effort.wall_seconds:
        return "not known: nothing like it was measured"
    least, rough = missing or any(cost.least for cost in costs), any(cost.rough for cost in costs)
    bound = "at least" if least else "roughly" if rough else "about"
    workers = f" with {effort.workers} workers" if effort.workers > 1 else ""
    total = f"{bound} {shown_time(effort.wall_seconds)}{workers}"
    if effort.foreign:
        return f"not known: nothing was measured on a GPU; on a CPU like the benchmarks' {total}{unknown}"
    return total + unknown


def _parts(effort: Effort) -> Iterator[str]:
    """A line for each stage, method and kind of evidence: how often, how long each, what that rests on."""
    groups: dict[tuple[str, str, str], list[Cost]] = {}
    for stage, costs in effort.stages.items():
        for trial, cost in costs:
            groups.setdefault((stage, _name(trial) if stage == "compress" else "", cost.basis), []).append(cost)
    rows = [
        (f"{stage} {name}".rstrip(), f"{len(costs)} x {_each(costs)}", basis)
        for (stage, name, basis), costs in groups.items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for what, time, basis in rows:
        yield f"{what.ljust(widths[0])}  {time.ljust(widths[1])}  {basis}"


def _each(costs: Sequence[Cost]) -> str:
    """ "3 min", "9 s to 3 min"; "?" of what nobody measured."""
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    if not seconds:
        return "?"
    low, high = shown_time(min(seconds)), shown_time(max(seconds))
    return low if low == high else f"{low} to {high}"
