"""What else changed where a number did: commits, library versions, settings, keys of artifacts, machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evenbits.fingerprints import Difference, differing_fields, flatten
from evenbits.gate_snapshot import KeptRow, Snapshot

LIBRARIES = frozenset(
    {
        "accelerate", "datasets", "evenbits", "faiss-cpu", "lm_eval", "numba", "numpy", "peft", "safetensors", "scipy",
        "tokenizers", "torch", "transformers", "triton",
    }
)  # fmt: skip
"""Fields of a protocol that say which version of a library measured: numbers are compared across these, and the
versions named, for what a new version changes is what a nightly run is to find."""

MACHINE = frozenset({"device_name", "threads", "cores", "processor"})
"""Fields of a time's protocol that say on which machine: a ratio to the dense model of the same run is compared
across these."""

SHOWN = 6  # settings or versions in a line; the rest are counted


def protocol_change(
    before: Mapping[str, Any], now: Mapping[str, Any], *, volatile: bool
) -> tuple[list[Difference], list[Difference]]:
    """(fields that make two numbers incomparable, fields that are only named), each with both values."""
    passed = LIBRARIES | MACHINE if volatile else LIBRARIES
    found = differing_fields(before, now)
    named = [one for one in found if one[0].rsplit(".", 1)[-1] in passed]
    return [one for one in found if one not in named], named


def describe_changes(changes: Sequence[Difference]) -> str:
    texts = [f"{field} {_short(a)} -> {_short(b)}" for field, a, b in changes]
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def causes_of(before: KeptRow, now: KeptRow, baseline: Snapshot, night: Snapshot) -> list[str]:
    """What goes with a change of this row, most telling first."""
    found = list(_settings(before, now))
    made = [_made_with(before, baseline), _made_with(now, night)]
    versions = differing_fields(*(one.get("versions") or {} for one in made))
    versions += differing_fields(*({"python": one.get("python")} for one in made))
    code = _code(before, now, bool(found), bool(versions))
    found += [code] if code else []
    if versions:
        found.append(f"libraries: {describe_changes(versions)}")
    commits = [_commit(one) for one in made]
    if commits[0] != commits[1]:
        found.append(f"commit {commits[0]} -> {commits[1]}")
    machines = [str(one.get("processor")) for one in made]
    if machines[0] != machines[1]:
        found.append(f"processor {machines[0]} -> {machines[1]}")
    return found


def same_machine(before: KeptRow, now: KeptRow, trial: str, baseline: Snapshot, night: Snapshot) -> bool:
    """Whether both sides of a trial were computed on the same kind of machine: by processor and number of cores."""
    made = [
        side.environments.get(row.made_with[row.trials.index(trial)], {})
        for row, side in ((before, baseline), (now, night))
    ]
    return all(made[0].get(key) == made[1].get(key) for key in ("processor", "cores", "versions"))


def _settings(before: KeptRow, now: KeptRow) -> Iterator[str]:
    options = differing_fields(flatten(before.options), flatten(now.options))
    if options:
        yield f"settings: {describe_changes(options)}"
    pairs = zip(before.recovery, before.recovery_options, now.recovery_options, strict=False)
    for name, a, b in pairs:
        if stage := differing_fields(flatten(a), flatten(b)):
            yield f"settings of {name}: {describe_changes(stage)}"
    if before.budget != now.budget and before.budget is not None and now.budget is not None:
        yield f"budget window {before.budget.window:g} -> {now.budget.window:g}"


def _code(before: KeptRow, now: KeptRow, settings: bool, versions: bool) -> str:
    """What the content hashes of the seeds that both have say."""
    common = [seed for seed in now.seeds if seed in before.seeds]
    if not common:
        return (
            "" if settings or versions else "no seed in common with the baseline: keys do not tell whether code changed"
        )
    seed = common[0]
    a, b = (row.seeds.index(seed) for row in (before, now))
    if before.artifacts[a] != now.artifacts[b]:
        if settings:
            return ""
        keys = f"artifact of seed {seed} {before.artifacts[a]} -> {now.artifacts[b]} with equal settings"
        what = "its libraries changed, or its code" if versions else "the code of the method changed"
        return f"{keys}: {what}, or what it reads"
    if before.trials[a] != now.trials[b]:
        return f"the artifact of seed {seed} is the same: what measures it changed"
    return f"trial {now.trials[b]} of seed {seed} is the same in both: code, settings and libraries are equal"


def _made_with(row: KeptRow, side: Snapshot) -> Mapping[str, Any]:
    return side.environments.get(row.made_with[-1], {})


def _commit(made: Mapping[str, Any]) -> str:
    git = made.get("git")
    if not git:
        return "unknown"
    return str(git["commit"])[:9] + (" with changes" if git.get("dirty") else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
