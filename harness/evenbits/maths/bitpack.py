"""Integer codes packed to their exact width: n codes of w bits take ceil(n * w / 8) bytes.

Layout: one bit stream, least significant bit first; bit k of code i is bit i * w + k of the stream, and bit j of the
stream is bit j % 8 of byte j // 8. The unused high bits of the last byte are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_WIDTH = 16
_CHUNK = 1 << 20  # codes at a time; a multiple of 8, so that every chunk but the last ends on a byte border


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `pack` needs for `count` codes of `width` bits."""
    return (count * width + 7) // 8


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack integer codes of any shape, in row-major order.

    Returns uint8 (ceil(n * width / 8),) on the device of `codes`.
    Raises ValueError for a width outside 1..16, a dtype that is not an integer, or a code outside [0, 2**width).
    """
    _check_width(width)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes are integers, not {codes.dtype}")
    flat = codes.reshape(-1)
    packed = torch.empty(packed_bytes(flat.numel(), width), dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        low, high = (int(bound) for bound in torch.aminmax(chunk))
        if low < 0 or high >= 1 << width:
            raise ValueError(f"codes of {width} bits lie in [0, {1 << width}), not in [{low}, {high}]")
        first = packed_bytes(start, width)
        stored = packed_bytes(chunk.numel(), width)
        packed[first : first + stored] = _pack_chunk(chunk, width)[:stored]
    return packed


def unpack(packed: Tensor, width: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Undo `pack`: (count,) of `dtype`, an integer one, on the device of `packed`.

    Raises ValueError for a width outside 1..16, a dtype other than uint8, a length that is not
    ceil(count * width / 8), or a `dtype` that does not hold every code.
    """
    _check_packed(packed, width)
    if (1 << width) - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"codes of {width} bits do not fit {dtype}")
    if count < 0 or packed.numel() != packed_bytes(count, width):
        raise ValueError(
            f"{count} codes of {width} bits are {packed_bytes(max(count, 0), width)} bytes, not {packed.numel()}"
        )
    codes = torch.empty(count, dtype=dtype, device=packed.device)
    for start in range(0, count, _CHUNK):
        length = min(_CHUNK, count - start)
        first = packed_bytes(start, width)
        chunk = packed[first : first + packed_bytes(length, width)]
        codes[start : start + length] = _unpack_chunk(chunk, width)[:length]
    return codes


def unpack_range(packed: Tensor, width: int, start: int, count: int) -> Tensor:
    """Codes start to start + count - 1 of what `pack` made: int64 (count,), without unpacking the others.

    Raises ValueError for a width outside 1..16, a dtype other than uint8, or a range that `packed` does not hold.
    """
    _check_packed(packed, width)
    if start < 0 or count < 0 or packed_bytes(start + count, width) > packed.numel():
        raise ValueError(f"{packed.numel()} bytes do not hold {count} codes of {width} bits from code {start} on")
    if not count:
        return torch.empty(0, dtype=torch.int64, device=packed.device)
    ahead = start % 8  # eight codes end on a byte border
    found = packed[packed_bytes(start - ahead, width) : packed_bytes(start + count, width)]
    return unpack(found, width, ahead + count)[ahead:]


def unpack_at(packed: Tensor, width: int, places: Tensor) -> Tensor:
    """The codes at these places of what `pack` made: int64 of the shape of `places`, which are int64, in any order.

    Raises ValueError for a width outside 1..16, a dtype other than uint8, or a place that `packed` does not hold.
    """
    _check_packed(packed, width)
    if places.is_floating_point() or places.is_complex():
        raise ValueError(f"places are integers, not {places.dtype}")
    if not places.numel():
        return torch.empty(places.shape, dtype=torch.int64, device=packed.device)
    low, high = (int(bound) for bound in torch.aminmax(places))
    if low < 0 or packed_bytes(high + 1, width) > packed.numel():
        raise ValueError(f"{packed.numel()} bytes do not hold codes of {width} bits at places {low} to {high}")
    bit = places.long() * width
    byte, shift = bit >> 3, bit & 7
    found = packed[byte].long()
    for more in range(1, (width + 14) // 8):  # a code and the bits before it, at most 23, lie in so many bytes
        # beyond the last byte there is nothing of the code
        found |= packed[(byte + more).clamp_max_(packed.numel() - 1)].long() << 8 * more
    return (found >> shift) & ((1 << width) - 1)


def _check_packed(packed: Tensor, width: int) -> None:
    _check_width(width)
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"packed codes are one row of uint8, not {packed.dtype} of shape {tuple(packed.shape)}")


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"a code's width is 1 to {MAX_WIDTH} bits, not {width}")


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Eight codes fill `width` bytes: which code meets which byte, and by how much it is shifted left there."""
    pairs = ((code, byte) for code in range(8) for byte in range(width))
    return [
        (code, byte, code * width - byte * 8)
        for code, byte in pairs
        if code * width < (byte + 1) * 8 and byte * 8 < (code + 1) * width
    ]


def _pack_chunk(codes: Tensor, width: int) -> Tensor:
    """int64 (n,) -> uint8 (ceil(n / 8) * width,); the tail is padded with zero codes."""
    rows = (codes.numel() + 7) // 8
    eights = torch.zeros(rows * 8, dtype=torch.int32, device=codes.device)
    eights[: codes.numel()] = codes
    by_place = eights.view(rows, 8).t().contiguous()  # (8, rows): each step below reads and writes whole rows
    out = torch.zeros((width, rows), dtype=torch.int32, device=codes.device)
    for code, byte, shift in _overlaps(width):
        out[byte] |= by_place[code] << shift if shift >= 0 else by_place[code] >> -shift
    return (out & 0xFF).to(torch.uint8).t().reshape(-1)


def _unpack_chunk(packed: Tensor, width: int) -> Tensor:
    """uint8 (m,) -> int32 (ceil(m / width) * 8,)."""
    rows = -(-packed.numel() // width)
    whole = torch.zeros(rows * width, dtype=torch.int32, device=packed.device)
    whole[: packed.numel()] = packed
    by_byte = whole.view(rows, width).t().contiguous()  # (width, rows)
    out = torch.zeros((8, rows), dtype=torch.int32, device=packed.device)
    for code, byte, shift in _overlaps(width):
        out[code] |= by_byte[byte] >> shift if shift >= 0 else by_byte[byte] << -shift
    return (out & ((1 << width) - 1)).t().reshape(-1)
