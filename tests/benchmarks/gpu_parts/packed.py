"""Random packed weights of every format that is measured, made on the device, and what they stand for in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evenbits.kernels.weights import CodebookWeight, IntegerWeight, Stream
from evenbits.maths.bitpack import packed_bytes, unpack
from gpu_parts.part import Setting

Weight = IntegerWeight | CodebookWeight
DEVIATION = 0.02  # of the weights, about that of a Llama's


def bit_stream(setting: Setting, count: int, width: int, seed: int) -> Tensor:
    """uint8: `count` uniform codes; any bytes are some codes, but the bits beyond the last one are zero."""
    size = packed_bytes(count, width)
    drawn = torch.randint(0, 256, (size,), generator=setting.generator(seed), device=setting.device, dtype=torch.uint8)
    if used := count * width % 8:
        drawn[-1] &= (1 << used) - 1
    return drawn


def integer(
    setting: Setting, out: int, into: int, seed: int = 0, *, bits: int = 4, group: int = 128, zero: bool = True,
    levels: bool = False, order: bool = False,
) -> IntegerWeight:  # fmt: skip
    """levels: the codes name levels of a table. order: columns belong to groups in a random order."""
    groups = -(-into // group)
    half = (1 << bits) / 2
    scale = (0.5 + torch.rand(out, groups, generator=setting.generator(seed + 1), device=setting.device)) / half
    zeros = torch.randint(
        0, 1 << bits, (out, groups), generator=setting.generator(seed + 2), device=setting.device, dtype=torch.uint8
    )
    places = torch.arange(into, device=setting.device, dtype=torch.int32) // group
    if order:
        places = places[torch.randperm(into, generator=setting.generator(seed + 3), device=setting.device)]
    return IntegerWeight(
        bit_stream(setting, out * into, bits, seed), (2 * DEVIATION * scale).half(), bits, out, into, group,
        zero=zeros if zero and not levels else None,
        group=places if order else None,
        levels=setting.normal(1 << bits, seed=seed + 4) if levels else None,
    )  # fmt: skip


def books(setting: Setting, count: int, bits: int, d: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """(count, 2^bits, d): 8-bit integers times a power of two, each column of each book with its extremes.

    So rounding a book to 8 bits a number, by one scale a book or one a column, changes nothing: exact and 8-bit tables
    answer to the same float64 reference.
    """
    drawn = (40 * setting.normal(count, 1 << bits, d, seed=seed)).round().clamp(-127, 127)
    drawn[:, 0], drawn[:, 1] = 127, -127
    return (drawn * 2.0**-11).to(dtype)


def codebook(
    setting: Setting, out: int, into: int, seed: int = 0, *, d: int = 8, bits: tuple[int, ...] = (15,),
    axis: Any = "in", gain: str = "", offset: str = "", row_scale: bool = False, interleaved: bool = False,
    window: int | None = None,
    several: int = 1, table: torch.dtype = torch.float16,
) -> CodebookWeight:  # fmt: skip
    """bits: of the codes of each stream. gain, offset: "", "line" or "number". interleaved: streams of equal bits take
    turns in one bit stream. window: bits of the window. several: books, which lines take at random."""
    lines, length = (out, into) if axis == "in" else (into, out)
    chunks = -(-length // d)
    streams = []
    shared = bit_stream(setting, lines * chunks * len(bits), bits[0], seed) if interleaved else None
    for place, width in enumerate(bits):
        own = bit_stream(setting, lines * chunks, width, seed + place) if shared is None else shared
        which = torch.randint(
            0, several, (lines,), generator=setting.generator(seed + 40 + place), device=setting.device,
            dtype=torch.int32,
        )  # fmt: skip
        streams.append(
            Stream(
                own, books(setting, several, window or width, d, seed + 20 + place, table), width,
                stride=len(bits) if interleaved else 1, offset=place if interleaved else 0,
                book=which if several > 1 else None, window=window,
            )
        )  # fmt: skip
    size = {"line": 1, "number": d}
    return CodebookWeight(
        tuple(streams), out, into, d, axis,
        gain=1 + setting.normal(lines, size[gain], seed=seed + 60) / 4 if gain else None,
        offset=setting.normal(lines, size[offset], seed=seed + 61) * DEVIATION / 4 if offset else None,
        row_scale=1 + setting.normal(out, seed=seed + 62) / 4 if row_scale else None,
    )  # fmt: skip


def tensors(held: Any) -> Iterator[Tensor]:
    """All tensors of a weight, each storage once."""
    seen: set[int] = set()
    todo = [held]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            if value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                yield value
        elif isinstance(value, tuple | list):
            todo += value
        elif is_dataclass(value):
            todo += [getattr(value, field.name) for field in fields(value)]


def stored_bytes(held: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(held))


def dense(weight: Weight) -> Tensor:
    """(out, in) float64, read off the definitions in `evenbits.kernels.weights` one step at a time."""
    return _integer(weight) if isinstance(weight, IntegerWeight) else _codebook(weight)


def _integer(weight: IntegerWeight) -> Tensor:
    out, into = weight.out_features, weight.in_features
    codes = unpack(weight.codes, weight.bits, out * into).view(out, into)
    column = torch.arange(into, device=codes.device) // weight.group_size if weight.group is None else weight.group
    scale = weight.scale.double()[:, column.long()]
    if weight.levels is not None:
        named: Tensor = weight.levels.double()[codes]
        return scale * named
    if weight.zero is None:
        return scale * (codes.double() - (1 << (weight.bits - 1)))
    return scale * (codes.double() - weight.zero.double()[:, column.long()])


def _codebook(weight: CodebookWeight) -> Tensor:
    lines, chunks, d = weight.lines, weight.chunks, weight.d
    total = torch.zeros(lines, chunks, d, dtype=torch.float64, device=weight.streams[0].codes.device)
    for stream in weight.streams:
        held = stream.codes.numel() * 8 // stream.bits
        number = stream.offset + torch.arange(lines * chunks, device=total.device) * stream.stride
        count = max(int(number[-1]) + 1, held if stream.stride > 1 else 0)
        while packed_bytes(count, stream.bits) > stream.codes.numel():
            count -= 1
        codes = unpack(stream.codes[: packed_bytes(count, stream.bits)], stream.bits, count)[number].view(lines, chunks)
        place = codes
        if stream.window is not None:
            place = torch.zeros_like(codes)
            for behind in range(-(-stream.window // stream.bits)):
                place += codes.roll(behind, dims=1) << behind * stream.bits
            place = place % (1 << stream.window)
        book = torch.zeros(lines, dtype=torch.int64, device=total.device) if stream.book is None else stream.book.long()
        total += stream.books.double()[book[:, None], place]
    if weight.gain is not None:
        total *= weight.gain.double()[:, None]
    if weight.offset is not None:
        total += weight.offset.double()[:, None]
    found = total.flatten(1)[:, : weight.length]
    found = found if weight.axis == "in" else found.t()
    return found if weight.row_scale is None else found * weight.row_scale.double()[:, None]


@dataclass(frozen=True)
class Format:
    """What is measured under one name. make(setting, out, in, seed) gives the weight, build(weight, setting) the
    module that multiplies by it. decoded: whether `torch_roads.dequantize` knows it, too."""

    name: str
    shown: str
    make: Callable[[Setting, int, int, int], Any]
    build: Callable[[Any, Setting], torch.nn.Module]
    decoded: bool = True
