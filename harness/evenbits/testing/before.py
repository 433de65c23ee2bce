"""A tiny model compressed and dense as artifacts, a recovery stage run on one, and what became of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenbits.artifact import Artifact, ArtifactWriter
from evenbits.compressor import AnyCompressor, Compressor, Needs, Options, Recovery, Role
from evenbits.driver import Driver, Work
from evenbits.ledger import measure_bits
from evenbits.models import build_model, guarded_randomness, torch_dtype
from evenbits.record import ModelFacts
from evenbits.recovery import LeaveDense, RecoveryWork, recover
from evenbits.shapes import read_inventory
from evenbits.subject import restore_state
from evenbits.testing.matrices import bytes_of
from evenbits.testing.stand_ins import ROWS
from evenbits.testing.stored import compress_model, folder_digest, manifest_facts
from evenbits.tiny import tiny_model, tiny_tokens

DENSE = Compressor("dense", "", "", Options, lambda options: None, ROWS.predict, ROWS.fit)  # type: ignore[arg-type,return-value]
SEED = 5


@dataclass
class Recovered:
    """An artifact before and after a stage. touched: files that were not the stage's to write, and changed."""

    before: Artifact
    after: Artifact
    compressor: AnyCompressor
    facts: ModelFacts
    moved_randomness: bool
    touched: list[str]

    @property
    def files(self) -> dict[str, str]:
        return {name: file.sha256 for name, file in self.after.manifest.files.items()}

    @property
    def roles(self) -> dict[Role, int]:
        return {Role(role): count for role, count in measure_bits(self.after.folder, self.facts).roles.items() if count}

    @property
    def dense(self) -> set[str]:
        return {layer.name for layer in self.after.manifest.layers if layer.left_dense}

    @property
    def dense_before(self) -> set[str]:
        return {layer.name for layer in self.before.manifest.layers if layer.left_dense}

    def before_roles(self, without: Collection[str]) -> dict[Role, int]:
        """Bytes before of all layers but these."""
        found: dict[Role, int] = {}
        for stored, packed in self.before.packed():
            if stored.name not in without:
                for name, tensor in packed.tensors.items():
                    role = packed.roles[name]
                    found[role] = found.get(role, 0) + tensor.numel() * tensor.element_size()
        return found

    def changed_codes(self, without: Collection[str]) -> list[str]:
        """Tensors that are not tunable and are not as they were, of all layers but these."""
        after = {stored.name: packed for stored, packed in self.after.packed()}
        changed = []
        for stored, packed in self.before.packed():
            if stored.name in without:
                continue
            tunable = set() if stored.left_dense else set(self.compressor.tunable(packed, None))  # type: ignore[union-attr]
            now = after[stored.name]
            if packed.tensors.keys() != now.tensors.keys() or packed.roles != now.roles or packed.meta != now.meta:
                changed.append(f"the tensors, roles or meta of {stored.name}")
                continue
            for name, tensor in packed.tensors.items():
                other = now.tensors[name]
                same_form = (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
                if not same_form or (name not in tunable and bytes_of(tensor) != bytes_of(other)):
                    changed.append(f"{stored.name}/{name}")
        return changed

    def changed_rest_forms(self) -> list[str]:
        before, after = self.before.rest(), self.after.rest()
        forms = ({name: (t.dtype, t.shape) for name, t in rest.items()} for rest in (before, after))
        one, other = forms
        return [name for name in sorted({**one, **other}) if one.get(name) != other.get(name)]

    def check_opens(self, name: str) -> None:
        again = Artifact(self.after.folder)  # every hash is compared
        model = build_model(again.folder, restore_state(again, self.compressor), "float32")  # type: ignore[arg-type]
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 19)[None, :]).logits
        assert bool(torch.isfinite(logits).all()), (
            f"{name}: the stored model's logits are not finite: raise TrialFailed when the loss is not finite"
        )


class Workbench:
    """The tiny model, its two artifacts and calibration tokens (samples, length)."""

    def __init__(self, folder: Path, model: Path | None, samples: int, length: int) -> None:
        self.folder = folder
        self.base = tiny_model(folder / "dense", "llama") if model is None else model
        self.shapes = read_inventory(self.base).shapes("float32")
        self.tokens = tiny_tokens(self.base, samples, length)
        compress_model(ROWS, ROWS.options(), self.base, folder / "rows")
        self._leave_dense(folder / "as-it-is")
        self.facts = ModelFacts(
            name="tiny", revision="none", dtype="float32", parameters=self.shapes.parameters,
            linear_weights=self.shapes.weights, stored_bits=32, linear_bytes=4 * self.shapes.weights,
            model_bytes=4 * self.shapes.weights + self.shapes.rest_bytes,
        )  # fmt: skip

    def _leave_dense(self, folder: Path) -> None:
        work = Work(self.base, "float32", torch.device("cpu"), LeaveDense(torch.float32), Needs(), None, 0, None, None)
        with ArtifactWriter(folder) as writer:
            stored = Driver(work, writer).run()
            writer.copy_base_files(self.base)
            writer.finish(**manifest_facts(DENSE, Options()), layers=tuple(stored.layers), shared=stored.shared)

    def recover(
        self,
        descriptor: Recovery,
        options: Options,
        stage: Any,
        name: str,
        which: str,
        outer: int,
        device: str,
    ) -> Recovered:
        """Run the stage as a trial would. outer: the global random state that the process happens to be in."""
        dense = which == "dense"
        before = Artifact(self.folder / ("as-it-is" if dense else "rows"))
        compressor: Any = LeaveDense(torch_dtype("float32")) if dense else ROWS.make(ROWS.options())
        work = RecoveryWork(
            before, compressor, stage, descriptor.name, self.base, self.tokens.clone(), SEED, torch.device(device)
        )
        digests = {folder: folder_digest(folder) for folder in (self.base, before.folder)}
        facts = {
            "key": "1" * 16, "calibration": None, "budget": None,
            "recovery": ({"name": descriptor.name, "options": options.model_dump(mode="json")},),
        }  # fmt: skip
        with guarded_randomness(outer), ArtifactWriter(self.folder / f"after-{name}") as writer:
            recover(work, writer, facts)
        touched = [
            f"{folder.name}/{file}"
            for folder, digest in digests.items()
            for file in sorted({**digest, **folder_digest(folder)})
            if digest.get(file) != folder_digest(folder).get(file)
        ]
        return Recovered(
            before, Artifact(self.folder / f"after-{name}"), compressor, self.facts, any(stage.moved), touched
        )
