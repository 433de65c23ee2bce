"""The codeword search against slow obvious versions, in Triton's interpreter and in torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import pytest
import torch
from torch import Tensor

from evenbits.kernels import nearest as kernel
from evenbits.kernels.launch import TUNER, Backend, Choice, Config, triton_refusal
from evenbits.kernels.nearest import Codebook, Precision, choose, search, share, warm
from evenbits.maths.nearest import Searcher, nearest

LENGTHS = [1, 2, 5, 8, 17, 32, 64]
ROADS: list[tuple[Backend, Precision]] = [("triton", "fma"), ("triton", "tf32x3"), ("torch", "auto")]
SHAPES = [(1, 17), (33, 1), (17, 65), (130, 33)]  # (vectors, centres)


def slow(vectors: Tensor, centres: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted squared distances, all of them, in float64: (n, k)."""
    apart = (vectors.double()[:, None] - centres.double()[None]).square()
    return (apart if weights is None else apart * weights.double()[:, None]).sum(2)


def seeded(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def whole(shape: tuple[int, int], most: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def assert_nearest(codes: Tensor, vectors: Tensor, centres: Tensor, weights: Tensor | None = None) -> None:
    """Each chosen centre is the nearest up to the rounding of its score, and nearly all are the very one.

    The score's error: products of relative error 2^-20 at most (tf32x3; fma 2^-24), width + 2 sums of 2^-24.
    """
    far = slow(vectors, centres, weights)
    assert codes.dtype == torch.int64
    assert codes.shape == vectors.shape[:1]
    chosen = far.gather(1, codes[:, None])[:, 0]
    size = slow(vectors.abs(), -centres.abs(), weights).amax(1)  # no partial sum is larger
    allowed = 2 * (2**-20 + (2 * vectors.shape[1] + 2) * 2**-24) * size
    assert bool((chosen - far.amin(1) <= allowed).all())
    assert (codes == far.argmin(1)).float().mean() > 0.999


@pytest.mark.parametrize(("backend", "precision"), ROADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_whole_numbers_agree_index_by_index(length: int, backend: Backend, precision: Precision) -> None:
    generator = seeded(length)
    vectors, centres = whole((35, length), 3, generator), whole((37, length), 3, generator)
    # tied inside a tile (4 and 9), across tiles of 16 (2, 20, 36), and what is nearest to some vectors for certain
    centres[9], centres[20], centres[36] = centres[4], centres[2], centres[2]
    vectors[:8], vectors[8:16] = centres[4], centres[2]
    far = slow(vectors, centres)
    codes = search(vectors, centres, precision=precision, backend=backend)
    assert codes.tolist() == far.argmin(1).tolist()
    assert max(codes[:8].tolist()) <= 4
    assert max(codes[8:16].tolist()) <= 2
    assert int((far == far.amin(1, keepdim=True)).sum(1).max()) >= 2  # ties there are


@pytest.mark.parametrize(("backend", "precision"), ROADS)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_weighted_whole_numbers_agree_index_by_index(length: int, backend: Backend, precision: Precision) -> None:
    generator = seeded(length, 1)
    vectors, centres = whole((37, length), 3, generator), whole((37, length), 3, generator)
    weights = torch.randint(0, 3, vectors.shape, generator=generator).float()
    weights[5] = 0  # all centres are tied
    codes = search(vectors, centres, weights, precision=precision, backend=backend)
    assert codes.tolist() == slow(vectors, centres, weights).argmin(1).tolist()
    assert codes[5] == 0


@pytest.mark.parametrize(("backend", "precision"), ROADS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gaussian(n: int, k: int, weighted: bool, backend: Backend, precision: Precision) -> None:
    generator = seeded(n, k)
    vectors, centres = torch.randn(n, 5, generator=generator), torch.randn(k, 5, generator=generator)
    weights = torch.rand(n, 5, generator=generator) if weighted else None
    assert_nearest(search(vectors, centres, weights, precision=precision, backend=backend), vectors, centres, weights)


@pytest.mark.parametrize(("backend", "precision"), ROADS)
@pytest.mark.parametrize("length", [8, 24])
def test_many_gaussian(length: int, backend: Backend, precision: Precision) -> None:
    generator = seeded(length, 2)
    vectors, centres = torch.randn(1040, length, generator=generator), torch.randn(20, length, generator=generator)
    assert_nearest(search(vectors, centres, precision=precision, backend=backend), vectors, centres)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_twin_in_float64_is_the_slow_version(offset: float) -> None:
    generator = seeded(64)
    vectors = torch.randn(211, 64, generator=generator).double() + offset
    centres = torch.randn(300, 64, generator=generator).double() + offset
    assert search(vectors, centres).tolist() == slow(vectors, centres).argmin(1).tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_twin_in_chunks(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = seeded(3)
    vectors, centres = whole((101, 3), 4, generator), whole((29, 3), 4, generator)
    weights = whole((101, 3), 2, generator).abs() if weighted else None
    monkeypatch.setattr(kernel, "_CHUNK", 29 * 7)
    assert search(vectors, centres, weights).tolist() == slow(vectors, centres, weights).argmin(1).tolist()


@pytest.mark.parametrize("precision", ["fma", "tf32x3"])
@pytest.mark.parametrize("number", range(4))
def test_no_configuration_changes_an_index(precision: Precision, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(key: Hashable, configs: Sequence[Config], run: Callable[[Config], object], device: torch.device) -> Config:
        taken.append(configs[min(number, len(configs) - 1)])
        return taken[-1]

    taken: list[Config] = []
    monkeypatch.setattr(TUNER, "choose", take)
    generator = seeded(7)
    vectors, centres = whole((520, 4), 3, generator), whole((40, 4), 3, generator)
    codes = search(vectors, centres, precision=precision, backend="triton")
    assert codes.tolist() == slow(vectors, centres).argmin(1).tolist()
    assert len(taken) == 1


@pytest.mark.parametrize("processors", [1, 3, 132])
@pytest.mark.parametrize("precision", ["fma", "tf32x3"])
def test_sharing_centres_out_changes_no_index(
    processors: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_processors", lambda device: processors)
    monkeypatch.setattr(kernel, "_SHORTEST", 1)
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)
    generator = seeded(9)
    vectors, centres = whole((50, 2), 3, generator), whole((303, 2), 3, generator)
    codes = search(vectors, centres, precision=precision, backend="triton")
    assert codes.tolist() == slow(vectors, centres).argmin(1).tolist()


@pytest.mark.parametrize("blocks", [1, 7, 1000, 2_097_152])
@pytest.mark.parametrize("tiles", [1, 3, 4, 5, 17, 2048, 4096])
@pytest.mark.parametrize("processors", [1, 108, 132])
def test_every_tile_has_one_part(blocks: int, tiles: int, processors: int) -> None:
    parts, span = share(blocks, tiles, processors)
    assert (parts - 1) * span < tiles <= parts * span
    assert parts <= 65535  # the grid's second dimension
    assert span >= min(4, tiles)


@pytest.mark.parametrize(("backend", "precision"), ROADS)
def test_strides(backend: Backend, precision: Precision) -> None:
    generator = seeded(11)
    wide = whole((2 * 40, 3 * 6 + 1), 4, generator)
    vectors, centres = wide[1::2, 1::3], whole((6, 21), 4, generator).t()
    assert not vectors.is_contiguous()
    assert not centres.is_contiguous()
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 1.0]).expand(40, 6)
    for given in (None, weights):
        codes = search(vectors, centres, given, precision=precision, backend=backend)
        assert codes.tolist() == slow(vectors, centres, given).argmin(1).tolist()


@pytest.mark.parametrize(("backend", "precision"), ROADS)
def test_nothing_asked(backend: Backend, precision: Precision) -> None:
    codes = search(torch.empty(0, 8), torch.ones(3, 8), precision=precision, backend=backend)
    assert codes.shape == (0,)
    assert codes.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_searched_in_float32(dtype: torch.dtype) -> None:
    generator = seeded(12)
    vectors, centres = torch.randn(40, 6, generator=generator), torch.randn(50, 6, generator=generator)
    vectors, centres = vectors.half().to(dtype), centres.half().to(dtype)
    codes = search(vectors, centres.float(), backend="triton")
    assert codes.tolist() == search(vectors.float(), centres.float(), backend="triton").tolist()


@pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning"
)  # numpy's, interpreting
@pytest.mark.parametrize(("backend", "precision"), ROADS)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_no_number_gives_an_index_in_range(weighted: bool, backend: Backend, precision: Precision) -> None:
    generator = seeded(13)
    vectors, centres = torch.randn(6, 4, generator=generator), torch.randn(19, 4, generator=generator)
    vectors[0, 2], vectors[1, 0], vectors[2, 3] = torch.nan, torch.inf, -torch.inf
    vectors[3] = 1e30  # |v||c| stays finite, the true distance would not
    centres[0, 1], centres[17, 0] = torch.nan, torch.inf
    weights = torch.ones_like(vectors) if weighted else None
    codes = search(vectors, centres, weights, precision=precision, backend=backend)
    assert codes[0] == 0
    assert bool(((codes >= 0) & (codes < 19)).all())
    finite = [*range(1, 17), 18]
    expected = torch.tensor(finite)[slow(vectors[4:], centres[finite]).argmin(1)]
    assert codes[4:].tolist() == expected.tolist()
    assert search(vectors, centres * torch.nan, weights, precision=precision, backend=backend).tolist() == [0] * 6


@pytest.mark.parametrize(("backend", "precision"), ROADS)
def test_order_does_not_matter(backend: Backend, precision: Precision) -> None:
    generator = seeded(14)
    vectors, centres = torch.randn(60, 8, generator=generator), torch.randn(77, 8, generator=generator)
    rows, order = torch.randperm(60, generator=generator), torch.randperm(77, generator=generator)
    codes = search(vectors, centres, precision=precision, backend=backend)
    again = search(vectors[rows], centres[order], precision=precision, backend=backend)
    assert torch.equal(order[again], codes[rows])


@pytest.mark.parametrize("weighted", [False, True])
def test_updated_codebook_is_a_new_one(weighted: bool) -> None:
    generator = seeded(15)
    first, second = torch.randn(35, 3, generator=generator), torch.randn(35, 3, generator=generator)
    first[4] = torch.nan
    codebook = Codebook(first, weighted)
    held = codebook.table.data_ptr()
    codebook.update(second)
    assert codebook.table.data_ptr() == held
    assert torch.equal(codebook.table, Codebook(second, weighted).table)


def test_agrees_with_the_search_that_compressors_use() -> None:
    generator = seeded(16)
    vectors, centres = torch.randn(300, 4, generator=generator), torch.randn(64, 4, generator=generator)
    weights = torch.rand(300, 4, generator=generator)
    assert torch.equal(search(vectors, centres, backend="triton"), nearest(vectors, centres))
    weighted = search(vectors, centres, weights, backend="triton")
    assert torch.equal(weighted, Searcher(centres)(vectors, weights))


def test_what_computes_is_said() -> None:
    cpu = torch.device("cpu")
    assert choose(Codebook(torch.ones(4, 8)), cpu).kernel == "torch-nearest"
    assert choose(Codebook(torch.ones(4, 32)), cpu, backend="triton").kernel == "triton-nearest-fma"
    assert choose(Codebook(torch.ones(4, 33)), cpu, backend="triton").kernel == "triton-nearest-tf32x3"
    assert choose(Codebook(torch.ones(4, 33), True), cpu, backend="triton").kernel == "triton-nearest-fma"
    assert choose(Codebook(torch.ones(4, 8)), cpu, "tf32x3", "triton") == Choice("triton-nearest-tf32x3", "asked for")
    assert warm(Codebook(torch.ones(4, 8)), 10).reason


def as_cuda(monkeypatch: pytest.MonkeyPatch, hip: str | None = None) -> torch.device:
    """torch says of itself what it says on a machine with a GPU, and Triton does not interpret."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("CC", "cc")
    return torch.device("cuda:0")


def test_cuda_takes_triton_but_for_float64_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    device = as_cuda(monkeypatch)
    assert choose(Codebook(torch.ones(4, 8)), device).kernel == "triton-nearest-fma"
    choice = choose(Codebook(torch.ones(4, 8).double()), device)
    assert choice.kernel == "torch-nearest"
    assert "float64" in choice.reason


def test_machines_where_triton_cannot_launch_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    device = as_cuda(monkeypatch)
    assert triton_refusal(device) is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler" in str(triton_refusal(device))
    assert "ROCm" in str(triton_refusal(as_cuda(monkeypatch, "7.0")))


def test_columns_far_apart() -> None:
    """A column's place may lie past 2^31 numbers although the stride does not: the memory is only reserved."""
    far = (1 << 30) + 8
    try:
        memory = torch.empty(2 * far + 40, dtype=torch.float32)
    except RuntimeError:
        pytest.skip("8 GiB of address space cannot be reserved here")
    vectors = memory.as_strided((33, 3), (1, far))
    vectors.copy_(whole((33, 3), 3, seeded(17)))
    centres = whole((20, 3), 3, seeded(18))
    for precision in ("fma", "tf32x3"):
        codes = search(vectors, centres, precision=precision, backend="triton")
        assert codes.tolist() == slow(vectors.clone(), centres).argmin(1).tolist()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: search(torch.ones(3, 4), torch.ones(3, 5)), r"vectors \(n, 5\)"),
        (lambda: search(torch.ones(3, 4), torch.ones(0, 4)), "k > 0"),
        (lambda: search(torch.ones(3, 65), torch.ones(3, 65)), "d from 1 to 64"),
        (lambda: search(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3)), r"weights \(3, 4\)"),
        (lambda: search(torch.ones(3, 4), torch.ones(3, 4), backend="numba"), "no codeword search"),
        (lambda: search(torch.ones(3, 4), torch.ones(3, 4), precision="tf32"), "there are auto, fma, tf32x3"),  # type: ignore[arg-type]
        (lambda: search(torch.ones(3, 4), torch.ones(3, 4), precision="tf32x3", backend="torch"), "is Triton's"),
        (
            lambda: search(
                torch.ones(3, 33), torch.ones(3, 33), torch.ones(3, 33), precision="tf32x3", backend="triton"
            ),
            "fma takes all",
        ),
        (lambda: search(torch.ones(3, 4), torch.ones(3, 4).double(), backend="triton"), "float64 centres"),
        (lambda: search(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4, device="meta")), "weights on meta"),
        (lambda: search(torch.ones(3, 4, device="meta"), torch.ones(3, 4)), "vectors on meta"),
        (lambda: Codebook(torch.ones(3, 4)).update(torch.ones(3, 4, device="meta")), "centres on meta"),
        (lambda: Codebook(torch.ones(3, 4)).search(torch.ones(3, 4), torch.ones(3, 4)), "weights are given"),
        (lambda: Codebook(torch.ones(3, 4), True).search(torch.ones(3, 4)), "weights are missing"),
        (lambda: Codebook(torch.ones(3, 4)).update(torch.ones(4, 4)), r"centres \(3, 4\)"),
    ],
)
def test_refusals(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
