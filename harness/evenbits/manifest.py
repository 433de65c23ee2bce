"""What an artifact says of itself: manifest.json, read and checked without torch.

An artifact is a folder: manifest.json, blocks/*.safetensors (packed layers), shared.safetensors (what layers
share), rest.safetensors (all other tensors at the evaluated dtype), adapters.safetensors, and the config and
tokenizer files of the base model. Nothing is pickled. Its config.json differs from the base model's in two entries,
by which transformers' from_pretrained finds its way here (evenbits.quantizer): the evaluated dtype, and a
quantization_config.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from evenbits.compressor import LayerShape, Role
from evenbits.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
ADAPTER_A, ADAPTER_B = "adapter_a", "adapter_b"
QUANT_METHOD = "evenbits"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredFile(_Frozen):
    sha256: str
    bytes: int


class StoredLayer(_Frozen):
    """A packed layer: its shape, where its tensors are, and the role of each.

    error: relative squared error of the weights; calibrated_error: tr(E H E^T) / tr(W H W^T) on the statistics
    the method was given, None for data-free methods.
    folded: whether the stored weight is that of a rescaled layer, which cannot be compared with the dense one; the
    errors were taken before that knowledge was lost, and are None after a recovery stage.
    """

    name: str
    block: int
    kind: str
    out_features: int
    in_features: int
    stored_dtype: str
    bias: bool
    file: str
    roles: dict[str, Role]
    error: float | None
    calibrated_error: float | None = None
    folded: bool = False

    @property
    def shape(self) -> LayerShape:
        return LayerShape(
            self.name, self.block, self.kind, self.out_features, self.in_features, self.stored_dtype, self.bias
        )

    @property
    def left_dense(self) -> bool:
        return set(self.roles.values()) == {Role.DENSE}


class Manifest(_Frozen):
    """model_form: "layers" (packed layer by layer) or "whole" (a model compressor's own tensors, with `roles`).

    made_with: versions of the libraries of another program's environment that decided the result, by distribution.
    """

    schema_version: int = SCHEMA
    key: str
    evenbits: str
    model: dict[str, Any]
    method: str
    distribution: str
    options: dict[str, Any]
    budget: dict[str, Any] | None
    seed: int
    recovery: tuple[dict[str, Any], ...]
    calibration: dict[str, Any] | None
    dtype: str
    trust_remote_code: bool = False
    model_form: str = "layers"
    paper_bits: float
    files: dict[str, StoredFile]
    layers: tuple[StoredLayer, ...]
    shared: dict[str, Role] = {}
    whole: dict[str, Role] = {}
    whole_weights: int = 0
    made_with: dict[str, str] = {}

    def check_files(self, folder: Path) -> None:
        """Compare every file with its sha256. Raises ArtifactError naming the first that differs."""
        for name, stored in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{path}: missing; remove the folder {folder} and run again")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != stored.sha256:
                raise ArtifactError(
                    f"{path}: sha256 differs from the manifest's, the file was damaged; "
                    f"remove the folder {folder} and run again"
                )


def artifact_config(text: bytes, dtype: str, form: str) -> bytes:
    """config.json of an artifact, from that of its base model."""
    config = json.loads(text)
    config.pop("torch_dtype", None)  # what the entry was called before transformers 5
    config |= {"dtype": dtype, "quantization_config": {"quant_method": QUANT_METHOD, "form": form}}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def base_config(config: Any) -> Any:
    """The transformers config of an artifact without what is for from_pretrained alone: a model made from it here is
    an ordinary one, which may be saved."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
        del config.quantization_config
    return config


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactError when there is none, it is damaged, or its schema is newer than this version's."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError:
        raise ArtifactError(f"{folder}: not an artifact (no {MANIFEST})") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); remove the folder and run again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise ArtifactError(f"{path}: schema {version} is newer than this evenbits knows ({SCHEMA}); upgrade evenbits")
    digest = folder / MANIFEST_DIGEST
    if not digest.is_file() or digest.read_text().strip() != hashlib.sha256(text).hexdigest():
        raise ArtifactError(f"{path}: differs from its sha256, it was damaged; remove the folder and run again")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}; remove the folder and run again") from None
