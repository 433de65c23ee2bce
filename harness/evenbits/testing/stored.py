"""Artifacts outside a run: a compressor driven over a whole model, and what is held of the result."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import (
    AnyCompressor,
    Compressor,
    LayerCompressor,
    LayerShape,
    Options,
    PackedLayer,
    meta_bytes,
)
from evenbits.driver import Driver, Work
from evenbits.foreign import Launch
from evenbits.manifest import Manifest, StoredLayer
from evenbits.models import build_model
from evenbits.shapes import read_inventory
from evenbits.subject import restore_state
from evenbits.testing.cases import untouched_randomness
from evenbits.tiny import tiny_model, tiny_tokens
from evenbits.whole import restore_whole


def manifest_facts(descriptor: Compressor, options: Options, dtype: str = "float32") -> dict[str, Any]:
    """What `ArtifactWriter.finish` must be told, for artifacts written outside a run."""
    return {
        "key": "0" * 16, "evenbits": "0", "model": {"name": "tiny", "revision": "none"}, "method": descriptor.name,
        "distribution": "", "options": options.model_dump(mode="json"), "budget": None, "seed": 0, "recovery": (),
        "calibration": None, "dtype": dtype, "paper_bits": 0.0,
    }  # fmt: skip


def stored_layer(shape: LayerShape, file: str, packed: PackedLayer) -> StoredLayer:
    """The manifest's entry of one packed layer."""
    return StoredLayer(
        name=shape.name, block=shape.block, kind=shape.kind, out_features=shape.out_features,
        in_features=shape.in_features, stored_dtype=shape.dtype, bias=shape.bias, file=file, roles=packed.roles,
        error=0.0,
    )  # fmt: skip


def compress_model(
    descriptor: Compressor,
    options: Options,
    model_folder: Path,
    folder: Path,
    *,
    tokens: Tensor | None = None,
    dtype: str = "float32",
    seed: int = 0,
    device: str = "cpu",
    launch: Launch | None = None,
) -> Manifest:
    """Drive a compressor over a model folder as a run would, and store the artifact in `folder`."""
    needs = descriptor.needs_of(options)
    moments = None if tokens is None else folder.parent / f"{folder.name}-moments"
    work = Work(
        model_folder, dtype, torch.device(device), descriptor.make(options), needs, None, seed, tokens, moments,
        launch=launch,
    )  # fmt: skip
    with ArtifactWriter(folder) as writer:
        stored = Driver(work, writer).run()
        writer.copy_base_files(model_folder)
        return writer.finish(
            **manifest_facts(descriptor, options, dtype), layers=tuple(stored.layers), shared=stored.shared,
            model_form=stored.form, whole=stored.whole, whole_weights=stored.whole_weights,
            made_with=stored.made_with,
        )  # fmt: skip


def check_model(
    descriptor: Compressor,
    options: Options,
    folder: Path,
    *,
    exact: bool = True,
    device: str = "cpu",
    launch: Launch | None = None,
) -> None:
    """Through the driver, over a tiny Llama: the same files twice, the predicted bytes, a model that is restored and
    runs, whatever form it is stored in."""
    # other libraries' kernels and groups want widths that are multiples of 128
    width, inner = (64, 172) if launch is None else (128, 256)
    base = tiny_model(folder / "model", "llama", hidden=width, intermediate=inner)
    before = folder_digest(base)
    tokens = tiny_tokens(base, samples=8, length=32)
    manifests = []
    for run in ("first", "second"):
        with untouched_randomness(f"{descriptor.name}: a run over a model"):
            written = compress_model(
                descriptor, options, base, folder / run, tokens=tokens, device=device, launch=launch
            )
        manifests.append(written)
        torch.rand(3)  # the second run starts from another global state
    first, second = manifests
    assert folder_digest(base) == before, f"{descriptor.name}: compressing changed the dense model's own files"
    assert first.files == second.files, f"{descriptor.name}: two runs of one seed store different files"
    artifact = Artifact(folder / "first")
    count = stored_bytes(artifact)
    shapes = read_inventory(base).shapes("float32")
    predicted = descriptor.predict(options, shapes).linear_bytes
    right = count == predicted if exact else count <= predicted
    assert right, f"{descriptor.name}: predict says {predicted} bytes for a model, stored are {count}"
    logits, again = (_logits(artifact, descriptor.make(options), tokens[:1]) for _ in range(2))
    assert bool(torch.isfinite(logits).all()), f"{descriptor.name}: the restored model's logits are not finite"
    assert torch.equal(logits, again), (
        f"{descriptor.name}: two restored models of one artifact differ: compute from stored tensors and options alone"
    )


@torch.no_grad()
def _logits(artifact: Artifact, compressor: AnyCompressor, tokens: Tensor) -> Tensor:
    model: Any
    if isinstance(compressor, LayerCompressor):
        model = build_model(artifact.folder, restore_state(artifact, compressor), "float32")
    else:
        model = restore_whole(artifact, compressor)
    found: Tensor = model(input_ids=tokens).logits
    return found


def stored_bytes(artifact: Artifact) -> int:
    """What is billed for the linear layers: packed, shared and meta, or what a model stored whole has of them."""
    manifest = artifact.manifest
    if manifest.model_form == "whole":
        tensors = artifact.whole()
        count = sum(tensors[name].numel() * tensors[name].element_size() for name in manifest.whole)
        return count + meta_bytes(artifact.whole_meta())
    return sum(packed.nbytes for _, packed in artifact.packed()) + (artifact.shared.nbytes if artifact.shared else 0)


def folder_digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
