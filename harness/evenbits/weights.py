"""A stored model's tensors one at a time, from a checkpoint or an artifact: nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from evenbits.artifact import Artifact
from evenbits.compressor import LayerCompressor, PackedLayer
from evenbits.errors import TrialFailed
from evenbits.manifest import StoredLayer
from evenbits.models import read_tensor
from evenbits.restoring import restore_layer
from evenbits.shapes import ARCHITECTURES, read_config, read_inventory


class StoredWeights(Protocol):
    """A model's tensors on disk, under their names in the transformers model and as its modules hold them."""

    @property
    def names(self) -> Collection[str]: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """One at a time, in any order and any dtype; the tensor may be a view of a mapped file.

        Raises TrialFailed when the files have changed since this was made.
        """
        ...


class _Files:
    """Files that are read over minutes: one replaced on the way would give a model of two halves."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._seen = {file: _looks(file) for file in files}

    def check(self) -> None:
        """Raises TrialFailed when one is not as it was at first."""
        for file, looks in self._seen.items():
            if _looks(file) != looks:
                raise TrialFailed(f"{file}: changed while the model was read from it; measure again")


def _looks(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class DenseWeights:
    """The tensors of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Raises SuiteError as `read_inventory` does."""
        inventory = read_inventory(folder)
        stored = [tensor for _, tensor in inventory.layers] + list(inventory.rest)
        self._tensors = {tensor.name: tensor for tensor in stored}
        self._files = _Files({tensor.file for tensor in stored})

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        self._files.check()
        for name in names:
            yield name, read_tensor(self._tensors[name])
        self._files.check()


class ArtifactWeights:
    """The tensors of an artifact of layers: packed ones decoded, with their adapters merged."""

    def __init__(self, artifact: Artifact, compressor: LayerCompressor) -> None:
        """Raises TrialFailed for an artifact that stores a whole model: nothing says which tensors a block needs."""
        manifest = artifact.manifest
        if manifest.model_form != "layers":
            raise TrialFailed(
                f"method {manifest.method!r} stores a whole model, which can only be restored at once: it cannot be "
                'streamed a block at a time; give memory = "model"'
            )
        self._artifact, self._compressor = artifact, compressor
        self._transposed = ARCHITECTURES[read_config(artifact.folder)["model_type"]].transposed
        self._layers = {f"{layer.name}.weight": layer for layer in artifact.layers}
        self._rest = artifact.rest_names()
        self._files = _Files(artifact.folder / name for name in artifact.manifest.files)

    @property
    def names(self) -> Collection[str]:
        return {*self._layers, *self._rest}

    @torch.no_grad()
    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        self._files.check()
        for name in names:
            if name not in self._layers:
                yield name, self._artifact.rest_tensor(name)
        wanted = {self._layers[name].name for name in names if name in self._layers}
        for file in dict.fromkeys(self._layers[name].file for name in names if name in self._layers):
            for stored, packed in self._artifact.block(file):
                if stored.name in wanted:
                    yield f"{stored.name}.weight", self._decoded(stored, packed)  # kept by no name of ours
        self._files.check()

    def _decoded(self, stored: StoredLayer, packed: PackedLayer) -> Tensor:
        weight = restored_weight(self._compressor, self._artifact, stored, packed)
        return weight.T if self._transposed else weight


def restored_weight(
    compressor: LayerCompressor, artifact: Artifact, stored: StoredLayer, packed: PackedLayer
) -> Tensor:
    """(out, in) float32 of a stored layer, its adapter merged."""
    weight = restore_layer(compressor, packed, stored.shape, artifact.shared)
    adapter = artifact.adapter(stored.name)
    return weight if adapter is None else weight + adapter[1].float() @ adapter[0].float()
