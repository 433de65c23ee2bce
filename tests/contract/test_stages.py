"""Every installed recovery stage, evaluator and profiler keeps the contract; and the contract catches those that do
not."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import nn

from evenbits.compressor import ModelShapes, Options, Recovery, Role
from evenbits.measure import Evaluator, Measurement, Profiler, Remark, Sample
from evenbits.plugins import load_plugins
from evenbits.testing import Check, NotApplicable, checks
from evenbits.testing.evaluators import EvaluatorContract
from evenbits.testing.profilers import ProfilerContract
from evenbits.testing.recoveries import RecoveryContract
from evenbits.testing.subjects import Stand

REGISTRY = load_plugins()
# what has no default that a tiny model could be tried with, and shorter training
SETTINGS: dict[str, dict[str, Any]] = {
    "lm-eval": {"tasks": ["reference_piqa"], "folder": "package:evenbits_reference/tasks", "limit": 4},
    "samples": {"prompts": ["the red dog", "a small bird"], "new_tokens": 8},
    "perplexity": {"context": 32},
    "lora": {"r": 4, "epochs": 1},
    "distill": {"epochs": 1},
    "hardware": {"repeats": 2, "warmup": 1, "prompt_tokens": 16, "decode_tokens": 4},
    "energy": {"meter": "auto", "seconds": 0.05, "updates": 2, "warmup": 1, "prompt_tokens": 16, "decode_tokens": 4},
}
NAMES = [name for kind in (REGISTRY.recoveries, REGISTRY.evaluators, REGISTRY.profilers) for name in kind]


def _named() -> Iterator[Any]:
    for name in NAMES:
        model = Path(REGISTRY.models["gaussian"].value) if name == "distortion" else None  # it measures no other
        for check in checks(name, SETTINGS.get(name), model=model):
            yield pytest.param(check, id=f"{name}-{check.name}")


@pytest.mark.parametrize("check", list(_named()))
def test_installed_stages_keep_the_contract(check: Check) -> None:
    try:
        check.run()
    except NotApplicable as reason:
        pytest.skip(str(reason))


def numbered(broken: Sequence[tuple[Any, str, str]]) -> list[str]:
    return [f"{check}-{number}" for number, (_, check, _) in enumerate(broken)]


class Nothing(Options):
    pass


class LossOptions(Options):
    windows: int = Field(default=3, ge=1, description="of the text")


class Loss:
    """The mean next-token loss over windows: the smallest evaluator that keeps the contract."""

    def __init__(self, options: LossOptions) -> None:
        self.options = options

    def windows(self, subject: Any) -> int:
        return self.options.windows

    def fingerprint(self, subject: Any) -> Mapping[str, Any]:
        return {**subject.facts, "windows": self.options.windows}

    @torch.no_grad()
    def losses(self, subject: Any) -> list[float]:
        text = subject.corpus({"name": "evenbits-testing-text"})
        ids = torch.tensor(subject.tokenizer(text.joined())["input_ids"], device=subject.device)
        rows = ids[: self.windows(subject) * 16].view(-1, 16)
        logits = subject.model(input_ids=rows).logits[:, :-1]
        return [float(nn.functional.cross_entropy(one, row[1:])) for one, row in zip(logits, rows, strict=True)]

    def measured(self, subject: Any) -> Measurement:
        import numpy as np

        items = np.array(self.losses(subject))
        value = float(items.mean())
        return Measurement("loss", value, "nats", "lower", fingerprint=self.fingerprint(subject), items=items)

    def evaluate(self, subject: Any) -> Sequence[Any]:
        return [self.measured(subject)]


class Writes(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        found = super().evaluate(subject)
        subject.model.lm_head.weight.data.mul_(1.01)
        return found


class Trains(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        subject.model.train()
        return super().evaluate(subject)


class Files(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        (subject.folder / "cache.txt").write_text(str(subject.artifact))
        return super().evaluate(subject)


class Doubles(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        found = super().evaluate(subject)
        torch.set_default_dtype(torch.float64)
        return found


class Elsewhere(Loss):
    def losses(self, subject: Any) -> list[float]:
        return [loss + int.from_bytes(os.urandom(4)) * 1e-12 for loss in super().losses(subject)]


class Shuffled(Loss):
    def losses(self, subject: Any) -> list[float]:
        found = super().losses(subject)
        random.Random(int.from_bytes(os.urandom(8))).shuffle(found)
        return [*found, *found[:0]]


class Fewer(Loss):
    def windows(self, subject: Any) -> int:
        return 2 if subject.artifact else 3


class Bare(Loss):
    def fingerprint(self, subject: Any) -> Mapping[str, Any]:
        return {"windows": self.options.windows}


class Apart(Loss):
    def fingerprint(self, subject: Any) -> Mapping[str, Any]:
        return {**super().fingerprint(subject), "artifact": subject.artifact}


class Untold(Loss):
    def fingerprint(self, subject: Any) -> Mapping[str, Any]:
        return dict(subject.facts)


class Asks(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        try:
            socket.create_connection(("example.invalid", 80))
        except OSError:
            return super().evaluate(subject)
        raise AssertionError


@dataclass
class Changed(Loss):
    """Its measurement with something else in it."""

    changes: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__init__(LossOptions())

    def evaluate(self, subject: Any) -> Sequence[Any]:
        return [replace(self.measured(subject), **self.changes)]


class Gives(Loss):
    found: Sequence[Any] = ()

    def evaluate(self, subject: Any) -> Sequence[Any]:
        return self.found


class Number(Gives):
    found = (1.0,)


class Quits(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        raise SystemExit(1)


class Crashes(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        raise KeyError("loss")


class DenseOnly(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        return [Remark("only of the dense model")] if subject.artifact else super().evaluate(subject)


class Improvises(Loss):
    def evaluate(self, subject: Any) -> Sequence[Any]:
        return [*super().evaluate(subject), Sample("the", os.urandom(4).hex())]


def changed(**changes: Any) -> Callable[[Any], Any]:
    return lambda options: Changed(changes)


# an evaluator that is broken, the check that catches it, and what that one says to do
EVALUATORS: list[tuple[Callable[[Any], Any], str, str]] = [
    (Writes, "model", "wrote into the model's weights: work on a copy"),
    (Trains, "model", "left the model in training mode"),
    (Files, "model", "changed files of the stored model"),
    (Doubles, "global-state", "torch's default dtype .* put back"),
    (Elsewhere, "determinism", "seeded with `subject.seed`"),
    (Shuffled, "determinism", "differ from run to run, or in their order|is .*, then"),
    (Improvises, "determinism", "decode greedily"),
    (Fewer, "items", "one for every window or question"),
    (Bare, "fingerprint", r"begin it with \*\*subject.facts"),
    (Apart, "fingerprint", "put what depends on the method into details"),
    (Untold, "options-told", "put 'windows' into the fingerprint"),
    (Asks, "offline", "asked example.invalid over the network: read local files"),
    (changed(unit=""), "units", "has no unit: give one"),
    (changed(better="up"), "units", 'better must be "lower" or "higher"'),
    (changed(low=100.0, high=101.0), "units", "outside its own interval"),
    (changed(value=float("nan")), "findings", "a record cannot hold"),
    (Gives, "dense", "finds nothing: give a Measurement"),
    (Number, "dense", "gives a float: return Measurement"),
    (Quits, "dense", "ended the interpreter .*raise evenbits.errors.TrialFailed"),
    (Crashes, "dense", "fails on a tiny dense model .KeyError"),
    (DenseOnly, "compressed", "a table compares the same metrics"),
]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("stand"))


def evaluator(make: Callable[[Any], Any]) -> Evaluator:
    return Evaluator("loss", "mean loss of some windows", LossOptions, make)


def caught(contract: Any, check: str, message: str) -> None:
    (one,) = [each for each in contract.checks() if each.name == check]
    with pytest.raises(AssertionError, match=message):
        one.run()


def passes(contract: Any) -> set[str]:
    """The checks that do not apply; raises for one that fails."""
    skipped = set()
    for check in contract.checks():
        try:
            check.run()
        except NotApplicable:
            skipped.add(check.name)
    return skipped - {"cuda"}


def test_a_small_evaluator_passes(stand: Stand) -> None:
    contract = EvaluatorContract(evaluator(Loss))
    contract.stand = stand
    assert passes(contract) == set()


@pytest.mark.parametrize(
    ("make", "check", "message"), EVALUATORS, ids=[f"{e[1]}-{i}" for i, e in enumerate(EVALUATORS)]
)
def test_a_broken_evaluator_is_caught(make: Callable[[Any], Any], check: str, message: str, stand: Stand) -> None:
    contract = EvaluatorContract(evaluator(make))
    contract.stand = stand
    try:
        caught(contract, check, message)
    finally:
        for folder in (stand.base, stand.compressed):
            (folder / "cache.txt").unlink(missing_ok=True)


class Speed:
    """The smallest profiler: the time of one forward pass, and bytes."""

    volatile = True

    def profile(self, subject: Any) -> Sequence[Any]:
        import time

        model, _ = subject.load()
        begun = time.perf_counter()
        self.use(model, subject)
        seconds = time.perf_counter() - begun
        fingerprint = dict(subject.facts)
        found = [Measurement("seconds", seconds, "s", "lower", fingerprint=fingerprint, volatile=self.volatile)]
        return [*found, Measurement("bytes", subject.sizes["model"], "bytes", "lower", fingerprint=fingerprint)]

    @torch.no_grad()
    def use(self, model: Any, subject: Any) -> None:
        model(input_ids=torch.arange(3, 19, device=subject.device)[None, :])


class Steady(Speed):
    volatile = False


class Tunes(Speed):
    def use(self, model: Any, subject: Any) -> None:
        model.half()


class Sometimes(Speed):
    count = 0

    def profile(self, subject: Any) -> Sequence[Any]:
        type(self).count += 1
        return super().profile(subject)[: 1 + type(self).count % 2]


PROFILERS: list[tuple[type[Speed], str, str]] = [
    (Steady, "repeats", "declare it volatile=True"),
    (Tunes, "model", "wrote into the model's weights"),
    (Sometimes, "repeats", "in one of two runs only"),
]


def test_a_small_profiler_passes(stand: Stand) -> None:
    contract = ProfilerContract(Profiler("speed", "seconds and bytes", Nothing, lambda options: Speed()))
    contract.stand = stand
    assert passes(contract) == set()


@pytest.mark.parametrize(("kind", "check", "message"), PROFILERS)
def test_a_broken_profiler_is_caught(kind: type[Speed], check: str, message: str, stand: Stand) -> None:
    contract = ProfilerContract(Profiler("speed", "seconds and bytes", Nothing, lambda options: kind()))
    contract.stand = stand
    caught(contract, check, message)


class Nudge:
    """The smallest recovery stage: every trainable tensor by a draw of its generator, and an adapter of zeros."""

    def recover(self, work: Any, generator: torch.Generator) -> None:
        with torch.no_grad():
            for parameter in work.parameters.values():
                parameter.mul_(1 + 0.01 * torch.rand((), generator=generator))
            for parameter in work.rest().values():
                parameter.mul_(1 + 1e-3 * torch.rand((), generator=generator))
        shape = work.shapes[0]
        work.add_adapter(shape.name, {"A": torch.zeros(1, shape.in_features), "B": torch.zeros(shape.out_features, 1)})


class DrawsGlobally(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        torch.rand(3)
        super().recover(work, generator)


class DrawsElsewhere(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        super().recover(work, torch.Generator().manual_seed(int.from_bytes(os.urandom(4))))


class TrainsCodes(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        super().recover(work, generator)
        for name, (_, packed) in work.layers.items():
            if "codes" in packed.tensors:
                work.parameters[f"{name}/codes"] = nn.Parameter((packed.tensors["codes"] // 2).float())


class AnotherShape(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        super().recover(work, generator)
        for name, (_, packed) in work.layers.items():
            if "step" in packed.tensors:
                packed.tensors["step"] = packed.tensors["step"].float()
                del work.parameters[f"{name}/step"]


class WritesFiles(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        super().recover(work, generator)
        with (work._base / "config.json").open("a") as file:
            file.write(" ")


class Explodes(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        super().recover(work, generator)
        with torch.no_grad():
            for parameter in work.rest().values():
                parameter.fill_(torch.inf)


class Fails(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        raise IndexError("no layer")


class Merges(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        super().recover(work, generator)
        work.merge_adapters([work.shapes[0].name])


class NotDense(Nudge):
    def recover(self, work: Any, generator: torch.Generator) -> None:
        next(iter(work.parameters.values()))
        super().recover(work, generator)


def _one_adapter(options: Options, shapes: ModelShapes) -> dict[Role, int]:
    first = shapes.layers[0]
    return {Role.ADAPTER: 4 * (first.in_features + first.out_features)}


def recovery(kind: type[Nudge], **changes: Any) -> Recovery:
    return replace(Recovery("nudge", "a small change", "", Nothing, lambda options: kind(), _one_adapter), **changes)


RECOVERIES: list[tuple[Recovery, str, str]] = [
    (recovery(DrawsGlobally), "global-state", "draw from the `generator`"),
    (recovery(DrawsElsewhere), "determinism", "draw from the `generator` argument only"),
    (recovery(Nudge, predict=lambda options, shapes: {}), "predict", "must name all bytes that are added"),
    (recovery(Merges), "predict", "return the layers whose adapters are merged"),
    (recovery(TrainsCodes), "untouched", "codes .* which is not tunable"),
    (recovery(AnotherShape), "untouched", "which is not tunable: train what is in `work.parameters`"),
    (recovery(WritesFiles), "files", "changed dense/config.json: a stage writes through its `work` alone"),
    (recovery(Explodes), "round-trip", "raise TrialFailed when the loss is not finite"),
    (recovery(Fails), "recover", "fails on a tiny compressed model .IndexError: no layer"),
    (recovery(NotDense), "dense", "refuse it by TrialFailed"),
]


def test_a_small_recovery_passes() -> None:
    assert passes(RecoveryContract(recovery(Nudge))) == set()


@pytest.mark.parametrize(
    ("broken", "check", "message"), RECOVERIES, ids=[f"{e[1]}-{i}" for i, e in enumerate(RECOVERIES)]
)
def test_a_broken_recovery_is_caught(broken: Recovery, check: str, message: str) -> None:
    caught(RecoveryContract(broken), check, message)
