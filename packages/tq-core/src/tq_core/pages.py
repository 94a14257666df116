"""The page format of the kernels: nibble-words, planes and records (``docs/format.md``, 4 to 6).

A record holds the codes and scales of ``page_size`` tokens of one KV head without an unused bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tq_core.codebook import Codebook, lloyd_max
from tq_core.errors import TQError
from tq_core.inputs import as_vectors, check_finite
from tq_core.quantizer import chunks, encode_rows
from tq_core.rotation import HadamardRotation, Rotation
from tq_core.scale import check_scale, round_scales

__all__ = [
    "PAGE_BITS",
    "PAGE_PLANES",
    "PageLayout",
    "Plane",
    "decode_record",
    "encode_record",
    "pack_keys",
    "pack_record",
    "pack_values",
    "page_codebook",
    "unpack_keys",
    "unpack_record",
    "unpack_values",
]

Bytes = NDArray[np.uint8]

PAGE_BITS = (2, 3, 4, 8)
#: By the bits of a code: the width of each plane, and the position of its lowest bit in the code.
PAGE_PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    8: ((8, 0),),
}


@dataclass(frozen=True)
class Plane:
    """One plane of a record: ``rows`` rows of ``row_bytes`` bytes from ``offset`` on.

    ``width`` is the number of bits a code, ``shift`` the position of the lowest of them.
    """

    width: int
    shift: int
    offset: int
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the plane."""
        return self.rows * self.row_bytes


def _check_bits(bits: int, name: str = "bits") -> int:
    if bits not in PAGE_PLANES:
        raise TQError(f"{name}={bits}: pages take {', '.join(map(str, PAGE_BITS))} bits")
    return int(bits)


def _check_dim(dim: int) -> None:
    if dim % 16 or not 16 <= dim <= 256:
        raise TQError(f"head_dim={dim}: pages take multiples of 16 from 16 to 256")


@dataclass(frozen=True)
class PageLayout:
    """Where everything lies in a record.

    Parameters
    ----------
    head_dim : int
        Multiple of 16 from 16 to 256.
    k_bits, v_bits : int
        2, 3, 4 or 8.
    page_size : int
        Tokens a page, a multiple of 16.

    Examples
    --------
    >>> layout = PageLayout(128, k_bits=4, v_bits=3)
    >>> layout.slot_bytes, layout.record_bytes
    (116, 1856)
    """

    head_dim: int
    k_bits: int
    v_bits: int
    page_size: int = 16

    def __post_init__(self) -> None:
        _check_dim(self.head_dim)
        _check_bits(self.k_bits, "k_bits")
        _check_bits(self.v_bits, "v_bits")
        if self.page_size < 16 or self.page_size % 16:
            raise TQError(f"page_size={self.page_size}: needs a positive multiple of 16")

    @property
    def slot_bytes(self) -> int:
        """Bytes a token and KV head, both scales included."""
        return self.head_dim * (self.k_bits + self.v_bits) // 8 + 4

    @property
    def record_bytes(self) -> int:
        """Bytes of a page and KV head."""
        return self.page_size * self.slot_bytes

    def _planes(self, bits: int, offset: int, rows: int, codes: int) -> tuple[Plane, ...]:
        planes = []
        for width, shift in PAGE_PLANES[bits]:
            planes.append(Plane(width, shift, offset, rows, codes * width // 8))
            offset += planes[-1].nbytes
        return tuple(planes)

    @cached_property
    def k_planes(self) -> tuple[Plane, ...]:
        """Planes of the keys: one row a token."""
        return self._planes(self.k_bits, 0, self.page_size, self.head_dim)

    @cached_property
    def v_planes(self) -> tuple[Plane, ...]:
        """Planes of the values: one row for four tokens."""
        start = self.page_size * self.head_dim * self.k_bits // 8
        return self._planes(self.v_bits, start, self.page_size // 4, 4 * self.head_dim)

    @property
    def k_scale_offset(self) -> int:
        """Offset of the fp16 scales of the keys."""
        return self.page_size * self.head_dim * (self.k_bits + self.v_bits) // 8

    @property
    def v_scale_offset(self) -> int:
        """Offset of the fp16 scales of the values."""
        return self.k_scale_offset + 2 * self.page_size


def _to_bytes(words: NDArray[np.uint32]) -> Bytes:
    return np.ascontiguousarray(words.astype("<u4")).view(np.uint8)


def _pack_row(nibbles: Bytes, width: int, shift: int) -> Bytes:
    """One plane of rows of nibble-words: codes [..., N, 8] → bytes [..., N*width]."""
    fields = (nibbles.astype(np.uint32) >> np.uint32(shift)) & np.uint32(2**width - 1)
    words = np.bitwise_or.reduce(fields << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    if width == 4:
        return _to_bytes(words)
    if width == 2:
        return _to_bytes(words[..., 0::2] | words[..., 1::2] << np.uint32(2))
    whole = words.shape[-1] // 4 * 4
    merged = np.zeros((*words.shape[:-1], whole // 4), dtype=np.uint32)
    for m in range(4):
        merged |= words[..., m:whole:4] << np.uint32(m)
    data = _to_bytes(merged)
    if whole == words.shape[-1]:
        return data
    tail = np.zeros(words.shape[:-1], dtype=np.uint32)
    for m in range(2):
        word = words[..., whole + m]
        half = (word & np.uint32(0x1111)) | (word >> np.uint32(16)) << np.uint32(1)
        tail |= half << np.uint32(2 * m)
    return np.concatenate([data, _to_bytes(tail[..., None])[..., :2]], axis=-1)


def _unpack_row(data: Bytes, width: int, count: int) -> Bytes:
    """Invert `_pack_row` for ``count`` nibble-words: fields [..., count, 8]."""
    whole = count // 4 * 4 if width == 1 else count
    size = whole * width
    packed = np.ascontiguousarray(data[..., :size]).view("<u4").astype(np.uint32)
    words = np.zeros((*data.shape[:-1], count), dtype=np.uint32)
    per_word = 4 // width
    for m in range(per_word):
        words[..., m:whole:per_word] = packed >> np.uint32(width * m)
    if whole < count:
        tail = data[..., size].astype(np.uint32) | data[..., size + 1].astype(np.uint32) << 8
        for m in range(2):
            half = tail >> np.uint32(2 * m)
            low, high = half & np.uint32(0x1111), half >> np.uint32(1) & np.uint32(0x1111)
            words[..., whole + m] = low | high << np.uint32(16)
    shifts = 4 * np.arange(8, dtype=np.uint32)
    return ((words[..., None] >> shifts) & np.uint32(2**width - 1)).astype(np.uint8)


def _unpack_planes(planes: tuple[Bytes, ...], bits: int, count: int) -> Bytes:
    """Codes [..., count, 8] of ``count`` nibble-words a row."""
    parts = [
        _unpack_row(plane, width, count) << np.uint8(shift)
        for (width, shift), plane in zip(PAGE_PLANES[bits], planes, strict=True)
    ]
    return np.asarray(np.bitwise_or.reduce(parts), dtype=np.uint8)


def _check_codes(codes: ArrayLike, bits: int) -> Bytes:
    array = np.asarray(codes)
    if array.ndim < 2 or array.dtype.kind not in "iu":
        raise TQError(
            f"codes of dtype {array.dtype} and shape {array.shape}: pass integers "
            "[..., tokens, head_dim]"
        )
    _check_dim(array.shape[-1])
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**bits):
        bad = tuple(int(i) for i in np.argwhere((array < 0) | (array >= 2**bits))[0])
        raise TQError(
            f"code {array[bad]} at index {bad}: {bits} bits hold 0 to {2**bits - 1}; use more bits"
        )
    return array.astype(np.uint8)


def pack_keys(codes: ArrayLike, bits: int) -> tuple[Bytes, ...]:
    """Planes of key codes.

    Parameters
    ----------
    codes : integer array [..., tokens, head_dim]
        Codes below ``2**bits``.
    bits : int
        2, 3, 4 or 8.

    Returns
    -------
    tuple of uint8 arrays [..., tokens, head_dim * width / 8]
        One array a plane.
    """
    array = _check_codes(codes, _check_bits(bits))
    if bits == 8:
        return (array,)
    nibbles = array.reshape(*array.shape[:-1], array.shape[-1] // 8, 8)
    return tuple(_pack_row(nibbles, width, shift) for width, shift in PAGE_PLANES[bits])


def unpack_keys(planes: tuple[Bytes, ...], bits: int, head_dim: int) -> Bytes:
    """Invert `pack_keys`: uint8 codes [..., tokens, head_dim]."""
    _check_dim(head_dim)
    if _check_bits(bits) == 8:
        return planes[0].copy()
    codes = _unpack_planes(planes, bits, head_dim // 8)
    return codes.reshape(*planes[0].shape[:-1], head_dim)


def pack_values(codes: ArrayLike, bits: int) -> tuple[Bytes, ...]:
    """Planes of value codes.

    Parameters
    ----------
    codes : integer array [..., tokens, head_dim]
        Codes below ``2**bits``; ``tokens`` a multiple of 4.
    bits : int
        2, 3, 4 or 8.

    Returns
    -------
    tuple of uint8 arrays [..., tokens / 4, head_dim * width / 2]
        One array a plane.
    """
    array = _check_codes(codes, _check_bits(bits))
    *lead, tokens, dim = array.shape
    if tokens % 4:
        raise TQError(f"tokens={tokens}: values are packed in fours; pad to a multiple of 4")
    quads = array.reshape(*lead, tokens // 4, 4, dim)
    if bits == 8:
        return (np.ascontiguousarray(quads.swapaxes(-1, -2)).reshape(*lead, tokens // 4, 4 * dim),)
    pairs = quads.reshape(*lead, tokens // 4, 4, dim // 2, 2).swapaxes(-2, -3)
    nibbles = pairs.reshape(*lead, tokens // 4, dim // 2, 8)
    return tuple(_pack_row(nibbles, width, shift) for width, shift in PAGE_PLANES[bits])


def unpack_values(planes: tuple[Bytes, ...], bits: int, head_dim: int) -> Bytes:
    """Invert `pack_values`: uint8 codes [..., tokens, head_dim]."""
    _check_dim(head_dim)
    *lead, rows, _ = planes[0].shape
    if _check_bits(bits) == 8:
        quads = planes[0].reshape(*lead, rows, head_dim, 4).swapaxes(-1, -2)
        return np.ascontiguousarray(quads).reshape(*lead, 4 * rows, head_dim)
    nibbles = _unpack_planes(planes, bits, head_dim // 2)
    pairs = nibbles.reshape(*lead, rows, head_dim // 2, 4, 2).swapaxes(-2, -3)
    return pairs.reshape(*lead, 4 * rows, head_dim)


def pack_record(
    k_codes: ArrayLike,
    v_codes: ArrayLike,
    k_scales: ArrayLike,
    v_scales: ArrayLike,
    layout: PageLayout,
) -> Bytes:
    """Records from codes and scales.

    Parameters
    ----------
    k_codes, v_codes : integer arrays [..., page_size, head_dim]
    k_scales, v_scales : arrays [..., page_size]
        Converted to fp16.
    layout : PageLayout

    Returns
    -------
    uint8 array [..., record_bytes]
    """
    expected = (layout.page_size, layout.head_dim)
    for name, codes in (("k_codes", k_codes), ("v_codes", v_codes)):
        shape = np.shape(codes)
        if shape[-2:] != expected:
            raise TQError(
                f"{name} has shape {shape}: needs [..., {expected[0]}, {expected[1]}]; pad the page"
            )
    lead = np.shape(k_codes)[:-2]
    planes = pack_keys(k_codes, layout.k_bits) + pack_values(v_codes, layout.v_bits)
    parts = [p.reshape(*lead, p.shape[-2] * p.shape[-1]) for p in planes]
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        array = np.asarray(scales).astype("<f2")
        if array.shape != (*lead, layout.page_size):
            raise TQError(f"{name} has shape {array.shape}: needs {(*lead, layout.page_size)}")
        parts.append(np.ascontiguousarray(array).view(np.uint8))
    return np.concatenate(parts, axis=-1)


def _checked_record(record: ArrayLike, layout: PageLayout) -> Bytes:
    data = np.asarray(record)
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] != layout.record_bytes:
        raise TQError(
            f"record of dtype {data.dtype} and shape {data.shape}: this layout needs uint8 "
            f"[..., {layout.record_bytes}]"
        )
    return data


def _scales(data: Bytes, layout: PageLayout, offset: int) -> NDArray[np.float16]:
    part = np.ascontiguousarray(data[..., offset : offset + 2 * layout.page_size])
    return part.view("<f2").astype(np.float16)


def unpack_record(
    record: ArrayLike, layout: PageLayout
) -> tuple[Bytes, Bytes, NDArray[np.float16], NDArray[np.float16]]:
    """Codes and scales ``(k_codes, v_codes, k_scales, v_scales)`` of records [..., record_bytes]."""
    data = _checked_record(record, layout)

    def plane(p: Plane) -> Bytes:
        part = data[..., p.offset : p.offset + p.nbytes]
        return np.ascontiguousarray(part).reshape(*data.shape[:-1], p.rows, p.row_bytes)

    return (
        unpack_keys(tuple(map(plane, layout.k_planes)), layout.k_bits, layout.head_dim),
        unpack_values(tuple(map(plane, layout.v_planes)), layout.v_bits, layout.head_dim),
        _scales(data, layout, layout.k_scale_offset),
        _scales(data, layout, layout.v_scale_offset),
    )


def page_codebook(head_dim: int, bits: int) -> Codebook:
    """Codebook of the page format: grid "int8" at 8 bits, "int7" below."""
    return lloyd_max(head_dim, _check_bits(bits), "int8" if bits == 8 else "int7")


def encode_record(
    k: ArrayLike,
    v: ArrayLike,
    layout: PageLayout,
    *,
    rotation: Rotation | None = None,
    scale: str = "unbiased",
) -> Bytes:
    """Quantize full pages of keys and values.

    Parameters
    ----------
    k, v : float arrays [..., page_size, head_dim]
        Computed in float64.
    layout : PageLayout
    rotation : Rotation, optional
        ``HadamardRotation(head_dim)`` if not given.
    scale : {"unbiased", "mse", "norm", "none"}

    Returns
    -------
    uint8 array [..., record_bytes]

    Raises
    ------
    TQError
        For a wrong shape or dtype, a value that is not finite, or a scale above 65504.
    """
    check_scale(scale)
    rotation = HadamardRotation(layout.head_dim) if rotation is None else rotation
    page = (layout.page_size, layout.head_dim)
    sides = []
    for name, x in (("k", k), ("v", v)):
        array = as_vectors(x, layout.head_dim, name, finite=False)
        if array.ndim < 2 or array.shape[-2] != layout.page_size:
            raise TQError(
                f"{name} has shape {array.shape}: needs [..., {page[0]}, {page[1]}]; pad the page"
            )
        sides.append(array)
    lead = sides[0].shape[:-2]
    if sides[1].shape[:-2] != lead:
        raise TQError(f"k has {lead} pages and v {sides[1].shape[:-2]}: needs the same")
    records = np.empty((math.prod(lead), layout.record_bytes), dtype=np.uint8)
    for name, array, bits, planes, pack, scales_at in (
        ("k", sides[0], layout.k_bits, layout.k_planes, pack_keys, layout.k_scale_offset),
        ("v", sides[1], layout.v_bits, layout.v_planes, pack_values, layout.v_scale_offset),
    ):
        pages = array.reshape(-1, *page)
        scales = np.empty(pages.shape[:2])
        book = page_codebook(layout.head_dim, bits)
        for part in chunks(len(pages), math.prod(page)):
            rows = pages[part].reshape(-1, layout.head_dim)
            codes, own = encode_rows(rows, rotation, book, scale, whole=array, name=name)
            scales[part] = own.reshape(-1, layout.page_size)
            packed = pack(codes.reshape(-1, *page), bits)
            for plane, data in zip(planes, packed, strict=True):
                records[part, plane.offset : plane.offset + plane.nbytes] = data.reshape(
                    len(data), -1
                )
        rounded = round_scales(
            scales.reshape(*lead, layout.page_size),
            np.dtype(np.float16),
            f"divide {name} by a constant and fold it into the weights",
        )
        as_bytes = rounded.astype("<f2").reshape(scales.shape).view(np.uint8)
        records[:, scales_at : scales_at + 2 * layout.page_size] = as_bytes
    return records.reshape(*lead, layout.record_bytes)


def decode_record(
    record: ArrayLike, layout: PageLayout, *, rotation: Rotation | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keys and values, float64 [..., page_size, head_dim], of records [..., record_bytes].

    Raises
    ------
    TQError
        For records of another dtype or size, and for a scale that is not finite. All other bytes
        decode to finite numbers.
    """
    rotation = HadamardRotation(layout.head_dim) if rotation is None else rotation
    data = _checked_record(record, layout)
    for name, offset in (("k", layout.k_scale_offset), ("v", layout.v_scale_offset)):
        check_finite(_scales(data, layout, offset), f"{name}_scales of the record")
    flat = data.reshape(-1, layout.record_bytes)
    page = (layout.page_size, layout.head_dim)
    k, v = np.empty((2, len(flat), *page))
    books = [page_codebook(layout.head_dim, bits) for bits in (layout.k_bits, layout.v_bits)]
    for part in chunks(len(flat), math.prod(page)):
        codes_and_scales = unpack_record(flat[part], layout)
        for n, out in enumerate((k, v)):
            unit = rotation.inverse(books[n].decode(codes_and_scales[n]))
            out[part] = unit * codes_and_scales[2 + n].astype(np.float64)[..., None]
    shape = (*data.shape[:-1], *page)
    return k.reshape(shape), v.reshape(shape)
