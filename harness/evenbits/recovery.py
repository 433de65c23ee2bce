"""The stage after a compressor: open an artifact so that gradients reach what may be trained, let the stage
train, and store the result as a new artifact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.artifact import Artifact, ArtifactWriter, dense_layer
from evenbits.compressor import AnyCompressor, LayerCompressor, LayerShape, PackedLayer, RecoveryStage, Role, Shared
from evenbits.driver import seeded_generator
from evenbits.manifest import Manifest, StoredLayer
from evenbits.maths.hessian import relative_error
from evenbits.models import build_model, guarded_randomness, read_weight, torch_dtype
from evenbits.opened import Opened, adapter_tensors
from evenbits.restoring import restore_layer
from evenbits.shapes import read_inventory
from evenbits.tunable import TunableLinear
from evenbits.whole import OpenedWhole

SHARED = "shared/"


class OpenedArtifact(Opened):
    """An artifact of packed layers as a recovery stage sees it (`evenbits.compressor.TunableModel`)."""

    def __init__(
        self, artifact: Artifact, compressor: LayerCompressor, base: Path, tokens: Tensor, device: torch.device
    ) -> None:
        super().__init__(artifact, base, tokens, device)
        self.layers: dict[str, tuple[StoredLayer, PackedLayer]] = {}
        self.shared: Shared | None = None if artifact.shared is None else _copy(artifact.shared)
        self._compressor = compressor
        state = artifact.rest()
        self._rest_names = list(state)
        for stored, packed in artifact.packed():
            self.layers[stored.name] = (stored, packed)
            state[f"{stored.name}.weight"] = torch.zeros(stored.out_features, stored.in_features)
        self.model = self._open(artifact, state)

    def _open(self, artifact: Artifact, state: dict[str, Tensor]) -> nn.Module:
        transposed = read_inventory(self._base).architecture.transposed
        for name in self.layers:
            if transposed:
                state[f"{name}.weight"] = state[f"{name}.weight"].T
        model: nn.Module = build_model(artifact.folder, state, self._dtype, trust_remote_code=self._trusted).to(
            self._device
        )
        for name, (stored, packed) in self.layers.items():
            self._tune(stored, packed)
            module = model.get_submodule(name)
            bias = getattr(module, "bias", None)
            replacement = TunableLinear(lambda name=name: self.restore(name), bias)  # type: ignore[misc]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
        return model

    def _tune(self, stored: StoredLayer, packed: PackedLayer) -> None:
        if stored.left_dense:
            return
        for key, tensor in self._compressor.tunable(packed, self.shared).items():
            if key.startswith(SHARED):
                if key not in self.parameters:
                    self.parameters[key] = nn.Parameter(tensor.detach().float().to(self._device))
            else:
                self.parameters[f"{stored.name}/{key}"] = nn.Parameter(tensor.detach().float().to(self._device))

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(stored.shape for stored, _ in self.layers.values())

    def restore(self, name: str) -> Tensor:
        """(out, in) float32, with the parameters in place of the tensors they stand for, and its adapter added."""
        stored, packed = self.layers[name]
        weight = restore_layer(self._compressor, self._with(f"{name}/", packed), stored.shape, self._shared_now())
        return self.adapted(name, weight)

    def _with(self, prefix: str, packed: PackedLayer) -> PackedLayer:
        tensors = {
            key: self.parameters.get(prefix + key, tensor.to(self._device)) for key, tensor in packed.tensors.items()
        }
        return PackedLayer(tensors, packed.roles, packed.meta)

    def _shared_now(self) -> Shared | None:
        return None if self.shared is None else self._with(SHARED, self.shared)

    def merge_adapters(self, layers: Iterable[str]) -> None:
        """Adapters become part of their weights, which are stored dense from then on, at the evaluated dtype.

        Raises TrialFailed for a layer without an adapter, or whose sum is not finite at that dtype.
        """
        dtype = torch_dtype(self._dtype)
        for name in layers:
            packed = dense_layer(self.take_adapter(name, dtype), dtype)
            self.layers[name] = (self.layers[name][0].model_copy(update={"roles": packed.roles}), packed)
            for key in [key for key in self.parameters if key.startswith(f"{name}/")]:
                del self.parameters[key]

    # -- what is stored ---------------------------------------------------------------------------------------

    def trained(self, prefix: str, packed: PackedLayer) -> PackedLayer:
        """The packed tensors with what was trained, back in the dtypes they were stored in."""
        tensors = {
            key: self.parameters[prefix + key].detach().to(tensor.dtype) if prefix + key in self.parameters else tensor
            for key, tensor in packed.tensors.items()
        }
        return PackedLayer(tensors, packed.roles, packed.meta)


class _Noting(dict[str, Tensor]):
    """Tensors by name, and the names that were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], read: set[str]) -> None:
        super().__init__(tensors)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def values(self) -> Any:
        self._read.update(self)
        return super().values()

    def items(self) -> Any:
        self._read.update(self)
        return super().items()


def _copy(packed: PackedLayer) -> PackedLayer:
    return PackedLayer(dict(packed.tensors), dict(packed.roles), dict(packed.meta))


@dataclass(frozen=True)
class RecoveryWork:
    """What to recover: the artifact before, the stage, and the base model it came from."""

    before: Artifact
    compressor: AnyCompressor
    stage: RecoveryStage
    name: str
    base: Path
    tokens: Tensor
    seed: int
    device: torch.device


def recover(work: RecoveryWork, writer: ArtifactWriter, facts: Mapping[str, Any]) -> Manifest:
    """Run the stage and store what it made of the artifact. `facts`: what in the manifest changes (key, recovery)."""
    compressor = work.compressor
    if isinstance(compressor, LayerCompressor):
        layers = OpenedArtifact(work.before, compressor, work.base, work.tokens, work.device)
        _train(work, layers)
        with torch.no_grad():
            return _write(work, compressor, layers, writer, facts)
    whole = OpenedWhole(work.before, compressor, work.base, work.tokens, work.device)
    _train(work, whole)
    return whole.write(writer, work.before.manifest, facts)


def _train(work: RecoveryWork, opened: OpenedArtifact | OpenedWhole) -> None:
    with guarded_randomness(work.seed), torch.enable_grad():
        work.stage.recover(opened, seeded_generator(work.seed, "recovery", work.name))


def _write(
    work: RecoveryWork,
    compressor: LayerCompressor,
    opened: OpenedArtifact,
    writer: ArtifactWriter,
    facts: Mapping[str, Any],
) -> Manifest:
    manifest = work.before.manifest
    inventory = read_inventory(work.base)
    weights = {layer.name: tensor for layer, tensor in inventory.layers}
    shared = None if opened.shared is None else opened.trained(SHARED, opened.shared)
    read: set[str] = set()
    if shared is not None:
        shared = PackedLayer(_Noting(shared.tensors, read), shared.roles, shared.meta)
    adapters = {name: opened.stored_adapter(name) for name in opened.adapters}
    layers = []
    for file in dict.fromkeys(layer.file for layer in manifest.layers):
        block = [opened.layers[layer.name] for layer in manifest.layers if layer.file == file]
        for layer, before in block:
            packed = opened.trained(f"{layer.name}/", before)
            restored = restore_layer(compressor, packed, layer.shape, shared)
            if layer.name in adapters:
                a, b = adapters[layer.name]
                restored = restored + (b.float() @ a.float()).to(restored.device)
            dense = read_weight(weights[layer.name], inventory.architecture)
            error = None if layer.folded else relative_error(dense, restored.cpu())
            # the statistics that the method saw are gone: the calibrated error is not known after tuning
            layers.append(layer.model_copy(update={"error": error, "calibrated_error": None}))
            writer.add_layer(layer.name, packed)
        writer.flush_block(block[0][0].block)
    if shared is not None:
        # what only layers used that are dense now is neither stored nor billed
        tensors = {name: shared.tensors[name] for name in shared.tensors if name in read}
        shared = PackedLayer(tensors, {name: shared.roles[name] for name in tensors}, shared.meta) if tensors else None
    if shared is not None:
        writer.write_shared(shared)
    rest = work.before.rest()
    for name, parameter in opened.rest().items():
        rest[name] = parameter.detach().to(rest[name].dtype)
    writer.write("rest.safetensors", rest)
    if adapters:
        writer.write("adapters.safetensors", adapter_tensors(adapters))
    writer.copy_base_files(work.base)
    kept = manifest.model_dump(exclude={"files", "layers", "schema_version"})
    found = {
        "layers": tuple(layers),
        "shared": {} if shared is None else shared.roles,
        "paper_bits": _paper_bits(manifest, layers),
    }
    return writer.finish(**{**kept, **facts, **found})


def _paper_bits(before: Manifest, layers: Sequence[StoredLayer]) -> float:
    """The method's paper bits, with those of a dense weight for the layers that the stage made dense."""
    merged = {layer.name for layer in layers if layer.left_dense}
    merged -= {layer.name for layer in before.layers if layer.left_dense}
    weights = sum(layer.shape.weights for layer in layers if layer.name in merged)
    share = weights / sum(layer.shape.weights for layer in layers)
    dense_bits = 8 * torch_dtype(before.dtype).itemsize
    return before.paper_bits * (1 - share) + dense_bits * share


class LeaveDense(LayerCompressor):
    """The dense model as an artifact, so that a recovery stage can follow it."""

    def compress(self, weight: Tensor, layer: Any, shared: Shared | None, generator: torch.Generator) -> PackedLayer:
        return PackedLayer({"weight": weight.to(self.dtype)}, {"weight": Role.DENSE})

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
