"""Write and read artifacts: manifest.json and safetensors, hashed, whole or not there at all. No pickle.

Blocks are written one by one, so that a model can be compressed in the memory of a block.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evenbits.compressor import PackedLayer, Role, Shared
from evenbits.errors import ArtifactError
from evenbits.files import NOT_WEIGHTS, write_atomically
from evenbits.manifest import (
    ADAPTER_A,
    ADAPTER_B,
    MANIFEST,
    MANIFEST_DIGEST,
    Manifest,
    StoredFile,
    StoredLayer,
    artifact_config,
    read_manifest,
)

TEMPORARY = ".writing-"
CONFIG = "config.json"


def dense_layer(weight: Tensor, dtype: torch.dtype) -> PackedLayer:
    """A layer that a method leaves as it is, billed at the dtype it is evaluated in."""
    return PackedLayer({"weight": weight.to(dtype).contiguous()}, {"weight": Role.DENSE})


class ArtifactWriter:
    """Writes into a temporary neighbour of `folder`; `finish` renames it. Leaving the context early removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._work = folder.parent / f"{TEMPORARY}{folder.name}-{os.getpid()}"
        self._scratch = self._work.with_name(f"{self._work.name}-scratch")
        self._files: dict[str, StoredFile] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_meta: dict[str, Any] = {}

    def __enter__(self) -> ArtifactWriter:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def scratch(self) -> Path:
        """A folder for what another program writes on the way, on the artifact's disk; gone with the context."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        return self._scratch

    def _record(self, name: str) -> None:
        path = self._work / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[name] = StoredFile(sha256=digest, bytes=path.stat().st_size)

    def write(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
        """One safetensors file. `meta` goes into its header, and so into its bytes."""
        path = self._work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"meta": json.dumps(meta, sort_keys=True)} if meta else None)
        self._record(name)

    def add_layer(self, name: str, packed: PackedLayer) -> None:
        """Keep a layer until `flush_block`."""
        for key, tensor in packed.tensors.items():
            # a clone: tensors that share memory would be refused or stored twice
            self._pending[f"{name}/{key}"] = tensor.detach().cpu().clone()
        if packed.meta:
            self._pending_meta[name] = packed.meta

    def flush_block(self, index: int) -> str:
        """Write the layers added since the last call; returns the file's name."""
        name = f"blocks/block-{index:04d}.safetensors"
        self.write(name, self._pending, self._pending_meta)
        self._pending, self._pending_meta = {}, {}
        return name

    def write_shared(self, shared: Shared) -> None:
        tensors = {f"shared/{key}": tensor for key, tensor in shared.tensors.items()}
        self.write("shared.safetensors", tensors, shared.meta)

    def copy_base_files(self, model_folder: Path) -> None:
        """Config, tokenizer and generation files: everything small that loading needs."""
        for path in sorted(model_folder.iterdir()):
            weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"}
            index = path.name.endswith(".index.json")
            if path.is_file() and not weights and not index and not path.name.endswith(NOT_WEIGHTS):
                shutil.copyfile(path, self._work / path.name)
                self._record(path.name)

    def finish(self, **facts: Any) -> Manifest:
        """Write the manifest and move the folder in place. An artifact already there is kept: same key, same bytes."""
        if CONFIG in self._files:
            text = (self._work / CONFIG).read_bytes()
            (self._work / CONFIG).write_bytes(artifact_config(text, facts["dtype"], facts.get("model_form", "layers")))
            self._record(CONFIG)
        manifest = Manifest(files=self._files, **facts)
        text = manifest.model_dump_json(indent=1).encode()
        write_atomically(self._work / MANIFEST_DIGEST, hashlib.sha256(text).hexdigest().encode())
        write_atomically(self._work / MANIFEST, text)
        if not (self.folder / MANIFEST).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)  # a folder that lost its manifest is no artifact
            self._work.replace(self.folder)
        return manifest


class Artifact:
    """A stored model, opened for reading; tensors are loaded when asked for."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Raises ArtifactError for a missing, damaged or too new artifact."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        if verify:
            self.manifest.check_files(folder)
        self._by_name = {layer.name: layer for layer in self.manifest.layers}
        self._shared: Shared | None = None

    @property
    def layers(self) -> tuple[StoredLayer, ...]:
        return self.manifest.layers

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except Exception as error:  # safetensors raises its own SafetensorError, a bare Exception
            raise ArtifactError(f"{self.folder / name}: cannot be read ({error})") from None

    def block(self, file: str) -> Iterator[tuple[StoredLayer, PackedLayer]]:
        """The packed layers of one block file."""
        with self._open(file) as opened:
            meta = json.loads((opened.metadata() or {}).get("meta", "{}"))
            for layer in self.manifest.layers:
                if layer.file == file:
                    tensors = {key: opened.get_tensor(f"{layer.name}/{key}") for key in layer.roles}
                    yield layer, PackedLayer(tensors, dict(layer.roles), meta.get(layer.name, {}))

    def packed(self) -> Iterator[tuple[StoredLayer, PackedLayer]]:
        """All packed layers, a block at a time."""
        for file in dict.fromkeys(layer.file for layer in self.manifest.layers):
            yield from self.block(file)

    @property
    def shared(self) -> Shared | None:
        # facts without a tensor are shared too
        if self._shared is None and "shared.safetensors" in self.manifest.files:
            with self._open("shared.safetensors") as opened:
                tensors = {key: opened.get_tensor(f"shared/{key}") for key in self.manifest.shared}
                meta = json.loads((opened.metadata() or {}).get("meta", "{}"))
            self._shared = Shared(tensors, dict(self.manifest.shared), meta)
        return self._shared

    def rest(self) -> dict[str, Tensor]:
        """Every tensor outside the linear layers, by name in the transformers model."""
        with self._open("rest.safetensors") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping, only keys()

    def rest_names(self) -> tuple[str, ...]:
        """What `rest` would hold."""
        with self._open("rest.safetensors") as opened:
            return tuple(opened.keys())

    def rest_tensor(self, name: str) -> Tensor:
        """One of them; the others stay on disk."""
        with self._open("rest.safetensors") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def adapter(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """(A, B) of one layer, or None where it has no adapter."""
        if "adapters.safetensors" not in self.manifest.files:
            return None
        with self._open("adapters.safetensors") as opened:
            if f"{layer}/{ADAPTER_A}" not in opened.keys():  # noqa: SIM118
                return None
            return opened.get_tensor(f"{layer}/{ADAPTER_A}"), opened.get_tensor(f"{layer}/{ADAPTER_B}")

    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Low-rank updates (A, B) by layer: the weight is what was restored plus B A."""
        if "adapters.safetensors" not in self.manifest.files:
            return {}
        with self._open("adapters.safetensors") as opened:
            names = {key.rsplit("/", 1)[0] for key in opened.keys()}  # noqa: SIM118
            return {
                name: (opened.get_tensor(f"{name}/{ADAPTER_A}"), opened.get_tensor(f"{name}/{ADAPTER_B}"))
                for name in sorted(names)
            }

    def whole(self) -> dict[str, Tensor]:
        """The tensors of a model compressor."""
        with self._open("whole.safetensors") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118

    def whole_meta(self) -> dict[str, Any]:
        with self._open("whole.safetensors") as opened:
            meta: dict[str, Any] = json.loads((opened.metadata() or {}).get("meta", "{}"))
            return meta


def remove_unfinished(folder: Path) -> int:
    """Delete what killed writers left behind; returns how many. Call only under the results folder's lock."""
    left = list(folder.glob(f"{TEMPORARY}*")) if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return len(left)
