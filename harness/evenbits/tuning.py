"""Compress a block layer by layer, then tune what was stored of it towards the dense block's outputs.

The second half is AQLM's block fine-tuning (arXiv:2401.06118, section 3.4) and VPTQ's layer-wise one (arXiv:2409.17066,
section 3.3). Unlike the papers, steps are relative to each tensor's size unless the options say otherwise, training
sees tensors rounded to what they are stored in, and the best state over all passes is kept, the first included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from evenbits.compressor import Block, BlockResult, LayerCompressor, LayerShape, PackedLayer, Shared
from evenbits.errors import TrialFailed
from evenbits.restoring import restore_layer
from evenbits.tunable import TunableLinear, Tuned, unit_of
from evenbits.tune_options import TuneOptions


def compress_then_tune(
    compressor: LayerCompressor,
    block: Block,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    shared: Shared | None,
    generator: torch.Generator,
    tune: TuneOptions | None,
) -> BlockResult:
    """Each layer by `compressor.compress`, in the order in which inputs become known and with statistics through what
    is compressed already; then `tune_block`, unless `tune` is None.

    inputs, targets: (rows, length, width) each, as `BlockCompressor.compress_block` gets them.
    """
    packed: dict[str, PackedLayer] = {}
    with torch.no_grad():
        for names in block.groups:
            for layer in block.refresh(names):
                found = compressor.compress(block.weight(layer.name), layer, shared, generator)
                packed[layer.name] = found
                block.install(layer.name, restore_layer(compressor, found, layer.shape, shared))
    if tune is None:
        return BlockResult(packed)
    return tune_block(compressor, block, packed, inputs, targets, shared, generator, tune)


def tune_block(
    compressor: LayerCompressor,
    block: Block,
    packed: Mapping[str, PackedLayer],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    shared: Shared | None,
    generator: torch.Generator,
    options: TuneOptions,
) -> BlockResult:
    """Train what `compressor.tunable` names, and the norms; the mean squared error never ends above where it began.

    What many layers share stays as it is. Raises TrialFailed where the error is not finite.
    """
    shapes = {layer.name: layer.shape for layer in block.layers}
    layers = {name: PackedLayer(dict(part.tensors), part.roles, part.meta) for name, part in packed.items()}
    tuned: list[Tuned] = []
    for name, part in layers.items():
        for key, tensor in compressor.tunable(part, shared).items():
            if key in part.tensors:  # "shared/..." is not this block's alone
                parameter = nn.Parameter(tensor.detach().float())
                tuned.append(_tuned(f"{name}/{key}", parameter, tensor.dtype, options))
                part.tensors[key] = parameter
    norms = dict(_norms(block)) if options.norms else {}
    tuned += [_tuned(name, parameter, parameter.dtype, options) for name, parameter in norms.items()]
    tuned = [one for one in tuned if one.parameter.numel()]
    if not tuned:
        return BlockResult(dict(packed))

    def restore(name: str) -> Callable[[], Tensor]:
        return lambda: restore_layer(compressor, layers[name], shapes[name], shared)

    try:
        with _restored_at_each_call(block, {shapes[name]: restore(name) for name in layers}), torch.enable_grad():
            _train(block, tuned, inputs, targets, generator, options)
    finally:
        for parameter in norms.values():
            parameter.requires_grad_(False)
    stored = {one.name: one.parameter.detach().to(one.dtype) for one in tuned}
    for name, part in layers.items():
        for key in part.tensors:
            part.tensors[key] = stored.get(f"{name}/{key}", part.tensors[key])
    prefix = _prefix(block)
    return BlockResult(layers, {prefix + name: stored[name] for name in norms if name in stored})


def _tuned(name: str, parameter: nn.Parameter, dtype: torch.dtype, options: TuneOptions) -> Tuned:
    return Tuned(name, parameter, dtype, unit_of(parameter) if options.relative else 1.0)


def _prefix(block: Block) -> str:
    shape = block.layers[0].shape
    return shape.name.removesuffix(shape.kind)


def _norms(block: Block) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights and biases of modules whose class says that they normalise, by their path inside the block."""
    for path, module in block.module.named_modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", parameter


@contextmanager
def _restored_at_each_call(block: Block, restores: Mapping[LayerShape, Callable[[], Tensor]]) -> Iterator[None]:
    originals: dict[str, nn.Module] = {}
    try:
        for shape, restore in restores.items():
            module = block.module.get_submodule(shape.kind)
            originals[shape.kind] = module
            bias = getattr(module, "bias", None)
            _put(block.module, shape.kind, TunableLinear(restore, None if bias is None else bias.detach()))
        yield
    finally:
        for kind, module in originals.items():
            _put(block.module, kind, module)


def _put(parent: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, child = path.rpartition(".")
    setattr(parent.get_submodule(holder), child, module)


def _train(
    block: Block,
    tuned: Sequence[Tuned],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    generator: torch.Generator,
    options: TuneOptions,
) -> None:
    """Leaves the parameters in the best state of all passes."""
    size = options.batch_size
    batches = [
        (states[start : start + size], wanted[start : start + size])
        for states, wanted in zip(inputs, targets, strict=True)
        for start in range(0, len(states), size)
    ]
    optimiser = torch.optim.Adam([one.free for one in tuned], lr=options.lr, betas=(options.beta1, options.beta2))

    last = least = _mean_error(block, batches)
    best = [one.parameter.detach().clone() for one in tuned]
    for _ in range(options.epochs):
        for turn in torch.randperm(len(batches), generator=generator).tolist():
            states, wanted = batches[turn]
            # a mean over all elements has gradients that underflow in float16; and Adam's eps is in no unit
            scale = wanted.numel() / math.sqrt(wanted.shape[0] * wanted.shape[1])
            (_error(block, states, wanted) * scale).backward()
            for one in tuned:
                one.take_gradient()
            optimiser.step()
            for one in tuned:
                one.show()
        found = _mean_error(block, batches)
        if found < least:
            least = found
            best = [one.parameter.detach().clone() for one in tuned]
        if found > last * (1 - options.relative_gain):
            break
        last = found
    with torch.no_grad():
        for one, values in zip(tuned, best, strict=True):
            one.parameter.copy_(values)


def _error(block: Block, states: Tensor, wanted: Tensor) -> Tensor:
    return (block.run(states).float() - wanted.float()).square().mean()


@torch.no_grad()
def _mean_error(block: Block, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Over all windows."""
    total = sum(len(states) for states, _ in batches)
    found = sum(float(_error(block, *batch)) * len(batch[0]) / total for batch in batches)
    if not math.isfinite(found):
        raise TrialFailed(f"block {block.index}: its tuning diverged; try a smaller lr")
    return found
