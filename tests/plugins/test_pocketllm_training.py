"""A step of training as CUDA graphs need it: nothing read by the host, replayed from buffers of fixed address with the
numbers of the plain road; and the same road on a machine without anything but torch.

No GPU is needed: a traced graph of the step's operations stands for the captured one.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evenbits.kernels.nearest import Codebook
from evenbits_pocketllm.autoencoder import Trained, train
from evenbits_pocketllm.captured import WARM_STEPS, Runner, StaticStep, time_training
from evenbits_pocketllm.codewords import codebook_gradient, member_sums, whole_sums
from evenbits_pocketllm.decoding import decoder_network
from evenbits_pocketllm.layout import cut, order
from evenbits_pocketllm.network import initial
from evenbits_pocketllm.options import PocketOptions
from evenbits_pocketllm.settings import PlainSettings, recipe
from evenbits_pocketllm.step import Met, Step, adam_rates, learning_rate

SMALL: dict[str, Any] = {"axis": "in", "d": 2, "codebook_size": 16, "hidden": 8, "epochs": 6, "batch": 200}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "mean square, groups of the code, gains": {"loss": "mse", "rln": "code", "affine": True},
    "sub-vectors alone": {"rln": "layernorm"},
    "two units, wider latents": {"rln": "none", "units": 2, "latent": 3},
    "codewords alone": {"decoder": "none", "rln": "none"},
    "revival": {"revive": True, "init": "uniform", "codebook_size": 128},
    "shuffled, cosine": {"shuffle": True, "schedule": "cosine"},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes: Any) -> PlainSettings:
    return recipe("paper", **{**SMALL, **changes})


def new_step(settings: PlainSettings, per_group: int = 20) -> Step:
    generator = seeded(3)
    codebook = torch.randn(settings.codebook_size, settings.latent or settings.d, generator=generator)
    if settings.decoder == "none":
        return Step(torch.empty(0), torch.empty(0), codebook, None, settings)
    width = codebook.shape[1] * (1 if settings.rln == "layernorm" else per_group)
    network = decoder_network(settings, width)
    return Step(initial(network, generator, "encoder"), initial(network, generator), codebook, network, settings)


def matrices(settings: PlainSettings) -> list[Tensor]:
    """In batches of 10 or 11 groups; shuffled, there are shorter groups beside these, in batches of 28 or 29."""
    long = 0.3 * torch.randn(41, 20, 2, generator=seeded(1))
    return [long, torch.randn(57, 7, 2, generator=seeded(2))] if settings.shuffle else [long]


# one step


@variants
def test_a_step_reads_nothing_on_the_host_and_has_shapes_of_its_own(changes: dict[str, Any]) -> None:
    """Fake tensors have no values: a step that asked for one, or for a shape that depends on one, would raise."""
    plain = new_step(small(**changes))
    with FakeTensorMode() as mode:
        parts = [mode.from_tensor(part) for part in (plain.encoder, plain.decoder, plain.codebook)]
        step = Step(parts[0], parts[1], parts[2], plain.network, plain.settings)
        met = step(torch.empty(10, 20, 2), torch.empty(2))
        assert (met is None) == (not plain.settings.revive)
        whole_sums(torch.empty(200, 3), torch.empty(200, dtype=torch.int64), 16)


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda codes: float(codes.sum()), DataDependentOutputException),
        (lambda codes: torch.bincount(codes, minlength=16), DynamicOutputShapeException),
        (lambda codes: torch.nonzero(codes), DynamicOutputShapeException),
    ],
)
def test_fake_tensors_would_tell(read: Callable[[Tensor], object], error: type[Exception]) -> None:
    with FakeTensorMode(), pytest.raises(error):
        read(torch.zeros(5, dtype=torch.int64))


class NoneOnTheCPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for part in tree_leaves((args, kwargs, found)):
            assert not isinstance(part, Tensor) or part.device.type == "meta", function
        return found


@variants
def test_a_step_on_another_device_has_no_tensor_on_the_cpu(changes: dict[str, Any]) -> None:
    """A graph would hold what it read there while it was captured, if the copy were allowed at all."""
    plain = new_step(small(**changes))
    parts = [part.to("meta") for part in (plain.encoder, plain.decoder, plain.codebook)]
    step = Step(parts[0], parts[1], parts[2], plain.network, plain.settings)
    batch, rates = torch.empty(10, 20, 2, device="meta"), torch.empty(2, device="meta")
    with NoneOnTheCPU():  # type: ignore[no-untyped-call]
        step(batch, rates)
        step._table = Codebook(step.codebook)
        step(batch, rates)
        with pytest.raises(AssertionError):
            batch + torch.ones(())


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_adam_is_that_of_torch_to_the_bit(schedule: Any) -> None:
    settings = small(schedule=schedule, epochs=40)
    step = new_step(settings)
    learned = [part.clone().requires_grad_() for part in (step.encoder, step.decoder, step.codebook)]
    optimizer = torch.optim.Adam(learned, lr=settings.learning_rate, foreach=False)
    generator = seeded(7)
    for epoch in range(0, 40, 3):
        rates = adam_rates(settings, epoch, 3)
        for at in range(3):  # the epochs between are left out, of the numbers of steps too
            gradients = [torch.randn(part.shape, generator=generator) * 10.0 ** (at - 3) for part in learned]
            for part, gradient in zip(learned, gradients, strict=True):
                part.grad = gradient
            for state in optimizer.state.values():
                state["step"].fill_(epoch * 3 + at)
            optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch + at / 3)
            optimizer.step()
            step._adam(gradients, rates[at])
    for part, expected in zip((step.encoder, step.decoder, step.codebook), learned, strict=True):
        assert torch.equal(part, expected.detach())


def test_tensors_of_a_step_stay_where_they_are() -> None:
    step = new_step(small(revive=True))
    held = (step.encoder, step.decoder, step.codebook, step.squared_error, step.counts)
    places, before = [part.data_ptr() for part in held], [part.clone() for part in held]
    step(torch.randn(10, 20, 2, generator=seeded()), torch.tensor([-0.01, 1.0]))
    after = (step.encoder, step.decoder, step.codebook, step.squared_error, step.counts)
    assert [part.data_ptr() for part in after] == places
    assert not any(torch.equal(part, old) for part, old in zip(held, before, strict=True))
    assert int(step.counts.sum()) == 200
    step.start_epoch()
    assert float(step.squared_error) == int(step.counts.sum()) == 0


def test_a_table_made_once_finds_the_codewords_of_each_step() -> None:
    """As on CUDA: the codebook moves, and the table that is searched follows it."""
    plain, held = new_step(small()), new_step(small())
    assert plain._table is None
    held._table = Codebook(held.codebook)
    generator = seeded(5)
    for _ in range(4):
        batch, before = torch.randn(10, 20, 2, generator=generator), plain.codebook.clone()
        for step in (plain, held):
            step(batch, torch.tensor([-0.3, 0.1]))
        assert (plain.codebook - before).abs().max() > 0.05
        assert torch.equal(held.codebook, plain.codebook)
    assert torch.equal(held.decoder, plain.decoder)


# sums in whole numbers, as on a GPU


@pytest.mark.parametrize("size", [1.0, 64.0, 1e-36, 1e36])
def test_whole_sums_come_out_alike_in_any_order(size: float) -> None:
    latents = size * torch.randn(5000, 3, generator=seeded())
    latents[::7] *= 1e-3
    codes = torch.randint(17, (5000,), generator=seeded(1))
    exact = torch.zeros(20, 3, dtype=torch.float64).index_add_(0, codes, latents.double())
    found = whole_sums(latents, codes, 20)
    torch.testing.assert_close(found, exact, rtol=0, atol=2.0**-36 * size)  # 5000 times 2^-49 of 8
    assert found.dtype == torch.float64
    assert not found[17:].any()
    turned = torch.randperm(5000, generator=seeded(2))
    assert torch.equal(whole_sums(latents[turned], codes[turned], 20), found)
    assert not torch.equal(member_sums(latents[turned], codes[turned], 20), member_sums(latents, codes, 20))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_whole_sums_hide_no_latent_that_is_not_finite(bad: float) -> None:
    latents = torch.randn(50, 3, generator=seeded())
    latents[20, 1] = bad
    assert whole_sums(latents, torch.zeros(50, dtype=torch.int64), 4).isnan().all()


def test_whole_sums_of_zeros_and_of_the_same_sign_do_not_overflow() -> None:
    codes = torch.zeros(1 << 15, dtype=torch.int64)
    assert not whole_sums(torch.zeros(1 << 15, 2), codes, 3).any()
    assert whole_sums(torch.full((1 << 15, 1), 1.75), codes, 2)[0].item() == 1.75 * (1 << 15)


def test_a_codebook_gradient_by_whole_sums_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, codebook = torch.randn(900, 4, generator=seeded()), torch.randn(33, 4, generator=seeded(1))
    codes = torch.randint(30, (900,), generator=seeded(2))
    plain = codebook_gradient(latents, codebook, codes, 0.5)
    monkeypatch.setattr("evenbits_pocketllm.codewords.member_sums", lambda *given: whole_sums(*given).float())
    whole = codebook_gradient(latents, codebook, codes, 0.5)
    torch.testing.assert_close(whole[0], plain[0], rtol=1e-5, atol=1e-9)
    assert torch.equal(whole[1], plain[1])


# replayed


class TracedGraph:
    """What a CUDA graph does: the operations of one step, in the buffers it was recorded with, again and again."""

    def __init__(self, step: Step, batch: Tensor, rates: Tensor) -> None:
        learned = [step.encoder, step.decoder, step.codebook, *step._first, *step._second]
        held = [*learned, step.squared_error, step.counts]
        before = [part.clone() for part in held]  # tracing computes, unlike a capture
        self.met: list[Tensor] = []

        def record() -> list[Tensor]:
            met = step(batch, rates)
            return [] if met is None else [met.latents, met.distances]

        self._traced = make_fx(record)()
        for part, old in zip(held, before, strict=True):
            part.copy_(old)
        self.met = [torch.empty_like(part) for part in self._traced()]
        for part, old in zip(held, before, strict=True):
            part.copy_(old)

    def replay(self) -> None:
        for part, found in zip(self.met, self._traced(), strict=True):
            part.copy_(found)


def replayed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Have trainings on the CPU take the road of CUDA; returns the shapes that get captured."""
    shapes: list[torch.Size] = []

    def capture(static: StaticStep) -> None:
        graph = TracedGraph(static._step, static._batch, static._rates)
        shapes.append(static._batch.shape)
        static._graph = graph  # type: ignore[assignment]
        static._met = Met(graph.met[0], graph.met[1]) if graph.met else None

    monkeypatch.setattr(StaticStep, "capture", capture)
    allow(monkeypatch)
    return shapes


def allow(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Runner.__init__

    def begin(runner: Runner, step: Step, device: torch.device, steps: int) -> None:
        start(runner, step, device, steps)
        assert runner.eager == "CUDA graphs do not exist on cpu"
        runner.eager = ""

    monkeypatch.setattr(Runner, "__init__", begin)


def assert_same(one: Trained, other: Trained) -> None:
    for name in ("codebook", "decoder", "encoder"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(a, b) for a, b in zip(one.codes, other.codes, strict=True))
    assert one.history == other.history
    assert (one.error, one.dead) == (other.error, other.dead)


@variants
def test_replayed_training_is_the_plain_one_to_the_bit(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(**changes)
    plain = train(matrices(settings), settings, seeded())
    assert plain.road.startswith("step by step: CUDA graphs do not exist on cpu; units are torch's: ")
    shapes = replayed(monkeypatch)
    fast = train(matrices(settings), settings, seeded())
    assert_same(fast, plain)
    assert len(shapes) == len(set(shapes)) == (4 if settings.shuffle else 2)  # one for each shape of a batch
    assert fast.road.startswith(f"{len(shapes)} CUDA graphs replayed; ")


def test_what_cannot_be_captured_is_said_and_trained_step_by_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = small()
    plain = train(matrices(settings), settings, seeded())

    def capture(static: StaticStep) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(StaticStep, "capture", capture)
    allow(monkeypatch)
    with caplog.at_level(logging.WARNING):
        slow = train(matrices(settings), settings, seeded())
    assert_same(slow, plain)
    assert "cannot be captured (operation not permitted when stream is capturing)" in slow.road
    reason = slow.road.removeprefix("step by step: ").partition(";")[0]
    assert [record.message for record in caplog.records if "step by step" in record.message] == [
        f"pocketllm trains step by step, several times as slowly: {reason}"
    ]


def test_what_spoilt_a_capture_is_said_and_not_that_it_was_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(*_: object, **__: object) -> Any:
        try:
            yield
        finally:  # as torch's context ends a capture
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", object)
    allow(monkeypatch)
    step = new_step(small())
    runner, given = Runner(step, torch.device("cpu"), 100), (torch.zeros(4, 20, 2), torch.tensor([-0.1, 1.0]))
    for _ in range(WARM_STEPS):
        runner(*given)
    assert runner.eager == ""
    search, met = step._nearest, []

    def read(latents: Tensor) -> Tensor:
        met.append(latents)
        if len(met) == 1:
            raise RuntimeError("a value read\non the host")
        return search(latents)

    monkeypatch.setattr(step, "_nearest", read)
    runner(*given)
    assert len(met) == 2
    assert runner.eager == "a step of (4, 20, 2) cannot be captured (a value read)"


def test_a_batch_that_is_a_view_of_a_transposed_matrix_is_laid_out_anew() -> None:
    settings = small(axis="out")
    groups = order(cut(torch.randn(40, 30, generator=seeded()), "out", 2), settings.rln)
    assert not groups[3:8].is_contiguous()
    static = StaticStep(new_step(settings), groups[3:8], torch.empty(2))
    static(groups[5:10], torch.tensor([-0.1, 1.0]))
    assert static._batch.is_contiguous()
    assert torch.equal(static._batch, groups[5:10])


def test_warm_steps_come_before_a_capture_and_buffers_are_fed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = replayed(monkeypatch)
    step = new_step(small())
    runner = Runner(step, torch.device("cpu"), 100)
    for taken in range(WARM_STEPS + 3):
        batch = torch.full((4, 20, 2), float(taken))
        runner(batch, torch.tensor([-0.1, 1.0]))
        static = runner._shapes[batch.shape][0]
        assert static._batch.data_ptr() != batch.data_ptr()
        assert torch.equal(static._batch, batch)
        assert len(shapes) == (taken >= WARM_STEPS)


def test_few_steps_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    @contextmanager
    def ignored(*_: object) -> Any:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device))
    monkeypatch.setattr(torch.cuda, "device", ignored)
    runner = Runner(new_step(small()), torch.device("cuda"), 10)
    assert runner.road.startswith("step by step: 10 steps are too few to be worth a capture; ")
    assert Runner(new_step(small()), torch.device("cuda"), 6400).eager == ""
    assert made


# settings and machines without more than torch


def test_plain_settings_are_the_options() -> None:
    options = PocketOptions.model_fields
    plain, types = PlainSettings(), get_type_hints(PlainSettings)
    for field in fields(PlainSettings):
        assert field.name in options
        assert field.default == options[field.name].default
        assert types[field.name] == options[field.name].annotation
    for name in ("evenbits", "paper", "code"):
        of_options, of_recipe = PocketOptions(recipe=name), recipe(name)
        for attribute in (*(field.name for field in fields(plain)), "index_bits", "window_bits", "windowed"):
            assert getattr(of_recipe, attribute) == getattr(of_options, attribute), (name, attribute)
    with pytest.raises(TypeError, match="wide"):
        recipe("paper", wide=3)


def test_plain_settings_train_alike() -> None:
    plain = small(revive=True, shuffle=True)
    options = PocketOptions.model_validate({"recipe": "paper", **SMALL, "revive": True, "shuffle": True})
    assert_same(train(matrices(plain), plain, seeded()), train(matrices(plain), options, seeded()))


BARE = """
import sys

class Absent:
    names = {"pydantic", "pydantic_core", "scipy", "faiss", "numba", "llvmlite", "pluggy", "safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from evenbits_pocketllm import codebooks, codewords, cost, decoding, folding, groups, layout, network, pools, scales
from evenbits_pocketllm import alternating, autoencoder, captured, computed, feedback, step, unit
from evenbits_pocketllm.settings import recipe

settings = recipe("paper", d=2, codebook_size=16, batch=64, epochs=4)
weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
lines = layout.cut(weight, settings.axis, settings.d)
trained = autoencoder.train(layout.order(lines, settings.rln), settings, torch.Generator().manual_seed(0))

class Shape:
    out_features, in_features = weight.shape

from evenbits.maths.bitpack import pack
packed = groups.PackedCodes(pack(trained.codes[0], settings.index_bits), settings, Shape())
decoder = groups.load_decoder(packed, codebooks.Coder(trained.codebook, trained.decoder))
folded = folding.fold(decoder)
exact = decoder(0, 16)
print(float((exact - lines).square().sum() / lines.square().sum()) - trained.error)
print(folding.folded_error(decoder, folded))
print(cost.geometry(settings, Shape()), *sorted(sys.modules.keys() & Absent.names))
"""


def test_training_and_decoding_need_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", BARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    off, decibels, shape = done.stdout.splitlines()
    assert abs(float(off)) < 1e-5
    assert float(decibels) > 10
    assert shape == "Geometry(lines=16, length=24, chunks=12)"


# timing


def test_timing_extrapolates_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that steps training by training: 2 s fixed and 3 s an epoch."""
    now, asked = [0.0], []

    def trained(vectors: Tensor, settings: PlainSettings, generator: torch.Generator) -> Any:
        asked.append(settings.epochs)
        now[0] += 2 + 3 * settings.epochs
        return type("Trained", (), {"road": "as told"})

    monkeypatch.setattr("evenbits_pocketllm.autoencoder.train", trained)
    monkeypatch.setattr("evenbits_pocketllm.captured.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("evenbits_pocketllm.captured.time_search", lambda *_: 0.5)
    found = time_training(40, 24, small(batch=60), device="cpu", epochs=(1, 4))
    assert asked == [1, 1, 4]
    assert (found.fixed_seconds, found.epoch_seconds, found.seconds) == (2, 3, 2 + 6 * 3)
    assert (found.steps_per_epoch, found.steps, found.vectors_per_step) == (8, 48, 60)
    assert found.seconds_per_step == 3 / 8
    assert found.search_share == pytest.approx(0.5 / (3 / 8))
    assert found.road == "as told"


def test_timing_runs() -> None:
    found = time_training(16, 24, small(batch=64), device="cpu")
    assert 0 < found.seconds < 60
    assert 0 < found.search_seconds < 1
    assert found.codewords == 16
    with pytest.raises(ValueError, match="rising"):
        time_training(16, 24, small(), device="cpu", epochs=(2, 2))
