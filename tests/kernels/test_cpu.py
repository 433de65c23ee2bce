"""numba's kernels for packed weights against the definitions in `evenbits.kernels.weights`, in float64."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evenbits.integer import group_count, index_width
from evenbits.kernels import cpu_codebook, cpu_integer, cpu_products
from evenbits.kernels.weights import Axis, CodebookWeight, IntegerWeight, Stream
from evenbits.maths.bitpack import pack, unpack
from evenbits.testing import make_case, run_case
from evenbits_gptq import provide_compressors as gptq
from evenbits_rtn import provide_compressors as rtn

# of the sum of the products' sizes: float32 has 2^-24, and sums over a few hundred round several times
ERROR = 2.0**-22


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integer_dense(weight: IntegerWeight) -> Tensor:
    """(out, in) float64, one number at a time as the definition says."""
    out, columns = weight.out_features, weight.in_features
    codes = unpack(weight.codes, weight.bits, out * columns).view(out, columns)
    groups = [k // weight.group_size for k in range(columns)] if weight.group is None else weight.group.tolist()
    group = torch.tensor(groups)
    scale = weight.scale.double()[:, group]
    if weight.levels is not None:
        return scale * weight.levels.double()[codes]
    zero = 2 ** (weight.bits - 1) if weight.zero is None else weight.zero.double()[:, group]
    return scale * (codes.double() - zero)


def codebook_dense(weight: CodebookWeight) -> Tensor:
    """(out, in) float64."""
    lines, chunks, d = weight.lines, weight.chunks, weight.d
    total = torch.zeros(lines, chunks, d, dtype=torch.float64)
    for stream in weight.streams:
        codes = _all_codes(stream)[stream.offset :: stream.stride][: lines * chunks].view(lines, chunks)
        place = codes
        if stream.window is not None:
            place = torch.zeros_like(codes)
            for behind in range(-(-stream.window // stream.bits)):
                earlier = (torch.arange(chunks) - behind) % chunks
                place += codes[:, earlier] << (behind * stream.bits)
            place &= (1 << stream.window) - 1
        book = torch.zeros(lines, dtype=torch.int64) if stream.book is None else stream.book.long()
        total += stream.books.double()[book[:, None], place]
    if weight.gain is not None:
        total = total * weight.gain.double()[:, None]
    if weight.offset is not None:
        total = total + weight.offset.double()[:, None]
    matrix = total.reshape(lines, chunks * d)[:, : weight.length]
    dense = matrix if weight.axis == "in" else matrix.t()
    return dense if weight.row_scale is None else dense * weight.row_scale.double()[:, None]


def _all_codes(stream: Stream) -> Tensor:
    """Every code of the stream, the bits taken one by one."""
    bits = (stream.codes.long()[:, None] >> torch.arange(8)) & 1
    whole = bits.reshape(-1)[: bits.numel() // stream.bits * stream.bits].view(-1, stream.bits)
    return (whole << torch.arange(stream.bits)).sum(1)


def assert_product(found: Tensor, rows: Tensor, dense: Tensor, sizes: Tensor | None = None) -> None:
    """sizes: (out, in), of what each weight was summed from, where that is larger than the weight."""
    expected = rows.double() @ dense.t()
    bound = ERROR * (rows.double().abs() @ (dense if sizes is None else sizes).abs().t()) + 1e-30
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    within = (found.double() - expected).abs() <= bound  # False where either is NaN
    assert bool(within.all()), f"{int((~within).sum())} of {within.numel()} numbers are wrong"


def assert_codebook(weight: CodebookWeight, rows: Tensor) -> None:
    def size(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.abs()

    streams = tuple(replace(stream, books=stream.books.abs()) for stream in weight.streams)
    sizes = replace(
        weight, streams=streams, gain=size(weight.gain), offset=size(weight.offset), row_scale=size(weight.row_scale)
    )
    assert_product(cpu_codebook.multiply(weight, rows), rows, codebook_dense(weight), codebook_dense(sizes))


def integer_weight(
    out: int, columns: int, bits: int, size: int, *, zero: bool = True, group: bool = False, levels: bool = False,
    wide: bool = False,
) -> IntegerWeight:  # fmt: skip
    generator = seeded(out * 1000 + columns + bits)
    groups = -(-columns // size)
    return IntegerWeight(
        pack(torch.randint(1 << bits, (out, columns), generator=generator), bits),
        (torch.randn(out, groups, generator=generator) * 0.1).to(torch.float32 if wide else torch.float16),
        bits, out, columns, size,
        torch.randint(1 << bits, (out, groups), generator=generator).to(torch.uint8) if zero else None,
        torch.randint(groups, (columns,), generator=generator).int() if group else None,
        torch.randn(1 << bits, generator=generator) if levels else None,
    )  # fmt: skip


INTEGERS = [(1, 1, 1), (3, 17, 5), (4, 33, 33), (9, 130, 128), (13, 257, 1), (17, 100, 32), (6, 4103, 64)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_codes(bits: int) -> None:
    for out, columns, size in INTEGERS:
        for zero, group, levels in (
            (True, False, False), (False, False, False), (True, True, False), (False, True, False),
            (False, False, True), (True, True, True),
        ):  # fmt: skip
            for wide in (False, True):
                weight = integer_weight(out, columns, bits, size, zero=zero, group=group, levels=levels, wide=wide)
                rows = torch.randn(3, columns, generator=seeded(1))
                assert_product(cpu_integer.multiply(weight, rows), rows, integer_dense(weight))


def test_a_zero_point_takes_no_digits() -> None:
    """What code and zero point leave is small beside either; a single product shows the weight itself."""
    scale = (torch.rand(300, 1, generator=seeded(9)) + 0.5) / 3
    codes, zero = torch.full((300, 1), 254), torch.full((300, 1), 253, dtype=torch.uint8)
    for group in (None, torch.zeros(1, dtype=torch.int32)):
        for dtype in (torch.float16, torch.float32):
            weight = IntegerWeight(pack(codes, 8), scale.to(dtype), 8, 300, 1, 1, zero, group)
            found = cpu_integer.multiply(weight, torch.ones(1, 1))[0]
            assert torch.equal(found, weight.scale[:, 0].float())


def test_every_scale_in_16_bits() -> None:
    patterns = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)[:, None]
    levels = torch.ones(4)
    weight = IntegerWeight(torch.zeros(1 << 14, dtype=torch.uint8), patterns, 2, 1 << 16, 1, 1, levels=levels)
    found = cpu_integer.multiply(weight, torch.ones(1, 1))[0]
    assert torch.equal(found.nan_to_num(7.0), patterns[:, 0].float().nan_to_num(7.0))


def test_columns_sorted_by_group() -> None:
    rows = torch.randn(3, 72, generator=seeded(10))
    order = torch.randperm(72, generator=seeded(11))
    for out in (1, 13, 40):
        weight = replace(integer_weight(out, 72, 3, 16, levels=out == 13), group=(order // 16).int())
        found_runs = cpu_integer.in_runs(weight)
        assert found_runs is not None
        runs, by_group = found_runs
        assert runs.group is None
        assert runs.codes.numel() == weight.codes.numel()
        found = cpu_integer.multiply(runs, rows[:, by_group])
        assert_product(found, rows, integer_dense(weight))
    assert cpu_integer.in_runs(integer_weight(3, 72, 3, 16)) is None
    assert cpu_integer.in_runs(integer_weight(3, 72, 3, 16, group=True)) is None  # groups of any size


@pytest.mark.parametrize("count", [0, *range(1, 18), 100])
def test_any_number_of_inputs(count: int) -> None:
    integers = integer_weight(19, 75, 3, 16)
    rows = torch.randn(count, 75, generator=seeded(2))
    assert_product(cpu_integer.multiply(integers, rows), rows, integer_dense(integers))
    for axis in ("in", "out"):
        weight = draw_codebook(7, out=19, columns=75, axis=axis)
        assert_codebook(weight, rows)


def draw_codebook(
    seed: int, *, out: int | None = None, columns: int | None = None, axis: Axis | str | None = None, **fixed: Any
) -> CodebookWeight:
    """A weight of random shape and settings, of all that the definition allows, random codes in it."""
    choose, generator = random.Random(seed), seeded(seed)
    out = out or choose.choice([1, 2, 3, 8, 17, 33, 70])
    columns = columns or choose.choice([1, 3, 16, 37, 64, 131])
    axis = axis or choose.choice(["in", "out"])
    d = fixed.get("d") or choose.choice([1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 11, 12, 16, 17, 24, 31, 64])
    lines, length = (out, columns) if axis == "in" else (columns, out)
    chunks = -(-length // d)
    streams: list[Stream] = []
    count = fixed.get("streams") or choose.choice([1, 1, 2])
    together = choose.random() < 0.5  # codes of all streams in turn, or each stream's own
    for number in range(count):
        bits = fixed.get("bits") or choose.choice([1, 2, 3, 4, 5, 7, 8, 10, 12])
        stride, offset = choose.choice([(1, 0), (1, 3), (2, 1), (3, 0)])
        if together:
            bits, stride, offset = streams[0].bits if streams else bits, count, number
        window = fixed.get("window", choose.choice([None, None, bits, 2 * bits, bits + 1, 6, 11]))
        if window is not None and not bits <= window <= 12:
            window = None
        total = offset + (lines * chunks - 1) * stride + 1
        codes = pack(torch.randint(1 << bits, (total,), generator=generator), bits)
        books = torch.randn(choose.choice([1, 3]), 1 << (window or bits), d, generator=generator)
        book = torch.randint(len(books), (lines,), generator=generator).int() if len(books) > 1 else None
        streams.append(
            Stream(codes, books.half() if choose.random() < 0.5 else books, bits, stride, offset, book, window)
        )

    def line_numbers() -> Tensor | None:
        width = choose.choice([None, 1, d])
        return None if width is None else torch.randn(lines, width, generator=generator)

    row_scale = torch.randn(out, generator=generator) if choose.random() < 0.5 else None
    return CodebookWeight(
        tuple(streams), out, columns, d, "in" if axis == "in" else "out", line_numbers(), line_numbers(), row_scale
    )


@pytest.mark.parametrize("axis", ["in", "out"])
def test_codebooks_of_any_settings(axis: str) -> None:
    for seed in range(120):
        weight = draw_codebook(seed, axis=axis)
        rows = torch.randn(1 + seed % 6, weight.in_features, generator=seeded(seed))
        try:
            assert_codebook(weight, rows)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_of_a_code(bits: int) -> None:
    for d in (1, 4, 8):
        weight = draw_codebook(bits, out=9, columns=45, bits=bits, d=d, streams=1, window=None)
        rows = torch.randn(2, 45, generator=seeded(3))
        assert_codebook(weight, rows)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(
    ("bits", "window"),
    [(1, 1), (1, 16), (2, 12), (2, 16), (3, 12), (3, 16), (4, 16), (8, 16), (5, 13), (2, 7), (7, 16)],
)
def test_windows_go_round_a_line(bits: int, window: int, axis: Axis) -> None:
    generator = seeded(window)
    for lines, chunks, d in ((3, 1, 1), (2, 3, 1), (5, 8, 1), (3, 29, 1), (2, 70, 2), (3, 9, 8)):
        out, columns = (lines, chunks * d) if axis == "in" else (chunks * d, lines)
        codes = pack(torch.randint(1 << bits, (lines * chunks,), generator=generator), bits)
        books = torch.randn(1, 1 << window, d, generator=generator)
        weight = CodebookWeight((Stream(codes, books, bits, window=window),), out, columns, d, axis)
        rows = torch.randn(2, columns, generator=generator)
        assert_codebook(weight, rows)


# threads


def test_no_bit_depends_on_threads() -> None:
    shapes: list[tuple[Any, Any]] = [
        (cpu_integer.multiply, integer_weight(101, 300, 3, 32)),
        (cpu_codebook.multiply, draw_codebook(3, out=301, columns=97, axis="in", streams=2)),
        (cpu_codebook.multiply, draw_codebook(5, out=1031, columns=41, axis="out", d=1)),
        (cpu_codebook.multiply, draw_codebook(6, out=1031, columns=41, axis="out", d=3)),
        (cpu_codebook.multiply, draw_codebook(6, out=8301, columns=5, axis="out", d=6)),
    ]
    for multiply, weight in shapes:
        for count in (1, 3, 4, 17):
            rows = torch.randn(count, weight.in_features, generator=seeded(count))
            torch.set_num_threads(1)
            alone = multiply(weight, rows)
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(multiply(weight, rows), alone)


def test_calls_at_once_do_not_meet() -> None:
    torch.set_num_threads(2)
    weights: list[tuple[Any, Any]] = [
        (cpu_integer.multiply, integer_weight(40, 64, 4, 16)),
        (cpu_codebook.multiply, draw_codebook(7, out=40, columns=64, axis="in")),
    ]
    rows = torch.randn(3, 64, generator=seeded(5))
    alone = [multiply(weight, rows) for multiply, weight in weights]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(weights[i % 2][0], weights[i % 2][1], rows) for i in range(40)]
        for i, one in enumerate(found):
            assert torch.equal(one.result(), alone[i % 2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    torch.set_num_threads(3)
    weight = integer_weight(40, 64, 4, 16)
    rows = torch.randn(3, 64, generator=seeded(5))
    expected = cpu_integer.multiply(weight, rows)  # in threads that a child does not have
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: that is what is tried
        child = os.fork()
    if not child:
        try:
            os._exit(0 if torch.equal(cpu_integer.multiply(weight, rows), expected) else 3)
        finally:
            os._exit(4)
    ended, status = 0, 0
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(cpu_integer.multiply(weight, rows), expected)


def test_an_error_of_one_share_is_raised_when_all_are_done() -> None:
    torch.set_num_threads(3)
    done: list[int] = []

    def work(first: int, last: int) -> None:
        if first == 1:
            raise ArithmeticError("of the second share")
        time.sleep(0.05)
        done.append(first)

    with pytest.raises(ArithmeticError, match="second share"):
        cpu_products.share(work, 3, 1)
    assert sorted(done) == [0, 2]


def test_where_nothing_can_be_written_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert cpu_products.compiled(_twice)(4) == 8


def _twice(number: int) -> int:
    return 2 * number


# prepared once


def test_prepared_weights_are_the_same_to_the_bit() -> None:
    generator = seeded(12)
    codes = torch.randint(256, (500,), generator=generator).to(torch.uint8)
    window = Stream(codes, torch.randn(1, 64, 1, generator=generator), 2, window=6)
    integers: list[IntegerWeight] = [
        integer_weight(10, 64, 4, 16, levels=True, wide=True), integer_weight(10, 64, 3, 16)
    ]  # fmt: skip
    codebooks = [CodebookWeight((window,), 10, 64, 1), *(draw_codebook(seed, columns=64) for seed in (1, 2, 3))]
    prepared: list[tuple[Any, Any, Any]] = [
        *((cpu_integer.multiply, weight, cpu_integer.prepare(weight)) for weight in integers),
        *((cpu_codebook.multiply, weight, cpu_codebook.prepare(weight)) for weight in codebooks),
    ]
    rows = torch.randn(3, 64, generator=generator)
    for multiply, weight, one in prepared:
        expected = multiply(weight, rows)
        for again in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert torch.equal(multiply(again, rows), expected)


def test_layers_that_share_books_share_what_is_made_of_them() -> None:
    codes = torch.randint(256, (2, 64), generator=seeded(13)).to(torch.uint8)
    books = torch.randn(1, 256, 4, generator=seeded(14)).half()
    weights = [CodebookWeight((Stream(one, books[:], 8),), 8, 32, 4) for one in codes]
    first, second = (cpu_codebook.prepare(weight) for weight in weights)
    assert first.tables[0] is second.tables[0]
    assert first.extra_bytes == 256 * 4 * 4
    wide = replace(weights[0], streams=(Stream(codes[0], books.float(), 8),))
    assert cpu_codebook.prepare(wide).extra_bytes == 0
    assert cpu_integer.prepare(integer_weight(8, 32, 4, 16)).extra_bytes == 0
    rows = torch.randn(2, 32, generator=seeded(15))
    before = cpu_codebook.multiply(weights[0], rows)
    books.mul_(2)  # what a prepared weight has read is not looked at again, a new one sees it
    assert torch.equal(cpu_codebook.multiply(first, rows), before)
    assert torch.equal(cpu_codebook.multiply(weights[0], rows), 2 * before)


# inputs


def test_what_is_not_finite_stays_in_its_input() -> None:
    weights: list[tuple[Any, Any]] = [
        (cpu_integer.multiply, integer_weight(10, 64, 4, 16)),
        (cpu_codebook.multiply, draw_codebook(8, out=10, columns=64, axis="in")),
        (cpu_codebook.multiply, draw_codebook(8, out=10, columns=64, axis="out")),
    ]
    for multiply, weight in weights:
        rows = torch.randn(5, 64, generator=seeded(6))
        whole = multiply(weight, rows)
        rows[2, 7] = float("nan")
        found = multiply(weight, rows)
        assert bool(found[2].isnan().all())
        assert torch.equal(found[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_inputs_of_another_layout() -> None:
    weight = integer_weight(10, 64, 4, 16)
    rows = torch.randn(64, 5, generator=seeded(7)).t()
    assert torch.equal(cpu_integer.multiply(weight, rows), cpu_integer.multiply(weight, rows.contiguous()))
    leaf = rows.contiguous().requires_grad_()
    assert not cpu_integer.multiply(weight, leaf).requires_grad


def test_row_scales_of_any_shape() -> None:
    weight = replace(draw_codebook(7, out=10, columns=64, axis="in"), row_scale=torch.rand(10, generator=seeded(8)))
    assert weight.row_scale is not None
    rows = torch.randn(10, 64, generator=seeded(7))  # as many as outputs: a column would scale inputs unseen
    expected = cpu_codebook.multiply(weight, rows)
    trained = weight.row_scale[:, None].clone().requires_grad_()
    found = cpu_codebook.multiply(replace(weight, row_scale=trained), rows)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_torchs_defaults_change_nothing() -> None:
    """As transformers sets them while it opens a model."""
    weights: list[tuple[Any, Any]] = [
        (cpu_integer.multiply, integer_weight(10, 64, 4, 16, levels=True)),
        (cpu_codebook.multiply, draw_codebook(7, out=10, columns=64, axis="in", window=6, bits=2)),
    ]
    rows = torch.randn(3, 64, generator=seeded(6))
    expected = [multiply(weight, rows) for multiply, weight in weights]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = [multiply(weight, rows) for multiply, weight in weights]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_refusals() -> None:
    weight, books = integer_weight(10, 64, 4, 16), draw_codebook(7, out=10, columns=64, axis="in", streams=1)
    rows, stream = torch.randn(2, 64), books.streams[0]
    integer: list[tuple[IntegerWeight, Tensor, str]] = [
        (weight, rows.double(), r"float32 rows \(m, 64\)"),
        (weight, rows[:, :63], r"float32 rows \(m, 64\)"),
        (replace(weight, codes=weight.codes[:-1]), rows, "640 codes of 4 bits are 320 uint8"),
        (replace(weight, bits=9), rows, "2 to 8 bits, not 9"),
        (replace(weight, scale=weight.scale.bfloat16()), rows, "float16 or float32"),
        (replace(weight, out_features=0), rows, "not 0 x 64"),
        (replace(weight, levels=torch.ones(16, device="meta")), rows, "levels on meta"),
        (replace(weight, group_size=8), rows, "groups of 8"),
        (replace(weight, group_size=0), rows, "groups of 0"),
        (replace(weight, zero=weight.scale), rows, "zeros are uint8"),
        (replace(weight, levels=torch.zeros(8)), rows, "16 levels, floats, not 8"),
        (replace(weight, group=torch.full((64,), 4, dtype=torch.int32)), rows, r"lie in \[0, 4\)"),
    ]
    for one, inputs, message in integer:
        with pytest.raises(ValueError, match=message):
            cpu_integer.multiply(one, inputs)
    codebook: list[tuple[CodebookWeight, str]] = [
        (replace(books, streams=()), "at least one stream"),
        (replace(books, d=65), "1 to 64 weights"),
        (replace(books, streams=(replace(stream, bits=17),)), "1 to 16 bits"),
        (replace(books, streams=(replace(stream, codes=stream.codes[:3]),)), "not 3 torch.uint8"),
        (replace(books, streams=(replace(stream, books=stream.books[:, 1:]),)), "codebooks of"),
        (replace(books, streams=(replace(stream, book=torch.full((10,), 9, dtype=torch.int32)),)), "one a line"),
        (replace(books, in_features=0), "not 10 x 0"),
        (replace(books, streams=(replace(stream, books=stream.books.repeat(2, 1, 1), book=None),)), "2 books nothing"),
        (replace(books, streams=(replace(stream, books=stream.books[:0], book=None),)), "0 books nothing"),
        (replace(books, streams=(replace(stream, codes=stream.codes.to("meta")),)), "codes on meta"),
        (replace(books, gain=torch.zeros(10, books.d + 1)), "gain is"),
        (replace(books, row_scale=torch.zeros(9)), "row scales are"),
    ]
    for packed, message in codebook:
        with pytest.raises(ValueError, match=message):
            cpu_codebook.multiply(packed, rows)


# memory


def _kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(name)


def peak_growth(function: Any) -> int:
    """Bytes by which the process was larger while the function ran than before it."""
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the highest mark becomes what is in use now
        before = _kilobytes("VmRSS")
        if _kilobytes("VmHWM") > before + 4096:
            pytest.skip("the kernel does not reset the mark of the largest memory")
    except (OSError, LookupError):
        pytest.skip("needs /proc/self/clear_refs")
    kept = function()
    del kept
    return 1024 * (_kilobytes("VmHWM") - before)


def test_memory_stays_near_the_packed_weight() -> None:
    out, columns = 4096, 2048  # 32 MiB in float32
    codes = torch.randint(256, (out * columns // 4,), generator=seeded(1)).to(torch.uint8)
    integers = IntegerWeight(codes, torch.ones(out, 16).half(), 2, out, columns, 128)
    books = torch.randn(1, 1 << 12, 1, generator=seeded(2))
    trellis = CodebookWeight((Stream(codes, books, 2, window=12),), out, columns, 1, "out")
    vectors = CodebookWeight((Stream(codes, torch.randn(1, 1 << 16, 8, generator=seeded(3)), 16),), out, columns, 8)
    calls: list[tuple[Any, Any]] = [
        (cpu_integer.multiply, integers), (cpu_codebook.multiply, trellis), (cpu_codebook.multiply, vectors)
    ]  # fmt: skip
    for multiply, weight in calls:
        for rows in (torch.randn(1, columns), torch.randn(64, columns)):
            multiply(weight, rows)  # compiled, or read from its cache
            growth = peak_growth(lambda multiply=multiply, weight=weight, rows=rows: multiply(weight, rows))
            assert growth < 4 << 20  # outputs of 64 inputs are 1 MiB
    assert peak_growth(lambda: torch.ones(out, columns)) > 24 << 20  # the measure sees a dense weight


# what compressors store (codebooks: through their layers, in test_codebook)


@pytest.mark.parametrize("provide", [rtn, gptq])
@pytest.mark.parametrize(
    "chosen",
    [
        {"bits": 4, "group_size": 16},
        {"bits": 3, "group_size": 24, "symmetric": False},
        {"bits": 2, "group_size": None, "symmetric": False},
    ],
)
def test_integer_compressors(provide: Any, chosen: dict[str, Any]) -> None:
    (descriptor,) = provide()
    order = {"act_order": True, "static_groups": False} if provide is gptq else {}
    case = make_case(37, 72)
    compressor: Any
    compressor, packed, _, dense = run_case(descriptor, descriptor.options.model_validate({**chosen, **order}), case)
    tensors, options = packed.tensors, compressor.options
    groups = group_count(72, options.group_size)
    zero = None
    if "zero" in tensors:
        zero = unpack(tensors["zero"], options.bits, 37 * groups, torch.uint8).view(37, groups)
    group = None
    if options.has_group_index(case.shape):
        group = unpack(tensors["group_index"], index_width(groups), 72).int()
    weight = IntegerWeight(
        tensors["codes"], tensors["scale"], options.bits, 37, 72, options.group_size or 72, zero, group
    )
    rows = case.inputs[:5].contiguous()
    assert_product(cpu_integer.multiply(weight, rows), rows, dense.double())
    runs = cpu_integer.in_runs(weight)
    assert (runs is None) == (group is None)
    if runs is not None:
        assert_product(cpu_integer.multiply(runs[0], rows[:, runs[1]]), rows, dense.double())
