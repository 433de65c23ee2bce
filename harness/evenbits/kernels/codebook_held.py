"""A codebook weight as it is kept between calls: streams in one buffer, books in one table, and what says where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from evenbits.kernels.weights import Axis, CodebookWeight, Stream
from evenbits.maths.bitpack import MAX_WIDTH, packed_bytes

Table = Literal["exact", "int8"]
MAX_D = 64
_ALIGNMENT = 16  # bytes; a code is read from two aligned words, and the second must exist
_SHARED: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


@dataclass(frozen=True)
class Part:
    """One stream's place in the buffers. entry: where its books begin in the table; window 0: none. read: entries are
    in the order of windows as they lie in the stream (`codebook_composed`)."""

    bits: int
    stride: int
    offset: int
    window: int
    byte: int
    bytes: int
    entry: int
    books: int
    read: bool = False

    @property
    def entries(self) -> int:
        """Of one of its books."""
        return 1 << (self.window or self.bits)


@dataclass(frozen=True)
class Layout:
    """What the buffers hold. stride: numbers from one entry of the table to the next, d or the power of two above."""

    parts: tuple[Part, ...]
    out_features: int
    in_features: int
    d: int
    stride: int
    axis: Axis


@dataclass(frozen=True)
class Held:
    """codes uint8, table (entries, stride) float16, float32 or int8, book (streams, lines) int32: entries to skip,
    gain and offset (lines, 1 or d) and row_scale (out,) float32."""

    layout: Layout
    codes: Tensor
    table: Tensor
    book: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    row_scale: Tensor | None


def hold(weight: CodebookWeight, padded: bool, table: Table) -> Held:
    """padded: entries of d numbers take a power of two of them, so that each is read in whole loads.

    Books are held in float16 where that is exact, else in float32; "int8" rounds them to one step for all, whose factor
    goes into gains or row scales. A table that had to be copied is held once by all layers of the same
    (`share`). Raises ValueError for a weight that does not fit together.
    """
    check(weight)
    stride = 1 << (weight.d - 1).bit_length() if padded else weight.d
    parts: list[Part] = []
    starts: dict[int, int] = {}  # where a tensor of codes begins: streams may share one
    pieces: list[Tensor] = []
    byte = entry = 0
    for stream in weight.streams:
        if id(stream.codes) not in starts:
            starts[id(stream.codes)] = byte
            size = stream.codes.numel()
            room = -(-size // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
            pieces += [stream.codes, stream.codes.new_zeros(room - size)]
            byte += room
        parts.append(
            Part(
                stream.bits, stream.stride, stream.offset, stream.window or 0,
                starts[id(stream.codes)], stream.codes.numel(), entry, stream.books.shape[0],
            )
        )  # fmt: skip
        entry += stream.books.shape[0] * stream.books.shape[1]
    if entry * stride >= 1 << 31:
        raise ValueError(f"tables of {entry:,} entries of {stride} numbers are too large for 32-bit positions")
    books, step = _table(weight.streams, stride, table)
    gain, offset, row_scale = _factors(weight, step)
    device = weight.streams[0].codes.device
    book = None
    if any(stream.book is not None for stream in weight.streams):
        plain = torch.zeros(weight.lines, dtype=torch.int32, device=device)
        book = torch.stack(
            [plain if s.book is None else s.book.to(torch.int32) * s.books.shape[1] for s in weight.streams]
        )
    layout = Layout(tuple(parts), weight.out_features, weight.in_features, weight.d, stride, weight.axis)
    return Held(layout, torch.cat(pieces), books, book, gain, offset, row_scale)


def weight_of(held: Held) -> CodebookWeight:
    """The weight again, as views of the buffers where entries are not padded; int8 books as they are."""
    layout = held.layout
    streams = []
    for i, part in enumerate(layout.parts):
        rows = held.table[part.entry : part.entry + part.books * part.entries]
        books = rows.view(part.books, part.entries, layout.stride)[..., : layout.d]
        book = None if held.book is None or part.books == 1 else held.book[i] // part.entries
        codes = held.codes[part.byte : part.byte + part.bytes]
        streams.append(Stream(codes, books, part.bits, part.stride, part.offset, book, part.window or None))
    return CodebookWeight(
        tuple(streams), layout.out_features, layout.in_features, layout.d, layout.axis,
        held.gain, held.offset, held.row_scale,
    )  # fmt: skip


def check(weight: CodebookWeight) -> None:
    """Raises ValueError, saying which stream does not fit."""
    if not weight.streams or not 1 <= weight.d <= MAX_D:
        raise ValueError(f"a codebook weight has streams of 1 to {MAX_D} numbers a codeword, not {weight.d}")
    count = weight.lines * weight.chunks
    if not count:
        raise ValueError(f"a codebook weight has inputs and outputs, not {weight.out_features} x {weight.in_features}")
    device = weight.streams[0].codes.device
    for i, stream in enumerate(weight.streams):
        if not 1 <= stream.bits <= MAX_WIDTH or not 1 <= (stream.window or stream.bits) <= MAX_WIDTH:
            raise ValueError(
                f"stream {i}: codes and windows have 1 to {MAX_WIDTH} bits, not {stream.bits} and {stream.window}"
            )
        shape = 1 << (stream.window or stream.bits), weight.d
        if stream.books.ndim != 3 or stream.books.shape[1:] != shape:
            raise ValueError(f"stream {i}: books are (B, {shape[0]}, {shape[1]}), not {tuple(stream.books.shape)}")
        if stream.books.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"stream {i}: books are float16, bfloat16 or float32, not {stream.books.dtype}")
        needed = packed_bytes(stream.offset + (count - 1) * stream.stride + 1, stream.bits)
        if stream.codes.dtype != torch.uint8 or stream.codes.ndim != 1 or stream.codes.numel() < needed:
            raise ValueError(f"stream {i}: {count} codes need {needed} bytes, there are {stream.codes.numel()}")
        lines = None if stream.book is None else stream.book
        if lines is None and stream.books.shape[0] != 1:
            raise ValueError(f"stream {i}: {stream.books.shape[0]} books, and nothing says which line reads which")
        if lines is not None:
            low, high = (int(bound) for bound in torch.aminmax(lines)) if lines.numel() else (0, 0)
            if lines.shape != (weight.lines,) or low < 0 or high >= stream.books.shape[0]:
                raise ValueError(
                    f"stream {i}: `book` names one of {stream.books.shape[0]} books for each of {weight.lines} lines"
                )
    for name, part in (("gain", weight.gain), ("offset", weight.offset)):
        if part is not None and tuple(part.shape) not in ((weight.lines, 1), (weight.lines, weight.d)):
            raise ValueError(f"{name} is ({weight.lines}, 1 or {weight.d}), not {tuple(part.shape)}")
    if weight.row_scale is not None and weight.row_scale.shape != (weight.out_features,):
        raise ValueError(f"row_scale is ({weight.out_features},), not {tuple(weight.row_scale.shape)}")
    parts = [part for stream in weight.streams for part in (stream.codes, stream.books, stream.book)]
    for part in (*parts, weight.gain, weight.offset, weight.row_scale):
        if part is not None and part.device != device:
            raise ValueError(f"a codebook weight lies on one device, not on {device} and {part.device}")


def share(tensor: Tensor) -> Tensor:
    """The tensor of the same content that was given before and is still held, else this one.

    For copies that nobody writes to: so that all layers of one codebook keep one copy of it.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(flat) % 8 == 0 and flat.storage_offset() % 8 == 0
    words = flat.view(torch.int64) if whole else flat.to(torch.int64)
    content = int((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
    key = tensor.device, tensor.dtype, tuple(tensor.shape), content
    found = _SHARED.get(key)
    if found is None or not torch.equal(found, tensor):
        _SHARED[key] = found = tensor
    return found


def _table(streams: Sequence[Stream], stride: int, table: Table) -> tuple[Tensor, float | None]:
    books = _joined([stream.books.reshape(-1, stream.books.shape[2]) for stream in streams])
    if stride != books.shape[1]:
        books = torch.nn.functional.pad(books, (0, stride - books.shape[1]))
    if table == "int8":
        wide = books.float()
        step = float(wide.abs().max()) / 127 or 1.0
        return share((wide / step).round().to(torch.int8)), step
    if books.dtype != torch.float16:
        half = books.half()
        books = half if torch.equal(half.float(), books.float()) else books.float()
    given = {stream.books.untyped_storage().data_ptr() for stream in streams}
    return (books if books.untyped_storage().data_ptr() in given else share(books)), None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(n, d) one after the other; not copied where they already lie so, since layers may share them."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel() * part.element_size()
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():  # neighbours by chance
        return torch.cat(list(parts))
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _factors(weight: CodebookWeight, step: float | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gain, offset and row scale, with the step of an int8 table; one gain a row is no more than a row scale."""
    gain, offset, row_scale = (
        None if part is None else part.float().contiguous() for part in (weight.gain, weight.offset, weight.row_scale)
    )
    device = weight.streams[0].codes.device
    if step is not None:
        if gain is None and offset is None:
            row_scale = torch.ones(weight.out_features, device=device) if row_scale is None else row_scale
            row_scale = row_scale * step
        else:
            gain = (torch.ones(weight.lines, 1, device=device) if gain is None else gain) * step
    if weight.axis == "in" and gain is not None and offset is None and gain.shape[1] == 1:
        row_scale = gain[:, 0] if row_scale is None else row_scale * gain[:, 0]
        gain = None
    return gain, offset, row_scale
