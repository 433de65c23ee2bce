"""Grids of integer codes: the GPU's layout and kernels, interpreted, against the twin in float64; and the layer."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evenbits.kernels import integer_launch
from evenbits.kernels.integer import IntegerLinear, decode_rows
from evenbits.kernels.integer_launch import product, way_for
from evenbits.kernels.integer_layout import repack
from evenbits.kernels.launch import Backend
from evenbits.kernels.weights import IntegerWeight
from evenbits.maths.bitpack import pack
from evenbits.maths.uniform import dequantise

pytest.importorskip("triton", reason="pip install 'evenbits[kernels]' for the Triton kernels")

# of the outputs' norm: sums in another order, and the output's own rounding. The interpreter cuts bfloat16 off where
# a GPU rounds it, which doubles the error
ERROR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 1e-2}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(
    out: int, columns: int, bits: int, group: int | None, *, zeros: bool = False, levels: bool = False,
    index: str = "", wide: bool = False,
) -> IntegerWeight:  # fmt: skip
    """index: "" runs of neighbours, "act" as act-order leaves them, "any" groups of any sizes."""
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    size = columns if group is None else group
    groups = -(-columns // size)
    scale = torch.rand(out, groups, generator=generator) * 0.1 + 0.01
    place = None
    if index == "act":
        place = (torch.randperm(columns, generator=generator) // size).int()
    elif index == "any":
        place = torch.randint(0, groups, (columns,), generator=generator).int()
    return IntegerWeight(
        pack(torch.randint(0, 1 << bits, (out, columns), generator=generator), bits),
        scale if wide else scale.half(), bits, out, columns, size,
        torch.randint(0, 1 << bits, (out, groups), generator=generator).to(torch.uint8) if zeros else None,
        place, torch.linspace(-1, 1, 1 << bits) ** 3 if levels else None,
    )  # fmt: skip


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    error = float((found.double() - exact).norm() / exact.norm())
    assert error <= ERROR[dtype], f"{error:g}"  # NaN fails


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def exact_product(weight: IntegerWeight, x: Tensor) -> Tensor:
    return x.double() @ decode_rows(weight, 0, weight.out_features, torch.float64).t()


# -- the twin and the layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_twin_is_the_restored_weight(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (5, 37), generator=generator).to(torch.uint8)
    scale = torch.rand(5, 4, generator=generator).half()
    zero = torch.randint(0, 1 << bits, (5, 4), generator=generator).to(torch.uint8)
    group = torch.randint(0, 4, (37,), generator=generator).int()
    weight = IntegerWeight(pack(codes, bits), scale, bits, 5, 37, 10, zero, group)
    expected = dequantise(codes, scale, zero.int(), group.long())
    assert torch.equal(decode_rows(weight, 0, 5), expected)
    assert torch.equal(decode_rows(weight, 3, 5), expected[3:])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 128, 131])
def test_planes_hold_each_code_where_it_is_said_to_lie(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(columns))
    planes = repack(codes, bits)
    widths = [4, 4] if bits == 8 else [width for width in (4, 2, 1) if bits & width]
    for row in range(3):
        for k in range(columns):
            tile, p, cell, half = k // 128, k % 128 // 16, k % 16 // 2, k % 2
            found, low, plane = 0, 0, 0
            for width in widths:
                if width == 1:
                    bit = 8 * half + (2 * p + 1 if p < 4 else 2 * p - 8)
                    field = int(planes.ones[tile, row, cell]) >> bit & 1
                else:
                    pairs = 16 // width
                    word = int(planes.words[tile, plane + p // pairs, row, cell])
                    field = word >> (16 * half + width * (p % pairs)) & ((1 << width) - 1)
                    plane += 8 // pairs
                found |= field << low
                low += width
            assert found == int(codes[row, k]), (row, k)


def test_the_layout_takes_no_more_than_the_codes() -> None:
    for bits in range(2, 9):
        weight = make(24, 384, bits, 128, zeros=True)
        held = IntegerLinear(weight, backend="triton").held_bytes
        assert held == weight.codes.numel() + 2 * weight.scale.numel() + 24 * 3


# -- kernels -------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, IntegerWeight] = {
    "2 bits, runs of 32, act order": make(3, 200, 2, 32, zeros=True, index="act"),
    "3 bits, runs of 64": make(17, 129, 3, 64, zeros=True),
    "4 bits, runs of 128": make(5, 256, 4, 128),
    "5 bits, runs of 16": make(3, 33, 5, 16),
    "6 bits, groups of 8": make(3, 130, 6, 8, zeros=True),
    "7 bits, a row": make(1, 150, 7, None, zeros=True),
    "8 bits, groups of 100, act order": make(3, 200, 8, 100, zeros=True, index="act"),
    "8 bits, runs of 128": make(3, 128, 8, 128, zeros=True),
    "3 bits, any groups": make(3, 140, 3, 48, index="any"),
    "4 bits, levels": make(3, 128, 4, 64, levels=True, wide=True),
    "2 bits, one weight": make(1, 1, 2, 1),
}
# how codes are read, by every dtype, stands in the test of slabs; here each weight once, and one by all dtypes
EACH = [(name, DTYPES[i % 3]) for i, name in enumerate(WEIGHTS)]
EACH += [("3 bits, runs of 64", dtype) for dtype in DTYPES if ("3 bits, runs of 64", dtype) not in EACH]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_slabs_are_the_rounded_weight(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]
    layer = IntegerLinear(weight, backend="triton")
    found = torch.cat([slab.clone() for _, slab in layer.slabs(dtype, 16)])
    expected = decode_rows(weight, 0, weight.out_features)
    if layer.order is not None:
        expected = expected[:, layer.order.long()]
    if dtype == torch.bfloat16:  # cut off by the interpreter
        assert torch.all((found.float() - expected).abs() <= expected.abs() * 2**-7)
        assert_close(found, expected.double(), dtype)
    else:
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_few_rows_by_the_matrix_unit(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]
    x = inputs(3, weight.in_features, dtype)
    out = torch.empty(3, weight.out_features, dtype=dtype)
    product(IntegerLinear(weight, backend="triton"), x, out, "matmul", "few-64")
    assert_close(out, exact_product(weight, x), dtype)


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_one_row_without_it(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]
    bias = torch.randn(weight.out_features, generator=torch.Generator().manual_seed(1))
    x = inputs(1, weight.in_features, dtype)
    out = torch.empty(1, weight.out_features, dtype=dtype)
    product(IntegerLinear(weight, bias, backend="triton"), x, out, "gemv", "row-16")
    assert_close(out, exact_product(weight, x) + bias, dtype)


@pytest.mark.parametrize("way", [("matmul", "few-64-split4"), ("gemv", "row-64-split4")])
def test_shares_of_the_columns_are_summed(way: tuple[str, str]) -> None:
    weight, bias = make(5, 700, 4, 128), torch.arange(5.0)
    x = inputs(2, 700, torch.float16)
    out = torch.empty(2, 5, dtype=torch.float16)
    product(IntegerLinear(weight, bias, backend="triton"), x, out, *way)
    assert_close(out, exact_product(weight, x) + bias, torch.float16)


@pytest.mark.parametrize(("rows", "name"), [(16, "few-64"), (17, "many-64"), (65, "many-64")])
def test_more_rows(rows: int, name: str) -> None:
    weight = make(33, 192, 4, 64, zeros=True, index="act")
    x = inputs(rows, 192, torch.float16)
    out = torch.empty(rows, 33, dtype=torch.float16)
    product(IntegerLinear(weight, backend="triton"), x, out, "matmul", name)
    assert_close(out, exact_product(weight, x), torch.float16)


# -- the layer -----------------------------------------------------------------------------------------------

BACKENDS: tuple[Backend, ...] = ("torch", "triton", "numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 5, 17, 300])
def test_the_layer_by_each_backend(backend: Backend, rows: int) -> None:
    weight = make(19, 96, 3, 32, zeros=True, index="act")
    bias = torch.linspace(-1, 1, 19)
    layer = IntegerLinear(weight, bias, backend)
    assert layer.choice(rows).reason
    assert layer.choice(rows).kernel.startswith(backend)
    for dtype in DTYPES:
        x = inputs(rows, 96, dtype)
        assert_close(layer(x), exact_product(weight, x) + bias, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layers_shapes_and_float64(backend: Backend) -> None:
    weight = make(3, 40, 4, 16)
    layer = IntegerLinear(weight, backend=backend)
    x = inputs(6, 40, torch.float64)
    assert torch.allclose(layer(x), exact_product(weight, x), rtol=1e-5)  # Triton's slabs are float32
    assert layer(inputs(6, 40, torch.float32).view(2, 3, 40)).shape == (2, 3, 3)
    assert layer(torch.zeros(0, 40)).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_the_inputs(backend: Backend) -> None:
    weight = make(7, 50, 2, 16, zeros=True, index="act")
    x = inputs(4, 50, torch.float32).requires_grad_()
    IntegerLinear(weight, backend=backend)(x).square().sum().backward()
    again = x.detach().double().requires_grad_()
    exact_product(weight, again).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert again.grad is not None
    assert_close(x.grad, again.grad, torch.float32)


def test_the_stored_codes_are_held_as_they_are_on_the_cpu() -> None:
    weight = make(8, 64, 3, 32)
    layer = IntegerLinear(weight)
    assert layer.codes.data_ptr() == weight.codes.data_ptr()
    assert layer.held_bytes == weight.codes.numel() + 2 * weight.scale.numel()
    assert layer.choice(1).kernel == "numba-integer"
    wide = IntegerLinear(make(8, 64, 4, 32, levels=True, wide=True))  # as NF4 with its scales quantised again
    assert wide.choice(1).kernel == "numba-integer"


def test_a_bias_goes_with_each_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_launch, "SLAB_BYTES", 1)  # 64 rows of W
    weight, bias = make(150, 40, 4, 8), torch.linspace(-9, 9, 150)
    x = inputs(17, 40, torch.float32)
    assert_close(IntegerLinear(weight, bias, "triton")(x), exact_product(weight, x) + bias, torch.float32)


def test_what_is_rounded_does_not_follow_a_clock() -> None:
    """Slabs round the weight: which rows take them is fixed, and so is where float32 is summed without the unit."""
    layers = [IntegerLinear(make(8, 256, 4, group), backend="triton") for group in (128, 32, 8)]
    layers.append(IntegerLinear(WEIGHTS["4 bits, levels"], backend="triton"))
    for layer in layers:
        for rows in (1, 2, 5, 16, 17, 128, 129, 2048):
            for dtype in DTYPES:
                way, names, reason = way_for(layer, rows, dtype)
                assert reason
                assert (way == "slab") == (not names)
                assert len(names) <= 1 or rows <= 16  # of a sum in another order alone
    plain = layers[0]
    assert [plain.choice(rows).kernel for rows in (1, 16, 17, 128, 129)] == [
        *["triton-integer-matmul"] * 4, "triton-integer-slab",
    ]  # fmt: skip
    assert "order float32 sums" in plain.choice(1).reason


def test_configurations_agree_but_for_the_order_of_sums() -> None:
    weight = make(5, 700, 3, 64, zeros=True)
    layer = IntegerLinear(weight, backend="triton")
    for dtype in (torch.float16, torch.float32):
        x = inputs(2, 700, dtype)
        way, names, _ = way_for(layer, 2, dtype)
        found = torch.empty(len(names), 2, 5, dtype=dtype)
        for out, name in zip(found, names, strict=True):
            product(layer, x, out, way, name)
        assert torch.allclose(found, found[:1].expand_as(found), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_keeps_its_numbers_whatever_becomes_of_it(backend: Backend) -> None:
    """A model's `.half()` must not round scales and levels; copies and pickles compute the same."""
    weight = make(5, 40, 4, 8, levels=True, index="act", wide=True)
    assert weight.levels is not None
    strided = replace(weight, levels=weight.levels.repeat_interleave(2)[::2])
    layer = IntegerLinear(strided, torch.linspace(-1, 1, 10)[::2], backend)
    x = inputs(2, 40, torch.float32)
    expected = layer(x)
    assert_close(expected, exact_product(weight, x) + torch.linspace(-1, 1, 10)[::2], torch.float32)
    for changed in (copy.deepcopy(layer).half(), pickle.loads(pickle.dumps(layer)).to(torch.bfloat16), layer.double()):
        assert torch.equal(changed(x), expected)
    if backend != "torch":
        with pytest.raises(ValueError, match=f"{backend} holds codes as it reads them on cpu: make this layer on meta"):
            layer.to("meta")


def test_the_choice_follows_groups() -> None:
    plain = IntegerLinear(make(8, 256, 4, 128), backend="triton")
    small = IntegerLinear(make(8, 256, 4, 8), backend="triton")
    assert small.choice(17).kernel == "triton-integer-slab"
    assert "64 columns" in small.choice(17).reason
    plain(inputs(2, 256, torch.float16))
    assert plain.choice(2).config == "few-128-split4"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 9}, "2 to 8 bits"),
        ({"codes": torch.zeros(3, dtype=torch.uint8)}, "codes of a weight 8x64 at 4 bits"),
        ({"scale": torch.ones(8, 3).half()}, "groups of 32"),
        ({"zero": torch.zeros(8, 1, dtype=torch.uint8)}, "zero of a weight"),
        ({"group": torch.full((64,), 2, dtype=torch.int32)}, "outside 0 to 1"),
        ({"levels": torch.zeros(16), "zero": torch.zeros(8, 2, dtype=torch.uint8)}, "not both"),
        ({"group_size": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntegerLinear(replace(make(8, 64, 4, 32), **changed))


def test_backends_that_cannot_run_are_refused() -> None:
    weight = make(8, 64, 4, 32)
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        IntegerLinear(weight, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="63 columns for a layer of 64"):
        IntegerLinear(weight)(torch.zeros(1, 63))
    with pytest.raises(ValueError, match=r"inputs of torch\.int64"):
        IntegerLinear(weight)(torch.zeros(1, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale lies on meta, the codes on cpu"):
        IntegerLinear(replace(weight, scale=weight.scale.to("meta")))
    with pytest.raises(ValueError, match="slabs are Triton's"):
        next(IntegerLinear(weight).slabs(torch.float32, 8))
