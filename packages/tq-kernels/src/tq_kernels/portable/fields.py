# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Codes of a tile to bytes and back, in plain Triton (``docs/format.md``, 4 and 5).

A tile holds the codes of one token a row, ordered *by field*: with ``F`` codes a byte and ``n``
bytes, column ``f n + i`` holds field ``f`` of byte ``i``. Bytes then form by combining the two
halves of the columns, one bit of ``f`` at a time, which on tensor-core layouts stays inside a lane.
The rotation matrix has its coordinates in this order (:func:`column_order`), so nothing is ever
permuted. Columns come in chunks; each chunk is ordered by itself.

3 bits have a byte of the second plane for two of the first. Its fields decide the order: bit 2 of
``f`` is bit ``j mod 2`` of the nibble, and the others are ``n mod 4``; in the last 16 dimensions of
keys with ``head_dim mod 32 = 16`` they are ``n mod 2`` and ``j div 4`` instead.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from tq_kernels.codec import PLANE_WIDTHS, Kind, field_dims

__all__ = [
    "chunk_width",
    "column_order",
    "load_codes",
    "store_codes",
]


def chunk_width(dim: int, most: int) -> int:
    """Columns a chunk: the largest power of two up to ``most`` that divides ``dim``."""
    return min(dim & -dim, most)


@lru_cache(maxsize=256)
def column_order(kind: Kind, bits: int, dim: int, chunk: int) -> tuple[int, ...]:
    """Dimension of each column of the tiles of one token, chunk by chunk."""
    # the last plane has the most codes a byte, and so decides
    table = field_dims(kind, PLANE_WIDTHS[bits][-1], dim)
    fields = table.shape[1]
    parts = table.reshape(dim // chunk, chunk // fields, fields).transpose(1, 2)
    return tuple(parts.flatten().tolist())


@triton.jit
def _halves(x):
    """First and second half of the columns."""
    pairs = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def _join_halves(first, second):
    """Invert :func:`_halves`."""
    pairs = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(pairs, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _combine(x, SHIFT: tl.constexpr):
    first, second = _halves(x)
    return first | (second << SHIFT)


@triton.jit
def _two_bytes(i, half, KEYS: tl.constexpr):
    """Either byte of the plane of 2 bits that belongs to byte ``i`` of the plane of 1 bit."""
    if KEYS:
        return i // 4 * 8 + 4 * half + i % 4
    else:
        return 2 * i + half


@triton.jit
def store_codes(
    codes, low, high, byte_stride, mask, start,
    D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Pack a chunk of codes int32 [block, columns] and store the bytes.

    ``low`` and ``high`` [block] point to the first byte of the token in either plane, ``start`` is
    the first column of the chunk.
    """
    N: tl.constexpr = codes.shape[1]
    if BITS == 8:
        at = start + tl.arange(0, N)
        tl.store(low[:, None] + at[None, :] * byte_stride, codes.to(tl.uint8), mask=mask[:, None])
    elif BITS == 4:
        at = start // 2 + tl.arange(0, N // 2)
        data = _combine(codes, 4).to(tl.uint8)
        tl.store(low[:, None] + at[None, :] * byte_stride, data, mask=mask[:, None])
    elif BITS == 2:
        at = start // 4 + tl.arange(0, N // 4)
        data = _combine(_combine(codes, 4), 2).to(tl.uint8)
        tl.store(low[:, None] + at[None, :] * byte_stride, data, mask=mask[:, None])
    else:
        e = tl.arange(0, N // 8)
        both = _combine((codes & 3) | ((codes & 4) << 14), 4)
        first, second = _halves(both)
        third = _combine((first >> 16) | ((second >> 16) << 2), 1).to(tl.uint8)
        place = high[:, None] + (start // 8 + e)[None, :] * byte_stride
        tl.store(place, third, mask=mask[:, None])
        zero = _combine(first & 0xFFFF, 2)
        one = _combine(second & 0xFFFF, 2)
        at_zero = _two_bytes(start // 8 + e, 0, KEYS)
        at_one = _two_bytes(start // 8 + e, 1, KEYS)
        if KEYS and D % 32 == 16:
            tail = start == D - 16
            tail_zero, tail_one = _halves((first & 0xFFFF) | ((second & 0xFFFF) << 2))
            zero = tl.where(tail, tail_zero, zero)
            one = tl.where(tail, tail_one, one)
            at_zero = tl.where(tail, start // 4 + e, at_zero)
            at_one = tl.where(tail, start // 4 + 2 + e, at_one)
        place = low[:, None] + at_zero[None, :] * byte_stride
        tl.store(place, zero.to(tl.uint8), mask=mask[:, None])
        place = low[:, None] + at_one[None, :] * byte_stride
        tl.store(place, one.to(tl.uint8), mask=mask[:, None])


@triton.jit
def load_codes(
    low, high, byte_stride, mask, start,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Invert :func:`store_codes`: codes int32 [block, N]."""
    if BITS == 8:
        at = start + tl.arange(0, N)
        data = tl.load(low[:, None] + at[None, :] * byte_stride, mask=mask[:, None], other=0)
        return data.to(tl.int32)
    elif BITS == 4:
        at = start // 2 + tl.arange(0, N // 2)
        data = tl.load(low[:, None] + at[None, :] * byte_stride, mask=mask[:, None], other=0)
        data = data.to(tl.int32)
        return _join_halves(data & 15, data >> 4)
    elif BITS == 2:
        at = start // 4 + tl.arange(0, N // 4)
        data = tl.load(low[:, None] + at[None, :] * byte_stride, mask=mask[:, None], other=0)
        data = data.to(tl.int32)
        data = _join_halves(data & 0x33, (data >> 2) & 0x33)
        return _join_halves(data & 15, data >> 4)
    else:
        e = tl.arange(0, N // 8)
        place = high[:, None] + (start // 8 + e)[None, :] * byte_stride
        third = tl.load(place, mask=mask[:, None], other=0).to(tl.int32)
        third = _join_halves(third & 0x55, (third >> 1) & 0x55)
        at_zero = _two_bytes(start // 8 + e, 0, KEYS)
        at_one = _two_bytes(start // 8 + e, 1, KEYS)
        if KEYS and D % 32 == 16:
            tail = start == D - 16
            at_zero = tl.where(tail, start // 4 + e, at_zero)
            at_one = tl.where(tail, start // 4 + 2 + e, at_one)
        place = low[:, None] + at_zero[None, :] * byte_stride
        zero = tl.load(place, mask=mask[:, None], other=0).to(tl.int32)
        place = low[:, None] + at_one[None, :] * byte_stride
        one = tl.load(place, mask=mask[:, None], other=0).to(tl.int32)
        first = _join_halves(zero & 0x33, (zero >> 2) & 0x33)
        second = _join_halves(one & 0x33, (one >> 2) & 0x33)
        if KEYS and D % 32 == 16:
            data = _join_halves(zero, one)
            first = tl.where(tail, data & 0x33, first)
            second = tl.where(tail, (data >> 2) & 0x33, second)
        first = first | ((third & 0x11) << 2)
        second = second | (third & 0x44)
        data = _join_halves(first, second)
        return _join_halves(data & 15, data >> 4)
