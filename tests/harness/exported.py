"""Artifacts for the tests of exports and of from_pretrained, and a reading of packed codes that shares no code with
the writer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import LayerCompressor
from evenbits.driver import Driver, Work
from evenbits.opened import adapter_tensors
from evenbits.plugins import load_plugins
from evenbits.restoring import restore_layer
from evenbits.testing import ModelKind, manifest_facts, tiny_model, tiny_tokens

REGISTRY = load_plugins()
TOKENS = torch.arange(1, 24)[None]


def make_artifact(
    folder: Path,
    method: str,
    options: Mapping[str, Any],
    *,
    kind: ModelKind = "llama",
    dtype: str = "float32",
    adapters: bool = False,
    tied: bool = False,
) -> Path:
    """An artifact of a tiny model as a run writes it; layers are (64, 64), (32, 64), (128, 64) and (64, 128)."""
    base = folder / f"base-{kind}-{tied}"
    if not base.is_dir():
        tiny_model(base, kind, hidden=64, intermediate=128, tied=tied)
    descriptor = REGISTRY.compressors[method].value
    checked = descriptor.options.model_validate(dict(options))
    tokens = tiny_tokens(base, samples=8, length=32)
    made = folder / f"artifact-{len(list(folder.iterdir()))}"
    needs = descriptor.needs_of(checked)
    work = Work(base, dtype, torch.device("cpu"), descriptor.make(checked), needs, None, 0, tokens, folder / "moments")
    with ArtifactWriter(made) as writer:
        stored = Driver(work, writer).run()
        if adapters:
            layer = stored.layers[0]
            pair = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            writer.write("adapters.safetensors", adapter_tensors({layer.name: pair}))
        writer.copy_base_files(base)
        writer.finish(
            **manifest_facts(descriptor, checked, dtype), layers=tuple(stored.layers), shared=stored.shared,
            model_form=stored.form, whole=stored.whole, whole_weights=stored.whole_weights,
        )  # fmt: skip
    return made


def restored_weights(folder: Path) -> dict[str, Tensor]:
    """(out, in) float32 of each layer, as the method restores it."""
    artifact = Artifact(folder)
    descriptor = REGISTRY.compressors[artifact.manifest.method].value
    compressor = descriptor.make(descriptor.options.model_validate(artifact.manifest.options))
    assert isinstance(compressor, LayerCompressor)
    return {
        stored.name: restore_layer(compressor, packed, stored.shape, artifact.shared)
        for stored, packed in artifact.packed()
    }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def read_stream(words: Tensor, bits: int, count: int) -> np.ndarray[Any, Any]:
    """int64 (rows, count): each row of int32 words as one stream of bits, the least significant first."""
    data = np.ascontiguousarray(words.numpy().astype("<i4")).view(np.uint8)
    stream = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits]
    found: np.ndarray[Any, Any] = (stream.reshape(len(data), count, bits).astype(np.int64) << np.arange(bits)).sum(
        axis=2
    )
    return found
