"""The meta-networks of PocketLLM (arXiv:2511.17637): residual MLP units with normalisation over whole groups.

A network is one flat tensor of parameters, so that a decoder is stored, billed and tuned as one tensor. `Network`
describes a decoder; its encoder is the mirror image, of the same units the other way round. Tensors are
(groups, per_group, numbers): a group is what is normalised together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import Norm

Kind = Literal["encoder", "decoder"]
EPSILON = 1e-5
_Normalise = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Network:
    """A decoder from codewords to weights; the encoder goes the other way, from `outputs` numbers to `inputs`.

    Unit 0 is plain, and the only one between latents and weights: first in the encoder, last in the decoder. The
    other units are residual, on latents. Each of these is normalised before, and the last also after; a network of one
    unit has no residual unit, hence no normalisation.
    """

    inputs: int  # numbers per codeword
    outputs: int  # numbers per sub-vector
    hidden: int
    units: int
    norm: Norm = "none"
    affine: bool = False
    width: int = 0  # numbers normalised together: per_group * inputs, or inputs for "layernorm"

    @property
    def norms(self) -> int:
        """Normalisations of the encoder, and of the decoder."""
        return self.units if self.units > 1 and self.norm != "none" else 0

    @property
    def group_norms(self) -> int:
        """Those whose statistics are of a group, not of a single sub-vector."""
        return 0 if self.norm == "layernorm" else self.norms

    @property
    def mlp_weights(self) -> int:
        """Weights of the units, biases left out, as the paper counts: 768 for 8 numbers, 16 hidden, 3 units."""
        return self.hidden * (self.inputs + self.outputs + 2 * self.inputs * (self.units - 1))

    @property
    def mlp_parameters(self) -> int:
        """Weights and biases of the units."""
        return self.mlp_weights + self.units * self.hidden + self.outputs + (self.units - 1) * self.inputs

    @property
    def parameters(self) -> int:
        """All that is stored of a decoder: the units, and a gain and a bias per normalised number if affine."""
        return self.mlp_parameters + (2 * self.norms * self.width if self.affine else 0)

    def shapes(self, kind: Kind = "decoder") -> dict[str, tuple[int, ...]]:
        """Name and shape of each part, in the order of the flat tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for unit in range(self.units):
            first, last = self.inputs, self.inputs
            if unit == 0:
                first, last = (self.inputs, self.outputs) if kind == "decoder" else (self.outputs, self.inputs)
            found[f"unit{unit}.in.weight"] = (self.hidden, first)
            found[f"unit{unit}.in.bias"] = (self.hidden,)
            found[f"unit{unit}.out.weight"] = (last, self.hidden)
            found[f"unit{unit}.out.bias"] = (last,)
        if self.affine and self.norms:
            found["gain"] = (self.norms, self.width)
            found["bias"] = (self.norms, self.width)
        return found

    def views(self, flat: Tensor, kind: Kind = "decoder", whole_units: bool = False) -> dict[str, Tensor]:
        """The parts of a flat tensor (parameters or mlp_parameters of an encoder,), as differentiable views.

        whole_units: each unit's weights and biases as one part, "unit0" and so on, still flat.
        Raises ValueError when its length is not that of the parts.
        """
        shapes = self._whole(kind) if whole_units else self.shapes(kind)
        sizes = [math.prod(shape) for shape in shapes.values()]
        if flat.shape != (sum(sizes),):
            raise ValueError(f"{kind}: {sum(sizes)} parameters expected, not a tensor {tuple(flat.shape)}")
        parts = zip(shapes.items(), torch.split(flat, sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def _whole(self, kind: Kind) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes(kind).items():
            unit, _, rest = name.partition(".")
            found[unit] = (found.get(unit, (0,))[0] + math.prod(shape),) if rest else shape
        return found


def initial(network: Network, generator: torch.Generator, kind: Kind = "decoder") -> Tensor:
    """Flat parameters, float32 on the CPU: of Linear layers as torch starts them, gains of one and biases of zero.

    Weights and biases of a layer are uniform within 1 / sqrt(its inputs) of zero.
    """
    parts: list[Tensor] = []
    bound = 0.0
    for name, shape in network.shapes(kind).items():
        if name in ("gain", "bias"):
            part = torch.full(shape, 1.0 if name == "gain" else 0.0)
        else:
            bound = 1 / math.sqrt(shape[1]) if name.endswith("weight") else bound  # a bias follows its weight
            part = (2 * torch.rand(shape, generator=generator) - 1) * bound
        parts.append(part.flatten())
    return torch.cat(parts)


def encode(vectors: Tensor, flat: Tensor, network: Network, fused: bool = False) -> Tensor:
    """(groups, per_group, outputs) -> latents (groups, per_group, inputs).

    The plain unit, then x + M(norm(x)) for each residual unit, then, where there was one, a last normalisation.
    fused: units by Triton's kernels, which `unit.unit_refusal` must allow.
    """
    parts = network.views(flat, "encoder", fused)
    normalise = _normaliser(network, parts)
    latents = _unit(vectors, parts, 0, network, network.inputs)
    for unit in range(1, network.units):
        latents = latents + _unit(normalise(latents, unit - 1), parts, unit, network, network.inputs)
    return normalise(latents, network.units - 1) if network.units > 1 else latents


def decode(codewords: Tensor, flat: Tensor, network: Network, fused: bool = False) -> Tensor:
    """(groups, per_group, inputs) -> (groups, per_group, outputs): the residual units first, the plain unit last.

    fused: as for `encode`.
    """
    parts = network.views(flat, whole_units=fused)
    return _decode(codewords, parts, network, _normaliser(network, parts))


def decode_statistics(codewords: Tensor, flat: Tensor, network: Network) -> Tensor:
    """(groups, norms, 2) float32: mean and inverse deviation that each group has at each normalisation of `decode`.

    Under "layernorm" and "none" a sub-vector is normalised alone, if at all, and there are none: (groups, 0, 2).
    """
    parts = network.views(flat)
    normalise, found = _normaliser(network, parts), []

    def record(numbers: Tensor, at: int) -> Tensor:
        joined = numbers.flatten(1)
        variance, mean = torch.var_mean(joined, dim=1, correction=0)
        found.append(torch.stack([mean, torch.rsqrt(variance + EPSILON)], dim=1))
        return normalise(numbers, at)

    if not network.group_norms:
        return codewords.new_zeros(codewords.shape[0], 0, 2)
    _decode(codewords, parts, network, record)
    return torch.stack(found, dim=1)


def decode_with(codewords: Tensor, statistics: Tensor, flat: Tensor, network: Network) -> Tensor:
    """`decode`, of whole groups or of any part of each, with the statistics of `decode_statistics` in place of its own.

    So a sub-vector is a function of its codeword and its group's statistics, and with affine gains of its place in the
    group: these need whole groups.
    """
    parts = network.views(flat)

    def fixed(numbers: Tensor, at: int) -> Tensor:
        mean, scale = statistics[:, at, 0, None, None], statistics[:, at, 1, None, None]
        numbers = (numbers - mean) * scale
        if not network.affine:
            return numbers
        return torch.addcmul(parts["bias"][at], numbers.flatten(1), parts["gain"][at]).view_as(numbers)

    return _decode(codewords, parts, network, fixed if network.group_norms else _normaliser(network, parts))


def _decode(codewords: Tensor, parts: dict[str, Tensor], network: Network, normalise: _Normalise) -> Tensor:
    latents = codewords
    for unit in range(1, network.units):
        latents = latents + _unit(normalise(latents, unit - 1), parts, unit, network, network.inputs)
    if network.units > 1:
        latents = normalise(latents, network.units - 1)
    return _unit(latents, parts, 0, network, network.outputs)


def _unit(numbers: Tensor, parts: dict[str, Tensor], unit: int, network: Network, outputs: int) -> Tensor:
    """Linear, GELU in its exact form, Linear."""
    if f"unit{unit}" in parts:
        from evenbits_pocketllm.unit import fused_unit

        return fused_unit(numbers, parts[f"unit{unit}"], network.hidden, outputs)
    hidden = functional.linear(numbers, parts[f"unit{unit}.in.weight"], parts[f"unit{unit}.in.bias"])
    return functional.linear(functional.gelu(hidden), parts[f"unit{unit}.out.weight"], parts[f"unit{unit}.out.bias"])


def _normaliser(network: Network, parts: dict[str, Tensor]) -> _Normalise:
    """Layer normalisation number `at` of a network, over a group's numbers taken together or each sub-vector's."""
    if network.norm == "none":
        return lambda numbers, at: numbers

    def normalise(numbers: Tensor, at: int) -> Tensor:
        joined = numbers if network.norm == "layernorm" else numbers.flatten(1)
        gain, bias = (parts["gain"][at], parts["bias"][at]) if network.affine else (None, None)
        return functional.layer_norm(joined, joined.shape[-1:], gain, bias, EPSILON).view_as(numbers)

    return normalise
