# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Codes of pages to fp16 numbers, in plain Triton (``docs/format.md``, 4 to 6).

Everything is elementwise on 32-bit words, so that a compiler can move it freely: a tile of words is
loaded once and gives one tile of numbers for every field, without any exchange between lanes.
The numbers are ``centroid / step``: half-integers, exact in fp16.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from tq_core import Codebook

from tq_kernels.format import KVFormat

__all__ = [
    "field_count",
    "key_words",
    "load_scales",
    "number",
    "table_words",
    "value_order",
    "value_words",
]


def field_count(bits: int) -> int:
    """Codes a word of keys."""
    return 4 if bits == 8 else 8


def value_order(fmt: KVFormat) -> list[int]:
    """Dimension of every column of values and outputs: the even ones, then the odd ones."""
    return [*range(0, fmt.head_dim, 2), *range(1, fmt.head_dim, 2)]


def table_words(book: Codebook) -> tuple[int, int]:
    """Levels of the first eight codes, four bytes a word; 8-bit codes are their own levels."""
    if book.bits == 8:
        return 0, 0
    assert book.levels is not None
    levels = np.zeros(8, np.uint8)
    count = min(8, len(book.levels))
    levels[:count] = book.levels[:count]
    low, high = levels.view("<i4").tolist()
    return low, high


@triton.jit
def _word(address, mask):
    """The 32-bit words at byte addresses, 0 where masked."""
    return tl.load(address.to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=0)


@triton.jit
def _half_word(address, mask):
    """The 16-bit words at byte addresses, as non-negative int32."""
    half = tl.load(address.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
    return half.to(tl.int32) & 0xFFFF


@triton.jit
def _third_key_bits(row, n, mask, D: tl.constexpr):
    """Bit ``4 j`` of the result is the third bit of code ``j`` of nibble-word ``n`` of a key."""
    if D % 32 == 0:
        return (_word(row + n // 4 * 4, mask) >> (n % 4)) & 0x11111111
    else:
        # Rows are not aligned to words, and the last two nibble-words share a half-word.
        TAIL: tl.constexpr = D // 8 - 2
        at_tail = n >= TAIL
        low = _half_word(row + tl.where(at_tail, TAIL, n // 4 * 4), mask)
        high = _half_word(row + n // 4 * 4 + 2, mask & (n < TAIL))
        whole = ((low | (high << 16)) >> (n % 4)) & 0x11111111
        pair = low >> (2 * (n - TAIL))
        tail = (pair & 0x1111) | (((pair >> 1) & 0x1111) << 16)
        return tl.where(at_tail, tail, whole)


@triton.jit
def _fold(words):
    """Complement the low three bits of every nibble whose top bit is set.

    Levels are symmetric: the low bits then tell the level of the lower half of the codebook, the
    top bit whether it is mirrored.
    """
    top = words & -0x77777778
    return words ^ (top - ((top >> 3) & 0x11111111))


@triton.jit
def key_words(
    record, token, n, mask, BITS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Words of keys.

    Parameters
    ----------
    record : uint8 pointers, broadcastable
        Records of the page format.
    token, n : int32, broadcastable
        Token of the page; nibble-word of its row, or word of four codes if ``BITS`` is 8.
    mask : bool, broadcastable
        Where to read; elsewhere the result is arbitrary.

    Returns
    -------
    int32 words for `number`
    """
    if BITS == 8:
        return _word(record + token * D + 4 * n, mask)
    elif BITS == 4:
        return _fold(_word(record + token * (D // 2) + 4 * n, mask))
    else:
        low = _word(record + token * (D // 4) + n // 2 * 4, mask)
        low = (low >> (2 * (n % 2))) & 0x33333333
        if BITS == 2:
            return low
        else:
            row = record + PAGE * (D // 4) + token * (D // 8)
            return low | (_third_key_bits(row, n, mask, D) << 2)


@triton.jit
def value_words(
    record, quad, n, mask, PARITY: tl.constexpr,
    BITS: tl.constexpr, K_BITS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Words of values: nibble-word ``n`` of a quad of the page; see `key_words`.

    With 8 bits there is no nibble-word: the word is that of dimension ``2 n + PARITY``.
    """
    record += PAGE * D * K_BITS // 8
    if BITS == 8:
        return _word(record + quad * (4 * D) + 8 * n + 4 * PARITY, mask)
    elif BITS == 4:
        return _fold(_word(record + quad * (2 * D) + 4 * n, mask))
    else:
        low = _word(record + quad * D + n // 2 * 4, mask)
        low = (low >> (2 * (n % 2))) & 0x33333333
        if BITS == 2:
            return low
        else:
            row = record + PAGE * (D // 4) + quad * (D // 2)
            high = (_word(row + n // 4 * 4, mask) >> (n % 4)) & 0x11111111
            return low | (high << 2)


@triton.jit
def load_scales(
    record, token, mask, VALUES: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Scales of tokens of the page as float32, 0 where masked."""
    START: tl.constexpr = PAGE * D * (K_BITS + V_BITS) // 8 + (2 * PAGE if VALUES else 0)
    address = (record + START + 2 * token).to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pick(code, low, high):
    """Byte ``code & 7`` of two words, times 8."""
    word = tl.where((code & 4) != 0, high, low)
    return ((word >> ((code & 3) << 3)) << 3) & 0x3F8


@triton.jit
def number(words, FIELD: tl.constexpr, BITS: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr):
    """``centroid / step`` of field ``FIELD`` of words, fp16: a nibble, or a byte if 8 bits.

    ``T0`` and ``T1`` come from `table_words`.
    """
    if BITS == 8:
        # 256 + level as fp16
        bits = 0x5C00 | (((words >> (8 * FIELD)) << 2) & 0x3FC)
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 383.5
    else:
        code = words >> (4 * FIELD)
        if BITS == 2:
            eight = ((T0 >> ((code & 3) << 3)) << 3) & 0x3F8
        elif BITS == 3:
            eight = _pick(code, T0, T1)
        else:
            eight = _pick(code, T0, T1) ^ ((code & 8) * 127)
        # 128 + level as fp16
        bits = 0x5800 | eight
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 191.5
