"""A published checkpoint as a compressor: it only opens what is there, and checks it against the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evenbits.compressor import Fold, LayerShape, PackedLayer, Shared
from evenbits.errors import TrialFailed
from evenbits.foreign import Bench, CheckpointCompressor
from evenbits.maths.hessian import relative_error
from evenbits.models import read_tensor
from evenbits.restoring import unfolded
from evenbits.shapes import StoredTensor
from evenbits_backends.located import content_of, snapshot
from evenbits_backends.opened import StoredCheckpoint, decode
from evenbits_backends.trust import Claim

if TYPE_CHECKING:
    from evenbits_backends.libraries.checkpoint import CheckpointOptions

# Gaussians that have nothing to do with each other have an error of 2, a weight rounded to zeros one of 1. Error
# feedback where inputs fill few directions goes beyond (GPTQ at 2 bits on the reference model: 1.8), and yet holds the
# weight: 0.87 of it, where another weight, or this one out of order, holds none.
UNRELATED = 1.0
FED_BACK, HELD = 4.0, 0.3  # the error that is allowed so, and how far from 1 the held share may be
# Share of the error's energy that means over groups explain. Rounding, also with error feedback and with levels that
# are not around zero: twice what one number is of a group at most (0.06 in groups of 32). Zero points read one too low,
# or in another order: 0.6 and more, at every width.
OFFSET = 0.4
FEWEST = 256  # weights: of fewer, chance makes an offset
RESCALING = ("awq", "compressed_tensors")  # layouts of methods that may move scales into the norms


class Published(CheckpointCompressor):
    def __init__(self, options: CheckpointOptions) -> None:
        self.options = options

    def open(self, bench: Bench) -> PublishedCheckpoint:
        """Raises TrialFailed where it is not what the trial was planned with, or is not of the base model."""
        return PublishedCheckpoint(self._folder(), bench.model, bench.dtype)

    def _folder(self) -> Path:
        options = self.options
        if options.path is None:
            folder = snapshot(str(options.id), str(options.revision), download=True)
            assert folder is not None
            return folder
        path = Path(options.path)
        if content_of(path) != options.content:
            raise TrialFailed(f"{path}: its files have changed since the run was planned; run again")
        return path

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return decode(packed, layer, shared)


class PublishedCheckpoint(StoredCheckpoint):
    """Nobody ran its library here, and what it was tuned with is not known: a layer is taken unless its weight has
    nothing to do with the base model's, or lies beside it as a whole."""

    def __init__(self, folder: Path, base: Path, dtype: str) -> None:
        super().__init__(folder, base, dtype, Claim("the checkpoint", calibrated=True))
        self.verify()
        self.versions = made_with(self.folder.quantization)
        self._rescales = self.layout.name in RESCALING and self._norms_changed()

    def check(self, shape: LayerShape, weight: Tensor, restored: Tensor, moment: Tensor | None = None) -> Fold | None:
        fold = self.rescaled(shape, weight, restored) if self._rescales else None
        compared = restored if fold is None else unfolded(restored, fold)
        error = relative_error(weight, compared)
        held = float((compared * weight).sum() / weight.square().sum().clamp_min(1e-30))
        if not error <= (FED_BACK if abs(held - 1) <= HELD else UNRELATED):
            raise TrialFailed(
                f"{shape.name}: its relative squared error to the base model's weight is {error:.3g}, where a weight "
                f"of zeros has {UNRELATED:g}, and it holds {held:.2f} of it: another model's checkpoint, or one "
                "that is decoded wrongly"
            )
        grid = self.layout.grid(shape, self.facts)
        share = offset_share(compared - weight, (grid.group if grid else 0) or shape.in_features)
        if share > OFFSET and weight.numel() >= FEWEST:
            raise TrialFailed(
                f"{shape.name}: whole groups lie to one side of the base model's weights ({share:.0%} of its error, "
                f"{OFFSET:.0%} allowed): its zero points are not those of the format that its config names"
            )
        return fold

    def _check_outside(self, stored: StoredTensor, ours: Tensor, theirs: Tensor) -> None:
        """Tuned with whatever data; but an embedding or a head that is another model's is refused."""
        if len(stored.shape) == 2 and not (error := relative_error(ours, theirs)) <= UNRELATED:
            raise TrialFailed(
                f"{stored.name}: its relative squared error to the base model's is {error:.3g}: another model's"
            )

    def _norms_changed(self) -> bool:
        norms = [s for s in self._inventory.rest if len(s.shape) == 1 and s.name.endswith("norm.weight")]
        tensors = ((read_tensor(stored), self.folder.tensor(stored.name)) for stored in norms)
        return any(relative_error(ours.float()[None], theirs.float()[None]) > 1e-4 for ours, theirs in tensors)


def offset_share(error: Tensor, group: int) -> float:
    """Of the energy of `error` (out, in), what the means of each row's groups of columns make up, 0 to 1."""
    padded = torch.nn.functional.pad(error.double(), (0, -error.shape[1] % group))
    means = padded.view(len(error), -1, group).mean(-1)
    return float(group * means.square().sum() / padded.square().sum().clamp_min(1e-30))


def made_with(quantization: Mapping[str, Any]) -> dict[str, str]:
    """The library that a quantization_config names with its version, where it names one."""
    named = dict(quantization.get("meta") or {}).get("quantizer")
    for text in named if isinstance(named, list) else [named]:
        if isinstance(text, str) and ":" in text:  # "gptqmodel:7.6.0"
            library, _, release = text.partition(":")
            return {library: release}
    if quantization.get("quant_method") == "compressed-tensors" and isinstance(quantization.get("version"), str):
        return {"compressed-tensors": quantization["version"]}
    if isinstance(version := quantization.get("autoround_version"), str):
        return {"auto-round": version}
    return {}
