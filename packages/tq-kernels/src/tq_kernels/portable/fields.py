# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Codes of a tile to bytes and back, in plain Triton (``docs/format.md``, 4 and 5).

A tile holds the codes of one token a row, ordered *by field*: with ``F`` codes a byte and ``n``
bytes, padded to a power of two, column ``f n + i`` holds field ``f`` of byte ``i``. Bytes then form
by combining the two halves of the columns, one bit of ``f`` at a time, which on tensor-core layouts
stays inside a lane. The rotation matrix has its coordinates in this order (`column_order`),
so nothing is ever permuted.

3 bits have a byte of the second plane for two of the first. Its fields decide the order: bit 2 of
``f`` is bit ``j mod 2`` of the nibble, and the others are ``n mod 4``; in the last 16 dimensions of
keys with ``head_dim mod 32 = 16`` they are ``n mod 2`` and ``j div 4`` instead.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from tq_kernels.codec import PLANE_WIDTHS, Kind, field_dims

__all__ = [
    "column_order",
    "lane_order",
    "load_codes",
    "store_by_lanes",
    "store_codes",
    "sum_products",
    "token_places",
]


@lru_cache(maxsize=256)
def column_order(kind: Kind, bits: int, dim: int) -> tuple[int, ...]:
    """Dimension of each column of a tile, -1 for padding."""
    # the last plane has the most codes a byte, and so decides
    table = field_dims(kind, PLANE_WIDTHS[bits][-1], dim)
    count = len(table)
    width = triton.next_power_of_2(count)
    rows = [[*column, *([-1] * (width - count))] for column in table.T.tolist()]
    return tuple(dimension for row in rows for dimension in row)


@lru_cache(maxsize=256)
def lane_order(kind: Kind, bits: int, dim: int) -> tuple[int, ...]:
    """`column_order` for `store_by_lanes`, for 2, 4 and 8 bits and a power of two from 32 on.

    Of the ``n`` bytes of a row, lane ``t`` of four has columns ``8 i + 2 t + b``: of keys it gets
    ``n / 4`` neighbours, of values the four lanes get neighbours for each ``i`` and ``b``.
    """
    order = torch.tensor(column_order(kind, bits, dim))
    if kind == "k":
        fields = order.reshape(8 // bits, 4, -1, 2).transpose(1, 2)
    else:
        fields = order.reshape(8 // bits, -1, 2, 4).transpose(2, 3)
    return tuple(fields.flatten().tolist())


@triton.jit
def _halves(x):
    """First and second half of the columns."""
    pairs = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def _join_halves(first, second):
    """Invert `_halves`."""
    pairs = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(pairs, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _combine(x, SHIFT: tl.constexpr):
    first, second = _halves(x)
    return first | (second << SHIFT)


@triton.jit
def _pack(codes, BITS: tl.constexpr):
    """Bytes of 2, 4 or 8 bits."""
    if BITS == 8:
        return codes
    elif BITS == 4:
        return _combine(codes, 4)
    else:
        return _combine(_combine(codes, 4), 2)


@triton.jit
def _two_bytes(i, D: tl.constexpr, KEYS: tl.constexpr):
    """Two bytes of the first plane for byte ``i`` of the second, and whether it is in the tail."""
    if KEYS:
        first = i // 4 * 8 + i % 4
        second = first + 4
    else:
        first = 2 * i
        second = first + 1
    tail = i >= D // 8 - 2
    if KEYS and D % 32 == 16:
        at = i + (D - 16) // 8
        first = tl.where(tail, at, first)
        second = tl.where(tail, at + 2, second)
    return first, second, tail


@triton.jit
def _store_flat(place, data, mask):
    """Store so that neighbours along the last axis are on neighbouring lanes."""
    N: tl.constexpr = data.numel
    mask = tl.broadcast_to(mask, data.shape)
    tl.store(tl.reshape(place, (N,)), tl.reshape(data, (N,)), mask=tl.reshape(mask, (N,)))


@triton.jit
def _store_bytes(base, at, data, mask, known, KEYS: tl.constexpr):
    """Store bytes ``at`` of the tokens at ``base``, [tokens, bytes].

    Of values, the lanes of a warp have 8 bytes of each token of a quad: neighbours in memory.
    """
    data = data.to(tl.uint8)
    if KEYS:
        tl.store(base[:, None] + at[None, :], data, mask=mask[:, None] & known[None, :])
    else:
        GROUP: tl.constexpr = 8 if at.shape[0] >= 8 else at.shape[0]
        shape: tl.constexpr = (at.shape[0] // GROUP, mask.shape[0], GROUP)
        data = tl.permute(tl.reshape(data, (shape[1], shape[0], shape[2])), (1, 0, 2))
        at = tl.reshape(at, (shape[0], 1, shape[2]))
        known = tl.reshape(known, (shape[0], 1, shape[2]))
        _store_flat(base[None, :, None] + 4 * at, data, mask[None, :, None] & known)


@triton.jit
def _load_bytes(base, at, mask, known, KEYS: tl.constexpr):
    """Invert `_store_bytes`: int32, 0 where nothing is stored."""
    if KEYS:
        place = base[:, None] + at[None, :]
        data = tl.load(place, mask=mask[:, None] & known[None, :], other=0)
    else:
        GROUP: tl.constexpr = 8 if at.shape[0] >= 8 else at.shape[0]
        shape: tl.constexpr = (at.shape[0] // GROUP, 1, GROUP)
        place = base[None, :, None] + 4 * tl.reshape(at, shape)
        data = tl.load(place, mask=mask[None, :, None] & tl.reshape(known, shape), other=0)
        data = tl.reshape(tl.permute(data, (1, 0, 2)), (base.shape[0], at.shape[0]))
    return data.to(tl.int32)


@triton.jit
def store_codes(codes, low, high, mask, D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr):
    """Pack codes int32 [block, columns] and store the bytes.

    ``low`` and ``high`` [block] point to the first byte of the token in either plane.
    """
    N: tl.constexpr = codes.shape[1]
    if BITS == 3:
        i = tl.arange(0, N // 8)
        known = i < D // 8
        both = _combine((codes & 3) | ((codes & 4) << 14), 4)
        first, second = _halves(both)
        third = _combine((first >> 16) | ((second >> 16) << 2), 1)
        _store_bytes(high, i, third, mask, known, KEYS)
        at_zero, at_one, tail = _two_bytes(i, D, KEYS)
        zero = _combine(first & 0xFFFF, 2)
        one = _combine(second & 0xFFFF, 2)
        if KEYS and D % 32 == 16:
            tail_zero, tail_one = _halves((first & 0xFFFF) | ((second & 0xFFFF) << 2))
            zero = tl.where(tail[None, :], tail_zero, zero)
            one = tl.where(tail[None, :], tail_one, one)
        _store_bytes(low, at_zero, zero, mask, known, KEYS)
        _store_bytes(low, at_one, one, mask, known, KEYS)
    else:
        i = tl.arange(0, N * BITS // 8)
        _store_bytes(low, i, _pack(codes, BITS), mask, i < D * BITS // 8, KEYS)


@triton.jit
def store_by_lanes(
    codes, low, mask, BITS: tl.constexpr, KEYS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """`store_codes` of columns in `lane_order` straight from the result of a tensor core.

    Rows of codes are [warp, repetition, 8], those of ``low`` and ``mask`` [repetition, warp, 8].
    """
    BLOCK: tl.constexpr = codes.shape[0]
    data = _pack(codes, BITS)
    N: tl.constexpr = data.shape[1]
    data = tl.reshape(data.to(tl.uint8), (WARPS, BLOCK // (8 * WARPS), 8, N // 8, 4, 2))
    if KEYS:
        data = tl.reshape(tl.permute(data, (1, 0, 2, 4, 3, 5)), (BLOCK, N))
        tl.store(low[:, None] + tl.arange(0, N)[None, :], data, mask=mask[:, None])
    else:
        data = tl.reshape(tl.permute(data, (3, 5, 1, 0, 2, 4)), (N // 4, BLOCK, 4))
        at = 4 * tl.arange(0, N // 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
        _store_flat(low[None, :, None] + 4 * at, data, mask[None, :, None])


@triton.jit
def load_codes(
    low, high, mask, N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Invert `store_codes`: codes int32 [block, N], zero where nothing is stored."""
    if BITS == 3:
        i = tl.arange(0, N // 8)
        known = i < D // 8
        third = _load_bytes(high, i, mask, known, KEYS)
        third = _join_halves(third & 0x55, (third >> 1) & 0x55)
        at_zero, at_one, tail = _two_bytes(i, D, KEYS)
        zero = _load_bytes(low, at_zero, mask, known, KEYS)
        one = _load_bytes(low, at_one, mask, known, KEYS)
        first = _join_halves(zero & 0x33, (zero >> 2) & 0x33)
        second = _join_halves(one & 0x33, (one >> 2) & 0x33)
        if KEYS and D % 32 == 16:
            data = _join_halves(zero, one)
            at_tail = _join_halves(tail[None, :].to(tl.int32), tail[None, :].to(tl.int32)) != 0
            first = tl.where(at_tail, data & 0x33, first)
            second = tl.where(at_tail, (data >> 2) & 0x33, second)
        data = _join_halves(first | ((third & 0x11) << 2), second | (third & 0x44))
        return _join_halves(data & 15, data >> 4)
    else:
        i = tl.arange(0, N * BITS // 8)
        data = _load_bytes(low, i, mask, i < D * BITS // 8, KEYS)
        if BITS == 2:
            data = _join_halves(data & 0x33, (data >> 2) & 0x33)
        if BITS < 8:
            data = _join_halves(data & 15, data >> 4)
        return data


@triton.jit
def token_places(
    pages, slot, page_stride, head_offset, PLANES: tl.constexpr, SCALES_AT: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """First byte of the token of each slot in either plane, and its scale."""
    inner = slot % PAGE
    record = pages + (slot // PAGE).to(tl.int64) * page_stride + head_offset
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    if KEYS:
        low = record + (PLANES + inner * (D * WIDTH // 8))
        high = record + (PLANES + PAGE * D // 4 + inner * (D // 8))
    else:
        low = record + (PLANES + inner // 4 * (D * WIDTH // 2) + inner % 4)
        high = record + (PLANES + PAGE * D // 4 + inner // 4 * (D // 2) + inner % 4)
    scale = (record + (SCALES_AT + 2 * inner)).to(tl.pointer_type(tl.float16), bitcast=True)
    return low, high, scale


@triton.jit
def sum_products(a, b):
    """Sum of ``a * b`` over the columns, with a multiply-add for most of them."""
    if a.shape[1] >= 64:
        a0, a1 = _halves(a)
        b0, b1 = _halves(b)
        a00, a01 = _halves(a0)
        a10, a11 = _halves(a1)
        b00, b01 = _halves(b0)
        b10, b11 = _halves(b1)
        return tl.sum(a00 * b00 + a01 * b01 + a10 * b10 + a11 * b11, 1)
    else:
        return tl.sum(a * b, 1)
