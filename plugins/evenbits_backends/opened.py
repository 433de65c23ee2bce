"""A quantized checkpoint as the harness reads it: layers verbatim, what changed beside them, whether to trust it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenbits.artifact import dense_layer
from evenbits.compressor import Fold, LayerShape, PackedLayer, Role, Shared
from evenbits.errors import TrialFailed
from evenbits.models import read_tensor, torch_dtype
from evenbits.restoring import named_failure
from evenbits.shapes import Inventory, StoredTensor, read_config, read_inventory
from evenbits_backends.layout import layout, recognise
from evenbits_backends.reading import FLOATS, CheckpointFolder
from evenbits_backends.rescaling import WRITERS, Rescaling, fitted
from evenbits_backends.trust import Claim, check_forward, check_left, check_weight, folded

HEAD = "lm_head.weight"
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class StoredCheckpoint:
    """`evenbits.foreign.Checkpoint` of a folder in any layout.

    base: the dense model's folder. outputs: the library's own forward of the probes, by layer (empty where nobody ran
    it: a published checkpoint). claim: what the method promises of a layer's error.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        dtype: str,
        claim: Claim,
        *,
        versions: Mapping[str, str] | None = None,
        probes: Mapping[int, Tensor] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.folder = CheckpointFolder(folder)
        self.layout, self.facts = recognise(self.folder.quantization, str(folder))
        self.versions = dict(versions or {})
        self.shared = Shared({}, {}, {"layout": self.layout.name, **self.facts})
        self._base, self._dtype, self._claim = base, torch_dtype(dtype), claim
        self._probes, self._outputs = probes or {}, outputs or {}
        self._verified = False

    @cached_property
    def _inventory(self) -> Inventory:
        return read_inventory(self._base)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_config(self._base)

    @property
    def _tied(self) -> bool:
        return bool(self._config.get("tie_word_embeddings", self._inventory.architecture.tied))

    @cached_property
    def _rescaling(self) -> Rescaling | None:
        """None for a model whose operations before each layer are not known."""
        model_type = self._config.get("model_type", "")
        return Rescaling(model_type, self._inventory.head_dim, self._norm) if model_type in WRITERS else None

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        ours = next((stored for stored in self._inventory.rest if stored.name == name), None)
        if ours is None:
            raise TrialFailed(f"{name}: no norm of the base model, and no layer that was checked before")
        return read_tensor(ours), self.folder.tensor(name)

    def rescaled(self, shape: LayerShape, weight: Tensor, restored: Tensor, *, dense: bool = False) -> Fold | None:
        """How a layer of a rescaled checkpoint was stored; None for an embedding or a head, which nothing rescales.

        dense: it was left unrounded. Raises TrialFailed for scales that nothing takes back.
        """
        if shape.block < 0:
            return None
        if self._rescaling is None:
            return fitted(weight, restored)
        return (self._rescaling.fold_dense if dense else self._rescaling.fold)(shape, weight, restored)

    def verify(self) -> None:
        """From headers alone, before anything is decoded: that the checkpoint is the base model, whole and no more.

        Raises TrialFailed where it is of another model: the tensor and both shapes; where a tensor is missing; and
        where one is left over, which the library would use, and which would be neither decoded nor billed here.
        """
        if self._verified:
            return
        self.folder.check_names([shape for shape, _ in self._inventory.layers])
        self._check_rest()
        self._check_leftovers()
        self._verified = True

    def layer(self, shape: LayerShape) -> PackedLayer:
        """As the file has it; a layer that the library left dense, at the dtype it is evaluated in."""
        roles = self._roles_of(shape)
        if roles is None:
            weight = self.folder.tensor(f"{shape.name}.weight")
            return dense_layer(weight.T if self._inventory.architecture.transposed else weight, self._dtype)
        stored = self.folder.with_spare_bias(shape, roles)
        return PackedLayer({name: self.folder.tensor(f"{shape.name}.{name}") for name in stored}, stored)

    def check(self, shape: LayerShape, weight: Tensor, restored: Tensor, moment: Tensor | None = None) -> Fold | None:
        if shape.name in self._outputs:
            # what is stored stands for the weight only where nothing was rescaled: else its error would say nothing
            beside = None if self._claim.rescales else weight
            probe, outputs = self._probes[shape.in_features], self._outputs[shape.name]
            check_forward(shape, restored, probe, outputs, beside, self._claim.library)
        dense = self._roles_of(shape) is None
        fold = self.rescaled(shape, weight, restored, dense=dense) if self._claim.rescales else None
        if dense:
            check_left(shape.name, weight if fold is None else folded(weight, fold), restored, self._claim)
            return None if torch.equal(weight.to(self._dtype), restored.to(self._dtype)) else fold
        check_weight(shape, weight, restored, fold, self.layout.grid(shape, self.facts), self._claim, moment)
        return fold

    def rest(self) -> Mapping[str, Tensor]:
        """What differs from the base model outside the layers: norms, biases, embeddings, a head.

        An embedding or a head that was quantized is decoded, and checked as a layer is: it is stored dense, and so
        billed for more than it takes. Raises TrialFailed as `verify` and `check` do.
        """
        self.verify()
        changed: dict[str, Tensor] = {}
        for stored in self._inventory.rest:
            ours, dense = read_tensor(stored), self._is_dense(stored)
            theirs = self.folder.tensor(stored.name) if dense else self._decoded(stored, ours)
            if not bool(torch.isfinite(theirs).all()):
                raise TrialFailed(f"{stored.name}: not finite in {self.folder.path}")
            if torch.equal(ours.to(self._dtype), theirs.to(self._dtype)):
                continue
            if dense:
                self._check_outside(stored, ours.float(), theirs.float())
            changed[stored.name] = theirs
        return changed

    def _check_outside(self, stored: StoredTensor, ours: Tensor, theirs: Tensor) -> None:
        """Only rescaling changes more than a dtype: norms, which layers were checked against, and biases."""
        if self._claim.rescales and len(stored.shape) == 1:
            if self._rescaling is None or self._rescaling.takes_back(stored.name):
                return
            if (scaled := self._rescaling.bias(stored.name, ours)) is not None:
                expected, doubt = scaled
                check_left(stored.name, expected, theirs, self._claim, doubt**2)
                return
        check_left(stored.name, ours, theirs, self._claim)

    # -- what is where ----------------------------------------------------------------------------------------

    def _roles_of(self, shape: LayerShape) -> dict[str, Role] | None:
        """The tensors that a layer is stored in; None for one that was left dense."""
        roles = self.layout.roles(shape, self.facts)
        return roles if self.folder.packed(shape, roles) else None

    def _is_dense(self, stored: StoredTensor) -> bool:
        entry = self.folder.entries.get(stored.name)
        return entry is not None and (len(stored.shape) < 2 or entry.dtype in FLOATS)

    def _check_rest(self) -> None:
        for stored in self._inventory.rest:
            if self._is_dense(stored):
                if (shape := self.folder.entries[stored.name].shape) != stored.shape:
                    raise TrialFailed(
                        f"{stored.name}: {shape} in {self.folder.path}, {stored.shape} in the base model: "
                        "another model's checkpoint"
                    )
            elif len(stored.shape) == 2 and stored.name.endswith(".weight"):
                self._roles_of(_as_layer(stored))  # raises for what is missing
            else:
                raise TrialFailed(f"{self.folder.path}: no tensor {stored.name!r}, which the base model has")

    def _decoded(self, stored: StoredTensor, dense: Tensor) -> Tensor:
        shape = _as_layer(stored)
        roles = self.layout.roles(shape, self.facts)
        tensors = {name: self.folder.tensor(f"{shape.name}.{name}") for name in roles}
        with named_failure(shape.name):
            weight = self.layout.decode(tensors, shape, self.facts)
            self.check(shape, dense.float(), weight)
        return weight

    def _known_names(self) -> Iterator[str]:
        for shape, _ in self._inventory.layers:
            yield from (f"{shape.name}.{part}" for part in (self._roles_of(shape) or {"weight": Role.DENSE}))
        for stored in self._inventory.rest:
            yield stored.name
            if not self._is_dense(stored):
                shape = _as_layer(stored)
                yield from (f"{shape.name}.{part}" for part in self.layout.roles(shape, self.facts))

    def _check_leftovers(self) -> None:
        for name in sorted(self.folder.entries.keys() - set(self._known_names())):
            if name.endswith(BUFFERS):
                continue
            if name.endswith(".bias") and not self.folder.tensor(name).count_nonzero():
                continue  # AutoGPTQ gives every layer a bias, of zeros where there is none; billed with its layer
            if name == HEAD and self._tied and self._is_embedding(self.folder.tensor(name)):
                continue
            tied = "; the base model's head is its embedding" if name.startswith("lm_head.") and self._tied else ""
            raise TrialFailed(f"{self.folder.path}: {name!r} is nothing of the base model{tied}: it cannot be left out")

    def _is_embedding(self, head: Tensor) -> bool:
        names = [s.name for s in self._inventory.rest if s.shape == tuple(head.shape) and s.name in self.folder.where]
        return any(torch.equal(self.folder.tensor(name), head) for name in names)


def _as_layer(stored: StoredTensor) -> LayerShape:
    """An embedding or a head as a linear layer, so that a layout can say how it would be stored."""
    name = stored.name.removesuffix(".weight")
    rows, columns = stored.shape
    return LayerShape(name, -1, name, rows, columns, stored.dtype)


def decode(packed: PackedLayer, shape: LayerShape, shared: Shared | None) -> Tensor:
    """(out, in) float32 of a stored layer, by the layout that the artifact's shared facts name."""
    facts: dict[str, Any] = dict(shared.meta) if shared is not None else {}
    name = facts.pop("layout", "")
    return layout(name).decode(packed.tensors, shape, {**facts, **packed.meta})
