"""Dense bit packing of codes, 1 to 8 bits (``docs/format.md``, section 7)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tq_core.errors import TQError

__all__ = ["pack_bits", "packed_size", "unpack_bits"]

_CHUNK = 1 << 17  # codes handled at once: they stay in the second-level cache


def _check_bits(bits: int) -> int:
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= 8:
        raise TQError(f"bits={bits}: dense packing takes 1 to 8 bits")
    return int(bits)


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits."""
    return -(-count * _check_bits(bits) // 8)


def _rows(total: int, count: int) -> range:
    return range(0, total, max(1, _CHUNK // max(count, 1)))


@lru_cache(maxsize=8)
def _steps(bits: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """Low fields, high fields and shift of the steps that join codes to pairs, fours and eights."""
    out = []
    for lane in (8, 16, 32):
        width = bits * lane // 8
        low = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * lane))
        out.append((np.uint64(low), np.uint64(low << width), np.uint64(lane - width)))
    return out


def _padded(rows: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Rows of ``width`` bytes, contiguous, zeros after the given ones."""
    if rows.shape[1] == width:
        return np.ascontiguousarray(rows)
    out = np.zeros((len(rows), width), dtype=np.uint8)
    out[:, : rows.shape[1]] = rows
    return out


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packed rows of checked codes [n, count]: eight codes at once in a 64-bit word."""
    size = packed_size(codes.shape[1], bits)
    words = _padded(codes, -(-codes.shape[1] // 8) * 8).view("<u8")
    for low, high, shift in _steps(bits):
        words = (words & low) | ((words >> shift) & high)
    words = words.astype("<u8", copy=False)
    if 8 % bits == 0:
        return words.view(f"<u{bits}")[:, :: 8 // bits].copy().view(np.uint8)[:, :size]
    groups = words.view(np.uint8).reshape(len(codes), -1, 8)
    return groups[:, :, :bits].reshape(len(codes), -1)[:, :size]


def _unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Invert `_pack`."""
    groups = -(-count // 8)
    spread = np.zeros((len(data), groups, 8), dtype=np.uint8)
    spread[:, :, :bits] = _padded(data, groups * bits).reshape(len(data), groups, bits)
    words = spread.view("<u8")
    for low, high, shift in reversed(_steps(bits)):
        words = (words & low) | ((words & high) << shift)
    return words.astype("<u8", copy=False).view(np.uint8).reshape(len(data), -1)[:, :count]


def pack_bits(codes: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Pack the codes of the last axis, least significant bit first.

    Parameters
    ----------
    codes : integer array [..., count]
        Values from 0 to ``2**bits - 1``.
    bits : int
        1 to 8.

    Returns
    -------
    uint8 array [..., ceil(count * bits / 8)]
        Unused high bits of the last byte are zero.

    Examples
    --------
    >>> pack_bits([1, 2, 3], 3).tolist()
    [209, 0]
    """
    bits = _check_bits(bits)
    array = np.asarray(codes)
    if array.ndim == 0:
        raise TQError("codes are a scalar; pass an array of at least one axis")
    if array.size == 0:
        array = array.astype(np.uint8)
    if array.dtype.kind not in "iu":
        raise TQError(f"codes of dtype {array.dtype}: pass integers")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**bits):
        bad = np.argwhere((array < 0) | (array >= 2**bits))[0]
        raise TQError(
            f"code {array[tuple(bad)]} at index {tuple(int(i) for i in bad)}: {bits} bits hold "
            f"0 to {2**bits - 1}; use more bits"
        )
    count = array.shape[-1]
    flat = array.reshape(math.prod(array.shape[:-1]), count).astype(np.uint8, copy=False)
    out = np.empty((len(flat), packed_size(count, bits)), dtype=np.uint8)
    step = _rows(len(flat), count)
    for start in step:
        out[start : start + step.step] = _pack(flat[start : start + step.step], bits)
    return out.reshape(*array.shape[:-1], out.shape[-1])


def unpack_bits(data: ArrayLike, bits: int, count: int) -> NDArray[np.uint8]:
    """Invert `pack_bits`.

    Parameters
    ----------
    data : uint8 array [..., ceil(count * bits / 8)]
        Packed codes.
    bits : int
        1 to 8.
    count : int
        Codes of the last axis.

    Returns
    -------
    uint8 array [..., count]
    """
    bits = _check_bits(bits)
    array = np.asarray(data)
    if count < 0 or int(count) != count:
        raise TQError(f"count={count}: needs an integer >= 0")
    if array.dtype != np.uint8 or array.ndim == 0 or array.shape[-1] != packed_size(count, bits):
        raise TQError(
            f"data of dtype {array.dtype} and shape {array.shape}: {count} codes of {bits} bits "
            f"are uint8 with a last axis of {packed_size(count, bits)}"
        )
    lead = array.shape[:-1]
    flat = array.reshape(math.prod(lead), array.shape[-1])
    out = np.empty((len(flat), count), dtype=np.uint8)
    if out.size == 0:
        return out.reshape(*lead, count)
    step = _rows(len(flat), count)
    for start in step:
        out[start : start + step.step] = _unpack(flat[start : start + step.step], bits, count)
    return out.reshape(*lead, count)
