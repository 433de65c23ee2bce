"""What the numba kernels share: codes out of a bit stream, products of a decoded tile, and threads.

Loops are plain, over whole arrays, without signed offsets, since only then does LLVM make vectors of them; where it
does not, the vector is written out as an intrinsic. Sums may be taken in any order ("reassoc"), which is what turns a
dot product into vectors; the order depends on shapes and processor alone, never on threads.

Whoever changes this file while cpu_integer and cpu_codebook stay: numba keeps compiled kernels by the date of the file
they stand in, and does not see what they call. Touch those two, or delete __pycache__.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int32]
Whole = int | np.integer[Any]  # a number, as numba's arithmetic leaves it
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return cast(F, numba.njit(function, cache=True, **options))
    except RuntimeError:  # neither beside this file nor in the home can anything be written: compiled in every process
        return cast(F, numba.njit(function, **options))


def pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any) -> Any:
    """Address of array[at], as that of an `element`."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at], inbounds=True), element.as_pointer())


def _emit_word(context: Any, array: Any, at: Any) -> Any:
    """Eight bytes from byte `at` on, lowest first, wherever they begin."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        array, at = arguments
        loaded = builder.load(pointer(context, builder, signature.args[0], array, at, word))
        loaded.align = 1
        return loaded

    return types.uint64(array, types.intp), emit


word_at: Any = cast(Any, intrinsic(_emit_word))


def _emit_eight(context: Any, word: Any, bits: Any, scale: Any, shift: Any, out: Any, at: Any) -> Any:
    """out[at + i] = code i of the word * scale - shift, for its first eight codes of up to 8 bits, as one vector."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, bits, scale, shift, out, at = arguments
        wide, lanes, single = (ir.VectorType(kind, 8) for kind in (ir.IntType(64), ir.IntType(32), ir.FloatType()))

        places = builder.mul(splat(builder, bits, wide), ir.Constant(wide, list(range(8))))
        one = ir.IntType(64)(1)
        mask = builder.sub(builder.shl(one, bits), one)
        codes = builder.and_(builder.lshr(splat(builder, word, wide), places), splat(builder, mask, wide))
        values = builder.sitofp(builder.trunc(codes, lanes), single)
        values = builder.fmul(values, splat(builder, scale, single), flags=("contract",))
        values = builder.fsub(values, splat(builder, shift, single), flags=("contract",))
        stored = builder.store(values, pointer(context, builder, signature.args[4], out, at, single))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, types.float32, types.float32, out, types.intp), emit


store_eight: Any = cast(Any, intrinsic(_emit_eight))


def emit_entries(
    context: Any, builder: Any, kind: Any, table: Any, word: Any, step: Any, mask: Any, base: Any, lanes: int,
    count: int,
) -> Any:  # fmt: skip
    """A vector of table[base + place i * lanes + j], i < count, j < lanes; place i is i * step bits up in the word.

    Single loads, joined: a vector gather of single numbers is slower, and in a loop LLVM moves one number at a time,
    since for all that it knows the arrays may overlap.
    """
    number, entry = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
    parts = []
    for i in range(count):
        place = builder.and_(builder.lshr(word, builder.mul(step, number(i))), mask)
        first = builder.add(base, builder.mul(place, number(lanes)))
        part = builder.load(pointer(context, builder, kind, table, first, entry))
        part.align = 4
        parts.append(part)
    while len(parts) > 1:  # neighbours joined, until all are one
        width = 2 * lanes * count // len(parts)
        joined = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(width)))
        parts = [builder.shuffle_vector(a, b, joined) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def emit_scaled_entries(lanes: int, count: int) -> Any:
    """For `intrinsic`: out[at + i * lanes + j] = scale * table[place i * lanes + j], as one vector."""

    def emit_scaled(context: Any, word: Any, step: Any, mask: Any, table: Any, scale: Any, out: Any, at: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word, step, mask, table, scale, out, at = arguments
            none = ir.IntType(64)(0)
            value = emit_entries(context, builder, signature.args[3], table, word, step, mask, none, lanes, count)
            value = builder.fmul(value, splat(builder, scale, value.type))
            builder.store(value, pointer(context, builder, signature.args[5], out, at, value.type)).align = 4
            return context.get_dummy_value()

        signature = types.void(types.uint64, types.uint64, types.uint64, table, types.float32, out, types.intp)
        return signature, emit

    return emit_scaled


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of this type, the value in every lane."""
    lanes = ir.IntType(32)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, lanes(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(lanes, kind.count), [0] * kind.count))


def _emit_half(context: Any, array: Any, at: Any) -> Any:
    """array[at], int16 as float16 is stored, in float32.

    By integers: LLVM's own conversion calls a function that numba does not have where the processor has none (or
    NUMBA_CPU_NAME is generic), and the process dies.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at = arguments
        whole, single = ir.IntType(32), ir.FloatType()
        stored = builder.load(pointer(context, builder, signature.args[0], array, at, ir.IntType(16)))
        bits = builder.zext(stored, whole)
        size = builder.shl(builder.and_(bits, whole(0x7FFF)), whole(13))
        small = builder.icmp_unsigned("<", size, whole(1 << 23))  # below 2^-14 the number is its digits, in 2^-24
        digits = builder.fmul(builder.uitofp(builder.lshr(size, whole(13)), single), ir.Constant(single, 2.0**-24))
        endless = builder.icmp_unsigned(">=", size, whole(31 << 23))
        normal = builder.add(size, builder.select(endless, whole(224 << 23), whole(112 << 23)))
        sign = builder.shl(builder.and_(bits, whole(0x8000)), whole(16))
        found = builder.select(small, builder.bitcast(digits, whole), normal)
        return builder.bitcast(builder.or_(found, sign), single)

    return types.float32(array, types.intp), emit


half_at: Any = cast(Any, intrinsic(_emit_half))


@compiled
def bits_at(codes: Bytes, bit: int, bits: int) -> int:
    """The number in `bits` (up to 16) bits of a stream from `bit` on, reading no byte beyond it."""
    byte = bit >> 3
    last = (bit + bits - 1) >> 3
    found = np.int64(codes[byte])
    if last > byte:
        found |= np.int64(codes[byte + 1]) << 8
    if last > byte + 1:
        found |= np.int64(codes[byte + 2]) << 16
    return int((found >> (bit & 7)) & ((1 << bits) - 1))


@compiled
def code_at(codes: Bytes, number: int, bits: int) -> int:
    return bits_at(codes, number * bits, bits)


@compiled
def _four_by_four(
    a: Floats, b: Floats, c: Floats, d: Floats, e: Floats, f: Floats, g: Floats, h: Floats, out: Floats
) -> None:
    """out[4 * i + j] = product of output i of a, b, c, d and input j of e, f, g, h."""
    ae = af = ag = ah = be = bf = bg = bh = ce = cf = cg = ch = de = df = dg = dh = np.float32(0)
    for k in range(a.shape[0]):
        ak, bk, ck, dk, ek, fk, gk, hk = a[k], b[k], c[k], d[k], e[k], f[k], g[k], h[k]
        ae += ak * ek
        af += ak * fk
        ag += ak * gk
        ah += ak * hk
        be += bk * ek
        bf += bk * fk
        bg += bk * gk
        bh += bk * hk
        ce += ck * ek
        cf += ck * fk
        cg += ck * gk
        ch += ck * hk
        de += dk * ek
        df += dk * fk
        dg += dk * gk
        dh += dk * hk
    out[0], out[1], out[2], out[3] = ae, af, ag, ah
    out[4], out[5], out[6], out[7] = be, bf, bg, bh
    out[8], out[9], out[10], out[11] = ce, cf, cg, ch
    out[12], out[13], out[14], out[15] = de, df, dg, dh


@compiled
def _four_by_two(a: Floats, b: Floats, c: Floats, d: Floats, e: Floats, f: Floats, out: Floats) -> None:
    ae = af = be = bf = ce = cf = de = df = np.float32(0)
    for k in range(a.shape[0]):
        ak, bk, ck, dk, ek, fk = a[k], b[k], c[k], d[k], e[k], f[k]
        ae += ak * ek
        af += ak * fk
        be += bk * ek
        bf += bk * fk
        ce += ck * ek
        cf += ck * fk
        de += dk * ek
        df += dk * fk
    out[0], out[1], out[4], out[5] = ae, af, be, bf
    out[8], out[9], out[12], out[13] = ce, cf, de, df


@compiled
def _four_by_one(a: Floats, b: Floats, c: Floats, d: Floats, e: Floats, out: Floats) -> None:
    ae = be = ce = de = np.float32(0)
    for k in range(a.shape[0]):
        ek = e[k]
        ae += a[k] * ek
        be += b[k] * ek
        ce += c[k] * ek
        de += d[k] * ek
    out[0], out[4], out[8], out[12] = ae, be, ce, de


@compiled
def add_products(
    tile: Floats, rows: Floats, first: int, last: int, out: Floats, at: int, count: int, sums: Floats
) -> None:
    """out[q, at + i] += rows[q, first:last] . tile[i, :last - first], for i < count.

    tile: a multiple of 4 rows, those beyond count are read and dropped. sums: (16,), scratch.
    """
    length = last - first
    q = 0
    while q < rows.shape[0]:
        left = rows.shape[0] - q
        step = 4 if left >= 4 else 2 if left >= 2 else 1
        e = rows[q, first:last]
        f = rows[q + step // 2, first:last]
        for i in range(0, count, 4):
            a, b, c, d = tile[i, :length], tile[i + 1, :length], tile[i + 2, :length], tile[i + 3, :length]
            if step == 4:
                g, h = rows[q + 2, first:last], rows[q + 3, first:last]
                _four_by_four(a, b, c, d, e, rows[q + 1, first:last], g, h, sums)
            elif step == 2:
                _four_by_two(a, b, c, d, e, f, sums)
            else:
                _four_by_one(a, b, c, d, e, sums)
            for p in range(min(4, count - i)):
                for j in range(step):
                    out[q + j, at + i + p] += sums[4 * p + j]
        q += step


@compiled
def _four_lines_to_four(
    a: Floats, b: Floats, c: Floats, d: Floats, by: Floats, e: Floats, f: Floats, g: Floats, h: Floats
) -> None:
    """To e, f, g, h: a, b, c, d times the four numbers of each in `by` (16,)."""
    ae, be, ce, de, af, bf, cf, df = by[0], by[1], by[2], by[3], by[4], by[5], by[6], by[7]
    ag, bg, cg, dg, ah, bh, ch, dh = by[8], by[9], by[10], by[11], by[12], by[13], by[14], by[15]
    for n in range(a.shape[0]):
        an, bn, cn, dn = a[n], b[n], c[n], d[n]
        en = e[n] + (an * ae + bn * be + cn * ce + dn * de)
        fn = f[n] + (an * af + bn * bf + cn * cf + dn * df)
        gn = g[n] + (an * ag + bn * bg + cn * cg + dn * dg)
        hn = h[n] + (an * ah + bn * bh + cn * ch + dn * dh)
        e[n], f[n], g[n], h[n] = en, fn, gn, hn


@compiled
def _four_lines_to_one(a: Floats, b: Floats, c: Floats, d: Floats, by: Floats, e: Floats) -> None:
    ae, be, ce, de = by[0], by[1], by[2], by[3]
    for n in range(a.shape[0]):
        e[n] = e[n] + (a[n] * ae + b[n] * be + c[n] * ce + d[n] * de)


@compiled
def add_lines(tile: Floats, count: int, rows: Floats, first: int, out: Floats, start: int, stop: int) -> None:
    """out[q, start:stop] += sum over l < count of rows[q, first + l] * tile[l, :stop - start].

    tile: a multiple of 4 lines; those beyond count are finite.
    """
    width = stop - start
    by = np.empty(16, np.float32)
    q = 0
    while q < rows.shape[0]:
        step = 4 if rows.shape[0] - q >= 4 else 1
        for at in range(0, count, 4):
            a, b, c, d = tile[at, :width], tile[at + 1, :width], tile[at + 2, :width], tile[at + 3, :width]
            for j in range(step):
                for p in range(4):
                    by[4 * j + p] = rows[q + j, first + at + p] if at + p < count else np.float32(0)
            e = out[q, start:stop]
            if step == 4:
                f, g, h = out[q + 1, start:stop], out[q + 2, start:stop], out[q + 3, start:stop]
                _four_lines_to_four(a, b, c, d, by, e, f, g, h)
            else:
                _four_lines_to_one(a, b, c, d, by, e)
        q += step


def even_stretch(length: int, most: int, multiple: int) -> int:
    """The length of a row's stretches: equal ones but the last, at most `most` each (or one `multiple`)."""
    stretches = -(-length // max(most // multiple * multiple, multiple))
    each = -(-length // stretches)
    return -(-each // multiple) * multiple


@cache
def _pool() -> ThreadPoolExecutor:
    """One for any number of threads, which begin as they are needed."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="evenbits-cpu")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def share(function: Callable[..., None], count: int, piece: int, *arguments: Any) -> None:
    """function(first, last, *arguments) over 0..count, in as many threads as torch has, cut at multiples of `piece`.

    The function must let go of the GIL, and each number of 0..count be computed alike wherever the cuts are.
    """
    pieces = -(-count // piece)
    threads = max(1, min(torch.get_num_threads(), pieces))
    cuts = [min(count, pieces * share // threads * piece) for share in range(threads + 1)]
    others = [_pool().submit(function, cuts[i], cuts[i + 1], *arguments) for i in range(1, threads)]
    try:
        function(cuts[0], cuts[1], *arguments)
    finally:
        wait(others)  # nobody writes into what is handed back
    for other in others:
        other.result()


def array_of(tensor: Tensor | None, dtype: torch.dtype) -> npt.NDArray[Any]:
    """As numba takes it: flat, of this dtype; one zero for None. Shares memory where nothing has to change."""
    if tensor is None:
        return np.zeros(1, np.dtype(str(dtype).removeprefix("torch.")))
    return tensor.detach().to(dtype).contiguous().view(-1).numpy()


def copied_bytes(array: npt.NDArray[Any], tensor: Tensor | None) -> int:
    """What `array` takes beside the tensor that it was made of."""
    return 0 if tensor is None or array.ctypes.data == tensor.data_ptr() else array.nbytes


def require_rows(rows: Tensor, in_features: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != in_features or rows.dtype != torch.float32 or rows.device.type != "cpu":
        raise ValueError(
            f"a CPU kernel takes float32 rows (m, {in_features}) on the CPU, not {rows.dtype} of shape "
            f"{tuple(rows.shape)} on {rows.device}"
        )


def require_sizes(out_features: int, in_features: int, parts: Iterable[tuple[str, Tensor | None]]) -> None:
    if out_features < 1 or in_features < 1:
        raise ValueError(f"a weight has at least one row and one column, not {out_features} x {in_features}")
    for name, part in parts:
        if part is not None and part.device.type != "cpu":
            raise ValueError(f"a CPU kernel takes tensors on the CPU, not {name} on {part.device}")


def require_codes(codes: Tensor, count: int, bits: int) -> None:
    if codes.dtype != torch.uint8 or codes.numel() * 8 < count * bits:
        raise ValueError(
            f"{count} codes of {bits} bits are {(count * bits + 7) // 8} uint8, not {codes.numel()} {codes.dtype}"
        )
