"""Dense bit packing of codes, 1 to 8 bits (``docs/format.md``, section 7)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tq_core.errors import TQError

__all__ = ["pack_bits", "packed_size", "unpack_bits"]

_CHUNK = 1 << 20  # codes handled at once


def _check_bits(bits: int) -> int:
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= 8:
        raise TQError(f"bits={bits}: dense packing takes 1 to 8 bits")
    return int(bits)


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits."""
    return -(-count * _check_bits(bits) // 8)


def _rows(total: int, count: int) -> range:
    return range(0, total, max(1, _CHUNK // max(count, 1)))


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
    flat = array.reshape(math.prod(array.shape[:-1]), count).astype(np.uint8)
    out = np.empty((len(flat), packed_size(count, bits)), dtype=np.uint8)
    step = _rows(len(flat), count)
    for start in step:
        part = flat[start : start + step.step]
        spread = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little")
        out[start : start + step.step] = np.packbits(
            spread.reshape(len(part), count * bits), axis=-1, bitorder="little"
        )
    return out.reshape(*array.shape[:-1], out.shape[-1])


def unpack_bits(data: ArrayLike, bits: int, count: int) -> NDArray[np.uint8]:
    """Invert :func:`pack_bits`.

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
        part = flat[start : start + step.step]
        spread = np.unpackbits(part, axis=-1, count=count * bits, bitorder="little")
        grouped = spread.reshape(len(part), count, bits)
        out[start : start + step.step] = np.packbits(grouped, axis=-1, bitorder="little")[..., 0]
    return out.reshape(*lead, count)
