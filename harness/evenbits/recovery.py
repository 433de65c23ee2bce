"""The stage after a compressor: open an artifact so that gradients reach what may be trained, let the stage
train, and store the result as a new artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.artifact import Artifact, ArtifactWriter, dense_layer
from evenbits.compressor import LayerCompressor, LayerShape, PackedLayer, RecoveryStage, Role, Shared
from evenbits.driver import restore_layer, seeded_generator
from evenbits.errors import TrialFailed
from evenbits.manifest import ADAPTER_A, ADAPTER_B, Manifest, StoredLayer
from evenbits.maths.hessian import relative_error
from evenbits.models import build_model, guarded_randomness, load_tokenizer, open_model, read_weight, torch_dtype
from evenbits.shapes import read_inventory

SHARED = "shared/"


class TunableLinear(nn.Module):
    """A linear layer whose weight is restored from packed tensors at each call, so that gradients reach these."""

    def __init__(self, restore: Callable[[], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self._restore = restore
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self._restore().to(inputs.dtype), self.bias)


class OpenedArtifact:
    """An artifact as a recovery stage sees it (`evenbits.compressor.TunableModel`)."""

    def __init__(
        self, artifact: Artifact, compressor: LayerCompressor, base: Path, tokens: Tensor, device: torch.device
    ) -> None:
        if artifact.manifest.model_form != "layers":
            raise TrialFailed(
                f"method {artifact.manifest.method!r} stores a whole model: no recovery stage can open it"
            )
        self.calibration = tokens.to(device)
        self.tokenizer = load_tokenizer(artifact.folder, trust_remote_code=artifact.manifest.trust_remote_code)
        self.parameters: dict[str, nn.Parameter] = {}
        self.adapters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.adapter_dtypes: dict[str, torch.dtype] = {}
        self.layers: dict[str, tuple[StoredLayer, PackedLayer]] = {}
        self.shared: Shared | None = None if artifact.shared is None else _copy(artifact.shared)
        self._compressor = compressor
        self._base = base
        self._dtype = artifact.manifest.dtype
        self._trusted = artifact.manifest.trust_remote_code
        self._device = device
        state = artifact.rest()
        for stored, packed in artifact.packed():
            self.layers[stored.name] = (stored, packed)
            state[f"{stored.name}.weight"] = torch.zeros(stored.out_features, stored.in_features)
        self._rest_names = list(artifact.rest())
        self.model = self._open(artifact, state)

    def _open(self, artifact: Artifact, state: dict[str, Tensor]) -> nn.Module:
        transposed = read_inventory(self._base).architecture.transposed
        for name in self.layers:
            if transposed:
                state[f"{name}.weight"] = state[f"{name}.weight"].T
        model: nn.Module = build_model(artifact.folder, state, self._dtype, trust_remote_code=self._trusted).to(
            self._device
        )
        for name, (a, b) in artifact.adapters().items():
            # trained in float32, stored in what it was stored in
            self.adapters[name] = (nn.Parameter(a.float().to(self._device)), nn.Parameter(b.float().to(self._device)))
            self.adapter_dtypes[name] = a.dtype
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
        if name in self.adapters:
            a, b = self.adapters[name]
            weight = weight + b.float() @ a.float()
        return weight

    def _with(self, prefix: str, packed: PackedLayer) -> PackedLayer:
        tensors = {
            key: self.parameters.get(prefix + key, tensor.to(self._device)) for key, tensor in packed.tensors.items()
        }
        return PackedLayer(tensors, packed.roles, packed.meta)

    def _shared_now(self) -> Shared | None:
        return None if self.shared is None else self._with(SHARED, self.shared)

    def dense(self) -> nn.Module:
        model: nn.Module = open_model(self._base, self._dtype, self._device, trust_remote_code=self._trusted)
        return model

    def rest(self) -> Mapping[str, nn.Parameter]:
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in self._rest_names if name in known}

    def add_adapter(self, layer: str, tensors: Mapping[str, Tensor], dtype: str | None = None) -> None:
        if layer not in self.layers:
            raise TrialFailed(f"{layer!r} is not a linear layer of this model")
        if layer in self.adapters:
            raise TrialFailed(f"{layer}: has an adapter from a stage before; train that one")
        a, b = tensors["A"], tensors["B"]
        shape = self.layers[layer][0].shape
        if (b.shape[0], b.shape[1:], a.shape[1]) != (shape.out_features, a.shape[:1], shape.in_features):
            raise TrialFailed(f"{layer}: an adapter of {tuple(b.shape)} times {tuple(a.shape)} does not fit its weight")
        self.adapters[layer] = (
            a if isinstance(a, nn.Parameter) else nn.Parameter(a.to(self._device)),
            b if isinstance(b, nn.Parameter) else nn.Parameter(b.to(self._device)),
        )
        self.adapter_dtypes[layer] = torch_dtype(dtype or self._dtype)

    def merge_adapters(self, layers: Iterable[str]) -> None:
        """Adapters become part of their weights, which are stored dense from then on, at the evaluated dtype.

        Raises TrialFailed for a layer without an adapter, or whose sum is not finite at that dtype.
        """
        for name in layers:
            if name not in self.adapters:
                raise TrialFailed(f"{name}: has no adapter that could be merged")
            with torch.no_grad():
                packed = dense_layer(self.restore(name), torch_dtype(self._dtype))
            if not bool(torch.isfinite(packed.tensors["weight"]).all()):
                raise TrialFailed(f"{name}: with its adapter merged, the weight is not finite in {self._dtype}")
            self.layers[name] = (self.layers[name][0].model_copy(update={"roles": packed.roles}), packed)
            del self.adapters[name], self.adapter_dtypes[name]
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

    def stored_adapter(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) in the dtype they are stored in. Raises TrialFailed where that cannot hold them."""
        dtype = self.adapter_dtypes[name]
        a, b = (tensor.detach().to(dtype) for tensor in self.adapters[name])
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise TrialFailed(f"{name}: its adapter is not finite in {str(dtype).removeprefix('torch.')}")
        return a, b


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
    compressor: LayerCompressor
    stage: RecoveryStage
    name: str
    base: Path
    tokens: Tensor
    seed: int
    device: torch.device


def recover(work: RecoveryWork, writer: ArtifactWriter, facts: Mapping[str, Any]) -> Manifest:
    """Run the stage and store what it made of the artifact. `facts`: what in the manifest changes (key, recovery)."""
    opened = OpenedArtifact(work.before, work.compressor, work.base, work.tokens, work.device)
    with guarded_randomness(work.seed), torch.enable_grad():
        work.stage.recover(opened, seeded_generator(work.seed, "recovery", work.name))
    with torch.no_grad():
        return _write(work, opened, writer, facts)


def _write(work: RecoveryWork, opened: OpenedArtifact, writer: ArtifactWriter, facts: Mapping[str, Any]) -> Manifest:
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
            restored = restore_layer(work.compressor, packed, layer.shape, shared)
            if layer.name in adapters:
                a, b = adapters[layer.name]
                restored = restored + (b.float() @ a.float()).to(restored.device)
            dense = read_weight(weights[layer.name], inventory.architecture)
            error = relative_error(dense, restored.cpu())
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
        named = {f"{name}/{ADAPTER_A}": a for name, (a, _) in adapters.items()}
        named |= {f"{name}/{ADAPTER_B}": b for name, (_, b) in adapters.items()}
        writer.write("adapters.safetensors", named)
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
