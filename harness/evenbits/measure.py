"""What evaluators and hardware profilers declare and return. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from evenbits.compressor import Options
from evenbits.environment import package_version

if TYPE_CHECKING:
    import numpy as np
    import torch

Better = Literal["lower", "higher"]

Weights = Literal["restored", "packed", "approximate"]
"""What a model computes with: weights restored to dense ones; each layer's packed form where its method can; or what
the method offers as faster and near that form (PocketLLM's decoders folded into tables)."""

KERNEL_POLICY: Mapping[Weights, str] = {
    "restored": "dense-restored",
    "packed": "packed",
    "approximate": "packed-approximate",
}
"""The "kernel" of a fingerprint: a policy, alike for all methods and the dense model, which is torch's own under all.
What really ran stands in a measurement's details."""

KERNEL_LIBRARIES: Mapping[str, str] = {"cpu": "numba", "cuda": "triton"}
"""What kernels of packed weights are compiled by, by type of device. They run without it too, by torch, and slower."""


def fingerprint_id(fields: Mapping[str, Any]) -> str:
    """Twelve hex digits of the canonical JSON; numbers with different ids never share a column."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Measurement:
    """One number with its interval, its protocol and the per-item values it was computed from.

    items: one float per item (window, question), in a fixed order, so that two trials can be paired.
    details: JSON facts that do not tell protocols apart. "strata": the sizes of consecutive groups of items (tasks)
    that are drawn again within their group, not across.
    attachments: further files kept beside the record, by name (letters, digits, ".", "_", "-").
    volatile: differs from run to run on one machine (time, memory, energy).
    """

    name: str
    value: float
    unit: str
    better: Better
    low: float | None = None
    high: float | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    items: np.ndarray[Any, Any] | None = None
    volatile: bool = False
    attachments: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote after a prompt: for people to look at beside the dense model's, no number."""

    prompt: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Remark:
    """Why something could not be measured here, e.g. no energy meter: kept in the record, the trial goes on."""

    text: str


Finding = Measurement | Sample | Remark


class _Stored(Protocol):
    """What evaluators and profilers both know of what was stored."""

    @property
    def device(self) -> torch.device: ...

    @property
    def seed(self) -> int: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Model, dtype, attention, kernel, library versions: they belong in every fingerprint."""
        ...

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        """A progress bar; call the result with the steps just done."""
        ...


def facts_of(subject: _Stored, weights: Weights) -> Mapping[str, Any]:
    """The subject's facts, for the fingerprint of what is measured with such weights.

    Packed ones also name the version of what compiles their kernels, null where it is not there.
    """
    if weights == "restored":
        return subject.facts
    library = KERNEL_LIBRARIES.get(subject.device.type)
    compiled = {} if library is None else {library: package_version(library)}
    return {**subject.facts, "kernel": KERNEL_POLICY[weights], **compiled}


class Subject(_Stored, Protocol):
    """The restored model as an evaluator sees it."""

    @property
    def model(self) -> Any: ...

    def opened(self, weights: Weights) -> Any:
        """The model with such weights; "restored" is `model`. Of the others `evenbits.packed.kernels_of` says what
        computes each layer."""
        ...

    @property
    def tokenizer(self) -> Any: ...

    def stream_logits(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Logits (B, T, vocabulary) of each batch of token ids (B, T), in order, as `model` gives them, with one
        block of the stored model in memory at a time. Raises TrialFailed where the model cannot be walked so."""
        ...

    def corpus(self, reference: Mapping[str, Any]) -> Text:
        """Open a corpus named in the evaluator's options: {"name": ..., other keys are the corpus's options}."""
        ...


class ProfileSubject(_Stored, Protocol):
    """What a profiler sees: it opens the model itself, so that loading can be measured.

    sizes: bytes on disk, "linear" and "model", and the dense model's as "dense_linear" and "dense_model".
    compress_peak_bytes, compress_seconds: of the compress stage, None for the dense model.
    compress_device_peak_bytes: by torch's allocator, where that stage ran on a GPU.
    """

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def compress_peak_bytes(self) -> int | None: ...

    @property
    def compress_device_peak_bytes(self) -> int | None: ...

    @property
    def compress_seconds(self) -> float | None: ...

    def load(self, weights: Weights = "restored") -> tuple[Any, Any]:
        """Open the model and its tokenizer from what is stored.

        weights: other than "restored", the dense weight of a layer that its method computes from the packed form is
        never held; `evenbits.packed.kernels_of` says of the model which these are.
        """
        ...


class EvaluatorStage(Protocol):
    def evaluate(self, subject: Subject) -> Sequence[Finding]: ...


class ProfilerStage(Protocol):
    def profile(self, subject: ProfileSubject) -> Sequence[Finding]: ...


@dataclass(frozen=True)
class Evaluator:
    """Measures quality.

    corpora  the corpora it reads, so that overlap with calibration is checked
    files    other local files it reads; the plan hashes them
    location the options that only say where those files are
    preload  modules that are slow to import: the fork server loads them once for all children
    libraries distributions whose version may change a number, beside those that every trial depends on
    """

    name: str
    summary: str
    options: type[Options]
    make: Callable[[Any], EvaluatorStage]
    corpora: Callable[[Any], Sequence[Mapping[str, Any]]] = lambda options: ()
    files: Callable[[Any], Sequence[Path]] = lambda options: ()
    location: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profiler:
    """Measures hardware cost; runs alone on the machine's cores."""

    name: str
    summary: str
    options: type[Options]
    make: Callable[[Any], ProfilerStage]


@dataclass(frozen=True)
class Text:
    """Documents of a corpus, and what identifies them.

    identity: JSON facts for fingerprints: name, revision or sha256, split, join rule.
    sampling: how the papers draw calibration samples from this corpus (see `evenbits.calibration`).
    """

    documents: Sequence[str]
    join: str
    identity: Mapping[str, Any]
    sampling: Literal["even", "crop", "document", "blocks", "prompt"] = "even"

    def joined(self) -> str:
        return self.join.join(self.documents)


@dataclass(frozen=True)
class Corpus:
    """A source of text for calibration or for perplexity.

    files     the local files that `read` would open: the plan hashes them, so that a trial is known by what its text
              says and not by where it lies. () for text that the options alone determine (a pinned revision)
    location  the options that only say where those files are
    """

    name: str
    summary: str
    options: type[Options]
    read: Callable[[Any], Text]
    files: Callable[[Any], Sequence[Path]] = lambda options: ()
    location: tuple[str, ...] = ("path",)
