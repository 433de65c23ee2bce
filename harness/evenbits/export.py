"""Artifacts as folders that other programs read: plain transformers ("dense"), compressed-tensors, GPTQ's layout.

What a format cannot hold exactly is refused; nothing is quantized again to fit it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from evenbits.artifact import CONFIG, Artifact
from evenbits.compressor import LayerCompressor, LayerShape, PackedLayer, Refusal, Shared
from evenbits.errors import ArtifactError
from evenbits.export_compressed_tensors import CompressedTensors
from evenbits.export_dense import whole_state
from evenbits.export_folder import SHARD_BYTES, ExportFolder
from evenbits.export_formats import Held, PackedFormat, held
from evenbits.export_gptq import Gptq
from evenbits.ledger import measure_bits
from evenbits.manifest import QUANT_METHOD, Manifest, StoredLayer
from evenbits.maths.uniform import OnGrid
from evenbits.models import torch_dtype
from evenbits.plugins import Registry
from evenbits.record import ModelFacts
from evenbits.restoring import restore_layer
from evenbits.shapes import ARCHITECTURES, read_header
from evenbits.subject import open_artifact
from evenbits.weights import ArtifactWeights

DENSE = "dense"
PACKED: Mapping[str, PackedFormat] = {found.name: found for found in (CompressedTensors(), Gptq())}
FORMATS = (DENSE, *PACKED)
LARGEST_DIFFERENCE = 0.005  # of a layer's weights as a reader's dtype has them, relative; bfloat16's own is 0.002


@runtime_checkable
class StoresOnGrid(Protocol):
    """A compressor whose layers are codes on evenly spaced levels, one grid a row and group of columns."""

    def on_grid(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> OnGrid | Refusal: ...


@dataclass(frozen=True)
class Size:
    """Of the tensor files on disk: payload of the linear layers, and whole files with their headers."""

    linear_bits: float  # per linear weight of the dense model
    model_bits: float  # per parameter of the dense model
    model_bytes: int


@dataclass(frozen=True)
class Exported:
    """difference: largest relative difference of a layer's weights between what a reader computes, in `read_dtype`,
    and the artifact's restored ones at its evaluated dtype; 0 for the same bits."""

    folder: Path
    form: str
    method: str
    before: Size
    after: Size
    difference: float = 0.0
    read_dtype: str = ""


def export(
    source: Path,
    form: str,
    out: Path,
    registry: Registry,
    *,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the artifact in `source` to the new folder `out`, in one of FORMATS.

    Raises ArtifactError for a damaged artifact or what the format cannot hold, naming the layer and what would do;
    SuiteError for a missing plugin or a folder that is there already. Nothing is left of an export that failed.
    """
    artifact, compressor = open_artifact(source, registry, trust_remote_code=trust_remote_code)
    manifest = artifact.manifest
    with torch.no_grad(), ExportFolder(out, shard_bytes) as folder:
        config = json.loads((source / CONFIG).read_text())
        config["dtype"] = manifest.dtype
        config.pop("torch_dtype", None)
        if (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
            del config["quantization_config"]
        difference, read_dtype = 0.0, manifest.dtype
        if form == DENSE:
            config |= _write_dense(artifact, compressor, folder)
        else:
            packing = _Packing(artifact, compressor, PACKED[form])
            difference = packing.write(folder)
            read_dtype = str(PACKED[form].read_dtype(torch_dtype(manifest.dtype))).removeprefix("torch.")
            config["quantization_config"] = packing.config
            if form == Gptq.name:
                folder.write_json("quantize_config.json", packing.config)  # where AutoGPTQ looks
        for name in manifest.files:
            if not name.endswith(".safetensors") and name != CONFIG:
                folder.copy(source / name)
        folder.write_json(CONFIG, config)
        folder.finish()
    before, after = _sizes(artifact, out)
    return Exported(out, form, manifest.method, before, after, difference, read_dtype)


# -- dense ----------------------------------------------------------------------------------------------------


def _write_dense(artifact: Artifact, compressor: Any, folder: ExportFolder) -> dict[str, Any]:
    """Every tensor as the restored model holds it; returns what the config must say otherwise."""
    if not isinstance(compressor, LayerCompressor):
        state, changes = whole_state(artifact, compressor)
        for name, tensor in state.items():
            folder.add(name, tensor)
        return changes
    dtype = torch_dtype(artifact.manifest.dtype)
    weights = ArtifactWeights(artifact, compressor)
    for name, tensor in weights.read(sorted(weights.names)):
        folder.add(name, tensor.to(dtype))
    return {}


# -- packed ---------------------------------------------------------------------------------------------------


class _Packing:
    """An artifact in a packed format, a layer at a time."""

    def __init__(self, artifact: Artifact, compressor: Any, form: PackedFormat) -> None:
        """Raises ArtifactError for an artifact that no layer of it could hold."""
        self._artifact, self._compressor, self._form = artifact, compressor, form
        self.config: Mapping[str, Any] = {}
        manifest = artifact.manifest
        if not isinstance(compressor, StoresOnGrid):
            what = "a whole model" if manifest.model_form == "whole" else "no integer codes on grids by row and group"
            raise self._refused(f"method {manifest.method!r} stores {what}")
        if "adapters.safetensors" in manifest.files:
            raise self._refused("it has adapters beside its codes")
        self._transposed = ARCHITECTURES[json.loads((artifact.folder / CONFIG).read_text())["model_type"]].transposed
        if self._transposed and not form.transposed:
            raise self._refused("its layers are GPT-2's Conv1D, and the format is for nn.Linear")

    def _refused(self, why: str, layer: str = "") -> ArtifactError:
        where = f"{self._artifact.folder}: {layer}: " if layer else f"{self._artifact.folder}: "
        return ArtifactError(f"{where}{why}; --format {self._form.name} cannot hold that, --format dense can")

    def write(self, folder: ExportFolder) -> float:
        """Returns the largest difference. Raises ArtifactError, naming the layer, for what cannot be held."""
        packed: list[Held] = []
        dense: list[str] = []
        largest = 0.0
        for stored, layer in self._artifact.packed():
            restored = restore_layer(self._compressor, layer, stored.shape, self._artifact.shared)
            if stored.left_dense:
                dense.append(stored.name)
                weight = restored.T if self._transposed else restored
                folder.add(f"{stored.name}.weight", weight.to(torch_dtype(self._artifact.manifest.dtype)))
                continue
            found = self._on_grid(stored, layer, restored)
            largest = max(largest, self._difference(stored, found, restored))
            packed.append(held(stored.name, found))
            for name, tensor in self._form.tensors(found).items():
                folder.add(f"{stored.name}.{name}", tensor)
        if not packed:
            raise self._refused("all its layers are dense")
        rest = self._artifact.rest()
        for name, tensor in rest.items():
            folder.add(name, tensor)
        # embeddings among them do no harm
        outside = {name.removesuffix(".weight") for name, tensor in rest.items() if tensor.dim() == 2}
        names = sorted(outside | {"lm_head"}) if self._form.name == CompressedTensors.name else []
        self.config = self._form.config(packed, [*names, *dense])
        return largest

    def _on_grid(self, stored: StoredLayer, layer: PackedLayer, restored: Tensor) -> OnGrid:
        found: OnGrid | Refusal = self._compressor.on_grid(layer, stored.shape, self._artifact.shared)
        if isinstance(found, Refusal):
            raise self._refused(found.reason, stored.name)
        if not torch.equal(found.decode(), restored):
            raise ArtifactError(
                f"{stored.name}: method {self._artifact.manifest.method!r} restores another weight than its codes and "
                "grids say; --format dense writes what it restores"
            )
        why = self._form.refusal(found)
        if why is not None:
            raise self._refused(why, stored.name)
        return found

    def _difference(self, stored: StoredLayer, found: OnGrid, restored: Tensor) -> float:
        evaluated = torch_dtype(self._artifact.manifest.dtype)
        dtype = self._form.read_dtype(evaluated)
        grid = found.grid
        steps = (found.codes.to(torch.int32) - grid.zero.to(torch.int32)[:, found.group]).to(dtype)
        read = (steps * grid.scale.to(dtype)[:, found.group]).float()
        expected = restored.to(evaluated).float()
        size = float(expected.norm())
        difference = float((read - expected).norm()) / size if size else float(read.norm())
        if not difference <= LARGEST_DIFFERENCE:
            raise self._refused(
                f"its weights computed in {str(dtype).removeprefix('torch.')}, as readers do, differ by "
                f"{100 * difference:.2g} % of their size",
                stored.name,
            )
        return difference


# -- bits -----------------------------------------------------------------------------------------------------


def _sizes(artifact: Artifact, out: Path) -> tuple[Size, Size]:
    """Before and after, from the bytes on disk."""
    manifest = artifact.manifest
    weights = manifest.whole_weights or sum(layer.shape.weights for layer in manifest.layers)
    parameters = manifest.model.get("parameters") or _parameters(artifact, weights)
    facts = ModelFacts(
        name="", revision="", dtype=manifest.dtype, parameters=parameters, linear_weights=weights, stored_bits=8,
        linear_bytes=1, model_bytes=1,
    )  # fmt: skip
    ledger = measure_bits(artifact.folder, facts)
    before = Size(ledger.bits.linear, ledger.bits.model, ledger.model_bytes)
    linear = total = 0
    own = _linear_names(manifest)
    for file in sorted(out.glob("*.safetensors")):
        total += file.stat().st_size
        for name, entry in read_header(file).items():
            layer, _, part = name.rpartition(".")
            if name != "__metadata__" and layer in own and part != "bias":
                start, end = entry["data_offsets"]
                linear += end - start
    return before, Size(8 * linear / weights, 8 * total / parameters, total)


def _linear_names(manifest: Manifest) -> set[str]:
    if manifest.model_form == "whole":
        return {name.removesuffix(".weight") for name in manifest.whole}
    return {layer.name for layer in manifest.layers}


def _parameters(artifact: Artifact, weights: int) -> int:
    if artifact.manifest.model_form == "whole":
        rest = {name: tensor for name, tensor in artifact.whole().items() if name not in artifact.manifest.whole}
    else:
        rest = artifact.rest()
    return weights + sum(tensor.numel() for tensor in rest.values())
