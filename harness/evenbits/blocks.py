"""The model to compress, a block at a time: its weights from the checkpoint, and what its layers read.

Opened on demand: a method that needs no statistics never has more than one layer of it in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evenbits.calibration import BlockRunner, DenseMoments, block_moments, layer_inputs
from evenbits.compressor import Layer, LayerShape, ModelShapes
from evenbits.errors import TrialFailed
from evenbits.fisher import DenseFisher
from evenbits.models import check_coverage, open_model, read_weight
from evenbits.shapes import Inventory, StoredTensor, read_inventory

if TYPE_CHECKING:
    from evenbits.driver import Work

NO_CALIBRATION = "statistics were asked for, and the suite gives no calibration data"


class Survey:
    """All weights, one at a time, from the checkpoint files."""

    def __init__(
        self,
        inventory: Inventory,
        shapes: ModelShapes,
        device: torch.device,
        moments: DenseMoments | None,
        fisher: DenseFisher | None,
    ) -> None:
        self.shapes = shapes
        self._inventory = inventory
        self._device = device
        self._moments = moments
        self._fisher = fisher

    def __iter__(self) -> Iterator[tuple[LayerShape, Tensor]]:
        for layer, tensor in self._inventory.layers:
            yield layer, read_weight(tensor, self._inventory.architecture).to(self._device)

    def second_moment(self, name: str) -> Tensor:
        if self._moments is None:
            raise TrialFailed(f"{name}: {NO_CALIBRATION}")
        return self._moments.get(name).to(self._device)

    def fisher(self, name: str) -> Tensor:
        if self._fisher is None:
            raise TrialFailed(f"{name}: {NO_CALIBRATION}")
        return self._fisher.get(name).to(self._device)


class Blocks:
    """The blocks of the model that `work` names."""

    def __init__(self, work: Work) -> None:
        self.inventory = read_inventory(work.model_folder)
        self.shapes = self.inventory.shapes(work.dtype)
        self._work = work
        self._model: nn.Module | None = None
        self._runner: BlockRunner | None = None

    def __iter__(self) -> Iterator[tuple[int, list[tuple[LayerShape, StoredTensor]]]]:
        """The linear layers of each block, from the checkpoint's headers."""
        blocks: dict[int, list[tuple[LayerShape, StoredTensor]]] = {}
        for layer, tensor in self.inventory.layers:
            blocks.setdefault(layer.block, []).append((layer, tensor))
        yield from sorted(blocks.items())

    def groups(self, shapes: Sequence[LayerShape]) -> list[list[LayerShape]]:
        """The layers of a block in groups of one input, in the order in which the inputs become known."""
        kinds = self.inventory.architecture.groups
        return [found for group in kinds if (found := [shape for shape in shapes if shape.kind in group])]

    def weight(self, tensor: StoredTensor) -> Tensor:
        """(out, in) float32, as the checkpoint has it."""
        return read_weight(tensor, self.inventory.architecture).to(self._work.device)

    def survey(self) -> Survey:
        return Survey(self.inventory, self.shapes, self._work.device, self.moments(), self.fisher())

    # -- what is opened on demand ---------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            work = self._work
            self._model = open_model(
                work.model_folder, work.dtype, work.device, trust_remote_code=work.trust_remote_code
            )
            check_coverage(self._model, self.inventory)
        return self._model

    def runner(self) -> BlockRunner:
        if self._work.tokens is None:
            raise TrialFailed(NO_CALIBRATION)
        if self._runner is None:
            self._runner = BlockRunner(self.model, self.inventory.architecture, self._work.tokens)
        return self._runner

    def moments(self) -> DenseMoments | None:
        if self._work.tokens is None or self._work.moments_folder is None:
            return None
        return DenseMoments(self._work.moments_folder, self.runner, self.inventory)

    def fisher(self) -> DenseFisher | None:
        """Beside the moments. Its model is its own: ours may be in a narrow dtype, or partly compressed by now."""
        work = self._work
        if work.tokens is None or work.moments_folder is None:
            return None

        def open_dense() -> nn.Module:
            model: nn.Module = open_model(
                work.model_folder, "float32", work.device, trust_remote_code=work.trust_remote_code
            )
            return model

        return DenseFisher(work.moments_folder, open_dense, self.inventory, work.tokens)

    def layers(self, index: int, shapes: Sequence[LayerShape], hidden: Sequence[Tensor]) -> list[Layer]:
        """The layers with the statistics that the compressor needs, through the blocks as they are now."""
        runner, modules = self.runner(), {shape.name: self.model.get_submodule(shape.name) for shape in shapes}
        moments: Mapping[str, Tensor] = {}
        inputs: Mapping[str, Tensor] = {}
        if self._work.needs.statistics != "none":
            moments = block_moments(runner, index, hidden, modules)
        if self._work.needs.statistics == "inputs":
            inputs = layer_inputs(runner, index, hidden, modules)
        fisher = self.fisher() if self._work.needs.statistics == "fisher" else None
        return [
            Layer(
                shape,
                moments.get(shape.name),
                inputs.get(shape.name),
                self._work.budget,
                None if fisher is None else fisher.get(shape.name).to(self._work.device),
            )
            for shape in shapes
        ]
