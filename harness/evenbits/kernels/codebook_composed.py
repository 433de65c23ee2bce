"""Tables for the GPU that decode several codes by one gather, and windows by the bits as they lie in the stream."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from evenbits.kernels.codebook_held import Held, Part, share
from evenbits.maths.bitpack import MAX_WIDTH

COMPOSED_BYTES = 64 << 10  # of all composed tables: they must stay in an L1 of 192 (A100) or 256 KiB (H100)
WIDEST = 8  # numbers an entry: one load of 16 bytes in float16


def compose(held: Held) -> Held | None:
    """The same weight with r neighbouring codes as one, r a power of two, and windows in the order of the stream.

    Entry p of a composed table decodes code j of the r by bits j * bits and up of p, as many as a window has. A window
    whose oldest code counts in part takes all of it, and entries repeat. None where nothing can be gained: one code an
    entry and no windows, codes that are interleaved, windows beyond 16 bits, tables that would outgrow the given one
    and COMPOSED_BYTES.
    """
    layout = held.layout
    if any(part.stride != 1 for part in layout.parts):
        return None
    r = 1
    while _fits(held, 2 * r):
        r *= 2
    if r == 1 and (not any(part.window for part in layout.parts) or not _fits(held, 1)):
        return None
    wide = 1 << (r * layout.d - 1).bit_length()
    tables, parts, books = [], [], []
    entry = 0
    for i, part in enumerate(layout.parts):
        old = held.table[part.entry : part.entry + part.books * part.entries]
        tables.append(_composed(old.view(part.books, part.entries, -1)[..., : layout.d], part, r, wide))
        run = _run(part) + (r - 1) * part.bits
        window = 0 if run == r * part.bits else run
        parts.append(
            replace(part, bits=r * part.bits, window=window, offset=part.offset // r, entry=entry, read=window > 0)
        )
        if held.book is not None:
            books.append(held.book[i] // part.entries << run)
        entry += part.books << run
    shape = replace(layout, parts=tuple(parts), d=r * layout.d, stride=wide)
    gain, offset = (None if f is None else f if f.shape[1] == 1 else f.repeat(1, r) for f in (held.gain, held.offset))
    book = torch.stack(books) if books else None
    return replace(held, layout=shape, table=share(torch.cat(tables)), book=book, gain=gain, offset=offset)


def _run(part: Part) -> int:
    """Bits of the codes that one of them is decoded by."""
    return -(-(part.window or part.bits) // part.bits) * part.bits


def _fits(held: Held, r: int) -> bool:
    layout = held.layout
    length = layout.in_features if layout.axis == "in" else layout.out_features
    runs = [_run(part) + (r - 1) * part.bits for part in layout.parts]
    if max(*runs, *(r * part.bits for part in layout.parts)) > MAX_WIDTH:
        return False
    entries = sum(part.books << run for part, run in zip(layout.parts, runs, strict=True))
    wide = 1 << (r * layout.d - 1).bit_length()
    small = entries * wide * held.table.element_size() <= COMPOSED_BYTES
    if r == 1:  # no more than another order, where no entry repeats
        return small or entries == sum(part.books * part.entries for part in layout.parts)
    return (
        wide <= WIDEST
        and small
        and -(-length // layout.d) % r == 0
        and all(part.offset % r == 0 for part in layout.parts)
    )


def _composed(books: Tensor, part: Part, r: int, wide: int) -> Tensor:
    """(B, entries, d) -> (B * 2^run, wide)."""
    own, mask = _run(part), (1 << part.bits) - 1
    field = torch.arange(1 << own + (r - 1) * part.bits, device=books.device)
    found = books.new_zeros(books.shape[0], len(field), wide)
    d, codes = books.shape[2], own // part.bits
    for j in range(r):
        place = torch.zeros_like(field)
        for older in range(codes):  # the oldest code lies lowest in the stream, and highest in a place
            place |= ((field >> (j + older) * part.bits) & mask) << (codes - 1 - older) * part.bits
        place &= part.entries - 1
        found[..., j * d : (j + 1) * d] = books[:, place]
    return found.flatten(0, 1)
