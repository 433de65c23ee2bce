"""The contracts of all three, a test a check, and figures that are known without this code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evenbits import compress_weight
from evenbits.measure import Measurement
from evenbits.testing import contract_tests

from evenbits_tutorial.measure_options import LoadTimeOptions
from evenbits_tutorial.profiler import LoadTime

test_powers = contract_tests("powers")
test_next_token = contract_tests("next-token", {"corpus": {"name": "reference", "documents": 20}, "context": 16})
test_load_time = contract_tests("load-time")


def loss_of_powers(bits: int) -> float:
    """Mean squared error of +-s 2^-e on a Gaussian of variance 1 at the best s, by the sum over a fine grid."""
    x = (torch.arange(3000, dtype=torch.float64) + 0.5) / 500  # half of the bell, to 6 deviations
    bell = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) / 250
    scales = 1 + torch.arange(80, dtype=torch.float64) / 20
    levels = scales[:, None] * 2.0 ** -torch.arange(2 ** (bits - 1), dtype=torch.float64)
    nearest = (x - levels[:, :, None]).square().amin(1)
    return float((nearest * bell).sum(1).min())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_weights_lose_what_the_integral_says(bits: int) -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    found = compress_weight(weight, "powers", options={"bits": bits})
    assert found.error == pytest.approx(loss_of_powers(bits), rel=0.02)


def test_powers_of_two_are_stored_exactly() -> None:
    weight = 0.75 * torch.tensor([[1.0, -0.5, 0.25, -0.125], [-8.0, 4.0, -1.0, 2.0]])
    assert torch.equal(compress_weight(weight, "powers", options={"bits": 3}).restored, weight)


def test_the_first_load_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 24.0])  # three times: 9, 2 and 4 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    subject: Any = SimpleNamespace(
        load=lambda: None, device=torch.device("cpu"), facts={}, progress=lambda total, what: lambda done: None
    )
    (found,) = LoadTime(LoadTimeOptions(repeats=2)).profile(subject)
    assert isinstance(found, Measurement)
    assert found.value == 3.0
