"""Matrices that a compressor is tried on, and what became of one: compressed once, looked at by every check."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evenbits.compressor import (
    Compressor,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelShapes,
    Options,
    PackedLayer,
    Shared,
)
from evenbits.errors import TrialFailed
from evenbits.restoring import restore_layer

# one that any method should take, then: short last groups, a width of 4 x 43, fewer rows than a tile, one row
SHAPES = ((64, 128), (24, 40), (16, 172), (7, 16), (1, 33))
OUTLIER = 1e4


@dataclass(frozen=True)
class Case:
    """A matrix with the statistics of its inputs, as the harness would hand it over."""

    weight: Tensor
    shape: LayerShape
    second_moment: Tensor
    inputs: Tensor

    def layer(self, statistics: str, device: torch.device | str = "cpu") -> Layer:
        moment = None if statistics == "none" else self.second_moment.to(device)
        return Layer(
            self.shape,
            moment,
            self.inputs.to(device) if statistics == "inputs" else None,
            fisher=self.fisher.to(device) if statistics == "fisher" else None,
        )

    @property
    def fisher(self) -> Tensor:
        """(out, in): what squared gradients are where those of the outputs are independent, some larger than others."""
        rows = torch.linspace(0.5, 1.5, self.shape.out_features)
        return rows[:, None] * torch.diagonal(self.second_moment)[None, :]

    @property
    def shapes(self) -> ModelShapes:
        return ModelShapes((self.shape,), self.shape.weights, 0, 4 * self.shape.weights)


def make_case(out_features: int, in_features: int, *, seed: int = 0, fill: str = "gaussian") -> Case:
    """fill: gaussian, zero, or outlier (one weight of 1e4 among Gaussians of deviation 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(out_features, in_features, generator=generator)
    if fill == "zero":
        weight.zero_()
    elif fill == "outlier":
        weight[out_features // 2, in_features // 3] = OUTLIER
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    inputs = torch.randn(2 * in_features, in_features, generator=generator) @ (mixing + torch.eye(in_features))
    shape = LayerShape("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", out_features, in_features, "float32")
    return Case(weight, shape, inputs.T @ inputs / len(inputs), inputs)


class Walk:
    """One matrix, as `prepare` walks it."""

    def __init__(self, case: Case, device: torch.device | str) -> None:
        self.shapes = case.shapes
        self._case = case
        self._device = device

    def __iter__(self) -> Iterator[tuple[LayerShape, Tensor]]:
        yield self._case.shape, self._case.weight.to(self._device)

    def second_moment(self, name: str) -> Tensor:
        return self._case.second_moment.to(self._device)

    def fisher(self, name: str) -> Tensor:
        return self._case.fisher.to(self._device)


def random_state() -> str:
    """A digest of Python's, numpy's and torch's global random states."""
    with np.printoptions(threshold=10_000):
        parts = (random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def untouched_randomness(what: str) -> Iterator[None]:
    """Raises AssertionError when Python's, numpy's or torch's global random state changes inside."""
    before = random_state()
    yield
    assert before == random_state(), f"{what} changed the global random state: draw from the `generator` argument only"


Outcome = tuple[LayerCompressor, PackedLayer, Shared | None, Tensor]


@dataclass
class Ran:
    """One matrix compressed and restored, or the error that ended it; and what the compressor touched on its way."""

    compressor: LayerCompressor
    packed: PackedLayer | None = None
    shared: Shared | None = None
    restored: Tensor | None = None
    error: Exception | SystemExit | None = None
    moved_randomness: bool = False
    wrote_into: list[str] = field(default_factory=list)

    def outcome(self) -> Outcome:
        """(compressor, packed, shared, restored (out, in)), the stored tensors copied: nobody spoils another's check.

        Raises the error that ended it.
        """
        if self.error is not None:
            raise self.error
        assert self.packed is not None
        assert self.restored is not None
        shared = None if self.shared is None else copied(self.shared)
        return self.compressor, copied(self.packed), shared, self.restored.clone()


def copied(packed: PackedLayer) -> PackedLayer:
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    return PackedLayer(tensors, dict(packed.roles), copy.deepcopy(packed.meta))


def try_case(
    descriptor: Compressor, options: Options, case: Case, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Ran:
    """Compress one matrix with a fresh compressor object, and restore it."""
    compressor = descriptor.make(options)
    assert isinstance(compressor, LayerCompressor)
    weight = case.weight.to(device, copy=True)
    layer = case.layer(descriptor.needs_of(options).statistics, device)
    given = {"weight": weight, "second_moment": layer.second_moment, "inputs": layer.inputs, "fisher": layer.fisher}
    before = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
    ran = Ran(compressor)
    state = random_state()
    try:
        with torch.no_grad():
            shared = compressor.prepare(Walk(case, device), torch.Generator().manual_seed(seed))
            packed = compressor.compress(weight, layer, shared, torch.Generator().manual_seed(seed))
            assert isinstance(packed, PackedLayer), (
                f"{descriptor.name}: compress must return PackedLayer, not {type(packed).__name__}"
            )
            ran.packed = copied(packed)  # as they are before `restore` sees them
            ran.shared = None if shared is None else copied(shared)
            ran.restored = restore_layer(compressor, packed, case.shape, shared).clone()
    except (Exception, SystemExit) as error:
        ran.error = error
    ran.moved_randomness = random_state() != state
    ran.wrote_into = [name for name, tensor in before.items() if not torch.equal(tensor, given[name])]  # type: ignore[arg-type]
    return ran


def run_case(
    descriptor: Compressor, options: Options, case: Case, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Outcome:
    """Compress one matrix with a fresh compressor object: (compressor, packed, shared, restored (out, in)).

    Raises AssertionError where the global random state or what was given changed, and the compressor's own errors.
    """
    ran = try_case(descriptor, options, case, seed=seed, device=device)
    check_state_untouched(descriptor.name, ran)
    check_given_untouched(descriptor.name, ran)
    return ran.outcome()


def check_state_untouched(name: str, ran: Ran) -> None:
    assert not ran.moved_randomness, (
        f"{name}: compress changed the global random state: draw from the `generator` argument only"
    )


def check_given_untouched(name: str, ran: Ran) -> None:
    assert not ran.wrote_into, f"{name}: compress wrote into its {', '.join(ran.wrote_into)}: work on a copy"


@dataclass
class Runs:
    """Of one compressor at one setting: every matrix is compressed once for all checks that look at the result."""

    descriptor: Compressor
    options: Options
    _cases: dict[tuple[int, int, str], Case] = field(default_factory=dict)
    _ran: dict[tuple[int, int, str, int, str], Ran] = field(default_factory=dict)

    def case(self, out_features: int, in_features: int, fill: str = "gaussian") -> Case:
        key = (out_features, in_features, fill)
        if key not in self._cases:
            self._cases[key] = make_case(out_features, in_features, fill=fill)
        return self._cases[key]

    def ran(self, size: tuple[int, int], fill: str = "gaussian", seed: int = 0, device: str = "cpu") -> Ran:
        key = (*size, fill, seed, device)
        if key not in self._ran:
            case = self.case(*size, fill)
            self._ran[key] = try_case(self.descriptor, self.options, case, seed=seed, device=device)
        return self._ran[key]

    def taken(self) -> list[tuple[int, int]]:
        """The shapes that compress; of the others the check "shapes" tells."""
        return [size for size in SHAPES if self.ran(size).error is None]

    def refused(self) -> dict[tuple[int, int], str]:
        """The shapes that are refused, as they may be, and why."""
        errors = {size: self.ran(size).error for size in SHAPES}
        return {size: str(error) for size, error in errors.items() if isinstance(error, TrialFailed)}
