"""A codebook weight as the CPU kernels read it: checked once, and codebooks in float32, in the order that is read."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evenbits.kernels.cpu_products import array_of, copied_bytes, require_codes, require_sizes
from evenbits.kernels.weights import CodebookWeight, Stream


@dataclass(frozen=True, eq=False)
class _Table:
    """entries: float32, flat, books one after the other. The source is kept: its address is what tells it apart."""

    entries: npt.NDArray[np.float32]
    source: Tensor
    is_copy: bool


_TABLES: WeakValueDictionary[Hashable, _Table] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A CodebookWeight as the kernels read it, checked once. Its tensors must stay as they are: most are shared.

    tables  books in float32, or in the order in which windows are read: one of each for all layers that share books
    extra_bytes  held beside the weight's own tensors; of a table that several layers share, each says all of it
    """

    weight: CodebookWeight
    tables: tuple[_Table, ...]
    arguments: tuple[Any, ...]
    extra_bytes: int

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare, (self.weight,)  # copied or pickled, arrays would no longer share the tensors' memory


def prepare(weight: CodebookWeight) -> Prepared:
    """What each call would do again: check, widen 16-bit books, put tables of windows in order.

    Raises ValueError for tensors that are not what the weight's sizes say, or not on the CPU.
    """
    _check(weight)
    tables = tuple(_table(stream) for stream in weight.streams)
    copied = {id(table): table.entries.nbytes for table in tables if table.is_copy}

    def array(tensor: Tensor | None, dtype: torch.dtype) -> npt.NDArray[Any]:
        found = array_of(tensor, dtype)
        copied[id(tensor)] = copied_bytes(found, tensor)
        return found

    codes = {id(stream.codes): array(stream.codes, torch.uint8) for stream in weight.streams}  # streams may share them
    streams = tuple(
        (
            codes[id(stream.codes)], stream.bits, stream.stride, stream.offset, _wide(stream), _behind(stream),
            table.entries, stream.books.shape[1] * stream.books.shape[2],
            array(stream.book, torch.int32), stream.book is not None,
        )
        for stream, table in zip(weight.streams, tables, strict=True)
    )  # fmt: skip
    gain, offset = array(weight.gain, torch.float32), array(weight.offset, torch.float32)
    arguments = (
        streams, weight.lines, weight.length, weight.chunks, weight.d,
        gain, 0 if weight.gain is None else weight.gain.shape[1],
        offset, 0 if weight.offset is None else weight.offset.shape[1],
    )  # fmt: skip
    return Prepared(weight, tables, arguments, sum(copied.values()))


def _wide(stream: Stream) -> int:
    return stream.bits if stream.window is None else stream.window


def _behind(stream: Stream) -> int:
    """How many codes before its own a place is read from, -1 where it cannot be read as it lies in the stream."""
    if stream.window is None:
        return 0
    return stream.window // stream.bits - 1 if stream.stride == 1 and stream.window % stream.bits == 0 else -1


def _table(stream: Stream) -> _Table:
    books, ordered = stream.books.detach(), _behind(stream) > 0
    version = None if books.is_inference() else books._version  # books that were written to are others
    key = (
        books.data_ptr(),
        version,
        books.dtype,
        books.shape,
        books.stride(),
        ordered and (stream.window, stream.bits),
    )
    found = _TABLES.get(key)
    if found is None:
        entries = books[:, _reading_order(_wide(stream), stream.bits)] if ordered else books
        array = array_of(entries, torch.float32)
        found = _Table(array, books, copied_bytes(array, books) > 0)
        _TABLES[key] = found
    return found


@lru_cache(maxsize=2)
def _reading_order(window: int, bits: int) -> Tensor:
    """Where in a table of states the entry stands whose window, as bits follow in the stream, is 0, 1, 2 ..."""
    symbols = window // bits
    read = np.arange(1 << window, dtype=np.int32)
    found = np.zeros_like(read)
    for behind in range(symbols):
        found |= ((read >> (symbols - 1 - behind) * bits) & ((1 << bits) - 1)) << behind * bits
    return torch.from_numpy(found)


def _check(weight: CodebookWeight) -> None:
    if not 1 <= weight.d <= 64:
        raise ValueError(f"a sub-vector has 1 to 64 weights, not {weight.d}")
    if not weight.streams:
        raise ValueError("a codebook weight has at least one stream of codes")
    if weight.axis not in ("in", "out"):
        raise ValueError(f'lines lie along "in" or "out", not {weight.axis!r}')
    parts = [("gain", weight.gain), ("offset", weight.offset), ("row scales", weight.row_scale)]
    for stream in weight.streams:
        parts += [("codes", stream.codes), ("codebooks", stream.books), ("the books of lines", stream.book)]
    require_sizes(weight.out_features, weight.in_features, parts)
    for stream in weight.streams:
        wide = _wide(stream)
        if not 1 <= stream.bits <= 16 or not 1 <= wide <= 16 or stream.stride < 1 or stream.offset < 0:
            raise ValueError(f"codes have 1 to 16 bits, windows 1 to 16, not {stream.bits} and {stream.window}")
        require_codes(stream.codes, stream.offset + (weight.lines * weight.chunks - 1) * stream.stride + 1, stream.bits)
        shape = tuple(stream.books.shape)
        if len(shape) != 3 or shape[1:] != (1 << wide, weight.d) or not stream.books.is_floating_point():
            raise ValueError(
                f"codebooks of {wide} bits are (B, {1 << wide}, d = {weight.d}) of floats, not {shape} of "
                f"{stream.books.dtype}"
            )
        book = stream.book
        if book is None:
            if shape[0] != 1:
                raise ValueError(f"of {shape[0]} books nothing says which a line reads")
            continue
        if book.numel() != weight.lines or int(book.min()) < 0 or int(book.max()) >= shape[0]:
            raise ValueError(f"the books of {weight.lines} lines lie in [0, {shape[0]}), one a line")
    for name, part in (("gain", weight.gain), ("offset", weight.offset)):
        if part is not None and tuple(part.shape) not in ((weight.lines, 1), (weight.lines, weight.d)):
            raise ValueError(f"{name} is ({weight.lines}, 1 or {weight.d}), not {tuple(part.shape)}")
    if weight.row_scale is not None and weight.row_scale.numel() != weight.out_features:
        raise ValueError(f"row scales are ({weight.out_features},), not {tuple(weight.row_scale.shape)}")
