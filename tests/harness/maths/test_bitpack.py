"""Exact bit packing: round trip, size, layout against a slow twin, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenbits.maths import bitpack
from evenbits.maths.bitpack import pack, packed_bytes, unpack, unpack_at, unpack_range


def slow_pack(codes: list[int], width: int) -> list[int]:
    """The definition: one big integer, code i at bit i * width, written little-endian."""
    stream = sum(code << (place * width) for place, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * width + 7) // 8, "little"))


@st.composite
def coded(draw: st.DrawFn) -> tuple[list[int], int]:
    width = draw(st.integers(1, 16))
    return draw(st.lists(st.integers(0, 2**width - 1), max_size=70)), width


@given(coded())
@settings(max_examples=150, deadline=None)
def test_layout_size_and_round_trip(case: tuple[list[int], int]) -> None:
    codes, width = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), width)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes, width)
    assert packed.numel() == packed_bytes(len(codes), width) == -(-len(codes) * width // 8)
    assert unpack(packed, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", range(1, 17))
def test_chunks_join_without_a_seam(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**width, (7, 31), generator=torch.Generator().manual_seed(width))
    whole = pack(codes, width)
    monkeypatch.setattr(bitpack, "_CHUNK", 16)
    assert torch.equal(pack(codes, width), whole)
    assert torch.equal(unpack(whole, width, codes.numel()), codes.flatten())
    narrow = torch.uint8 if width <= 8 else torch.int32
    found = unpack(whole, width, codes.numel(), narrow)
    assert found.dtype == narrow
    assert torch.equal(found.long(), codes.flatten())
    assert torch.equal(pack(codes.t(), width), pack(codes.t().contiguous(), width))  # row-major of what is passed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    codes = torch.tensor([1, 0, 1, 1, 0], dtype=dtype)
    assert pack(codes, 1).tolist() == [0b01101]


@pytest.mark.parametrize(
    ("codes", "width", "message"),
    [
        ([4], 2, r"lie in \[0, 4\), not in \[4, 4\]"),
        ([0, -1], 3, r"not in \[-1, 0\]"),
        ([2**40], 16, "lie in"),
        ([0], 0, "1 to 16 bits, not 0"),
        ([0], 17, "1 to 16 bits, not 17"),
    ],
)
def test_pack_refuses(codes: list[int], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor(codes), width)


def test_refuses_floats_and_wrong_lengths() -> None:
    with pytest.raises(ValueError, match="integers"):
        pack(torch.tensor([1.0]), 2)
    with pytest.raises(ValueError, match="3 codes of 3 bits are 2 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 3)
    with pytest.raises(ValueError, match="uint8"):
        unpack(torch.zeros(2, dtype=torch.int64), 3, 3)
    with pytest.raises(ValueError, match="1 to 16"):
        unpack(torch.zeros(2, dtype=torch.uint8), 0, 0)
    for width, dtype in ((9, torch.uint8), (8, torch.int8), (16, torch.int16)):
        with pytest.raises(ValueError, match=f"codes of {width} bits do not fit {dtype}"):
            unpack(torch.zeros(width, dtype=torch.uint8), width, 8, dtype)


@given(coded(), st.data())
@settings(max_examples=150, deadline=None)
def test_parts_are_those_of_the_whole(case: tuple[list[int], int], data: st.DataObject) -> None:
    codes, width = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), width)
    start = data.draw(st.integers(0, len(codes)))
    count = data.draw(st.integers(0, len(codes) - start))
    assert unpack_range(packed, width, start, count).tolist() == codes[start : start + count]
    places = data.draw(st.lists(st.integers(0, len(codes) - 1), max_size=20)) if codes else []
    found = unpack_at(packed, width, torch.tensor(places, dtype=torch.int64))
    assert found.tolist() == [codes[place] for place in places]


@pytest.mark.parametrize("width", range(1, 17))
def test_every_start_and_place(width: int) -> None:
    codes = torch.randint(0, 2**width, (3, 11), generator=torch.Generator().manual_seed(width))
    packed = pack(codes, width)
    for start in range(33):
        assert torch.equal(unpack_range(packed, width, start, 33 - start), codes.flatten()[start:])
    places = torch.arange(33).reshape(3, 11).t()
    found = unpack_at(packed, width, places)
    assert found.dtype == torch.int64
    assert torch.equal(found, codes.t())


def test_parts_refuse_what_is_not_there() -> None:
    packed = pack(torch.tensor([1, 2, 3]), 3)  # 9 bits, 2 bytes
    assert unpack_range(packed, 3, 3, 0).tolist() == []
    for start, count in ((-1, 1), (0, -1), (4, 2)):
        with pytest.raises(ValueError, match="2 bytes do not hold"):
            unpack_range(packed, 3, start, count)
    for place in (-1, 5):
        with pytest.raises(ValueError, match="2 bytes do not hold"):
            unpack_at(packed, 3, torch.tensor([0, place]))
    with pytest.raises(ValueError, match="places are integers"):
        unpack_at(packed, 3, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="uint8"):
        unpack_range(packed.long(), 3, 0, 1)
    with pytest.raises(ValueError, match="uint8"):
        unpack_at(packed[None], 3, torch.tensor([0]))
    with pytest.raises(ValueError, match="1 to 16 bits"):
        unpack_at(packed, 17, torch.tensor([0]))
