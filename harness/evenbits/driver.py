"""Runs a compressor over a model and stores what comes out.

Data-free methods stream: one layer of weights in memory at a time. Methods that need statistics of the dense
model stream too, once those are cached. Sequential ones go block by block through the blocks already compressed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenbits.artifact import ArtifactWriter
from evenbits.block_pass import BlockPass
from evenbits.blocks import NO_CALIBRATION, Blocks
from evenbits.budget import BitBudget
from evenbits.compressor import (
    AnyCompressor,
    Block,
    BlockCompressor,
    Fold,
    Layer,
    LayerCompressor,
    LayerShape,
    ModelCompressor,
    Needs,
    PackedLayer,
    Role,
    Shared,
)
from evenbits.errors import TrialFailed
from evenbits.foreign import Bench, CheckpointCompressor, Launch
from evenbits.manifest import StoredLayer
from evenbits.maths.hessian import calibrated_error, relative_error
from evenbits.models import (
    get_weight,
    guarded_randomness,
    read_tensor,
    set_weight,
    torch_dtype,
)
from evenbits.restoring import all_finite, named_failure, restore_layer, unfolded
from evenbits.shapes import StoredTensor

Advance = Callable[[int], None]


def seeded_generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names only, so that layers are independent of their order."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Work:
    """What to compress and with what. tokens: (samples, length) calibration ids, or None."""

    model_folder: Path
    dtype: str
    device: torch.device
    compressor: AnyCompressor
    needs: Needs
    budget: BitBudget | None
    seed: int
    tokens: Tensor | None
    moments_folder: Path | None
    trust_remote_code: bool = False
    advance: Advance = lambda steps: None
    launch: Launch | None = None  # runs a worker in the environment that the compressor needs


@dataclass
class Stored:
    """What the manifest needs to know of what was written."""

    layers: list[StoredLayer] = field(default_factory=list)
    shared: dict[str, Role] = field(default_factory=dict)
    whole: dict[str, Role] = field(default_factory=dict)
    whole_weights: int = 0
    form: str = "layers"
    made_with: dict[str, str] = field(default_factory=dict)  # versions of another program's libraries


class Driver:
    """One compression, from weights to an artifact's files."""

    def __init__(self, work: Work, writer: ArtifactWriter) -> None:
        self.work = work
        self.writer = writer
        self.blocks = Blocks(work)
        self.inventory = self.blocks.inventory
        self.shapes = self.blocks.shapes
        self.stored = Stored()
        self.changed: dict[str, Tensor] = {}
        self.shared: Shared | None = None
        self._refreshed: dict[str, Layer] = {}  # with the statistics that a block compressor last asked for

    @property
    def model(self) -> nn.Module:
        return self.blocks.model

    # -- the road -------------------------------------------------------------------------------------------

    def run(self) -> Stored:
        """Compress and write every tensor file. Raises TrialFailed with the layer's name."""
        compressor = self.work.compressor
        with guarded_randomness(self.work.seed):
            if not isinstance(compressor, LayerCompressor):
                self._whole(compressor)
                return self.stored
            if isinstance(compressor, CheckpointCompressor):
                self._foreign(compressor)
                self._rest()
                return self.stored
            self._share(compressor.prepare(self.blocks.survey(), seeded_generator(self.work.seed, "prepare")))
            if (
                isinstance(compressor, BlockCompressor)
                or self.work.needs.sequential
                or self.work.needs.statistics == "inputs"
            ):
                self._sequential(compressor)
            else:
                self._stream(compressor)
        self._rest()
        return self.stored

    @torch.no_grad()
    def _stream(self, compressor: LayerCompressor) -> None:
        wanted = self.work.needs.statistics
        fisher = self.blocks.fisher() if wanted == "fisher" else None
        moments = self.blocks.moments() if wanted in ("second_moment", "fisher") else None
        if moments is None and wanted != "none":
            raise TrialFailed(NO_CALIBRATION)
        for index, layers in self.blocks:
            for shape, tensor in layers:
                weight = self.blocks.weight(tensor)
                # first, while no other model is open for the moments
                felt = None if fisher is None else fisher.get(shape.name).to(self.work.device)
                moment = None if moments is None else moments.get(shape.name).to(self.work.device)
                self._compress(compressor, weight, Layer(shape, moment, None, self.work.budget, felt))
            self._flush(index)

    @torch.no_grad()
    def _foreign(self, compressor: CheckpointCompressor) -> None:
        """What another program stored, layer by layer as its files have it; each checked before it is taken."""
        work = self.work
        # a later recovery stage may have drawn tokens: no part of what this artifact is known by
        tokens = None if work.needs.statistics == "none" else work.tokens
        bench = Bench(
            work.model_folder, self.shapes, work.dtype, str(work.device), work.seed, work.budget, tokens,
            self.writer.scratch(), work.launch,
        )  # fmt: skip
        checkpoint = compressor.open(bench)
        self._share(checkpoint.shared)
        self.stored.made_with = dict(checkpoint.versions)
        moments = None if tokens is None else self.blocks.moments()
        for index, layers in self.blocks:
            for shape, tensor in layers:
                weight, packed = self.blocks.weight(tensor), checkpoint.layer(shape)
                moment = None if moments is None else moments.get(shape.name).to(work.device)
                with named_failure(shape.name):
                    restored = restore_layer(compressor, packed, shape, self.shared)
                    fold = checkpoint.check(shape, weight, restored, moment)
                self._store(compressor, weight, Layer(shape, moment), packed, fold)
            self._flush(index)
        self.changed = dict(checkpoint.rest())

    def _share(self, shared: Shared | None) -> None:
        self.shared = shared
        if shared is not None:
            self.writer.write_shared(shared)
            self.stored.shared = dict(shared.roles)

    @torch.no_grad()
    def _sequential(self, compressor: LayerCompressor) -> None:
        runner, needs = self.blocks.runner(), self.work.needs
        hidden = list(runner.hidden)
        in_turn = needs.within_block and needs.statistics == "second_moment"
        blocks = list(self.blocks)
        for index, layers in blocks:
            shapes = [shape for shape, _ in layers]
            weights = {shape.name: tensor for shape, tensor in layers}
            last = index == blocks[-1][0]  # whose outputs nobody reads
            if in_turn and not isinstance(compressor, BlockCompressor):
                hidden = self._in_turn(compressor, index, shapes, weights, hidden, last)
                self._flush(index)
                continue
            if isinstance(compressor, BlockCompressor):
                self._block(compressor, index, shapes, weights, hidden)
            else:
                for group in self.blocks.groups(shapes) if needs.within_block else [shapes]:
                    self._group(compressor, self.blocks.layers(index, group, hidden), weights)
            self._flush(index)
            if not last:
                hidden = runner.run_all(index, hidden)

    def _in_turn(
        self,
        compressor: LayerCompressor,
        index: int,
        shapes: Sequence[LayerShape],
        weights: Mapping[str, StoredTensor],
        hidden: Sequence[Tensor],
        last: bool,
    ) -> list[Tensor]:
        """Group by group in the order in which inputs become known; returns the block's outputs, none for the last."""
        groups = self.blocks.groups(shapes)
        modules = [{shape.name: self.model.get_submodule(shape.name) for shape in group} for group in groups]
        with BlockPass(self.blocks.runner(), index, hidden, modules) as under_way:
            for number, group in enumerate(groups):
                moments = under_way.moments(number)
                layers = [Layer(shape, moments[shape.name], None, self.work.budget) for shape in group]
                self._group(compressor, layers, weights)
            return [] if last else under_way.outputs()

    def _group(self, compressor: LayerCompressor, layers: Sequence[Layer], weights: Mapping[str, StoredTensor]) -> None:
        for layer in layers:
            weight = self.blocks.weight(weights[layer.name])
            restored = self._compress(compressor, weight, layer)
            set_weight(self.model.get_submodule(layer.name), restored, self.inventory.architecture)

    def _block(
        self,
        compressor: BlockCompressor,
        index: int,
        shapes: Sequence[LayerShape],
        weights: Mapping[str, StoredTensor],
        hidden: Sequence[Tensor],
    ) -> None:
        runner = self.blocks.runner()
        module = runner.blocks[index]
        targets = runner.run_all(index, hidden)
        block = self._opened(index, module, shapes, hidden)
        generator = seeded_generator(self.work.seed, f"block {index}")
        with torch.set_grad_enabled(self.work.needs.gradients), named_failure(f"block {index}"):
            result = compressor.compress_block(block, hidden, targets, self.shared, generator)
        lacking = {shape.name for shape in shapes} ^ result.layers.keys()
        if lacking:
            raise TrialFailed(f"block {index}: layers in and out differ: {', '.join(sorted(lacking))}")
        architecture = self.inventory.architecture
        for told in block.layers:
            layer = self._refreshed.pop(told.name, told)
            weight = self.blocks.weight(weights[layer.name])
            fold = result.folds.get(layer.name)
            restored = self._store(compressor, weight, layer, result.layers[layer.name], fold)
            set_weight(self.model.get_submodule(layer.name), restored, architecture)
        own = f"{architecture.blocks}.{index}."
        parameters = {name: p for name, p in self.model.named_parameters() if name.startswith(own)}
        for name, tensor in result.changed.items():
            if name not in parameters or name.removesuffix(".weight") in weights:
                raise TrialFailed(f"block {index}: {name!r} is not a tensor that a block may change")
            parameters[name].data.copy_(tensor)
            self.changed[name] = tensor

    def _opened(self, index: int, module: nn.Module, shapes: Sequence[LayerShape], hidden: Sequence[Tensor]) -> Block:
        runner, architecture, needs = self.blocks.runner(), self.inventory.architecture, self.work.needs
        by_name = {shape.name: shape for shape in shapes}

        def refresh(names: Sequence[str]) -> list[Layer]:
            layers = self.blocks.layers(index, [by_name[name] for name in names], hidden)
            self._refreshed.update({layer.name: layer for layer in layers})
            return layers

        return Block(
            index,
            module,
            [Layer(s, budget=self.work.budget) for s in shapes]
            if needs.within_block
            else self.blocks.layers(index, shapes, hidden),
            run=lambda states: runner.run(index, states),
            weight=lambda name: get_weight(self.model.get_submodule(name), architecture),
            install=lambda name, weight: set_weight(self.model.get_submodule(name), weight, architecture),
            refresh=refresh,
            groups=[[shape.name for shape in group] for group in self.blocks.groups(shapes)],
        )

    # -- one layer ------------------------------------------------------------------------------------------

    def _compress(self, compressor: LayerCompressor, weight: Tensor, layer: Layer) -> Tensor:
        if not all_finite(weight):
            raise TrialFailed(f"{layer.name}: the checkpoint's weight is not finite; it cannot be compressed")
        generator = seeded_generator(self.work.seed, layer.name)
        with named_failure(layer.name):
            packed = compressor.compress(weight, layer, self.shared, generator)
        return self._store(compressor, weight, layer, packed)

    def _store(
        self,
        compressor: LayerCompressor,
        weight: Tensor,
        layer: Layer,
        packed: PackedLayer,
        fold: Fold | None = None,
    ) -> Tensor:
        """Keep the packed layer for the block's file; returns what it restores to, (out, in) float32."""
        with named_failure(layer.name):
            PackedLayer(packed.tensors, packed.roles)  # checks again: the tensors may have changed since it was made
            restored = restore_layer(compressor, packed, layer.shape, self.shared)
        moment = layer.second_moment
        shape = layer.shape
        compared = restored if fold is None else unfolded(restored, fold)
        error = relative_error(weight, compared)
        if not math.isfinite(error):
            raise TrialFailed(f"{shape.name}: an all-zero weight was restored to something else")
        self.writer.add_layer(shape.name, packed)
        self.stored.layers.append(
            StoredLayer(
                name=shape.name,
                block=shape.block,
                kind=shape.kind,
                out_features=shape.out_features,
                in_features=shape.in_features,
                stored_dtype=shape.dtype,
                bias=shape.bias,
                file="",
                roles=packed.roles,
                error=error,
                calibrated_error=None if moment is None else calibrated_error(weight, compared, moment),
                folded=fold is not None,
            )
        )
        self.work.advance(shape.weights)
        return restored

    def _flush(self, index: int) -> None:
        file = self.writer.flush_block(index)
        self.stored.layers = [
            layer.model_copy(update={"file": file}) if layer.file == "" else layer for layer in self.stored.layers
        ]

    def _rest(self) -> None:
        dtype = torch_dtype(self.work.dtype)
        rest = {
            tensor.name: self.changed.get(tensor.name, read_tensor(tensor)).to(dtype) for tensor in self.inventory.rest
        }
        if left := self.changed.keys() - rest.keys():
            raise TrialFailed(f"changed tensors that the checkpoint does not hold: {', '.join(sorted(left))}")
        self.writer.write("rest.safetensors", rest)

    def _whole(self, compressor: ModelCompressor) -> None:
        sink = _WholeWriter()
        generator = seeded_generator(self.work.seed, "model")
        with torch.set_grad_enabled(self.work.needs.gradients):
            compressor.compress(self.model, self.work.tokens, sink, generator)
        if sink.weights != self.shapes.weights:
            raise TrialFailed(
                f"what is stored stands for {sink.weights} linear weights, the model has {self.shapes.weights}: "
                "all must be billed"
            )
        self.writer.write("whole.safetensors", sink.tensors, sink.facts)
        self.stored.form, self.stored.whole = "whole", sink.roles
        self.stored.whole_weights = sink.weights
        self.work.advance(self.shapes.weights)


class _WholeWriter:
    """Collects what a model compressor stores."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.roles: dict[str, Role] = {}
        self.facts: dict[str, Any] = {}
        self.weights = 0

    def write(self, name: str, tensor: Tensor, role: Role | None, *, weights: int = 0) -> None:
        """Whatever has a role is billed in linear bits, also scales and masks that stand for no weight of their own."""
        if role is None and weights:
            raise TrialFailed(f"{name}: stands for {weights} linear weights, so it needs a role to be billed under")
        self.tensors[name] = tensor
        if role is not None:
            self.roles[name] = role
        self.weights += weights

    def meta(self, facts: Mapping[str, Any]) -> None:
        self.facts.update(facts)
