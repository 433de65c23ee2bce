"""k-means against known optima, and what it does with weights, empty centres and few vectors."""

from __future__ import annotations

import math

import pytest
import torch

from evenbits.maths.kmeans import kmeans
from evenbits.maths.nearest import nearest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("k", "distortion"), [(2, 1 - 2 / math.pi), (4, 0.11748), (8, 0.03454)])
def test_one_dimension_reaches_lloyd_max(k: int, distortion: float) -> None:
    """The least distortion of k levels on a Gaussian source (Max 1960, table 1); 0.118 at 2 bits."""
    values = torch.randn(100_000, 1, generator=seeded())
    centres, codes = kmeans(values, k, 200, seeded(1))
    assert float((values - centres[codes]).square().mean()) == pytest.approx(distortion, rel=0.02)


def test_result_is_a_fixed_point_and_improves_with_iterations() -> None:
    vectors = torch.randn(4000, 3, generator=seeded())

    def error(iterations: int) -> float:
        centres, codes = kmeans(vectors, 32, iterations, seeded(2))
        assert torch.equal(codes, nearest(vectors, centres))
        return float((vectors - centres[codes]).square().mean())

    errors = [error(iterations) for iterations in (0, 1, 5, 200)]
    assert errors == sorted(errors, reverse=True)
    centres, codes = kmeans(vectors, 32, 1000, seeded(2))
    for code in range(32):
        torch.testing.assert_close(vectors[codes == code].mean(0), centres[code], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["plus-plus", "sample"])
def test_as_many_centres_as_vectors_is_exact(init: str) -> None:
    vectors = torch.randn(300, 4, generator=seeded())
    centres, codes = kmeans(vectors, 300, 5, seeded(), init=init)  # type: ignore[arg-type]
    assert torch.equal(centres[codes], vectors)


@pytest.mark.parametrize("init", ["plus-plus", "sample"])
def test_repeated_vectors_are_restored_exactly(init: str) -> None:
    distinct = torch.randn(16, 2, generator=seeded())
    vectors = distinct[torch.randint(16, (5000,), generator=seeded(1))]
    centres, codes = kmeans(vectors, 16, 50, seeded(), init=init)  # type: ignore[arg-type]
    torch.testing.assert_close(centres[codes], vectors, rtol=1e-6, atol=1e-6)


def test_empty_centres_are_revived() -> None:
    """Two far clusters, and a start that lies wholly in one: without revival every centre would stay there."""
    near, far = torch.randn(1000, 2, generator=seeded()), torch.randn(4, 2, generator=seeded(1)) + 1000
    vectors = torch.cat([near, near, far])
    _, codes = kmeans(vectors, 300, 30, seeded(3), init="sample")
    assert torch.unique(codes).numel() == 300
    assert torch.unique(codes[-4:]).numel() == 4


def test_weights_pull_centres() -> None:
    values = torch.tensor([[0.0], [1.0], [10.0]])
    centres, codes = kmeans(values, 2, 10, seeded(), weights=torch.tensor([3.0, 1.0, 1.0]))
    assert codes[0] == codes[1] != codes[2]
    assert float(centres[codes[0]]) == pytest.approx(0.25)
    integer = torch.randint(1, 4, (500,), generator=seeded())
    vectors = torch.randn(500, 2, generator=seeded(1))
    weighted, _ = kmeans(vectors, 1, 3, seeded(), weights=integer.float())
    repeated, _ = kmeans(vectors.repeat_interleave(integer, 0), 1, 3, seeded())
    torch.testing.assert_close(weighted, repeated)


def test_deterministic_by_generator_and_global_state_untouched() -> None:
    vectors = torch.randn(40_000, 4, generator=seeded())
    before = torch.random.get_rng_state()
    first, second, other = (kmeans(vectors, 64, 5, seeded(seed))[0] for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_degenerate_input() -> None:
    centres, codes = kmeans(torch.zeros(10, 2), 4, 5, seeded())
    assert torch.equal(centres[codes], torch.zeros(10, 2))
    with pytest.raises(ValueError, match="1 <= k <= n"):
        kmeans(torch.zeros(3, 2), 4, 5, seeded())
    with pytest.raises(ValueError, match="finite"):
        kmeans(torch.tensor([[math.nan], [1.0]]), 1, 5, seeded())
