"""Suite -> trials. Each is known by a hash of all that determines its result; what cannot run is a skip with
its reason. Reads file headers only: no weights, no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evenbits.budget import BitBudget
from evenbits.compressor import Compressor, Estimate, ModelShapes, Needs, Options, Recovery, Refusal
from evenbits.devices import cuda_devices
from evenbits.environment import package_version
from evenbits.environment_files import Environment, find_environment
from evenbits.errors import SuiteError
from evenbits.matching import Stages, call_plugin, choose_settings, recovery_bytes
from evenbits.planned_model import PlannedModel, plan_model
from evenbits.plugins import Provided, Registry
from evenbits.provenance import module_digest, source_digest
from evenbits.record import Bits, BudgetFacts
from evenbits.sources import DigestCache, find_model
from evenbits.suite_errors import check_options
from evenbits.suite_spec import Limits, MethodSpec, StageSpec, Suite

DENSE = "dense"
# what decides how a method is driven and stored, whatever the method
COMPRESS_MODULES = ("evenbits.driver", "evenbits.artifact")
MEASURE_MODULES = ("evenbits.artifact", "evenbits.driver")
# glue that decides what is drawn, billed and measured: its own files count, not all that they import
DRAW_GLUE = ("evenbits.sampling", "evenbits.tokens")
MEASURE_GLUE = ("evenbits.ledger", "evenbits.packed", "evenbits.stages", "evenbits.subject", "evenbits.whole")
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "faiss-cpu")


def content_hash(facts: Mapping[str, Any]) -> str:
    """Sixteen hex digits of the canonical JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stage:
    """A recovery, evaluator or profiler with checked options and the digest of its code."""

    name: str
    options: Mapping[str, Any]
    digest: str
    label: str | None = None  # in front of its metrics' names


@dataclass(frozen=True)
class Trial:
    """One thing to compress (or not) and to measure.

    chain: keys of the artifacts that lead to the one that is measured: the method's own, then one after each
    recovery stage; empty for the dense model as it is.
    """

    id: str
    chain: tuple[str, ...]
    suite: str
    model: PlannedModel
    method: str
    label: str
    distribution: str
    options: Mapping[str, Any]
    shown: tuple[str, ...]  # the options that a table shows
    budget: BitBudget | None
    seed: int
    recovery: tuple[Stage, ...]
    calibration: Mapping[str, Any] | None
    predicted: Bits | None
    predicted_bytes: int | None
    evaluators: tuple[Stage, ...]
    profilers: tuple[Stage, ...]
    device: str
    limits: Limits = field(default_factory=Limits)
    allowed_overlap: float = 0.01
    environment: Environment | None = None  # that the method runs another library in

    @property
    def artifact(self) -> str | None:
        return self.chain[-1] if self.chain else None

    @property
    def title(self) -> str:
        stages = "".join(f"+{stage.name}" for stage in self.recovery)
        budget = f" @ {self.budget.centre:g}" if self.budget else ""
        return f"{self.model.facts.name} {self.label}{stages}{budget} seed {self.seed}"


@dataclass(frozen=True)
class Skip:
    """What the suite asks for and cannot be had, with the reason."""

    id: str
    model: PlannedModel
    method: str
    label: str
    options: Mapping[str, Any]
    budget: BitBudget | None
    recovery: tuple[Stage, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    suite: Suite
    trials: tuple[Trial, ...]
    skips: tuple[Skip, ...] = ()
    order: tuple[str, ...] = field(default=())  # ids of trials and skips as tables list them


def budget_facts(budget: BitBudget | None) -> BudgetFacts | None:
    return None if budget is None else BudgetFacts(centre=budget.centre, window=budget.window, on=budget.on)


def _stages(registry: Registry, kind: str, what: str, specs: Iterable[StageSpec]) -> tuple[Stage, ...]:
    stages = []
    for spec in specs:
        provided = registry.find(kind, spec.name, what)
        options = check_options(provided.value.options, spec.options, f"{what} {spec.name}: options")
        digest = source_digest(provided.package)
        if isinstance(provided.value, Recovery):
            digest = "+".join([digest, *(f"{name}={package_version(name)}" for name in provided.value.libraries)])
        stages.append(Stage(spec.name, options.model_dump(mode="json"), digest, spec.label))
    return tuple(stages)


def _described(registry: Registry, recovery: Sequence[Stage]) -> Stages:
    found = []
    for stage in recovery:
        descriptor: Recovery = registry.find("recoveries", stage.name, "recovery stage").value
        found.append((descriptor, descriptor.options.model_validate(dict(stage.options))))
    return found


class Planner:
    """Turns one suite into a plan; keeps what trials share."""

    def __init__(self, suite: Suite, registry: Registry, digests: DigestCache) -> None:
        self.suite = suite
        self.registry = registry
        self._digests = digests
        self.evaluators = _stages(registry, "evaluators", "evaluator", suite.evaluators)
        self.profilers = _stages(registry, "profilers", "profiler", suite.profilers)
        self.libraries = {name: package_version(name) for name in LIBRARIES}
        self.trials: list[Trial] = []
        self.skips: list[Skip] = []
        self.order: dict[str, None] = {}  # ids in the order of the tables
        self._calibration_text = None if suite.calibration is None else self._text(suite.calibration.corpus)
        self._dumped = {
            "evaluators": [self._evaluated(stage) for stage in self.evaluators],
            "profilers": [asdict(stage) for stage in self.profilers],
            "digest": [source_digest(*MEASURE_MODULES), module_digest(*MEASURE_GLUE)],
            "loaders": [source_digest(package) for package in registry.packages_of("load_model")],
            "libraries": self.libraries,
        }

    def _text(self, reference: Mapping[str, Any]) -> dict[str, Any]:
        """What a corpus says, for hashes: its options without where it lies, its files' digests, its code's digest.

        Raises SuiteError when a local file is missing: that is better known before a run than in it.
        """
        given = {key: value for key, value in reference.items() if key != "name"}
        provided = self.registry.find("corpora", str(reference.get("name")), "corpus")
        corpus = provided.value
        options = check_options(corpus.options, given, f"corpus {corpus.name}")
        files = [self._digests.file(Path(path)) for path in corpus.files(options)]
        facts = options.model_dump(mode="json", exclude=set(corpus.location) if files else None)
        return {"name": corpus.name, "options": facts, "files": files, "digest": source_digest(provided.package)}

    def _evaluated(self, stage: Stage) -> dict[str, Any]:
        """An evaluator for hashes: corpora in its options stand for what they say."""
        evaluator = self.registry.find("evaluators", stage.name, "evaluator").value
        checked = evaluator.options.model_validate(dict(stage.options))
        references = list(evaluator.corpora(checked))
        files = [self._digests.file(Path(path)) for path in evaluator.files(checked)]
        given = checked.model_dump(mode="json", exclude_unset=True, exclude=set(evaluator.location) if files else None)
        options = {key: value for key, value in given.items() if value not in references}
        texts = [self._text(reference) for reference in references]
        libraries = {name: package_version(name) for name in evaluator.libraries}
        return {**asdict(stage), "options": options, "texts": texts, "files": files, "libraries": libraries}

    def calibration(self, seed: int) -> dict[str, Any] | None:
        """The calibration table, and the seed that its samples are drawn with."""
        if self.suite.calibration is None:
            return None
        return {**self.suite.calibration.model_dump(mode="json", exclude={"allowed_overlap"}), "seed": seed}

    def _pinned(self, calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if calibration is None or self.suite.calibration is None:
            return None
        allowed = self.suite.calibration.allowed_overlap
        drawn = {"corpus": self._calibration_text, "allowed_overlap": allowed, "digest": module_digest(*DRAW_GLUE)}
        return {**calibration, **drawn}

    def plan(self, models: Sequence[PlannedModel]) -> Plan:
        for model in models:
            self._dense(model)
            for method in self.suite.methods:
                for budget in method.budgets(self.suite.budgets):
                    self._method(model, method, budget)
        return Plan(self.suite, tuple(self.trials), tuple(self.skips), tuple(self.order))

    def _dense(self, model: PlannedModel) -> None:
        for stages in ((), *self.suite.dense_recovery):
            recovery = _stages(self.registry, "recoveries", "recovery stage", stages)
            # a stage that cannot be on this model says so here
            recovery_bytes(_described(self.registry, recovery), model.shapes)
            for seed in self.suite.seeds if recovery else self.suite.seeds[:1]:
                self._add(model, DENSE, DENSE, None, None, None, seed, recovery, False, None)

    def _method(self, model: PlannedModel, method: MethodSpec, budget: BitBudget | None) -> None:
        provided: Provided[Compressor] = self.registry.find("compressors", method.name, "method")
        compressor = provided.value
        recovery = _stages(self.registry, "recoveries", "recovery stage", method.recovery)
        label = method.label or method.name

        def skip(reason: str, options: Mapping[str, Any]) -> None:
            facts = {
                "skip": reason,
                "model": [model.facts.name, model.facts.revision],
                "method": [label, method.name],
                "options": options,
                "budget": str(budget),
                "recovery": [asdict(stage) for stage in recovery],
            }
            entry = Skip(content_hash(facts), model, method.name, label, options, budget, recovery, reason)
            if entry.id in self.order:
                return
            self.skips.append(entry)
            self.order[entry.id] = None

        chosen = choose_settings(provided, method.given, budget, _described(self.registry, recovery), model.shapes)
        if isinstance(chosen, Refusal):
            return skip(chosen.reason, method.given)
        options = chosen.options
        needs = call_plugin(provided, "needs_of", (Needs,), options)
        calibrated = needs.statistics != "none" or bool(recovery)
        if calibrated and self.suite.calibration is None:
            return skip("needs calibration data; give the suite a [calibration] table", method.given)
        if needs.device == "cuda" and self.suite.device == "cpu":
            return skip(f'needs a CUDA device, and the suite asks for "{self.suite.device}"', method.given)
        environment: Environment | None = None
        if needs.environment is not None:
            try:
                environment = find_environment(provided.package, needs.environment)
            except SuiteError as error:
                return skip(str(error), method.given)
            # a suite that asks for "cuda" is planned for a machine that has it, as needs.device above
            if environment.device == "cuda" and (
                self.suite.device == "cpu" or (self.suite.device == "auto" and not cuda_devices())
            ):
                here = f'the suite asks for "{self.suite.device}"' + (
                    "" if self.suite.device == "cpu" else ", and there is none here"
                )
                return skip(f"environment {environment.name!r} needs a CUDA device: {here}", method.given)
        seeded = calibrated or compressor.stochastic
        for seed in self.suite.seeds if seeded else self.suite.seeds[:1]:
            self._add(
                model, method.name, label, provided, options, budget, seed, recovery,
                needs.statistics != "none", chosen.estimate, environment,
            )  # fmt: skip
        return None

    def _add(
        self,
        model: PlannedModel,
        method: str,
        label: str,
        provided: Provided[Compressor] | None,
        chosen: Options | None,
        budget: BitBudget | None,
        seed: int,
        recovery: tuple[Stage, ...],
        statistics: bool,
        estimate: Estimate | None,
        environment: Environment | None = None,
    ) -> None:
        """`statistics`: whether the method itself looks at calibration data; a recovery stage always does."""
        calibration = self.calibration(seed) if statistics or recovery else None
        options = {} if chosen is None else chosen.model_dump(mode="json")
        chain: list[str] = []
        if provided is not None or recovery:
            facts: dict[str, Any] = {
                "model": model.facts.revision,
                "dtype": model.dtype,
                "device": self.suite.device.split(":")[0],
                "method": method,
                "options": options,
                "budget": str(budget),
                "seed": seed,
                "calibration": self._pinned(calibration) if statistics else None,
                "digest": source_digest(*COMPRESS_MODULES, *([provided.package] if provided else [])),
                "libraries": self.libraries,
            }
            if environment is not None:  # what is asked for, not whether or where it is made
                facts["environment"] = environment.digest
            chain.append(content_hash(facts))
            for stage in recovery:
                digest = source_digest("evenbits.recovery")
                after = {"after": chain[-1], "calibration": self._pinned(calibration), "seed": seed}
                chain.append(content_hash({**after, "stage": asdict(stage), "digest": digest}))
        trial = Trial(
            id="",
            chain=tuple(chain),
            suite=self.suite.name,
            model=model,
            method=method,
            label=label,
            distribution=provided.distribution if provided else "",
            options=options,
            shown=() if chosen is None else chosen.shown(),
            budget=budget,
            seed=seed,
            recovery=recovery,
            calibration=calibration,
            predicted=None if estimate is None else _bits(estimate, model.shapes),
            predicted_bytes=None if estimate is None else estimate.linear_bytes + model.shapes.rest_bytes,
            evaluators=self.evaluators,
            profilers=self.profilers,
            device=self.suite.device,
            limits=self.suite.limits,
            allowed_overlap=self.suite.calibration.allowed_overlap if self.suite.calibration else 1.0,
            environment=environment,
        )
        identity: dict[str, Any] = {
            "artifact": trial.artifact,
            "model": [model.facts.name, model.facts.revision],
            "dtype": model.dtype,
            "label": label,
            "seed": seed,
            "device": self.suite.device.split(":")[0],
            **self._dumped,
        }
        trial = replace(trial, id=content_hash(identity))
        if trial.id in self.order:
            return  # the same entry twice in a suite is one trial
        self.trials.append(trial)
        self.order[trial.id] = None


def _bits(estimate: Estimate, shapes: ModelShapes) -> Bits:
    return Bits(
        index=estimate.index_bits,
        paper=estimate.paper_bits,
        linear=estimate.linear_bits(shapes),
        model=estimate.model_bits(shapes),
    )


def make_plan(suite: Suite, registry: Registry, *, cache: Path | None = None, download: bool = False) -> Plan:
    """Raises SuiteError for models that are missing, not understood, or without linear layers.

    download: fetch hub models; else one that is not there is planned from its outline.
    """
    digests = DigestCache(cache / "digests.json" if cache else None)
    models = [
        plan_model(find_model(spec, registry, digests, download=download), suite.dtype, spec.outline)
        for spec in suite.model
    ]
    names = [model.facts.name for model in models]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SuiteError(f"two models are called {min(twice)!r}: give each a name of its own")
    plan = Planner(suite, registry, digests).plan(models)
    if cache is not None:
        digests.save()
    return plan
