"""What a plan will download, write and hold in memory: bytes, each with the words that say where it comes from.

Arithmetic on shapes, after what driver and stages do; nothing is opened. What is not known is None, not a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from evenbits.compressor import Compressor, LayerShape, ModelShapes, Needs
from evenbits.plan import DENSE, Plan, Trial
from evenbits.planned_model import PlannedModel
from evenbits.plugins import Registry
from evenbits.shapes import WIDTHS
from evenbits.store import Results, size_of
from evenbits.suite_errors import check_options

FLOAT32 = 4
BATCH_TOKENS = 8192  # of hidden states at a time, as calibration.TOKENS_AT_A_TIME has it (which imports torch)
# float32 copies of a layer while its error is computed in float64: weight, restored, both and their difference; against
# the second moment two products more
DRIVER, CALIBRATED = 8, 12
LIBRARIES = 200_000_000  # what scipy, faiss and the like take that the fork server has not loaded; measured


@dataclass(frozen=True)
class Amount:
    """Bytes and what they are; None: not known."""

    what: str
    bytes: int | None
    why: str = ""


@cache
def measured_costs() -> Mapping[str, Any]:
    """What benchmarks measured on one machine; see tests/benchmarks/effort.py, which writes the file."""
    import json

    found: Mapping[str, Any] = json.loads((files("evenbits") / "measured_costs.json").read_text())
    return found


UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def shown_bytes(count: int) -> str:
    for size, unit in UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"


def known_bytes(amounts: Iterable[Amount]) -> int:
    return sum(amount.bytes or 0 for amount in amounts)


def needs_of(trial: Trial, registry: Registry) -> Needs:
    if trial.method == DENSE:
        return Needs()
    descriptor: Compressor = registry.find("compressors", trial.method, "method").value
    return descriptor.needs_of(descriptor.options.model_validate(dict(trial.options)))


def calibration_tokens(trial: Trial) -> int:
    return 0 if trial.calibration is None else int(trial.calibration["samples"]) * int(trial.calibration["length"])


# -- to fetch ------------------------------------------------------------------------------------------------


def downloads(plan: Plan, registry: Registry) -> list[Amount]:
    """Models first, then what methods fetch, then data sets by name: how large these are is known to the hub alone."""
    found = []
    for model in _models(plan):
        name = model.facts.name
        if model.source.present:
            found.append(Amount(f"model {name}", 0, "its files are here"))
        else:
            count = f"{model.shapes.parameters:,} parameters at {model.facts.stored_bits} bits"
            found.append(Amount(f"model {name}", model.shapes.stored_bytes, count))
    found += [Amount(what, count, "for its method") for what, count in _fetched_by_methods(plan, registry)]
    return found + [Amount(name, None, "from the hub where its cache lacks it") for name in _data_sets(plan, registry)]


def _fetched_by_methods(plan: Plan, registry: Registry) -> Iterable[tuple[str, int | None]]:
    """Each once, whatever the number of trials that need it."""
    found: dict[tuple[str, int | None], None] = {}
    for trial in plan.trials:
        if trial.method != DENSE:
            descriptor: Compressor = registry.find("compressors", trial.method, "method").value
            found |= dict.fromkeys(descriptor.fetches(descriptor.options.model_validate(dict(trial.options))))
    return found


def _data_sets(plan: Plan, registry: Registry) -> list[str]:
    found: dict[str, None] = {}

    def add(reference: Mapping[str, Any]) -> None:
        corpus = registry.find("corpora", str(reference.get("name")), "corpus").value
        given = {key: value for key, value in reference.items() if key != "name"}
        options = check_options(corpus.options, given, f"corpus {corpus.name}")
        # what could lie somewhere and does not is fetched; the rest is made, or comes with a plugin
        if not corpus.files(options) and set(corpus.location) & set(corpus.options.model_fields):
            split = getattr(options, "split", None)
            found[f"{corpus.name}{f' ({split})' if split else ''}"] = None

    suite = plan.suite
    if suite.calibration is not None and any(trial.calibration for trial in plan.trials):
        add(suite.calibration.corpus)
    for spec in suite.evaluators:
        evaluator = registry.find("evaluators", spec.name, "evaluator").value
        options = check_options(evaluator.options, spec.options, f"evaluator {spec.name}")
        for reference in evaluator.corpora(options):
            add(reference)
        if evaluator.location and not evaluator.files(options):
            names = getattr(options, "names", ())
            found |= dict.fromkeys(names)
    return list(found)


# -- on disk -------------------------------------------------------------------------------------------------


def disk(plan: Plan, registry: Registry, store: Results) -> list[Amount]:
    """What a run will write into its results folder, beside what is there."""
    new: dict[str, int] = {}
    for trial in plan.trials:
        for key in trial.chain:
            if not store.has_artifact(key):
                # shared with a trial without the later stages, it is as large as that one says
                new.setdefault(key, trial.predicted_bytes or trial.model.facts.model_bytes)
    found = [Amount(f"{len(new)} artifacts", sum(new.values()), "as predicted, without headers and tokenizers")]
    moments: dict[tuple[str, int], int] = {}
    fishers: dict[tuple[str, int], int] = {}
    for trial in plan.trials:
        if trial.chain and trial.chain[0] in new and trial.calibration is not None:
            drawn, needs = (trial.model.facts.revision, int(trial.calibration["seed"])), needs_of(trial, registry)
            if needs.statistics in ("second_moment", "fisher") and not needs.sequential:
                moments[drawn] = moment_bytes(trial.model.shapes)
            if needs.statistics == "fisher":
                fishers[drawn] = FLOAT32 * trial.model.shapes.weights
    cached = sum(moments.values()) + sum(fishers.values())
    if cached:
        found.append(Amount("cache of second moments", cached, "of the dense model, by seed"))
    folder = store.run_folder(plan.suite.name)
    records = [path.parent for path in folder.glob("*/record.json")]
    if records:
        each = sum(size_of(path) for path in records) // len(records)
        words = f"{shown_bytes(each)} a trial, like those here"
        found.append(Amount("records", each * sum(not (folder / t.id).is_dir() for t in plan.trials), words))
    else:
        found.append(Amount("records", None, "usually under a megabyte a trial"))
    return found


def moment_bytes(shapes: ModelShapes) -> int:
    """Second moments of every block: layers of one input share one."""
    return sum(FLOAT32 * width * width for block in blocks(shapes) for width in input_widths(block))


def blocks(shapes: ModelShapes) -> list[list[LayerShape]]:
    found: dict[int, list[LayerShape]] = {}
    for layer in shapes.layers:
        found.setdefault(layer.block, []).append(layer)
    return [found[index] for index in sorted(found)]


def input_widths(block: Iterable[LayerShape]) -> list[int]:
    """Widths of a block's distinct inputs: of q, k and v one, of the output projection one, of gate and up one."""
    found: dict[str, int] = {}
    for layer in block:
        part, _, name = layer.kind.rpartition(".")
        last = name in ("o_proj", "out_proj", "down_proj", "fc2") or name.endswith("c_proj")
        found[f"{part}.{name if last or name.startswith('fc') else 'in'}"] = layer.in_features
    return list(found.values())


# -- in memory -----------------------------------------------------------------------------------------------


def compress_memory(trial: Trial, needs: Needs) -> Amount:
    """About what the compressing process holds at one time, above what its imports take: where hidden states and layers
    are large, that is most of it; of tiny models the measured peak is 0.2 to 1.9 of it.

    Data-free methods hold a layer: the method's work on it, then the computing of its error, whichever is more. With
    statistics the whole model is open at its dtype; hidden states of all samples are held as the embeddings gave them,
    before the block at hand and after it; then the second moments of that block and the largest of them in float64.
    Fisher information adds a float32 copy of model and linear layers.
    """
    shapes, facts = trial.model.shapes, trial.model.facts
    largest = max(shapes.layers, key=lambda layer: layer.weights)
    calibrated = needs.statistics != "none" or needs.sequential
    copies, why = _copies(trial, calibrated)
    work = round(FLOAT32 * largest.weights * copies) + (2 * FLOAT32 * largest.in_features**2 if calibrated else 0)
    parts = {f"largest layer ({why})": work, "libraries": LIBRARIES}
    if calibrated or trial.recovery:
        tokens, width = calibration_tokens(trial), shapes.layers[0].in_features
        states = 3 * tokens * width * WIDTHS[facts.dtype]
        block = max(blocks(shapes), key=lambda block: sum(input_widths(block)))
        moments = sum(FLOAT32 * width * width for width in input_widths(block))
        # activations of one batch inside a block, widest in its MLP
        inside = min(tokens, BATCH_TOKENS) * 3 * max(layer.out_features for layer in block) * WIDTHS[facts.dtype]
        held = {"model": facts.model_bytes, "hidden states": states, "second moments": moments, "activations": inside}
        parts |= held
    if needs.statistics == "fisher":
        parts["float32 model and gradients"] = FLOAT32 * (shapes.parameters + shapes.weights)
    budget = f" @ {trial.budget.centre:g}" if trial.budget else ""
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    return Amount(
        trial.label + budget, sum(parts.values()), ", ".join(f"{what} {shown_bytes(count)}" for what, count in ranked)
    )


def _copies(trial: Trial, calibrated: bool) -> tuple[float, str]:
    """Float32 copies of the largest layer at one time, the weight itself included."""
    driver = CALIBRATED if calibrated else DRIVER
    rows = [row for row in measured_costs()["methods"] if row["method"] == trial.method]
    copies = 1 + max((row["memory"] for row in rows), default=0.0)
    if copies > driver:
        return copies, f"{copies:.0f} float32 copies"
    return driver, f"{driver} float32 copies" + ("" if rows else "; the method's own were not measured")


def _models(plan: Plan) -> list[PlannedModel]:
    return list({trial.model.facts.name: trial.model for trial in plan.trials}.values())
