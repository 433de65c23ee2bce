"""Triton's MLP unit, by its interpreter, against the layers that torch computes, in float64 and under autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evenbits_pocketllm.decoding import decoder_network
from evenbits_pocketllm.network import decode, encode, initial
from evenbits_pocketllm.settings import recipe
from evenbits_pocketllm.step import Step
from evenbits_pocketllm.unit import WIDEST, WIDEST_HIDDEN, fused_unit, unit_numbers, unit_refusal

SIZES = [(8, 16, 8), (4, 16, 4), (1, 1, 1), (3, 5, 7), (16, 32, 16), (16, 17, 2), (2, 8, 13)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twin(numbers: Tensor, flat: Tensor, hidden: int, outputs: int) -> Tensor:
    inputs = numbers.shape[-1]
    sizes = [hidden * inputs, hidden, outputs * hidden, outputs]
    enter, first, leave, second = torch.split(flat, sizes)
    inner = functional.linear(numbers, enter.view(hidden, inputs), first)
    return functional.linear(functional.gelu(inner), leave.view(outputs, hidden), second)


@pytest.mark.parametrize(("inputs", "hidden", "outputs"), SIZES)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (1, 64), (5, 41)])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_unit_and_its_gradients_are_those_of_its_twin(
    inputs: int, hidden: int, outputs: int, shape: tuple[int, ...], size: float
) -> None:
    generator = seeded(inputs + hidden)
    numbers = size * torch.randn(*shape, inputs, generator=generator)
    # a part of a longer tensor, at an odd place
    long = torch.randn(3 + unit_numbers(inputs, hidden, outputs), generator=generator) / math.sqrt(inputs)
    slope = torch.randn(*shape, outputs, generator=generator)
    results = []
    for wide in (False, True):
        x, whole = (part.double() if wide else part.clone() for part in (numbers, long))
        x, whole = x.requires_grad_(), whole.requires_grad_()
        unit: Any = twin if wide else fused_unit
        y = unit(x, whole[3:], hidden, outputs)
        results.append([y, *torch.autograd.grad(y, (x, whole), slope.to(y.dtype))])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        off, largest = (float(part.detach().abs().max()) for part in (found.double() - expected, expected))
        assert off <= 3e-6 * max(1.0, largest), (off, largest)


def test_a_number_that_is_not_finite_stays_with_its_row() -> None:
    flat = torch.randn(unit_numbers(8, 16, 8), generator=seeded())
    numbers = torch.randn(70, 8, generator=seeded(1))
    numbers[30, 2] = torch.nan
    found = fused_unit(numbers, flat, 16, 8)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [30]
    assert found[30].isnan().all()


def test_gradients_are_the_same_each_time() -> None:
    flat = torch.randn(unit_numbers(8, 16, 8), generator=seeded()).requires_grad_()
    numbers = torch.randn(300, 8, generator=seeded(1))
    first, second = (torch.autograd.grad(fused_unit(numbers, flat, 16, 8).square().sum(), flat)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("changes", [{}, {"affine": True}, {"rln": "layernorm"}, {"rln": "none", "latent": 5}])
def test_networks_of_fused_units_are_the_plain_ones(changes: dict[str, Any]) -> None:
    settings = recipe("paper", d=4, hidden=9, **changes)
    latent = settings.latent or 4
    network = decoder_network(settings, latent * (1 if settings.rln == "layernorm" else 6))
    generator = seeded(2)
    vectors = torch.randn(5, 6, 4, generator=generator)
    flat = [initial(network, generator, kind).requires_grad_() for kind in ("encoder", "decoder")]
    found = []
    for fused in (False, True):
        latents = encode(vectors, flat[0], network, fused)
        restored = decode(latents, flat[1], network, fused)
        found.append([latents, restored, *torch.autograd.grad(restored.square().sum(), flat)])
    for plain, quick in zip(*found, strict=True):
        torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-5)


def test_a_step_by_fused_units_is_the_plain_step() -> None:
    """After some steps, since Adam's first ones have only signs for gradients."""
    settings = recipe("paper", d=4, codebook_size=32, learning_rate=1e-3)
    steps = []
    for fused in (False, True):
        generator = seeded(4)
        network = decoder_network(settings, 4 * 16)
        parts = [initial(network, generator, kind) for kind in ("encoder", "decoder")]
        step = Step(parts[0], parts[1], torch.randn(32, 4, generator=generator), network, settings)
        assert step.refusal == "Triton's units are for CUDA devices, not cpu"
        step._fused = fused
        for _ in range(3):
            step(torch.randn(8, 16, 4, generator=generator), torch.tensor([-1e-2, 0.1]))
        steps.append(step)
    for name in ("encoder", "decoder", "codebook", "squared_error"):
        torch.testing.assert_close(getattr(steps[1], name), getattr(steps[0], name), rtol=1e-3, atol=2e-4)


def test_what_is_too_wide_is_refused() -> None:
    cuda = torch.device("cuda")
    for sizes in ((WIDEST + 1, 16, 8), (8, WIDEST_HIDDEN + 1, 8), (8, 16, WIDEST + 1)):
        assert "wider than 16, 32, 16" in (unit_refusal(*sizes, cuda) or "")
    assert unit_refusal(8, 16, 8, torch.device("cpu")) is None  # the interpreter is on


@pytest.mark.parametrize(
    ("numbers", "flat"),
    [
        (torch.zeros(5, 8, dtype=torch.float64), torch.zeros(280)),
        (torch.zeros(5, 8), torch.zeros(280, dtype=torch.float16)),
        (torch.zeros(5, 8), torch.zeros(279)),
        (torch.zeros(5, 7), torch.zeros(280)),
    ],
)
def test_other_dtypes_and_too_few_parameters_are_refused(numbers: Tensor, flat: Tensor) -> None:
    with pytest.raises(ValueError, match="float32 numbers and"):
        fused_unit(numbers, flat, 16, 8)


def test_gradients_of_gradients_are_refused() -> None:
    numbers, flat = torch.ones(3, 8, requires_grad=True), torch.ones(unit_numbers(8, 16, 8), requires_grad=True)
    slope = torch.autograd.grad(fused_unit(numbers, flat, 16, 8).square().sum(), numbers, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(slope.sum())
