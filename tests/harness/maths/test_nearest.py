"""The nearest codeword by every path is the one that float64 brute force finds."""

from __future__ import annotations

import pytest
import torch

from evenbits.maths.nearest import FAISS_NUMBERS, _nearest_faiss, nearest, squared_distances


def brute_force(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return (vectors.double()[:, None] - centres.double()[None]).square().sum(2).argmin(1)


@pytest.mark.parametrize("d", [1, 2, 4, 5, 8, 16])
@pytest.mark.parametrize("large", [False, True], ids=["few", "many"])
def test_agrees_with_brute_force(d: int, large: bool) -> None:
    generator = torch.Generator().manual_seed(d)
    count = FAISS_NUMBERS // d + 1 if large else 500
    vectors = torch.randn(count, d, generator=generator)
    centres = torch.randn(64, d, generator=generator)
    codes = nearest(vectors, centres)
    assert codes.dtype == torch.int64
    ideal = brute_force(vectors, centres)
    best = squared_distances(vectors, centres, ideal)
    # near-ties may fall either way in float32; the distance found may not
    torch.testing.assert_close(squared_distances(vectors, centres, codes), best, rtol=1e-5, atol=1e-6)
    assert (codes == ideal).float().mean() > 0.9999


@pytest.mark.parametrize(("count", "d", "centres"), [(9001, 4, 256), (4096, 8, 300), (16_384, 2, 256), (2500, 24, 256)])
def test_padded_to_what_faiss_is_fast_from(count: int, d: int, centres: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a quarter of that many numbers and all: the zeros added are no answers, and neither path is wrong."""
    asked: list[int] = []

    def spy(vectors: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        asked.append(vectors.shape[0])
        return _nearest_faiss(vectors, places)

    monkeypatch.setattr("evenbits.maths.nearest._nearest_faiss", spy)
    vectors = torch.randn(count, d, generator=torch.Generator().manual_seed(d)) + 2
    places = torch.randn(centres, d, generator=torch.Generator().manual_seed(d + 1))
    codes = nearest(vectors, places)
    assert asked == [-(-FAISS_NUMBERS // d)]
    assert codes.shape == (count,)
    torch.testing.assert_close(
        squared_distances(vectors, places, codes),
        squared_distances(vectors, places, brute_force(vectors, places)),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    asked.clear()
    nearest(vectors, places[:255])
    assert not asked


def test_chunks_agree_with_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, centres = torch.randn(301, 3), torch.randn(10, 3)
    whole = nearest(vectors, centres)
    monkeypatch.setattr("evenbits.maths.nearest._CHUNK_DISTANCES", 70)
    assert torch.equal(nearest(vectors, centres), whole)


def test_ties_go_to_the_lowest_index() -> None:
    double = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert nearest(torch.tensor([[0.9, 0.0], [0.1, 0.0], [0.5, 0.0]]), double).tolist() == [0, 1, 0]
    line = torch.tensor([[2.0], [0.0], [2.0]])
    # 1.0 is as near to 0 as to 2: in one dimension the lower value wins
    assert nearest(torch.tensor([[5.0], [2.0], [1.0], [-3.0]]), line).tolist() == [0, 0, 1, 1]


def test_half_precision_codebooks_and_one_centre() -> None:
    assert nearest(torch.randn(7, 3).half(), torch.zeros(1, 3).half()).tolist() == [0] * 7


@pytest.mark.parametrize(("vectors", "centres"), [((4, 2), (3, 3)), ((4, 2), (0, 2)), ((4,), (3, 1))])
def test_refuses_shapes_that_do_not_match(vectors: tuple[int, ...], centres: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="vectors \\(n, d\\)"):
        nearest(torch.zeros(vectors), torch.zeros(centres))
