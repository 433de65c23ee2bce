"""Compressors whose layers come out of a checkpoint that another program wrote: the contract with that program.

The program is a worker: one Python file that imports nothing of evenbits, run by the interpreter of the environment
that the compressor names (`Needs.environment`) as `python WORKER FOLDER`. In FOLDER it finds request.json and
tensors.safetensors; it writes a checkpoint into FOLDER/output and its facts to FOLDER/result.json, or it ends with
another exit code than 0 and, where it can, one line of reason in FOLDER/error.json ({"message": ...}).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evenbits.budget import BitBudget
from evenbits.compressor import Fold, LayerCompressor, LayerShape, ModelShapes, PackedLayer, Shared
from evenbits.errors import TrialFailed

if TYPE_CHECKING:
    from torch import Tensor

REQUEST, TENSORS, OUTPUT, RESULT, ERROR = "request.json", "tensors.safetensors", "output", "result.json", "error.json"

# (worker, folder): runs it to its end; TrialFailed with the reason where it does not end well
Launch = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Bench:
    """What a worker is given: the dense model's folder, calibration tokens (samples, length), a folder to work in."""

    model: Path
    shapes: ModelShapes
    dtype: str
    device: str
    seed: int
    budget: BitBudget | None
    tokens: Tensor | None
    folder: Path
    launch: Launch | None = None

    def run(self, worker: Path, options: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Produced:
        """Run `worker` in the compressor's environment; it reads the dense model from its folder.

        request.json: model, dtype, device, seed, layers (names of the linear layers), options.
        tensors.safetensors: "tokens" (samples, length) int64 where there is calibration, and what `tensors` adds.
        Raises TrialFailed where the worker does not end well, leaves no output, or facts that do not read.
        """
        from safetensors.torch import save_file

        if self.launch is None:
            raise TrialFailed(f"{worker.name}: no environment to run it in; name one in the method's Needs")
        folder = self.folder / worker.stem
        (folder / OUTPUT).mkdir(parents=True)
        request = {
            "model": str(self.model.resolve()),
            "dtype": self.dtype,
            "device": self.device,
            "seed": self.seed,
            "layers": [layer.name for layer in self.shapes.layers],
            "options": dict(options),
        }
        (folder / REQUEST).write_text(json.dumps(request, indent=1) + "\n")
        given = dict(tensors or {}) if self.tokens is None else {"tokens": self.tokens, **(tensors or {})}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}, folder / TENSORS)
        self.launch(worker, folder)
        result = folder / RESULT
        if not result.is_file() or not any((folder / OUTPUT).iterdir()):
            raise TrialFailed(f"{worker.name}: ended without a checkpoint in {OUTPUT}/ or without {RESULT}")
        try:
            facts = json.loads(result.read_text())
        except ValueError as error:
            raise TrialFailed(f"{worker.name}: its {RESULT} is no JSON ({error})") from None
        versions = facts.get("versions", {}) if isinstance(facts, dict) else None
        if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
            raise TrialFailed(f'{worker.name}: its {RESULT} is no object with "versions" by distribution')
        return Produced(folder / OUTPUT, facts)


@dataclass(frozen=True)
class Produced:
    """What a worker left: the folder of its checkpoint, and its facts (result.json).

    facts["versions"]: the libraries that decided the result, by distribution.
    """

    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)


class Checkpoint(Protocol):
    """A checkpoint opened for reading, in terms of the dense model's layers."""

    @property
    def shared(self) -> Shared | None:
        """What decoding must know of all layers; stored and billed once. As a rule no tensors, only meta."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the libraries that made it, by distribution; {} where that is not known."""
        ...

    def layer(self, shape: LayerShape) -> PackedLayer:
        """The tensors of one layer, as the file has them. Raises TrialFailed where it is not there."""
        ...

    def check(self, shape: LayerShape, weight: Tensor, restored: Tensor, moment: Tensor | None) -> Fold | None:
        """Whether what is stored can be trusted: against the library's own forward, and against the dense weight.

        weight, restored: (out, in) float32. moment: (in, in), of the dense layer's inputs, where there is calibration.
        Returns how the stored weight was rescaled, if it was, so that its error is that of the weight it stands for.
        Raises TrialFailed with the layer and the numbers where it cannot.
        """
        ...

    def rest(self) -> Mapping[str, Tensor]:
        """Tensors outside the linear layers that differ from the dense model's, by name in the transformers model."""
        ...


class CheckpointCompressor(LayerCompressor):
    """Write `open` and `restore`; `restore` decodes from the stored tensors and the shared meta alone."""

    def open(self, bench: Bench) -> Checkpoint:
        """Make the checkpoint, by `bench.run`, or find the one that is there."""
        raise NotImplementedError
