"""The Python door: one method on a matrix or on a few, and an artifact as a transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, overload

import torch
from torch import Tensor

from evenbits.budget import BitBudget, default_window
from evenbits.compressor import Layer, LayerCompressor, LayerShape, ModelShapes, PackedLayer, Refusal, Role, Shared
from evenbits.driver import seeded_generator
from evenbits.errors import SuiteError, TrialFailed
from evenbits.maths.hessian import calibrated_error, relative_error
from evenbits.measure import Weights
from evenbits.models import guarded_randomness
from evenbits.packed import kernels_of
from evenbits.plugins import load_plugins
from evenbits.record import Bits
from evenbits.restoring import restore_layer
from evenbits.subject import choose_device, load_artifact
from evenbits.suite import check_options

_NO_LOSS = "needs gradients of a whole model's loss, which matrices alone do not have: compress the model in a suite"
ASYMMETRY = 1e-4  # of a second moment, relative to its largest entry: what float32 sums in another order leave


@dataclass(frozen=True)
class CompressedWeight:
    """What one method made of one matrix.

    packed            the tensors that would be stored, with the role each is billed under
    restored          (out, in) float32, decoded from them
    options           the method's options, as `fit` chose them or as given
    bits              index, paper and linear bits per weight; with several weights linear counts shared parts once
                      over all of them; `model` equals `linear`, there being no more of a model than these
    error             ||W - W'||^2 / ||W||^2
    calibrated_error  tr(E H E^T) / tr(W H W^T), None without a second moment
    shared            what several weights share, or None
    """

    packed: PackedLayer
    restored: Tensor
    options: Mapping[str, Any]
    bits: Bits
    error: float
    calibrated_error: float | None = None
    shared: Shared | None = field(default=None, repr=False)


class _Survey:
    """The matrices at hand, as a method's `prepare` walks them."""

    def __init__(self, shapes: ModelShapes, weights: Sequence[Tensor], moments: Sequence[Tensor | None]) -> None:
        self.shapes = shapes
        self._weights = weights
        self._moments = {layer.name: moment for layer, moment in zip(shapes.layers, moments, strict=True)}

    def __iter__(self) -> Iterator[tuple[LayerShape, Tensor]]:
        yield from zip(self.shapes.layers, self._weights, strict=True)

    def second_moment(self, name: str) -> Tensor:
        moment = self._moments[name]
        if moment is None:
            raise TrialFailed(f"{name}: this method needs the second moment of its inputs: give second_moment=")
        return moment

    def fisher(self, name: str) -> Tensor:
        raise TrialFailed(f"{name}: {_NO_LOSS}")


def _tensors(given: Tensor | Sequence[Tensor], what: str) -> list[Tensor]:
    found = [given] if isinstance(given, Tensor) or not isinstance(given, Sequence) else list(given)
    for index, tensor in enumerate(found):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} {index} must be a torch tensor, not {type(tensor).__name__}")
    return found


def _moments_of(given: Tensor | Sequence[Tensor] | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    if given is None:
        return [None] * len(weights)
    found = _tensors(given, "second moment")
    if len(found) != len(weights):
        raise ValueError(f"{len(found)} second moment(s) for {len(weights)} weight(s)")
    return [
        _checked_moment(moment, matrix.shape[1], i)
        for i, (moment, matrix) in enumerate(zip(found, weights, strict=True))
    ]


def _checked_weight(weight: Tensor, index: int) -> Tensor:
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight {index} must be a float matrix (out, in), not {tuple(weight.shape)} {weight.dtype}")
    weight = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):  # after the cast: float64 holds numbers that float32 does not
        raise TrialFailed(f"weight {index} is not finite in float32; it cannot be compressed")
    return weight


def _checked_moment(moment: Tensor, columns: int, index: int) -> Tensor:
    if tuple(moment.shape) != (columns, columns) or not moment.is_floating_point():
        shape = f"{tuple(moment.shape)} {moment.dtype}"
        raise ValueError(f"second moment {index} must be a float matrix {(columns, columns)}, not {shape}")
    moment = moment.detach().to(torch.float32)
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(f"second moment {index} is not finite in float32")
    if float((moment - moment.T).abs().max()) > ASYMMETRY * float(moment.abs().max()):
        raise ValueError(f"second moment {index} is not symmetric, as a mean of x x^T is")
    return moment


@overload
def compress_weight(
    weight: Tensor,
    method: str,
    *,
    budget: float | BitBudget | None = ...,
    options: Mapping[str, Any] | None = ...,
    second_moment: Tensor | None = ...,
    seed: int = ...,
) -> CompressedWeight: ...
@overload
def compress_weight(
    weight: Sequence[Tensor],
    method: str,
    *,
    budget: float | BitBudget | None = ...,
    options: Mapping[str, Any] | None = ...,
    second_moment: Sequence[Tensor] | None = ...,
    seed: int = ...,
) -> list[CompressedWeight]: ...
def compress_weight(
    weight: Tensor | Sequence[Tensor],
    method: str,
    *,
    budget: float | BitBudget | None = None,
    options: Mapping[str, Any] | None = None,
    second_moment: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
) -> CompressedWeight | list[CompressedWeight]:
    """Run one method on one matrix, or on several that may share parts.

    weight: (out, in) float, or a list of such. budget: bits per weight (a centre with the default window, or a
    BitBudget): the method chooses its settings; `options` pin some of them, or all without a budget.
    second_moment: (in, in) mean of x x^T over the inputs x, one for each weight.

    Raises SuiteError for an unknown method or option and for a budget that no setting meets, ValueError for wrong
    shapes, a second moment that is none or a seed outside 0..2^63 - 1, TrialFailed when a weight is not finite or the
    method needs what was not given.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
    weights = [_checked_weight(matrix, index) for index, matrix in enumerate(_tensors(weight, "weight"))]
    if not weights:
        raise ValueError("give at least one weight")
    moments = _moments_of(second_moment, weights)
    descriptor = load_plugins().find("compressors", method, "method").value
    shapes = _shapes_of(weights)
    chosen = _choose(descriptor, budget, shapes, options or {})
    compressor = descriptor.make(chosen)
    if not isinstance(compressor, LayerCompressor):
        raise SuiteError(f"method {method!r} compresses whole models, not single matrices")
    if descriptor.needs_of(chosen).statistics == "fisher":
        raise TrialFailed(f"method {method!r} {_NO_LOSS}")
    if descriptor.needs_of(chosen).statistics != "none" and any(moment is None for moment in moments):
        raise TrialFailed(f"method {method!r} needs the second moment of the layer's inputs: give second_moment=")
    estimate = descriptor.predict(chosen, shapes)
    window = _budget_of(budget)
    with guarded_randomness(seed), torch.no_grad():
        shared = compressor.prepare(_Survey(shapes, weights, moments), seeded_generator(seed, "prepare"))
        packed = [
            compressor.compress(matrix, Layer(layer, moment, None, window), shared, seeded_generator(seed, layer.name))
            for layer, matrix, moment in zip(shapes.layers, weights, moments, strict=True)
        ]
        restored = [
            restore_layer(compressor, stored, layer, shared)
            for layer, stored in zip(shapes.layers, packed, strict=True)
        ]
    total = sum(stored.nbytes for stored in packed) + (0 if shared is None else shared.nbytes)
    codes = sum(_bytes_of(stored, Role.CODE) for stored in packed)
    linear = 8 * total / shapes.weights
    bits = Bits(index=8 * codes / shapes.weights, paper=estimate.paper_bits, linear=linear, model=linear)
    results = [
        CompressedWeight(
            packed=stored,
            restored=decoded,
            options=chosen.model_dump(mode="json"),
            bits=bits,
            error=relative_error(matrix, decoded),
            calibrated_error=None if moment is None else calibrated_error(matrix, decoded, moment),
            shared=shared,
        )
        for matrix, moment, stored, decoded in zip(weights, moments, packed, restored, strict=True)
    ]
    return results[0] if isinstance(weight, Tensor) else results


def _shapes_of(weights: Sequence[Tensor]) -> ModelShapes:
    layers = tuple(
        LayerShape(f"weight.{index}", index, "weight", matrix.shape[0], matrix.shape[1], "float32")
        for index, matrix in enumerate(weights)
    )
    count = sum(matrix.numel() for matrix in weights)
    return ModelShapes(layers, count, 0, 4 * count)


def _budget_of(budget: float | BitBudget | None) -> BitBudget | None:
    if budget is None or isinstance(budget, BitBudget):
        return budget
    return BitBudget(float(budget), default_window(float(budget)))


def _choose(descriptor: Any, budget: float | BitBudget | None, shapes: ModelShapes, options: Mapping[str, Any]) -> Any:
    checked = check_options(descriptor.options, options, f"method {descriptor.name}: options")
    window = _budget_of(budget)
    if window is None:
        return checked
    fitted = descriptor.fit(window, shapes, options)
    if isinstance(fitted, Refusal):
        raise SuiteError(f"method {descriptor.name}: {fitted.reason}")
    return fitted


def _bytes_of(packed: PackedLayer, role: Role) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for key, tensor in packed.tensors.items() if packed.roles[key] is role
    )


def load(artifact_folder: str | Path, *, device: str = "cpu", weights: Weights = "restored") -> Any:
    """A transformers model from an artifact folder, in eval mode.

    weights: "restored" decodes every layer to a dense weight. "packed" computes each layer from what is stored, by the
    method's kernel for the device, and takes the memory of the packed model; a warning says which layers the method
    has no such path for, and `evenbits.packed.kernels_of(model)` what computes each of the others. "approximate" takes
    what the method offers as faster and near what is stored: PocketLLM's decoders folded into tables.

    Raises ArtifactError for a damaged or too new artifact and, with packed weights, for a model stored whole;
    SuiteError when the method's plugin is not installed or for an unknown device; ValueError for other `weights`.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be {' or '.join(map(repr, get_args(Weights)))}, not {weights!r}")
    model = load_artifact(Path(artifact_folder), load_plugins(), choose_device(device), weights=weights)
    kernels = kernels_of(model)
    if kernels is not None and kernels.remark:
        warnings.warn(f"{artifact_folder}: {kernels.remark}", stacklevel=2)
    return model
