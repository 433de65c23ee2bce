"""A stored model whose linear layers compute from their packed form: no dense weight of theirs is ever in memory.

What computes each layer, or why one runs on its restored dense weight after all, is kept with the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenbits.artifact import Artifact
from evenbits.compressor import LayerCompressor, PackedLayer, Refusal
from evenbits.errors import ArtifactError, TrialFailed
from evenbits.kernels.launch import Choice
from evenbits.streaming import fill_places, open_skeleton, places_of
from evenbits.weights import ArtifactWeights

STORED_DENSE = "stored dense"
_ATTRIBUTE = "evenbits_kernels"


@dataclass(frozen=True)
class LayerKernels:
    """What computes the linear layers of a model's blocks.

    packed  layer -> the module that its method's `linear` made
    dense   layer -> why it runs on a dense weight
    whole   why there are no layers to speak of, "" where there are: the dense model, or a method of whole models
    expected  whether that is as anyone expects: of the dense model it is, and no remark is made of it
    """

    packed: Mapping[str, nn.Module] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    whole: str = ""
    expected: bool = False

    @property
    def held_bytes(self) -> int | None:
        """Bytes that packed layers keep between calls, as they say themselves, tensors of several layers counted once;
        None where one does not say."""
        seen: set[tuple[int, int]] = set()
        total = 0
        for module in self.packed.values():
            held = getattr(module, "held_bytes", None)
            if held is None:
                return None
            own = {(buffer.data_ptr(), buffer.nbytes) for buffer in module.buffers()}
            total += int(held) - sum(size for _, size in own & seen)
            seen |= own
        return total

    def choice(self, layer: str, rows: int) -> Choice:
        """What computes a packed layer for so many rows (batch times tokens): the class's name where it does not say.

        Raises KeyError for a layer that is not packed.
        """
        module = self.packed[layer]
        choose = getattr(module, "choice", None)
        if choose is None:
            return Choice(type(module).__name__, "the only path of this module")
        found = choose(rows)
        assert isinstance(found, Choice)
        return found

    def facts(self, rows: Mapping[str, int]) -> dict[str, Any]:
        """As JSON, for a measurement's details. rows: of each phase, such as {"prefill": 128, "decode": 1}.

        Equal choices stand once, with the number of layers.
        """
        facts: dict[str, Any] = {"packed_layers": len(self.packed), "dense_layers": len(self.dense)}
        if self.whole:
            return {**facts, "whole": self.whole}
        if self.dense:
            facts["why_dense"] = dict(Counter(self.dense.values()).most_common())
        if self.packed:
            facts["held_bytes"] = self.held_bytes
            facts["phases"] = {phase: {"rows": count, "ran": self._ran(count)} for phase, count in rows.items()}
        return facts

    def _ran(self, rows: int) -> list[dict[str, Any]]:
        """What ran, the most frequent first; of layers that are only near what is stored the least and the largest
        decibels."""
        found: dict[Choice, list[float | None]] = {}
        for layer in self.packed:
            choice = self.choice(layer, rows)
            found.setdefault(replace(choice, decibels=None), []).append(choice.decibels)
        ran = []
        for choice, decibels in sorted(found.items(), key=lambda one: -len(one[1])):
            said = {"kernel": choice.kernel, "config": choice.config, "reason": choice.reason, "layers": len(decibels)}
            near = [value for value in decibels if value is not None and math.isfinite(value)]
            ran.append({**said, "decibels": [min(near), max(near)]} if near else said)
        return ran

    @property
    def remark(self) -> str | None:
        """One line where something that could have been packed ran dense; None where all is packed, or all dense by
        its nature."""
        if self.whole:
            return None if self.expected else f"nothing ran from packed weights: {self.whole}"
        if not self.dense:
            return None
        (reason, layers), *others = Counter(self.dense.values()).most_common()
        more = f", and {len(others)} more reasons" if len(others) > 1 else ", and one more reason" if others else ""
        count = len(self.dense) + len(self.packed)
        noun = "layer" if layers == 1 else "layers"
        return f"{len(self.dense)} of {count} layers ran on dense weights: {reason} ({layers} {noun}){more}"


def kernels_of(model: Any) -> LayerKernels | None:
    """What computes the layers of a model opened from its packed weights; None for any other."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, LayerKernels) else None


def attach_kernels(model: Any, kernels: LayerKernels) -> Any:
    """The model, with what `kernels_of` will say of it."""
    setattr(model, _ATTRIBUTE, kernels)
    return model


class PackedLayerModule(nn.Module):
    """A layer of a model in place of its nn.Linear or GPT-2's Conv1D: y = path(x) + x A^T B^T + bias.

    path: inputs (..., in) -> (..., out) in their dtype. An adapter stays the two small matrices that it is stored as:
    its product with the input is added in the inputs' dtype, where a restored weight has it merged in float32.
    """

    path: nn.Module | None
    bias: nn.Parameter | None
    adapter_a: Tensor | None  # (r, in)
    adapter_b: Tensor | None  # (out, r)

    def __init__(self, bias: nn.Parameter | None) -> None:
        """`install` makes it a layer; until then it only keeps the bias's place among the stored tensors."""
        super().__init__()
        self.register_parameter("bias", bias)
        self.register_buffer("adapter_a", None, persistent=False)
        self.register_buffer("adapter_b", None, persistent=False)
        self.path = None

    def install(self, path: nn.Module, adapter: tuple[Tensor, Tensor] | None) -> None:
        self.path = path
        if adapter is not None:
            self.adapter_a, self.adapter_b = adapter

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype."""
        assert self.path is not None
        outputs: Tensor = self.path(inputs)
        if self.adapter_a is not None and self.adapter_b is not None:
            low = functional.linear(inputs, self.adapter_a.to(inputs.dtype))
            outputs = outputs + functional.linear(low, self.adapter_b.to(inputs.dtype))
        return outputs if self.bias is None else outputs + self.bias


def open_packed(
    artifact: Artifact,
    compressor: Any,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    approximate: bool = False,
    advance: Callable[[int], None] = lambda layers: None,
) -> Any:
    """A transformers model in eval mode, each layer that the method has a packed path for computed by that; all else
    is read straight into its place. `kernels_of` says what computes each layer.

    approximate: by `LayerCompressor.approximate_linear`. advance: is told of each layer done.
    Raises ArtifactError for a method that stores a whole model, TrialFailed naming a layer whose packed path cannot be
    made, and tensors that are missing or left over.
    """
    manifest, folder = artifact.manifest, artifact.folder
    if manifest.model_form != "layers" or not isinstance(compressor, LayerCompressor):
        raise ArtifactError(f"{folder}: {whole_reason(manifest.method)}; open it restored")
    model = open_skeleton(folder, manifest.dtype, trust_remote_code=trust_remote_code)
    make = compressor.approximate_linear if approximate else compressor.linear
    packed, dense = make_paths(artifact, make, device, advance)
    places = {name: stand_in(model, name) for name in packed}
    weights = ArtifactWeights(artifact, compressor)
    stored = [*artifact.rest_names(), *(f"{name}.weight" for name in dense)]
    fill_places(places_of(model, stored, str(folder)), weights, device, folder)
    for name, path in packed.items():
        adapter = artifact.adapter(name)
        places[name].install(path, None if adapter is None else owned_pair(adapter, device))
    model.to(device).eval().requires_grad_(False)
    return attach_kernels(model, LayerKernels(packed, dense))


def whole_reason(method: str) -> str:
    return f"method {method!r} stores a whole model, which computes as the method restores it"


def make_paths(
    artifact: Artifact, make: Callable[..., nn.Module | Refusal], device: torch.device, advance: Callable[[int], None]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(layer -> module, layer -> why dense). What layers share is held once, and so is what each makes of it alike."""
    shared = None if artifact.shared is None else _owned(artifact.shared, device)
    once = _Once()
    packed: dict[str, nn.Module] = {}
    dense: dict[str, str] = {}
    for layer, tensors in artifact.packed():
        if layer.left_dense:
            dense[layer.name] = STORED_DENSE
            advance(1)
            continue
        with torch.no_grad():
            try:
                found = make(_owned(tensors, device), layer.shape, shared, device)
            except ValueError as error:
                raise TrialFailed(f"{layer.name}: no packed path could be made: {error}") from error
        if isinstance(found, Refusal):
            dense[layer.name] = found.reason
        else:
            packed[layer.name] = once(found)
        del tensors, found  # before the next layer is read
        advance(1)
    return packed, dense


class _Once:
    """Makes equal buffers of several modules one: a table that each layer decodes from the same codebook would else be
    there as many times as there are layers."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}  # by what is cheap to compare

    def __call__(self, made: nn.Module) -> nn.Module:
        for module in made.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self._one(buffer)
        return made

    def _one(self, buffer: Tensor) -> Tensor:
        first = tuple(buffer.flatten()[:16].tolist())
        alike = self._known.setdefault((buffer.dtype, buffer.shape, buffer.stride(), first), [])
        for tensor in alike:
            if torch.equal(tensor, buffer):
                return tensor
        alike.append(buffer)
        return buffer


def _owned(packed: PackedLayer, device: torch.device) -> PackedLayer:
    """Copies: what is read from a file is a view of it, which would keep the whole file's pages."""
    return PackedLayer({k: t.to(device, copy=True) for k, t in packed.tensors.items()}, packed.roles, packed.meta)


def owned_pair(pair: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return pair[0].to(device, copy=True), pair[1].to(device, copy=True)


def stand_in(model: nn.Module, name: str) -> PackedLayerModule:
    """Put in a layer's place what `install` makes it; its bias stays where it was among the parameters."""
    module = model.get_submodule(name)
    found = PackedLayerModule(module._parameters.get("bias"))
    model.set_submodule(name, found)
    return found
