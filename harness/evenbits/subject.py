"""What evaluators and profilers get: the model restored from what is stored, and how to open a corpus."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.artifact import Artifact
from evenbits.compressor import LayerCompressor, Options
from evenbits.errors import ArtifactError, SuiteError, TrialFailed
from evenbits.manifest import read_manifest
from evenbits.measure import Text, Weights
from evenbits.models import load_tokenizer, open_model, torch_dtype
from evenbits.packed import LayerKernels, attach_kernels, open_packed, whole_reason
from evenbits.plugins import Registry
from evenbits.shapes import ARCHITECTURES, read_config
from evenbits.streaming import BlockStream, open_stored
from evenbits.suite import check_options
from evenbits.weights import ArtifactWeights, DenseWeights, StoredWeights, restored_weight
from evenbits.whole import restore_whole


def read_corpus(registry: Registry, reference: Mapping[str, Any]) -> Text:
    """Open the corpus that `reference` names; its other keys are the corpus's options."""
    options = dict(reference)
    provided = registry.find("corpora", str(options.pop("name", "")), "corpus")
    checked: Options = check_options(provided.value.options, options, f"corpus {provided.value.name}")
    text = provided.value.read(checked)
    assert isinstance(text, Text)
    return text


def make_compressor(registry: Registry, method: str, options: Mapping[str, Any]) -> Any:
    """The compressor object of a method; SuiteError when its plugin is not installed."""
    descriptor = registry.find("compressors", method, "method").value
    return descriptor.make(check_options(descriptor.options, options, f"method {method}"))


def restore_state(artifact: Artifact, compressor: LayerCompressor) -> dict[str, Tensor]:
    """The complete state of the model at the artifact's dtype: packed layers decoded, adapters merged, the rest."""
    dtype = torch_dtype(artifact.manifest.dtype)
    transposed = ARCHITECTURES[read_config(artifact.folder)["model_type"]].transposed
    state = artifact.rest()
    with torch.no_grad():
        for stored, packed in artifact.packed():
            weight = restored_weight(compressor, artifact, stored, packed)
            state[f"{stored.name}.weight"] = (weight.T if transposed else weight).to(dtype).contiguous()
    return state


def open_artifact(folder: Path, registry: Registry, *, trust_remote_code: bool) -> tuple[Artifact, Any]:
    """The artifact, verified against its hashes, and the compressor that restores it. Raises as `load_artifact`."""
    artifact = Artifact(folder)
    manifest = artifact.manifest
    if manifest.trust_remote_code and not trust_remote_code:
        raise ArtifactError(f"{folder}: its model runs code of its own; allow it by trust_remote_code if you trust it")
    if manifest.method == "dense":
        return artifact, LayerCompressor()
    return artifact, make_compressor(registry, manifest.method, manifest.options)


def load_artifact(
    folder: Path,
    registry: Registry,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
    weights: Weights = "restored",
) -> Any:
    """A transformers model from an artifact folder alone, verified against its hashes, in eval mode.

    weights: other than "restored": each layer from its packed form where its method can (`evenbits.packed`).
    Raises ArtifactError for a damaged or too new artifact, for one that brings code of its own where the caller
    does not trust it, and for a model stored whole where packed weights are asked for; SuiteError when the method's
    plugin is missing.
    """
    artifact, compressor = open_artifact(folder, registry, trust_remote_code=trust_remote_code)
    manifest = artifact.manifest
    if weights != "restored":
        near, place = weights == "approximate", torch.device(device)
        return open_packed(artifact, compressor, place, trust_remote_code=trust_remote_code, approximate=near)
    if manifest.model_form == "whole":
        return restore_whole(artifact, compressor).to(device)
    stored = ArtifactWeights(artifact, compressor)
    return open_stored(stored, folder, manifest.dtype, torch.device(device), trust_remote_code=trust_remote_code)


def _stores_whole(folder: Path) -> str:
    """The method of an artifact that stores a whole model; "" for one of layers."""
    manifest = read_manifest(folder)
    return manifest.method if manifest.model_form == "whole" else ""


@dataclass
class MeasuredModel:
    """Both `evenbits.measure.Subject` and `ProfileSubject`: the stored model, opened when asked for."""

    registry: Registry
    folder: Path
    artifact: bool  # whether `folder` is an artifact, or the dense model's own
    dtype: str
    device: torch.device
    seed: int
    base_facts: Mapping[str, Any]
    sizes: Mapping[str, int] = field(default_factory=dict)
    compress_peak_bytes: int | None = None
    compress_device_peak_bytes: int | None = None
    compress_seconds: float | None = None
    trust_remote_code: bool = False
    report: Callable[[int, int, str], None] = lambda done, total, what: None
    _model: nn.Module | None = None
    _weights: Weights = "restored"  # of that model
    _tokenizer: Any = None
    _attention: str | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What belongs in every fingerprint; the attention implementation is known once the model is open
        or streamed."""
        return {**self.base_facts, "attention": self._attention}

    def load(self, weights: Weights = "restored") -> tuple[nn.Module, Any]:
        """Of the dense model, and of one stored whole, packed weights are those that it has: `kernels_of` says so."""
        packed = weights != "restored"
        if self.artifact:
            method = "" if not packed else _stores_whole(self.folder)
            model = load_artifact(
                self.folder,
                self.registry,
                self.device,
                trust_remote_code=self.trust_remote_code,
                weights="restored" if method else weights,
            )
            if method:
                attach_kernels(model, LayerKernels(whole=whole_reason(method)))
        else:
            model = open_model(
                self.folder,
                self.dtype,
                self.device,
                trust_remote_code=self.trust_remote_code,
                loader=self.registry.load_model,
            )
            if packed:
                attach_kernels(model, LayerKernels(whole="the dense model, by torch's matmul", expected=True))
        self._attention = getattr(model.config, "_attn_implementation", None)
        return model, load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    @property
    def model(self) -> nn.Module:
        return self.opened("restored")

    def opened(self, weights: Weights) -> nn.Module:
        """Held until one with other weights is asked for: never two at once."""
        if self._model is None or self._weights != weights:
            self._model = None
            self._model, tokenizer = self.load(weights)
            self._weights = weights
            if self._tokenizer is None:
                self._tokenizer = tokenizer
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Without opening the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        return self._tokenizer

    def stream_logits(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """(B, T, vocab) logits of each batch (B, T) of token ids, in order, as the model held whole would give them,
        with one block of the stored model in memory at a time (`evenbits.streaming`).

        Raises TrialFailed for what cannot be streamed: a model stored whole, or one that a plugin may open.
        """
        dtype, trusted = self.dtype, self.trust_remote_code
        weights: StoredWeights
        if self.artifact:
            artifact, compressor = open_artifact(self.folder, self.registry, trust_remote_code=trusted)
            weights, dtype = ArtifactWeights(artifact, compressor), artifact.manifest.dtype
        elif loaders := self.registry.packages_of("load_model"):
            raise TrialFailed(
                f"{self.folder}: plugin {loaders[0]} may open dense models in a way of its own (load_model), which "
                'cannot be streamed a block at a time; give memory = "model"'
            )
        else:
            weights = DenseWeights(self.folder)
        stream = BlockStream(weights, self.folder, dtype, self.device, trust_remote_code=trusted)
        self._attention = stream.attention
        return stream.logits(batches, self.progress(stream.blocks, "blocks"))

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        return read_corpus(self.registry, reference)

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            self.report(done, total, what)

        return advance


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA where there is one. Raises SuiteError for a device that is unknown or not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SuiteError(f'unknown device {name!r}; give "cpu", "cuda", "cuda:N" or "auto"')
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SuiteError(f'device {name!r}: no CUDA device here; give device = "cpu" or "auto"')
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SuiteError(f"device {name!r}: there are only {torch.cuda.device_count()} CUDA devices here")
    return device
