"""How long a plan will take, from what was measured: records of a results folder first, then one machine's benchmarks.

No number is made up: what nobody measured is None. Every number says what it rests on. Benchmarks of one layer leave
out the road around it (of the quickstart's trials they give 0.08 to 0.9 of the recorded time, 0.19 of their sum): what
rests on one is the least that it takes. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from evenbits.compressor import ModelShapes, Needs
from evenbits.footprint import blocks, calibration_tokens, input_widths, measured_costs, needs_of
from evenbits.plan import DENSE, Plan, Trial
from evenbits.plugins import Registry
from evenbits.scored_tokens import tokens_of
from evenbits.shapes import read_config
from evenbits.store import Results

Device = Literal["cpu", "cuda"]
FAR = 16.0  # times larger or smaller, a layer's or model's costs no longer follow from its size
NEEDED = {"trial", "suite", "method", "options", "model", "seconds", "metrics"}  # of a record, whatever its age
PASSES = 2  # of a block over the calibration tokens: for the statistics of its layers, and for what it puts out


@dataclass(frozen=True)
class Cost:
    """Seconds of one stage of one trial, None where nobody measured; basis: what they rest on, in few words.

    missing: whether some or all of it has no measurement. least: it takes no less, and may take several times as much.
    rough: what was measured had other settings.
    """

    seconds: float | None
    basis: str
    missing: bool = False
    least: bool = False
    rough: bool = False


@dataclass(frozen=True)
class Effort:
    """Costs of what is still to be done, by stage, in the plan's order; foreign: of a CPU, as no GPU was measured."""

    compress: tuple[tuple[Trial, Cost], ...]
    evaluate: tuple[tuple[Trial, Cost], ...]
    profile: tuple[tuple[Trial, Cost], ...]
    workers: int
    foreign: bool = False

    @property
    def stages(self) -> dict[str, tuple[tuple[Trial, Cost], ...]]:
        return {"compress": self.compress, "evaluate": self.evaluate, "profile": self.profile}

    @property
    def wall_seconds(self) -> float:
        """Of all that is known: workers share compressing and evaluating, profilers run alone."""
        return (sum_seconds(self.compress) + sum_seconds(self.evaluate)) / self.workers + sum_seconds(self.profile)


def sum_seconds(costs: Iterable[tuple[Trial, Cost]]) -> float:
    return sum(cost.seconds or 0.0 for _, cost in costs)


@dataclass(frozen=True)
class Evidence:
    """What something took once. weights: linear ones, of `layers` layers; tokens: of calibration."""

    method: str
    options: Mapping[str, Any]
    recovery: tuple[Any, ...]
    weights: int
    layers: int
    tokens: int
    seconds: float
    where: str
    recorded: bool
    driven: bool = True  # whether the passes over the calibration tokens are in the seconds

    def distance(self, trial: Trial) -> tuple[Any, ...]:
        """Less is nearer: layers of a like size before others, then records, the same recipe, size, and settings."""
        mine = trial.model.shapes.weights / len(trial.model.shapes.layers)
        apart = abs(math.log(mine / (self.weights / self.layers)))
        unlike = self.unlike(trial)
        # another recipe or rule is another method, where another number is another size
        ways = sum(isinstance(self.options[name], str) for name in unlike)
        # layers of another size take other overheads, which no setting of bits or groups makes up for
        size = round(apart / math.log(4))
        return (apart > math.log(FAR), not self.recorded, ways, size, len(unlike), round(apart, 3))

    def unlike(self, trial: Trial) -> list[str]:
        """Names of settings that differ."""
        return [name for name, value in self.options.items() if trial.options.get(name) != value]


class Estimator:
    """Reads the evidence once and asks it for every trial."""

    def __init__(self, plan: Plan, registry: Registry, store: Results, device: Device) -> None:
        self.plan, self.registry, self.store, self.device = plan, registry, store, device
        limits = plan.suite.limits
        self.cores = limits.threads or max(1, (os.cpu_count() or 1) // limits.workers)

    def effort(self) -> Effort:
        todo = [trial for trial in self.plan.trials if not self._recorded(trial)]
        made: set[str] = set()
        compress = []
        for trial in todo:
            there = [key in made or self.store.has_artifact(key) for key in trial.chain]
            if not all(there):
                made.update(trial.chain)
                compress.append((trial, self.compress(trial, base=not there[0])))
        return Effort(
            tuple(compress),
            tuple((trial, self.evaluate(trial)) for trial in todo if trial.evaluators),
            tuple((trial, self.profile(trial)) for trial in todo if trial.profilers),
            self.plan.suite.limits.workers,
            self.foreign,
        )

    @cached_property
    def foreign(self) -> bool:
        """Whether a GPU's costs are asked for and only those of a CPU are known: the two are never mixed."""
        return self.device == "cuda" and all(found["device"] != "cuda" for found in self._records)

    def _recorded(self, trial: Trial) -> bool:
        path = self.store.trial_folder(trial.suite, trial.id) / "record.json"
        found = _read(path) if path.is_file() else None
        return found is not None and found.get("status") == "done"

    # -- evidence ---------------------------------------------------------------------------------------------

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        """Done records of the folder with the device each ran on: this one's, or a CPU's where no GPU has any."""
        found = []
        for path in sorted(self.store.root.glob("runs/*/*/record.json")):
            record = _read(path)
            if record is None or record.get("status") != "done" or not record.keys() >= NEEDED:
                continue
            devices = {str(fields.get("device", "")) for fields in record.get("fingerprints", {}).values()} - {""}
            record["device"] = min(devices, default="cpu")
            found.append(record)
        return [record for record in found if record["device"] == self.device] or [
            record for record in found if record["device"] == "cpu"
        ]

    @property
    def _by_benchmarks(self) -> bool:
        """Whether the benchmarks' CPU stands for the device."""
        return self.device == "cpu" or self.foreign

    @cached_property
    def _layers(self) -> Mapping[str, int]:
        """Number of linear layers by a model's revision: records of methods that store a model whole have none."""
        found: dict[str, int] = {}
        for record in self._records:
            found[record["model"]["revision"]] = max(
                len(record.get("layers", ())), found.get(record["model"]["revision"], 0)
            )
        return found

    @cached_property
    def _compressed(self) -> Mapping[str, list[Evidence]]:
        found: dict[str, list[Evidence]] = defaultdict(list)
        for record in self._records:
            layers = self._layers[record["model"]["revision"]]
            if record.get("seconds", {}).get("compress") and layers:
                evidence = _of_record(record, layers)
                found[evidence.method].append(evidence)
        for row in measured_costs()["methods"] if self._by_benchmarks else ():
            where = f"benchmark ({row['remark']})" if row["remark"] else "benchmark"
            found[row["method"]].append(
                Evidence(
                    row["method"], row["options"], (), row["weights"], row["layers"], 0, row["seconds"], where,
                    recorded=False, driven=False,
                )
            )  # fmt: skip
        return found

    # -- one trial --------------------------------------------------------------------------------------------

    def compress(self, trial: Trial, *, base: bool = True) -> Cost:
        """Of the whole chain of artifacts; without `base`, of the recovery stages alone."""
        if not trial.recovery:
            return self._of_chain(trial, ())
        stages = tuple((stage.name, dict(stage.options)) for stage in trial.recovery)
        names = "+".join(stage.name for stage in trial.recovery)
        whole, first = self._of_chain(trial, stages), self._of_chain(trial, ())
        if trial.method == DENSE:
            first = Cost(0.0, "the dense model as it is")
        if whole.seconds is None:
            if not base or first.seconds is None or trial.method == DENSE:
                return Cost(None, f"no measurement of {names}", missing=True)
            return replace(first, basis=f"{first.basis}; without {names}", missing=True)
        if base:
            return whole
        if first.seconds is None:
            return Cost(None, f"no measurement of {trial.method} without {names}", missing=True)
        return replace(
            whole, seconds=max(0.0, whole.seconds - first.seconds), basis=f"{whole.basis}, less {trial.method}'s own"
        )

    def _of_chain(self, trial: Trial, stages: tuple[Any, ...]) -> Cost:
        """The nearest evidence of this method followed by these stages, scaled to the trial."""
        candidates = [found for found in self._compressed.get(trial.method, []) if found.recovery == stages]
        if not candidates:
            return Cost(None, f"no measurement of {trial.method}", missing=True)
        nearest = min(found.distance(trial) for found in candidates)
        alike = [found for found in candidates if found.distance(trial) == nearest]
        needs = needs_of(trial, self.registry)
        seconds = [self._scaled(found, trial, needs) for found in alike]
        unlike = bool(alike[0].unlike(trial))
        words = alike[0].where + (", other settings" if unlike else "")
        mine = trial.model.shapes.weights / len(trial.model.shapes.layers)
        theirs = alike[0].weights / alike[0].layers
        if nearest[0]:
            times = f"{max(mine / theirs, theirs / mine):,.0f} times"
            words += f", layers {times} {'smaller' if mine > theirs else 'larger'}"
        return Cost(sum(seconds) / len(seconds), words, False, not alike[0].recorded or nearest[0], unlike)

    def _scaled(self, found: Evidence, trial: Trial, needs: Needs) -> float:
        """The method's own work grows with the weights (with the tokens too where it takes gradients), the driver's
        passes with both."""
        shapes, tokens = trial.model.shapes, calibration_tokens(trial)
        statistics = needs.statistics != "none" or needs.sequential
        passes = pass_seconds(shapes, tokens, trial.model.dtype, self.cores) if statistics else 0.0
        theirs = passes * found.weights * found.tokens / (shapes.weights * tokens) if tokens and statistics else 0.0
        theirs = min(theirs, found.seconds) if found.driven else 0.0
        own = (found.seconds - theirs) * shapes.weights / found.weights
        if needs.gradients and found.tokens:
            own *= tokens / found.tokens
        if found.driven and theirs:
            passes = theirs * (shapes.weights * tokens) / (found.weights * found.tokens)
        return own + passes

    def evaluate(self, trial: Trial) -> Cost:
        """Records of the same evaluators, scaled by the parameters; else tokens, at two operations a parameter."""
        names = sorted({stage.name for stage in trial.evaluators})
        near = self._measured("evaluate", trial, names)
        if near is not None:
            return near
        spec = next((spec for spec in self.plan.suite.model if spec.shown == trial.model.facts.name), None)
        vocabulary, positions = self._sizes(trial, None if spec is None else spec.outline)
        counts = {s.label or s.name: tokens_of(s, vocabulary, positions) for s in trial.evaluators}
        unknown = [name for name, count in counts.items() if count is None]
        read = sum(count or 0 for count in counts.values())
        if not read or not self._by_benchmarks:
            return Cost(None, f"no measurement of {', '.join(names)}", missing=True)
        flops = 2.0 * trial.model.facts.parameters * read
        rate = flops_per_second(trial.model.dtype, self.cores)
        millions = f"{read / 1e6:.2g}" if read < 1e7 else f"{read / 1e6:,.0f}"
        words = f"{millions}M tokens at {rate / 1e9:,.0f} GFLOP/s of the benchmarks' machine"
        if unknown:
            words += f"; without {', '.join(unknown)}"
        return Cost(flops / rate, words, bool(unknown), least=True)

    def profile(self, trial: Trial) -> Cost:
        names = sorted({stage.name for stage in trial.profilers})
        return self._measured("profile", trial, names) or Cost(
            None, f"no measurement of {', '.join(names)}", missing=True
        )

    def _measured(self, stage: str, trial: Trial, names: Sequence[str]) -> Cost | None:
        """Records of this suite whose models are not far from this trial's in size; those of this very plan first.

        Options of evaluators are not in records: of another plan's it is said that they may be others.
        """
        found: dict[tuple[bool, str, int], list[float]] = defaultdict(list)
        mine, planned = trial.model.facts.parameters, {one.id for one in self.plan.trials}
        for record in self._records:
            theirs = int(record["model"]["parameters"])
            if record["suite"] != trial.suite or max(mine / theirs, theirs / mine) > FAR:
                continue
            sources = {metric["source"] for metric in record["metrics"]} | (
                {"samples"} if record.get("samples") else set()
            )
            if record["seconds"].get(stage) and sources >= set(names):
                other = record["trial"] not in planned
                found[other, record["model"]["name"], theirs].append(record["seconds"][stage])
        if not found:
            return None
        key = min(found, key=lambda key: (key[0], abs(math.log(mine / key[2]))))
        (other, name, theirs), seconds = key, found[key]
        mean = sum(seconds) / len(seconds) * mine / theirs
        scaled = "" if mine == theirs else f", {mine / theirs:.2g} times its parameters"
        words = f"recorded in {trial.suite} on {name}{scaled}{', perhaps with other settings' if other else ''}"
        return Cost(mean, words, rough=other or mine != theirs)

    def _sizes(self, trial: Trial, outline: Any) -> tuple[int | None, int | None]:
        """Vocabulary and context, as far as they are known."""
        if outline is not None:
            return outline.vocab_size, None
        if not trial.model.source.present:
            return None, None
        config = read_config(trial.model.source.folder)
        return config.get("vocab_size"), config.get("max_position_embeddings")


def flops_per_second(dtype: str, cores: int) -> float:
    """Of long matrix products, on so many cores of the benchmarks' machine."""
    rates = measured_costs()["flops_per_core_second"]
    return float(rates.get(dtype, rates["float32"])) * cores


def pass_seconds(shapes: ModelShapes, tokens: int, dtype: str, cores: int) -> float:
    """Of running every block over the calibration tokens, twice, and of the second moments of its inputs in float32,
    of which one half is computed."""
    forward = 2.0 * shapes.weights * tokens * PASSES
    moments = sum(float(width) ** 2 * tokens for block in blocks(shapes) for width in input_widths(block))
    return forward / flops_per_second(dtype, cores) + moments / flops_per_second("float32", cores)


def _of_record(record: Mapping[str, Any], layers: int) -> Evidence:
    model, calibration = record["model"], record.get("calibration")
    names = record.get("recovery", ())
    options = record.get("recovery_options") or [{}] * len(names)
    return Evidence(
        method=record["method"],
        options=record["options"],
        recovery=tuple(zip(names, options, strict=True)),
        weights=int(model["linear_weights"]),
        layers=layers,
        tokens=int(calibration["samples"]) * int(calibration["length"]) if calibration else 0,
        seconds=float(record["seconds"]["compress"]),
        where=f"recorded in {record['suite']} on {model['name']}",
        recorded=True,
    )


def _read(path: Any) -> dict[str, Any] | None:
    """A record as it stands in its file: a plan needs a few of its fields, and validating hundreds takes seconds."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # a damaged one is no evidence; `run` says so
    return found if isinstance(found, dict) else None
