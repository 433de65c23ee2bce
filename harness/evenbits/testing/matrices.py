"""What is held of one matrix that was compressed: determinism, the predicted bytes, `restore`, `tunable`, the way
through an artifact, extreme weights, a GPU.

`ran`: the matrix as it was compressed already (`evenbits.testing.cases.Runs`); without it, it is compressed here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import Compressor, LayerCompressor, Options, PackedLayer, Role, Shared
from evenbits.maths.hessian import calibrated_error, relative_error
from evenbits.models import guarded_randomness
from evenbits.restoring import restore_layer
from evenbits.testing.cases import OUTLIER, Case, Outcome, Ran, make_case, run_case, try_case, untouched_randomness
from evenbits.testing.linears import check_linear
from evenbits.testing.stored import manifest_facts, stored_layer

ROUNDS_TO_ZERO = 1e-6


def looked_at(descriptor: Compressor, options: Options, case: Case, ran: Ran | None, device: str = "cpu") -> Outcome:
    return run_case(descriptor, options, case, device=device) if ran is None else ran.outcome()


def bytes_of(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def all_tensors(packed: PackedLayer, shared: Shared | None) -> dict[str, Tensor]:
    return {**packed.tensors, **{f"shared/{k}": t for k, t in (shared.tensors if shared else {}).items()}}


def check_determinism(
    descriptor: Compressor, options: Options, case: Case, device: str = "cpu", *, ran: Ran | None = None
) -> None:
    """The same seed gives the same packed bytes, whatever the global random state."""
    first = looked_at(descriptor, options, case, ran, device)
    with guarded_randomness(12345):
        second = try_case(descriptor, options, case, device=device).outcome()
    tensors, again = all_tensors(first[1], first[2]), all_tensors(second[1], second[2])
    assert tensors.keys() == again.keys(), f"{descriptor.name}: the stored tensors differ from run to run"
    for name, tensor in tensors.items():
        same = tensor.dtype == again[name].dtype and bytes_of(tensor) == bytes_of(again[name])
        assert same, f"{descriptor.name}: {name!r} differs for one seed: draw from `generator` only, in a fixed order"
    assert first[1].meta == second[1].meta, f"{descriptor.name}: meta differs from run to run"


def check_seed(descriptor: Compressor, options: Options, case: Case, *, ran: Ran | None = None) -> None:
    """Another seed changes nothing, unless the descriptor says stochastic=True."""
    first = looked_at(descriptor, options, case, ran)
    other = try_case(descriptor, options, case, seed=8).outcome()
    tensors, again = all_tensors(first[1], first[2]), all_tensors(other[1], other[2])
    for name, tensor in tensors.items():
        same = name in again and bytes_of(tensor) == bytes_of(again[name])
        assert same, f"{descriptor.name}: {name!r} depends on the seed: declare stochastic=True"


def check_prediction(
    descriptor: Compressor, options: Options, case: Case, *, exact: bool = True, ran: Ran | None = None
) -> None:
    """`predict` names the bytes that are stored, role by role; `exact=False`: it is an upper bound of their sum."""
    _, packed, shared, _ = looked_at(descriptor, options, case, ran)
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


def check_restore(descriptor: Compressor, options: Options, case: Case, *, ran: Ran | None = None) -> None:
    """float32 of the layer's shape, finite, the same each time, from the stored tensors alone, which it leaves."""
    compressor, packed, shared, restored = looked_at(descriptor, options, case, ran)
    before = {name: bytes_of(tensor) for name, tensor in all_tensors(packed, shared).items()}
    assert restored.dtype == torch.float32, f"{descriptor.name}: restore must return float32, not {restored.dtype}"
    fresh = descriptor.make(options)
    assert isinstance(fresh, LayerCompressor)
    with untouched_randomness(f"{descriptor.name}: restore"), torch.no_grad():
        for other in (compressor, fresh):
            again = other.restore(packed, case.shape, shared)
            assert torch.equal(again, restored), (
                f"{descriptor.name}: restore differs from call to call: compute from stored tensors and options alone"
            )
    after = {name: bytes_of(tensor) for name, tensor in all_tensors(packed, shared).items()}
    assert before == after, f"{descriptor.name}: restore changes the stored tensors: work on copies"


def check_tunable(descriptor: Compressor, options: Options, case: Case, *, ran: Ran | None = None) -> None:
    """What a recovery stage may train is stored, is float, and has gradients through `restore`."""
    compressor, packed, shared, restored = looked_at(descriptor, options, case, ran)
    stored = all_tensors(packed, shared)
    tunable = compressor.tunable(packed, shared)
    for name, tensor in tunable.items():
        assert name in stored, f'{descriptor.name}: tunable {name!r} is not stored (shared ones are "shared/NAME")'
        assert tensor.is_floating_point(), f"{descriptor.name}: tunable {name!r} is {tensor.dtype}: only floats train"
    # of no entry, such as outliers of a matrix that has none: no gradient is to be had
    leaves = {name: tensor.detach().float().requires_grad_() for name, tensor in tunable.items() if tensor.numel()}
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


def check_extremes(descriptor: Compressor, options: Options, rows: int = 64, columns: int = 128) -> None:
    """An all-zero weight restores to zeros; with one huge outlier the error stays below the weight.

    The error of the weights or, where the method reads statistics, that of the outputs.
    """
    restored = try_case(descriptor, options, make_case(rows, columns, fill="zero")).outcome()[3]
    largest = float(restored.abs().max())
    assert largest <= ROUNDS_TO_ZERO, f"{descriptor.name}: an all-zero weight restores to values up to {largest:g}"
    case = make_case(rows, columns, fill="outlier")
    restored = try_case(descriptor, options, case).outcome()[3]  # restore_layer refuses what is not finite
    error = relative_error(case.weight, restored)
    if descriptor.needs_of(options).statistics not in ("none", "tokens"):
        # such a method lessens the error of the outputs, for which it may enlarge the weights'
        error = min(error, calibrated_error(case.weight, restored, case.second_moment))
    assert error <= 1.0, f"{descriptor.name}: with one outlier of {OUTLIER:g} the error exceeds the weight ({error:g})"


def check_round_trip(
    descriptor: Compressor, options: Options, case: Case, folder: Path, *, ran: Ran | None = None
) -> None:
    """Through an artifact on disk: every tensor, its role, meta and the restored weight, bit for bit."""
    compressor, packed, shared, restored = looked_at(descriptor, options, case, ran)
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
    written, loaded = all_tensors(packed, shared), all_tensors(read, artifact.shared)
    assert written.keys() == loaded.keys(), f"{descriptor.name}: tensors differ after reading"
    for name, tensor in written.items():
        same = (tensor.dtype, tensor.shape) == (loaded[name].dtype, loaded[name].shape)
        assert same, f"{descriptor.name}: {name!r} has another dtype or shape after reading"
        assert bytes_of(tensor) == bytes_of(loaded[name]), f"{descriptor.name}: {name!r} differs after reading"
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
