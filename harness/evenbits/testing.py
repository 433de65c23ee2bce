"""The contract that every compressor must keep, as a test suite for third parties, and tiny models to run it on.

`check_compressor(descriptor)` runs all of it. Each check is a function of its own that raises AssertionError with
what to do; none needs a network or a GPU, and where there is a GPU it is used too.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.budget import BitBudget, default_window
from evenbits.compressor import (
    Compressor,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelShapes,
    Options,
    PackedLayer,
    Refusal,
    Role,
    Shared,
    meta_bytes,
)
from evenbits.driver import Driver, Work, restore_layer
from evenbits.errors import TrialFailed
from evenbits.kernels.launch import Choice
from evenbits.manifest import Manifest, StoredLayer
from evenbits.maths.hessian import calibrated_error, relative_error
from evenbits.models import build_model, guarded_randomness
from evenbits.shapes import llama_shapes, read_inventory
from evenbits.subject import restore_state
from evenbits.tiny import ModelKind, tiny_model, tiny_text, tiny_tokens

__all__ = ["ModelKind", "check_compressor", "tiny_model", "tiny_text", "tiny_tokens"]

# one that any method should take, then: short last groups, a width of 4 x 43, fewer rows than a tile, one row
SHAPES = ((64, 128), (24, 40), (16, 172), (7, 16), (1, 33))
BUDGETS = (1.0, 2.0, 3.0, 4.0, 8.0)
ALL_BUT_FIRST = SHAPES[1:]
OUTLIER = 1e4
ROUNDS_TO_ZERO = 1e-6
# what a packed path may differ from a dense layer of the restored weight, of the outputs' energy: sums in another
# order, in half precision also weights rounded at another place and sums rounded tile by tile
LINEAR_ERROR = {torch.float32: 1e-8, torch.float16: 1e-6, torch.bfloat16: 4e-5}
ROWS = (1, 5, 33)  # decoding one sequence, several, and a prompt that is no multiple of a tile
HELD_PER_LINE = 32  # bytes that a packed layer may hold beyond what is stored, for each of its rows and columns
HELD_AT_ALL = 1024


# -- what the checks run on ----------------------------------------------------------------------------------


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


class _Survey:
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


@contextmanager
def untouched_randomness(what: str) -> Iterator[None]:
    """Raises AssertionError when Python's, numpy's or torch's global random state changes inside."""

    def state() -> str:
        parts = (random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    with np.printoptions(threshold=10_000):
        before = state()
        yield
        after = state()
    assert before == after, f"{what} changed the global random state: draw from the `generator` argument only"


def run_case(
    descriptor: Compressor, options: Options, case: Case, *, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[LayerCompressor, PackedLayer, Shared | None, Tensor]:
    """Compress one matrix with a fresh compressor object: (compressor, packed, shared, restored (out, in))."""
    compressor = descriptor.make(options)
    assert isinstance(compressor, LayerCompressor)
    weight = case.weight.to(device)
    before = weight.clone()
    layer = case.layer(descriptor.needs_of(options).statistics, device)
    with untouched_randomness(f"{descriptor.name}: compress"), torch.no_grad():
        shared = compressor.prepare(_Survey(case, device), torch.Generator().manual_seed(seed))
        packed = compressor.compress(weight, layer, shared, torch.Generator().manual_seed(seed))
        restored = restore_layer(compressor, packed, case.shape, shared)
    assert torch.equal(weight, before), f"{descriptor.name}: compress wrote into its weight: work on a copy"
    return compressor, packed, shared, restored


def _bytes_of(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def _all_tensors(packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
    return {**packed.tensors, **{f"shared/{k}": t for k, t in (shared.tensors if shared else {}).items()}}


# -- options, predict and fit --------------------------------------------------------------------------------


def check_options(descriptor: Compressor, options: Options) -> None:
    """Frozen, unknown keys refused, every field described, and the same again from JSON."""
    model = descriptor.options
    assert issubclass(model, Options), f"{descriptor.name}: options must derive from evenbits.compressor.Options"
    for name, field in model.model_fields.items():
        assert field.description, f"{descriptor.name}: option {name!r} has no description: use Field(description=...)"
        try:
            setattr(options, name, getattr(options, name))
        except ValidationError:
            continue
        raise AssertionError(f"{descriptor.name}: option {name!r} can be set: keep the options frozen")
    again = model.model_validate(json.loads(options.model_dump_json()))
    assert again == options, f"{descriptor.name}: options differ after JSON: {again} != {options}"
    try:
        model.model_validate({**options.model_dump(mode="json"), "no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError(f'{descriptor.name}: an unknown option is accepted: keep extra="forbid"')


def check_fit(descriptor: Compressor, budgets: Sequence[float] = BUDGETS) -> list[Options]:
    """What `fit` returns lies in the budget by `predict`; what nothing fits is refused. Returns what it chose."""
    shapes = llama_shapes(512, 1376, 4, 256, 4096)
    chosen = []
    for on in ("linear", "model"):
        for centre in budgets:
            budget = BitBudget(centre, default_window(centre), on)
            found = descriptor.fit(budget, shapes, {})
            if isinstance(found, Refusal):
                assert found.reason, f"{descriptor.name}: fit refuses {budget} without a reason"
                continue
            assert isinstance(found, descriptor.options), f"{descriptor.name}: fit must return its options or Refusal"
            bits = budget.bits(descriptor.predict(found, shapes), shapes)
            assert bits in budget, f"{descriptor.name}: fit chose {bits:.4f} bits for {budget}: {found}"
            assert found == descriptor.fit(budget, shapes, {}), f"{descriptor.name}: fit must be deterministic"
            pinned = descriptor.fit(budget, shapes, found.model_dump(mode="json"))
            assert pinned == found, f"{descriptor.name}: fit must leave pinned options as they are, got {pinned}"
            chosen.append(found)
    assert chosen, f"{descriptor.name}: fit finds nothing at {', '.join(map(str, budgets))} bits on a small Llama"
    for impossible in (BitBudget(0.01, 0.005), BitBudget(0.01, 0.005, "model")):
        refused = descriptor.fit(impossible, shapes, {})
        assert isinstance(refused, Refusal), f"{descriptor.name}: fit takes {impossible} with {refused}: refuse it"
        assert refused.reason, f"{descriptor.name}: fit refuses {impossible} without a reason: say what is nearest"
    return chosen


# -- one matrix ----------------------------------------------------------------------------------------------


def check_determinism(descriptor: Compressor, options: Options, case: Case, device: str = "cpu") -> None:
    """The same seed gives the same packed bytes, whatever the global random state."""
    first = run_case(descriptor, options, case, seed=7, device=device)
    with guarded_randomness(12345):
        second = run_case(descriptor, options, case, seed=7, device=device)
    tensors, again = _all_tensors(first[1], first[2]), _all_tensors(second[1], second[2])
    assert tensors.keys() == again.keys(), f"{descriptor.name}: the stored tensors differ from run to run"
    for name, tensor in tensors.items():
        same = tensor.dtype == again[name].dtype and _bytes_of(tensor) == _bytes_of(again[name])
        assert same, f"{descriptor.name}: {name!r} differs for one seed: draw from `generator` only, in a fixed order"
    assert first[1].meta == second[1].meta, f"{descriptor.name}: meta differs from run to run"
    if not descriptor.stochastic:
        other = _all_tensors(*run_case(descriptor, options, case, seed=8, device=device)[1:3])
        for name, tensor in tensors.items():
            same = _bytes_of(tensor) == _bytes_of(other[name])
            assert same, f"{descriptor.name}: {name!r} depends on the seed: declare stochastic=True"


def check_prediction(descriptor: Compressor, options: Options, case: Case, *, exact: bool = True) -> None:
    """`predict` names the bytes that are stored, role by role; `exact=False`: it is an upper bound of their sum."""
    _, packed, shared, _ = run_case(descriptor, options, case)
    stored: dict[Role, int] = {}
    for part in filter(None, (packed, shared)):
        for name, tensor in part.tensors.items():
            role = part.roles[name]
            assert isinstance(role, Role), f"{descriptor.name}: the role of {name!r} must be a Role"
            stored[role] = stored.get(role, 0) + tensor.numel() * tensor.element_size()
    predicted = {role: count for role, count in descriptor.predict(options, case.shapes).role_bytes.items() if count}
    size = f"{case.shape.out_features}x{case.shape.in_features}"
    if not exact:
        assert sum(stored.values()) <= sum(predicted.values()), (
            f"{descriptor.name}: {size} stores {sum(stored.values())} bytes, predict promises {sum(predicted.values())}"
        )
        return
    stored = {role: count for role, count in stored.items() if count}
    assert stored == predicted, f"{descriptor.name}: {size}: predict says {predicted}, stored are {stored}"


def check_restore(descriptor: Compressor, options: Options, case: Case) -> None:
    """float32 of the layer's shape, finite, the same each time, from the stored tensors alone, which it leaves."""
    compressor, packed, shared, restored = run_case(descriptor, options, case)
    before = {name: _bytes_of(tensor) for name, tensor in _all_tensors(packed, shared).items()}
    assert restored.dtype == torch.float32, f"{descriptor.name}: restore must return float32, not {restored.dtype}"
    fresh = descriptor.make(options)
    assert isinstance(fresh, LayerCompressor)
    with untouched_randomness(f"{descriptor.name}: restore"), torch.no_grad():
        for other in (compressor, fresh):
            again = other.restore(packed, case.shape, shared)
            assert torch.equal(again, restored), (
                f"{descriptor.name}: restore differs from call to call: compute from stored tensors and options alone"
            )
    after = {name: _bytes_of(tensor) for name, tensor in _all_tensors(packed, shared).items()}
    assert before == after, f"{descriptor.name}: restore changes the stored tensors: work on copies"


def check_tunable(descriptor: Compressor, options: Options, case: Case) -> None:
    """What a recovery stage may train is stored, is float, and has gradients through `restore`."""
    compressor, packed, shared, restored = run_case(descriptor, options, case)
    stored = _all_tensors(packed, shared)
    tunable = compressor.tunable(packed, shared)
    for name, tensor in tunable.items():
        assert name in stored, f'{descriptor.name}: tunable {name!r} is not stored (shared ones are "shared/NAME")'
        assert tensor.is_floating_point(), f"{descriptor.name}: tunable {name!r} is {tensor.dtype}: only floats train"
    leaves = {name: tensor.detach().float().requires_grad_() for name, tensor in tunable.items()}
    if not leaves:
        return
    inner = {name: leaves.get(name, tensor) for name, tensor in packed.tensors.items()}
    outer = {n: leaves.get(f"shared/{n}", t) for n, t in (shared.tensors if shared else {}).items()}
    with torch.enable_grad():
        trained = compressor.restore(
            PackedLayer(inner, packed.roles, packed.meta),
            case.shape,
            None if shared is None else Shared(outer, shared.roles, shared.meta),
        )
        assert torch.allclose(trained, restored, rtol=1e-3, atol=1e-6), (
            f"{descriptor.name}: restore from float32 copies of the tunable tensors gives another weight"
        )
        assert trained.requires_grad, f"{descriptor.name}: restore is not differentiable in {', '.join(leaves)}"
        (trained * case.weight).sum().backward()  # type: ignore[no-untyped-call]
    for name, leaf in leaves.items():
        grad = leaf.grad
        assert grad is not None, f"{descriptor.name}: no gradient reaches {name!r}: leave it out of tunable"
        assert bool(torch.isfinite(grad).all()), f"{descriptor.name}: the gradient of {name!r} is not finite"
        assert bool((grad != 0).any()), f"{descriptor.name}: the gradient of {name!r} is zero everywhere"


def check_linear(descriptor: Compressor, options: Options, case: Case, device: str = "cpu") -> None:
    """A packed path computes what the restored weight does, or is refused with a reason.

    Any module: float32 inputs of no row, one, several, three dimensions and other strides, and their dtype back. One
    that says what it runs (`evenbits.kernels.launch.PackedModule`) also: half precision, a kernel with a reason for one
    row and for several, and bytes held that do not grow as a dense weight would (`check_held`).
    """
    compressor, packed, shared, restored = run_case(descriptor, options, case, device=device)
    given = case.inputs.to(device)
    with untouched_randomness(f"{descriptor.name}: linear"), torch.no_grad():
        module = compressor.linear(packed, case.shape, shared, torch.device(device))
        if isinstance(module, Refusal):
            assert module.reason, f"{descriptor.name}: `linear` is refused without a reason"
            return
        choose: Any = getattr(module, "choice", None)
        for dtype in (torch.float32,) if choose is None else LINEAR_ERROR:
            for rows in ROWS:
                _check_outputs(descriptor.name, module, given[:rows].to(dtype), restored)
        _check_outputs(descriptor.name, module, given[:6].reshape(2, 3, -1), restored)
        _check_outputs(descriptor.name, module, given[:5].T.contiguous().T, restored)
        nothing = tuple(module(given[:0]).shape)
        assert nothing == (0, case.shape.out_features), f"{descriptor.name}: `linear` of no rows gives {nothing}"
    if choose is not None:
        for rows in (1, ROWS[-1]):
            found = choose(rows)
            said = isinstance(found, Choice) and found.kernel and found.reason
            assert said, f"{descriptor.name}: choice({rows}) must be a Choice with a kernel and a reason, not {found!r}"


def _check_outputs(name: str, module: Any, inputs: Tensor, restored: Tensor) -> None:
    """Against a dense layer: weights rounded to the inputs' dtype, sums in float32.

    The energy is what outputs of such inputs have on average: a single one may be near zero by chance.
    """
    outputs, shape = module(inputs), (*inputs.shape[:-1], restored.shape[0])
    what = f"{name}: `linear` of {tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    found = (tuple(outputs.shape), outputs.dtype)
    assert found == (shape, inputs.dtype), f"{what} gives {found}, expected {(shape, inputs.dtype)}"
    expected = inputs.float() @ restored.to(inputs.dtype).float().T
    energy = inputs.float().square().sum() * restored.square().sum() / restored.shape[1]
    difference = float((outputs.float() - expected).square().sum() / energy)
    assert difference <= LINEAR_ERROR[inputs.dtype], (
        f"{what} differs from the restored weight by {difference:g} of its outputs' energy; both must decode the same"
    )


def check_held(descriptor: Compressor, options: Options, case: Case, smaller: Case) -> None:
    """From a small layer to a larger one, `held_bytes` grows as what is stored does, and a little for every row and
    column: tables of a fixed size may be decoded, the weight may not. Modules that do not say are left alone."""
    grown = []
    for one in (case, smaller):
        compressor, packed, shared, _ = run_case(descriptor, options, one)
        module = compressor.linear(packed, one.shape, shared, torch.device("cpu"))
        held = getattr(module, "held_bytes", None)
        if not isinstance(held, int):
            assert held is None, f"{descriptor.name}: held_bytes must be a whole number of bytes, not {held!r}"
            return
        assert not isinstance(module, Refusal)
        tensors = [*module.parameters(), *module.buffers()]
        there = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
        assert held >= there, f"{descriptor.name}: held_bytes says {held}, the module's tensors alone take {there}"
        allowed = packed.nbytes + HELD_PER_LINE * (one.shape.out_features + one.shape.in_features)
        grown.append((held, allowed + (0 if shared is None else shared.nbytes)))
    held, allowed = (large - small for large, small in zip(*grown, strict=True))
    assert held <= allowed + HELD_AT_ALL, (
        f"{descriptor.name}: between layers of {smaller.shape.weights} and {case.shape.weights} weights held_bytes "
        f"grows by {held}, what is stored with some bytes a row and column by {allowed}: no decoded weight may be kept"
    )


def check_extremes(descriptor: Compressor, options: Options, rows: int = 64, columns: int = 128) -> None:
    """An all-zero weight restores to zeros; with one huge outlier the error stays below the weight.

    The error of the weights or, where the method reads statistics, that of the outputs.
    """
    restored = run_case(descriptor, options, make_case(rows, columns, fill="zero"))[3]
    largest = float(restored.abs().max())
    assert largest <= ROUNDS_TO_ZERO, f"{descriptor.name}: an all-zero weight restores to values up to {largest:g}"
    case = make_case(rows, columns, fill="outlier")
    restored = run_case(descriptor, options, case)[3]  # restore_layer refuses what is not finite
    error = relative_error(case.weight, restored)
    if descriptor.needs_of(options).statistics != "none":
        # such a method lessens the error of the outputs, for which it may enlarge the weights'
        error = min(error, calibrated_error(case.weight, restored, case.second_moment))
    assert error <= 1.0, f"{descriptor.name}: with one outlier of {OUTLIER:g} the error exceeds the weight ({error:g})"


def check_round_trip(descriptor: Compressor, options: Options, case: Case, folder: Path) -> None:
    """Through an artifact on disk: every tensor, its role, meta and the restored weight, bit for bit."""
    compressor, packed, shared, restored = run_case(descriptor, options, case)
    size = f"{case.shape.out_features}x{case.shape.in_features}"
    with ArtifactWriter(folder / f"round-trip-{size}") as writer:
        writer.add_layer(case.shape.name, packed)
        if shared is not None:
            writer.write_shared(shared)
        file = writer.flush_block(0)
        stored = stored_layer(case.shape, file, packed)
        writer.finish(
            **manifest_facts(descriptor, options), layers=(stored,), shared={} if shared is None else shared.roles
        )
    artifact = Artifact(folder / f"round-trip-{size}")
    ((_, read),) = list(artifact.packed())
    assert read.roles == packed.roles, f"{descriptor.name}: roles differ after reading"
    assert read.meta == packed.meta, f"{descriptor.name}: meta must be plain JSON: {packed.meta} became {read.meta}"
    written, loaded = _all_tensors(packed, shared), _all_tensors(read, artifact.shared)
    assert written.keys() == loaded.keys(), f"{descriptor.name}: tensors differ after reading"
    for name, tensor in written.items():
        same = (tensor.dtype, tensor.shape) == (loaded[name].dtype, loaded[name].shape)
        assert same, f"{descriptor.name}: {name!r} has another dtype or shape after reading"
        assert _bytes_of(tensor) == _bytes_of(loaded[name]), f"{descriptor.name}: {name!r} differs after reading"
    again = restore_layer(compressor, read, case.shape, artifact.shared)
    assert torch.equal(again, restored), f"{descriptor.name}: {size} restores to another weight after reading"


def check_cuda(descriptor: Compressor, options: Options, case: Case) -> None:
    """On a GPU, where there is one: works, is deterministic, and decodes to the CPU's decode of the same tensors."""
    if not torch.cuda.is_available():
        return
    check_determinism(descriptor, options, case, device="cuda")
    compressor, packed, shared, restored = run_case(descriptor, options, case, device="cuda")
    assert restored.is_cuda, f"{descriptor.name}: restore left the device of its tensors"
    home = PackedLayer({k: t.cpu() for k, t in packed.tensors.items()}, packed.roles, packed.meta)
    common = (
        None if shared is None else Shared({k: t.cpu() for k, t in shared.tensors.items()}, shared.roles, shared.meta)
    )
    twin = restore_layer(compressor, home, case.shape, common)
    close = torch.allclose(twin, restored.cpu(), rtol=1e-5, atol=1e-7)
    assert close, f"{descriptor.name}: CPU and GPU decode the same tensors to different weights"
    check_linear(descriptor, options, case, device="cuda")


# -- a whole model -------------------------------------------------------------------------------------------


def manifest_facts(descriptor: Compressor, options: Options, dtype: str = "float32") -> dict[str, Any]:
    """What `ArtifactWriter.finish` must be told, for artifacts written outside a run."""
    return {
        "key": "0" * 16, "evenbits": "0", "model": {"name": "tiny", "revision": "none"}, "method": descriptor.name,
        "distribution": "", "options": options.model_dump(mode="json"), "budget": None, "seed": 0, "recovery": (),
        "calibration": None, "dtype": dtype, "paper_bits": 0.0,
    }  # fmt: skip


def stored_layer(shape: LayerShape, file: str, packed: PackedLayer) -> StoredLayer:
    """The manifest's entry of one packed layer."""
    return StoredLayer(
        name=shape.name, block=shape.block, kind=shape.kind, out_features=shape.out_features,
        in_features=shape.in_features, stored_dtype=shape.dtype, bias=shape.bias, file=file, roles=packed.roles,
        error=0.0,
    )  # fmt: skip


def compress_model(
    descriptor: Compressor,
    options: Options,
    model_folder: Path,
    folder: Path,
    *,
    tokens: Tensor | None = None,
    dtype: str = "float32",
    seed: int = 0,
    device: str = "cpu",
) -> Manifest:
    """Drive a compressor over a model folder as a run would, and store the artifact in `folder`."""
    needs = descriptor.needs_of(options)
    moments = None if tokens is None else folder.parent / f"{folder.name}-moments"
    work = Work(model_folder, dtype, torch.device(device), descriptor.make(options), needs, None, seed, tokens, moments)
    with ArtifactWriter(folder) as writer:
        stored = Driver(work, writer).run()
        writer.copy_base_files(model_folder)
        return writer.finish(
            **manifest_facts(descriptor, options, dtype), layers=tuple(stored.layers), shared=stored.shared,
            model_form=stored.form, whole=stored.whole, whole_weights=stored.whole_weights,
        )  # fmt: skip


def check_model(descriptor: Compressor, options: Options, folder: Path, *, exact: bool = True) -> None:
    """Through the driver, over a tiny Llama: the same files twice, the predicted bytes, a model that runs."""
    base = tiny_model(folder / "model", "llama", hidden=64, intermediate=172)
    tokens = tiny_tokens(base, samples=8, length=32)
    manifests = []
    for run in ("first", "second"):
        with untouched_randomness(f"{descriptor.name}: a run over a model"):
            manifests.append(compress_model(descriptor, options, base, folder / run, tokens=tokens))
        torch.rand(3)  # the second run starts from another global state
    first, second = manifests
    assert first.files == second.files, f"{descriptor.name}: two runs of one seed store different files"
    shapes = read_inventory(base).shapes("float32")
    artifact = Artifact(folder / "first")
    count = sum(packed.nbytes for _, packed in artifact.packed()) + (artifact.shared.nbytes if artifact.shared else 0)
    if first.model_form == "whole":
        tensors = artifact.whole()
        count = sum(tensors[name].numel() * tensors[name].element_size() for name in first.whole)
        count += meta_bytes(artifact.whole_meta())
    predicted = descriptor.predict(options, shapes).linear_bytes
    right = count == predicted if exact else count <= predicted
    assert right, f"{descriptor.name}: predict says {predicted} bytes for a model, stored are {count}"
    compressor = descriptor.make(options)
    if not isinstance(compressor, LayerCompressor):
        return
    model = build_model(folder / "first", restore_state(artifact, compressor), "float32")
    with torch.no_grad():
        logits = model(input_ids=tokens[:1]).logits
    assert bool(torch.isfinite(logits).all()), f"{descriptor.name}: the restored model's logits are not finite"


# -- all of it -----------------------------------------------------------------------------------------------


def check_compressor(
    descriptor: Compressor, options: Mapping[str, Any] | None = None, *, exact: bool = True, fitted: bool = True
) -> list[tuple[int, int]]:
    """The whole contract for one compressor.

    options: settings to check beside what `fit` chooses; by default the options' defaults. exact: whether the
    stored bytes are known beforehand; False for methods whose bits depend on the data, which must stay below.
    fitted: also check `fit` and its settings; once is enough where several settings are checked.
    A shape may be refused with TrialFailed and a reason, but not the plain one (64 x 128). Returns the shapes
    that were refused. Raises AssertionError with what to do.
    """
    chosen = check_fit(descriptor) if fitted else []
    plain = descriptor.options.model_validate(dict(options or {}))
    settings = [plain, *(found for i, found in enumerate(chosen) if found != plain and found not in chosen[:i])]
    for setting in settings:
        check_options(descriptor, setting)
    refused: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if type(descriptor.make(plain)).compress is not LayerCompressor.compress and _takes_matrices(descriptor, plain):
            for size in SHAPES:
                case = make_case(*size)
                if size in ALL_BUT_FIRST and _refuses(descriptor, plain, case):
                    refused.append(size)
                    continue
                check_determinism(descriptor, plain, case)
                check_prediction(descriptor, plain, case, exact=exact)
                check_restore(descriptor, plain, case)
                check_tunable(descriptor, plain, case)
                check_round_trip(descriptor, plain, case, folder)
                check_linear(descriptor, plain, case)
            if SHAPES[1] not in refused:
                check_held(descriptor, plain, make_case(*SHAPES[0]), make_case(*SHAPES[1]))
            check_extremes(descriptor, plain)
            check_cuda(descriptor, plain, make_case(*SHAPES[0]))
            for setting in settings[1:]:
                case = make_case(64, 172)
                if not _refuses(descriptor, setting, case):
                    check_prediction(descriptor, setting, case, exact=exact)
                    check_restore(descriptor, setting, case)
        check_model(descriptor, plain, folder, exact=exact)
    return refused


def _takes_matrices(descriptor: Compressor, options: Options) -> bool:
    return isinstance(descriptor.make(options), LayerCompressor)


def _refuses(descriptor: Compressor, options: Options, case: Case) -> bool:
    """Whether a shape is refused, as it may be: by TrialFailed with a reason."""
    try:
        run_case(descriptor, options, case)
    except TrialFailed as error:
        reason = str(error)
    else:
        return False
    assert reason, f"{descriptor.name}: TrialFailed without a reason: name the layer and what is wrong with it"
    return True
