"""Artifacts of model compressors: restored whole, opened for a recovery stage, and written back after one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import LayerCompressor, LayerShape, ModelCompressor
from evenbits.errors import ArtifactError, TrialFailed
from evenbits.manifest import Manifest
from evenbits.models import get_weight, load_config, set_weight
from evenbits.opened import Opened, adapter_tensors
from evenbits.shapes import ARCHITECTURES, Architecture, read_config, read_inventory
from evenbits.tunable import TunableLinear


class WholeReader:
    """What a model compressor restores from (`evenbits.compressor.TensorReader`)."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    @property
    def config(self) -> Any:
        return load_config(self._artifact.folder, trust_remote_code=self._artifact.manifest.trust_remote_code)

    def tensors(self) -> Mapping[str, Tensor]:
        return self._artifact.whole()

    def meta(self) -> Mapping[str, Any]:
        return self._artifact.whole_meta()


def _restore(artifact: Artifact, compressor: Any) -> nn.Module:
    """As the method restores it, in eval mode and without gradients. Raises ArtifactError for a method of layers."""
    if isinstance(compressor, LayerCompressor):
        method = artifact.manifest.method
        raise ArtifactError(f"{artifact.folder}: stores a whole model, but method {method!r} restores layers")
    restorer: ModelCompressor = compressor
    return restorer.restore(WholeReader(artifact)).eval().requires_grad_(False)


def _architecture(artifact: Artifact) -> Architecture:
    return ARCHITECTURES[read_config(artifact.folder)["model_type"]]


@torch.no_grad()
def restore_whole(artifact: Artifact, compressor: Any) -> nn.Module:
    """The stored model with its adapters merged, in eval mode. Raises ArtifactError for a method of layers."""
    model = _restore(artifact, compressor)
    for name, (a, b) in artifact.adapters().items():
        architecture, module = _architecture(artifact), model.get_submodule(name)
        set_weight(module, get_weight(module, architecture) + b.float() @ a.float(), architecture)
    return model


class OpenedWhole(Opened):
    """A whole model as a recovery stage sees it. Its layers have the shapes that the method left them; nothing of
    them is tunable but through adapters, and an adapter merged keeps the dtype that its weight is stored in.

    Raises TrialFailed, naming it, for a linear layer that the restored model no longer has.
    """

    def __init__(
        self, artifact: Artifact, compressor: ModelCompressor, base: Path, tokens: Tensor, device: torch.device
    ) -> None:
        super().__init__(artifact, base, tokens, device)
        self.tensors = artifact.whole()
        self._meta = artifact.whole_meta()
        self._method = artifact.manifest.method
        self._transposed = _architecture(artifact).transposed
        self._rest_names = [name for name in self.tensors if name not in artifact.manifest.whole]
        self._shapes: list[LayerShape] = []
        self._weights: dict[str, Tensor] = {}  # as in the model's modules
        self.model = _restore(artifact, compressor).to(device)
        for layer, _ in read_inventory(base).layers:
            self._open(layer)

    def _open(self, layer: LayerShape) -> None:
        parent, _, child = layer.name.rpartition(".")
        module = getattr(self._parent(parent), child, None)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise TrialFailed(
                f"{layer.name}: method {self._method!r} left no such layer, so no recovery stage can open it"
            )
        self._weights[layer.name] = weight.detach()
        bias = getattr(module, "bias", None)
        rows, columns = weight.T.shape if self._transposed else weight.shape
        dtype = str(self.tensors.get(f"{layer.name}.weight", weight).dtype).removeprefix("torch.")
        found = LayerShape(layer.name, layer.block, layer.kind, rows, columns, dtype, bias is not None)
        self._shapes.append(found)
        setattr(self._parent(parent), child, TunableLinear(lambda: self.restore(layer.name), bias))

    def _parent(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(self._shapes)

    def restore(self, name: str) -> Tensor:
        """(out, in) float32: the weight as the model computes with it, its adapter added."""
        weight = self._weights[name].float()
        return self.adapted(name, weight.T if self._transposed else weight)

    def merge_adapters(self, layers: Iterable[str]) -> None:
        """Adapters become part of their weights, in the dtype that these are stored in: no byte is added.

        Raises TrialFailed for a layer without an adapter, whose sum is not finite at that dtype, or whose weight the
        method does not store as it is.
        """
        for name in layers:
            stored, weight = self.tensors.get(f"{name}.weight"), self._weights[name]
            # no other tensor of that name: what is stored is what the model computes with
            if stored is None or not stored.is_floating_point() or not torch.equal(stored.to(weight), weight):
                raise TrialFailed(
                    f"{name}: method {self._method!r} stores its weight in a form of its own, which no adapter can be "
                    "merged into; keep the adapters beside it"
                )
            merged = self.take_adapter(name, stored.dtype)
            self._weights[name] = merged.T if self._transposed else merged
            self.tensors[f"{name}.weight"] = self._weights[name]

    @torch.no_grad()
    def write(self, writer: ArtifactWriter, manifest: Manifest, facts: Mapping[str, Any]) -> Manifest:
        """Store what the stage made of it; `manifest` is that of before, `facts` what in it changes."""
        adapters = {name: self.stored_adapter(name) for name in self.adapters}
        for name, parameter in self.rest().items():
            self.tensors[name] = parameter.detach().to(self.tensors[name].dtype)
        writer.write("whole.safetensors", self.tensors, self._meta)
        if adapters:
            writer.write("adapters.safetensors", adapter_tensors(adapters))
        writer.copy_base_files(self._base)
        kept = manifest.model_dump(exclude={"files", "layers", "schema_version"})
        return writer.finish(**{**kept, **facts}, layers=())
