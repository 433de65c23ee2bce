"""Codebook layers against a dense weight that the test builds by itself, from codes that were never packed."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evenbits.compressor import Refusal, Shared
from evenbits.kernels import codebook_launch
from evenbits.kernels.codebook import CodebookLinear, decode_lines, restore
from evenbits.kernels.codebook_held import hold, share
from evenbits.kernels.launch import TUNER, Backend
from evenbits.kernels.weights import Axis, CodebookWeight, Stream
from evenbits.maths.bitpack import pack
from evenbits.maths.trellis import states
from evenbits.plugins import load_plugins
from evenbits.testing import make_case, run_case

# of the outputs' norm: float32 sums in another order; inputs, outputs and (in the matrix unit) weights of 11 and 8 bits
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def made(
    out: int, inputs: int, d: int, bits: tuple[int, ...], *,
    axis: Axis = "in", books: int = 1, window: int | None = None,
    interleaved: bool = False, gain: int = 0, offset: int = 0, scaled: bool = True, wide: bool = False, seed: int = 0,
) -> tuple[CodebookWeight, Tensor]:  # fmt: skip
    """A random weight, and the same dense (out, in) in float64. gain, offset: how many numbers a line, 0 for none."""
    g = torch.Generator().manual_seed(seed)
    lines, length = (out, inputs) if axis == "in" else (inputs, out)
    chunks = -(-length // d)
    codes = [torch.randint(0, 1 << width, (lines, chunks), generator=g) for width in bits]
    together = pack(torch.stack(codes, 2), bits[0]) if interleaved else None
    total = torch.zeros(lines, chunks, d, dtype=torch.float64)
    streams = []
    for i, width in enumerate(bits):
        table = torch.randn(books, 1 << (window or width), d, generator=g)
        table = table if wide else table.half()
        chosen = torch.randint(0, books, (lines,), generator=g, dtype=torch.int32) if books > 1 else None
        for line in range(lines):
            place = states(codes[i][line : line + 1], width, window)[0] if window else codes[i][line]
            total[line] += table[0 if chosen is None else int(chosen[line])].double()[place]
        stored = pack(codes[i], width) if together is None else together
        apart = (1, 0) if together is None else (len(bits), i)
        streams.append(Stream(stored, table, width, *apart, chosen, window))
    gains, offsets = (torch.randn(lines, n, generator=g) if n else None for n in (gain, offset))
    if gains is not None:
        total *= gains[:, None].double()
    if offsets is not None:
        total += offsets[:, None].double()
    rows = torch.rand(out, generator=g) + 0.5 if scaled else None
    dense = total.flatten(1)[:, :length]
    dense = dense if axis == "in" else dense.t()
    if rows is not None:
        dense = dense * rows[:, None].double()
    return CodebookWeight(tuple(streams), out, inputs, d, axis, gains, offsets, rows), dense


def inputs_of(rows: int, features: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(rows)).to(dtype)


def error(found: Tensor, inputs: Tensor, dense: Tensor) -> float:
    """Of the outputs' norm; inf for what is not finite."""
    assert found.dtype == inputs.dtype
    assert found.shape == (*inputs.shape[:-1], dense.shape[0])
    wanted = inputs.double() @ dense.t()
    off = float((found.double() - wanted).norm() / wanted.norm())
    return off if bool(torch.isfinite(found).all()) else float("inf")


CASES: dict[str, dict[str, Any]] = {
    "pocketllm": {"out": 33, "inputs": 40, "d": 8, "bits": (15,)},
    "odd": {"out": 17, "inputs": 41, "d": 5, "bits": (7,)},
    "aqlm": {"out": 17, "inputs": 64, "d": 4, "bits": (8, 8), "interleaved": True},
    "aqlm-unaligned": {"out": 13, "inputs": 37, "d": 3, "bits": (5, 5, 5), "interleaved": True},
    "vptq": {"out": 33, "inputs": 21, "d": 8, "bits": (12, 8), "axis": "out", "books": 3},
    "vptq-scales": {"out": 19, "inputs": 23, "d": 6, "bits": (9,), "axis": "out", "gain": 1, "offset": 1},
    "trellis": {"out": 9, "inputs": 300, "d": 1, "bits": (2,), "window": 12},
    "trellis-out": {"out": 50, "inputs": 9, "d": 2, "bits": (3,), "window": 13, "axis": "out"},
    "short-ring": {"out": 5, "inputs": 3, "d": 1, "bits": (1,), "window": 16},
    "by-number": {"out": 11, "inputs": 70, "d": 8, "bits": (6,), "gain": 8, "offset": 8},
    "by-number-out": {"out": 70, "inputs": 11, "d": 5, "bits": (6,), "gain": 5, "offset": 5, "axis": "out"},
    "long": {"out": 7, "inputs": 70, "d": 16, "bits": (6,), "gain": 16, "wide": True},
    "longest": {"out": 3, "inputs": 3, "d": 64, "bits": (1,)},
    "line-gain": {"out": 11, "inputs": 17, "d": 4, "bits": (4,), "gain": 1, "scaled": False},
    "line-offset": {"out": 11, "inputs": 17, "d": 4, "bits": (4,), "offset": 1, "scaled": False},
    "wide": {"out": 21, "inputs": 33, "d": 4, "bits": (6,), "wide": True},
    "one": {"out": 1, "inputs": 1, "d": 1, "bits": (16,)},
}


@pytest.mark.parametrize("name", CASES)
def test_the_twin_is_the_dense_weight(name: str) -> None:
    weight, dense = made(**CASES[name])
    assert torch.equal(restore(weight, torch.float64), dense)
    lines = dense if weight.axis == "in" else dense.t()
    if weight.row_scale is None and weight.lines > 2:
        assert torch.equal(decode_lines(weight, 1, 3, torch.float64), lines[1:3])


@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_dense_weight(name: str) -> None:
    weight, dense = made(**CASES[name])
    layer = CodebookLinear(weight, backend="triton")
    seen = set()
    for rows, dtype in ((1, torch.float16), (3, torch.float32), (6, torch.bfloat16), (65, torch.float32)):
        inputs = inputs_of(rows, weight.in_features, dtype)
        seen.add(layer.choice(rows).kernel)
        assert error(layer(inputs), inputs, dense) < ERRORS[dtype]
    assert seen == {"triton-codebook-gemv", "triton-codebook-gemm", "triton-codebook-slab"}


@pytest.mark.parametrize(  # numba's kernels have tests of their own
    ("name", "backend"),
    [*((name, "torch") for name in CASES), ("odd", "numba"), ("vptq", "numba"), ("trellis", "numba")],
)
def test_the_cpu_is_the_dense_weight(name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenbits.kernels.codebook.TILE_BYTES", 4000)  # a few lines at a time
    weight, dense = made(**CASES[name])
    layer = CodebookLinear(weight, backend=backend)
    for dtype, bound in ERRORS.items():
        inputs = inputs_of(5, weight.in_features, dtype)
        assert error(layer(inputs), inputs, dense) < bound


COMPOSED: dict[str, tuple[int, dict[str, Any]]] = {  # codes by one gather, 0 where nothing is composed
    "own": (2, {"out": 64, "inputs": 5, "d": 1, "bits": (2,), "window": 12, "axis": "out"}),
    "rows": (2, {"out": 3, "inputs": 300, "d": 1, "bits": (2,), "window": 12, "gain": 1, "offset": 1}),
    "window-odd": (1, {"out": 5, "inputs": 301, "d": 1, "bits": (2,), "window": 12}),
    "window-in-part": (1, {"out": 4, "inputs": 60, "d": 2, "bits": (3,), "window": 10}),
    "outgrown": (0, {"out": 4, "inputs": 60, "d": 2, "bits": (3,), "window": 13}),  # 2^15 entries for 2^13
    "reordered": (1, {"out": 4, "inputs": 32, "d": 8, "bits": (4,), "window": 16}),
    "window-too-wide": (0, {"out": 4, "inputs": 12, "d": 2, "bits": (7,), "window": 16}),
    "scalars": (4, {"out": 8, "inputs": 132, "d": 1, "bits": (3,), "gain": 1, "scaled": False}),
    "pairs": (2, {"out": 5, "inputs": 64, "d": 2, "bits": (3,), "gain": 2, "offset": 2, "wide": True}),
    "threes": (2, {"out": 5, "inputs": 60, "d": 3, "bits": (2,)}),
    "two-books": (2, {"out": 12, "inputs": 7, "d": 2, "bits": (4, 3), "books": 3, "axis": "out"}),
    "eight": (0, {"out": 5, "inputs": 64, "d": 8, "bits": (6,)}),
    "interleaved": (0, {"out": 5, "inputs": 64, "d": 2, "bits": (3, 3), "interleaved": True}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_tables_decode_several_codes(name: str) -> None:
    codes, case = COMPOSED[name]
    weight, dense = made(**case)
    layer = CodebookLinear(weight, backend="triton")
    held = layer._composed
    assert (0 if held is None else held.d // weight.d) == codes
    assert ("codes decoded by one gather" in layer.choice(1).reason) == (codes > 1)
    for rows, dtype in ((1, torch.float32), (4, torch.float16), (5, torch.float32), (65, torch.float32)):
        inputs = inputs_of(rows, weight.in_features, dtype)
        assert error(layer(inputs), inputs, dense) < ERRORS[dtype]
    wide = inputs_of(2, weight.in_features, torch.float64)  # by the table as it was given
    assert error(layer(wide), wide, dense) < ERRORS[torch.float64]


@pytest.mark.parametrize("axis", ["in", "out"])
def test_every_width_of_codes(axis: Axis) -> None:
    for bits in range(1, 17):
        weight, dense = made(5, 29, 4, (bits,), seed=bits) if axis == "in" else made(29, 3, 4, (bits,), axis="out")
        layer = CodebookLinear(weight, backend="triton")
        inputs = inputs_of(1, weight.in_features, torch.float32)
        assert error(layer(inputs), inputs, dense) < ERRORS[torch.float32], bits


@pytest.mark.parametrize("axis", ["in", "out"])
def test_every_number_of_rows(axis: Axis) -> None:
    weight, dense = made(*((35, 27) if axis == "in" else (35, 11)), 8, (10,), axis=axis)
    bias = torch.randn(35, generator=torch.Generator().manual_seed(3))
    layer = CodebookLinear(weight, bias, backend="triton")
    for rows in (*range(1, 6), 16, 17):
        inputs = inputs_of(rows, weight.in_features, torch.float16)
        found = layer(inputs).double() - bias.double()
        assert error(found.to(torch.float64), inputs.double(), dense) < 2 * ERRORS[torch.float16]


@pytest.mark.parametrize("axis", ["in", "out"])
def test_slabs_and_splits_join(axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs, with a bias and the last one short; sums split over programs, twice the same to the bit."""
    out, features, d = (11, 264, 1) if axis == "in" else (90, 36, 4)
    weight, dense = made(out, features, d, (9,), axis=axis)
    layer = CodebookLinear(weight, torch.ones(out), backend="triton")
    monkeypatch.setattr(codebook_launch, "SLAB_BYTES", 4 * (features * d) * (10 if axis == "out" else 4))
    inputs = inputs_of(66, features, torch.float32)
    assert error(layer(inputs) - 1, inputs, dense) < ERRORS[torch.float32]
    monkeypatch.setattr(codebook_launch, "_WARPS", 32)
    monkeypatch.setattr(codebook_launch, "_BLOCKS", 64)
    finish, joined = codebook_launch._finish, []

    def counted(parts: Tensor, *others: Any) -> None:
        joined.append(len(parts))
        finish(parts, *others)

    monkeypatch.setattr(codebook_launch, "_finish", counted)
    for rows in (2, 9):
        inputs = inputs_of(rows, features, torch.float32)
        first = layer(inputs)
        assert error(first - 1, inputs, dense) < ERRORS[torch.float32]
        assert torch.equal(first, layer(inputs))
    assert len(joined) == 4, "every call is split"


def test_decoding_rounds_as_a_dense_layer_does() -> None:
    for axis, sides in (("in", (29, 52)), ("out", (52, 29))):
        weight, _ = made(*sides, 4, (8,), axis=axis)  # type: ignore[arg-type]
        held = hold(weight, True, "exact")
        lines = restore(weight) if axis == "in" else restore(weight).t()
        for dtype in (torch.float32, torch.float16):  # to bfloat16 the interpreter cuts, and compiled code rounds
            found = torch.empty(9, 24, dtype=dtype)
            chunk = 0 if axis == "in" else 7
            codebook_launch.decode(held, held.table, found, (11, 20), chunk)
            assert torch.equal(found, lines[11:20, chunk * 4 : chunk * 4 + 24].to(dtype))


def test_many_axes_of_inputs_and_none() -> None:
    weight, dense = made(9, 16, 4, (5,))
    for backend in ("triton", "torch", "numba"):
        layer = CodebookLinear(weight, backend=backend)
        inputs = inputs_of(6, 16, torch.float32).view(2, 3, 16)
        assert error(layer(inputs), inputs, dense) < ERRORS[torch.float32]
        turned = inputs_of(16, 6, torch.float32).t()
        assert error(layer(turned), turned, dense) < ERRORS[torch.float32]
        assert layer(inputs[:, :0]).shape == (2, 0, 9)


def test_gradients_reach_the_inputs() -> None:
    for axis in ("in", "out"):
        weight, dense = made(9, 14, 4, (5,), axis=axis)
        for backend, rows in (("triton", 3), ("torch", 3), ("triton", 8)):
            layer = CodebookLinear(weight, backend=backend)  # type: ignore[arg-type]
            inputs = inputs_of(rows, 14, torch.float32).requires_grad_()
            outer = inputs_of(rows, 9, torch.float32)
            layer(inputs).backward(outer)
            assert inputs.grad is not None
            assert error(inputs.grad, outer, dense.t()) < ERRORS[torch.float32]
        half = inputs_of(3, 14, torch.float16).requires_grad_()
        layer(half, torch.float32).backward(outer[:3])  # outputs of another dtype than the inputs
        assert half.grad is not None
        assert error(half.grad, outer[:3].half(), dense.t()) < 2 * ERRORS[torch.float16]


def test_sums_come_in_float32_where_that_is_asked_for() -> None:
    weight, dense = made(9, 14, 4, (5,))
    exact = {torch.float16: 5e-7, torch.bfloat16: 5e-7}  # the vector kernel and tiles do not round sums
    for backend in ("triton", "numba"):
        layer = CodebookLinear(weight, torch.ones(9), backend=backend)
        for dtype, bound in exact.items():
            inputs = inputs_of(2, 14, dtype)
            found = layer(inputs, torch.float32)
            assert found.dtype == torch.float32
            assert error(found - 1, inputs.float(), dense) < bound
            if dtype == torch.float16:  # to bfloat16 the interpreter cuts, and compiled code rounds
                assert torch.equal(layer(inputs), found.to(dtype))
    assert layer(inputs[:0], torch.float32).dtype == torch.float32
    slab = CodebookLinear(weight, backend="triton")(inputs_of(66, 14, torch.float16), torch.float32)
    assert error(slab, inputs_of(66, 14, torch.float16).float(), dense) < ERRORS[torch.float16]


def test_an_int8_table_is_asked_for_and_measured() -> None:
    weight, dense = made(40, 64, 8, (9,), wide=True)
    exact, rounded = CodebookLinear(weight, backend="triton"), CodebookLinear(weight, backend="triton", table="int8")
    assert exact.table.dtype == torch.float32
    assert exact.table_decibels == float("inf")
    assert rounded.table.dtype == torch.int8
    assert rounded.held_bytes < exact.held_bytes
    step = weight.streams[0].books.abs().max() / 127
    near = weight.streams[0].books.div(step).round() * step
    changed = replace(weight, streams=(replace(weight.streams[0], books=near),))
    noise = (restore(changed, torch.float64) - dense).square().sum()
    wanted = float(10 * torch.log10(dense.square().sum() / noise))
    assert 35 < wanted < 50
    assert rounded.table_decibels == pytest.approx(wanted, abs=1e-3)
    assert rounded.choice(1).decibels == rounded.table_decibels
    assert "int8" in rounded.choice(1).reason
    assert exact.choice(1).decibels is None
    assert "int8" not in exact.choice(1).reason
    loaded = CodebookLinear(made(40, 64, 8, (9,), wide=True, seed=1)[0], backend="torch", table="int8")
    loaded.load_state_dict(rounded.state_dict())
    assert loaded.table_decibels == rounded.table_decibels
    for rows, dtype in ((1, torch.float16), (4, torch.float32), (7, torch.float32), (70, torch.float32)):
        inputs = inputs_of(rows, 64, dtype)
        assert error(rounded(inputs), inputs, restore(changed, torch.float64)) < ERRORS[dtype]


def test_an_int8_table_with_gains() -> None:
    for case in ("by-number", "line-offset", "line-gain", "vptq-scales"):
        weight, dense = made(**CASES[case])
        layer = CodebookLinear(weight, backend="torch", table="int8")
        inputs = inputs_of(3, weight.in_features, torch.float32)
        assert 1e-4 < error(layer(inputs), inputs, dense) < 0.05
        assert error(layer(inputs), inputs, restore(layer.weight, torch.float64)) < ERRORS[torch.float32]


def test_tables_in_the_precision_that_holds_them() -> None:
    plain, _ = made(8, 32, 8, (6,))
    wide, dense = made(8, 32, 8, (6,), wide=True)
    assert CodebookLinear(plain, backend="triton").table.dtype == torch.float16
    upcast = replace(plain, streams=(replace(plain.streams[0], books=plain.streams[0].books.float()),))
    assert CodebookLinear(upcast, backend="triton").table.dtype == torch.float16
    layer = CodebookLinear(wide, backend="triton")
    before = layer.held_bytes
    assert layer.table.dtype == torch.float32
    assert layer.narrow is not None  # from the beginning: a first call may be captured in a graph
    assert layer.narrow.dtype == torch.float16
    assert CodebookLinear(wide, backend="torch").held_bytes == before - layer.narrow.numel() * 2
    inputs = inputs_of(2, 32, torch.bfloat16)
    assert error(layer(inputs), inputs, dense) < ERRORS[torch.bfloat16]
    assert layer.held_bytes == before
    huge = wide.streams[0].books * 1e6  # beyond float16
    assert codebook_launch.half_table(huge).dtype == torch.float32
    assert codebook_launch.half_table(wide.streams[0].books * 1e-6).dtype == torch.float32  # below it


def test_what_is_held_is_what_is_stored() -> None:
    weight, _ = made(64, 128, 8, (11,))
    layer = CodebookLinear(weight, backend="triton")
    codes, books = weight.streams[0].codes, weight.streams[0].books
    assert layer.held_bytes <= codes.numel() + books.numel() * 2 + 64 * 4 + 32
    assert layer.table.data_ptr() == books.data_ptr()  # layers that share a codebook hold it once
    several, _ = made(16, 32, 8, (6, 6), interleaved=True)
    together = torch.cat([stream.books for stream in several.streams])
    split = tuple(replace(s, books=together[i : i + 1]) for i, s in enumerate(several.streams))
    assert CodebookLinear(replace(several, streams=split)).table.data_ptr() == together.data_ptr()
    mirrored = replace(several, streams=(replace(split[0], books=together[1:]), replace(split[1], books=together[:1])))
    assert torch.equal(CodebookLinear(mirrored).table[:64].view(1, 64, 8), together[1:])


def test_layers_of_one_codebook_hold_it_once() -> None:
    """Also where it is held in another form than it is stored in; and what a caller may change is left to him."""
    for case in ("odd", "wide", "trellis"):
        weight, _ = made(**CASES[case])
        stored = weight.streams[0].books
        layers = [CodebookLinear(weight, backend="triton") for _ in range(2)]
        for name in ("table", "narrow", "composed_table"):
            pair = [getattr(layer, name) for layer in layers]
            assert pair[0] is pair[1] or pair[0].data_ptr() == pair[1].data_ptr()
        assert layers[0].codes.data_ptr() != layers[1].codes.data_ptr()
        apart = replace(weight, streams=(replace(weight.streams[0], books=stored.clone()),))
        alike = CodebookLinear(apart, backend="triton").table.data_ptr() == layers[0].table.data_ptr()
        assert alike == (case == "odd")  # padded: a copy
    found = share(torch.arange(24).view(4, 6).float())
    assert share(found.clone()) is found
    assert share(found.flatten()) is not found
    assert share(found + 1) is not found
    changed = found.clone()
    found[0, 0] = 9
    assert share(changed) is changed  # not the one that was written to


@pytest.mark.parametrize("case", ["odd", "wide", "trellis", "pocketllm"])
def test_state_moves_with_the_module(case: str) -> None:
    weight, dense = made(**CASES[case])
    other, unlike = made(**CASES[case], seed=1)
    layer, sibling = CodebookLinear(weight, backend="triton"), CodebookLinear(other, backend="triton")
    loaded = CodebookLinear(other, backend="triton")
    inputs = inputs_of(2, weight.in_features, torch.float16)
    loaded(inputs)
    loaded.load_state_dict(layer.state_dict())
    assert error(loaded(inputs), inputs, dense) < ERRORS[torch.float16]
    assert error(copy.deepcopy(layer)(inputs), inputs, dense) < ERRORS[torch.float16]
    assert error(sibling(inputs), inputs, unlike) < ERRORS[torch.float16]  # it had the same table as `loaded`
    wide = inputs_of(2, weight.in_features, torch.float32)
    expected = layer(wide)
    for cast in (layer.half, layer.bfloat16, layer.double):
        assert torch.equal(cast()(wide), expected)  # dtypes are the format's
    assert layer.to("meta").table.is_meta
    with pytest.raises(ValueError, match="inputs on cpu, packed weight on meta"):
        layer(wide)


def test_layers_that_differ_only_in_gains_are_tuned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains by number take configurations of four lines: one tuned without them would not fit the registers."""
    kept: dict[Any, Any] = {}

    def choose(key: Any, configs: Any, *others: Any) -> Any:
        return kept.setdefault(key, configs[0])

    monkeypatch.setattr(TUNER, "choose", choose)
    weight, _ = made(**CASES["by-number"])
    names = []
    for each in (replace(weight, gain=None, offset=None), weight):
        layer = CodebookLinear(each, backend="triton")
        layer(inputs_of(1, weight.in_features, torch.float32))
        names.append(layer.choice(1).config)
    assert names == ["long", "short"]


def test_choices_say_why() -> None:
    layer = CodebookLinear(made(9, 16, 4, (5,))[0])
    assert layer.choice(1).kernel == "numba-codebook"
    assert "CPU" in layer.choice(1).reason
    asked = CodebookLinear(made(9, 16, 4, (5,))[0], backend="triton")
    assert asked.choice(2).config == ""
    asked(inputs_of(2, 16, torch.float32))
    assert asked.choice(2).config == "long"
    assert "2 rows" in asked.choice(2).reason
    assert "asked for" in asked.choice(2).reason
    assert asked.choice(300).kernel == "triton-codebook-slab"
    assert "300 rows" in asked.choice(300).reason
    assert CodebookLinear(made(9, 16, 4, (5,))[0], backend="torch").choice(1).kernel == "torch-tiles"


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = made(9, 16, 4, (5,))
    stream = weight.streams[0]
    wrong: list[tuple[CodebookWeight, str]] = [
        (replace(weight, streams=()), "streams"),
        (replace(weight, streams=(replace(stream, bits=6),)), r"stream 0: books are \(B, 64, 4\)"),
        (replace(weight, streams=(replace(stream, codes=stream.codes[:-1]),)), "36 codes need 23 bytes, there are 22"),
        (replace(weight, streams=(replace(stream, bits=17),)), "1 to 16 bits"),
        (replace(weight, streams=(replace(stream, books=stream.books.repeat(2, 1, 1)),)), "which line reads which"),
        (replace(weight, streams=(replace(stream, book=torch.ones(9, dtype=torch.int32)),)), "one of 1 books"),
        (replace(weight, gain=torch.ones(9, 3)), "gain is"),
        (replace(weight, row_scale=torch.ones(8)), "row_scale is"),
        (replace(weight, row_scale=torch.ones(9, device="meta")), "one device, not on cpu and meta"),
        (replace(weight, streams=(replace(stream, books=stream.books.long()),)), "not torch.int64"),
        (replace(weight, out_features=0), "inputs and outputs, not 0 x 16"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            CodebookLinear(bad)
    with pytest.raises(ValueError, match='"exact" or "int8"'):
        CodebookLinear(weight, table="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='backend "numba" reads float tables'):
        CodebookLinear(weight, backend="numba", table="int8")
    with pytest.raises(ValueError, match=r"the bias is \(9,\), not \(1,\)"):
        CodebookLinear(weight, torch.ones(1))
    layer = CodebookLinear(weight)
    for inputs, message in (
        (torch.ones(2, 32), "inputs of 32 columns for a layer of 16"),
        (torch.ones(0, 32), "inputs of 32 columns"),
        (torch.ones(2, 16, dtype=torch.int64), "float dtype, not torch.int64"),
        (torch.ones(2, 16, device="meta"), "inputs on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(inputs)
    with pytest.raises(ValueError, match="backend is"):
        CodebookLinear(weight, backend="cuda")  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match='cannot run on backend "triton": Triton does not run on cpu'):
        CodebookLinear(weight, backend="triton")


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "kmeans": ("kmeans", {"codebook_size": 16, "d": 3}),
    "kmeans-shared": ("kmeans", {"codebook_size": 32, "d": 4, "scope": "kind", "codebook_bits": 8}),
    "kmeans-plain": ("kmeans", {"codebook_size": 16, "d": 2, "row_scales": False, "codebook_bits": 8}),
    "llm-codebook": ("llm-codebook", {"codebook_size": 16, "d": 2, "iterations": 2}),
    "aqlm": ("aqlm", {"codebooks": 2, "code_bits": 3, "group_size": 4, "rounds": 1, "tune": False}),
    "aqlm-8": ("aqlm", {"codebooks": 2, "code_bits": 3, "group_size": 5, "rounds": 1, "codebook_bits": 8,
                        "scope": "model", "tune": False}),
    "vptq": ("vptq", {"v": 5, "codebook_size": 16, "residual_size": 8, "groups": 2, "tune": False}),
    "vptq-outliers": ("vptq", {"v": 4, "codebook_size": 16, "groups": 3, "outlier_percent": 10, "outlier_v": 2,
                               "outlier_size": 8, "scales": "row", "tune": False}),
    "vptq-columns": ("vptq", {"v": 4, "codebook_size": 16, "scales": "column", "column_bias": True,
                              "codebook_bits": 8, "residual_size": 4, "scope": "kind", "tune": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSED)
def test_linear_computes_what_restore_gives(name: str) -> None:
    """A layer that was really compressed, by Triton and on the CPU."""
    method, given = COMPRESSED[name]
    descriptor = load_plugins().compressors[method].value
    case = make_case(33, 47)
    compressor, packed, shared, restored = run_case(descriptor, descriptor.options.model_validate(given), case)
    assert shared is None or isinstance(shared, Shared)
    layer: Any = compressor.linear(packed, case.shape, shared, torch.device("cpu"))
    assert not isinstance(layer, Refusal)
    dense = restored.double()
    inputs = inputs_of(4, 47, torch.float32)
    assert error(layer(inputs), inputs, dense) < ERRORS[torch.float32]
    half = inputs_of(3, 47, torch.float16)
    assert torch.equal(layer(half), layer(half.float()).half())  # rounded once, in the end
    again: Any = compressor.linear(packed, case.shape, shared, torch.device("cpu"))
    for part, other in zip(layer.modules(), again.modules(), strict=True):
        if isinstance(part, CodebookLinear):
            assert part.table.data_ptr() == other.table.data_ptr(), "layers of one codebook hold it once"
            part.backend = "triton"
    for rows, dtype in ((1, torch.float32), (5, torch.float32), (2, torch.float16), (80, torch.bfloat16)):
        inputs = inputs_of(rows, 47, dtype)
        assert error(layer(inputs), inputs, dense) < 2 * ERRORS[dtype]
    stored = packed.nbytes + (0 if shared is None else shared.nbytes)
    assert layer.held_bytes < 3 * stored + 1000
    assert layer.choice(1).kernel == "triton-codebook-gemv"


def test_a_bare_machine_can_import_it() -> None:
    """torch alone: neither Triton nor numba nor what the rest of evenbits needs."""
    banned = "pydantic", "scipy", "numba", "triton", "faiss", "transformers"
    code = f"import sys, evenbits.kernels.codebook; print([m for m in {banned} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
