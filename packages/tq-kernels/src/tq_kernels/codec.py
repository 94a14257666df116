"""Codes of a token as bytes, in eager torch (``docs/format.md``, 4 to 6).

The bytes of one token in a plane of ``w`` bits hold ``8 / w`` codes each; which dimensions these
are is a fixed table, `field_dims`. Key rows store the bytes of a token consecutively, value
rows interleave those of four tokens, so byte ``i`` of token ``t`` of a quad is byte ``4 i + t``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from tq_core import PageLayout, TQError
from tq_core.pages import PAGE_PLANES, Plane

__all__ = [
    "PLANE_WIDTHS",
    "Kind",
    "field_dims",
    "pack_codes",
    "plane_bytes",
    "slot_offsets",
    "split_records",
    "unpack_codes",
]

Kind = Literal["k", "v"]

#: Widths of the planes of each number of bits; the first plane holds the low bits.
PLANE_WIDTHS = {bits: tuple(width for width, _ in planes) for bits, planes in PAGE_PLANES.items()}


def _key_place(d: int, width: int, dim: int) -> tuple[int, int]:
    """Byte and lowest bit of dimension ``d`` in the plane of a key row."""
    n, j = divmod(d, 8)
    if width == 8:
        return d, 0
    if width == 4:
        bit = 32 * n + 4 * j
    elif width == 2:
        bit = 32 * (n // 2) + 4 * j + 2 * (n % 2)
    elif dim % 32 and n >= dim // 8 - 2:
        tail = dim // 8 - 2
        bit = 8 * tail + 4 * (j % 4) + 2 * (n - tail) + j // 4
    else:
        bit = 32 * (n // 4) + 4 * j + n % 4
    return bit // 8, bit % 8


def _value_place(d: int, width: int) -> tuple[int, int]:
    """Byte, among those of its own token, and lowest bit of dimension ``d`` of a value."""
    if width == 8:
        return d, 0
    n, j = divmod(d, 2)
    per_word = 4 // width
    return n // per_word, 4 * j + width * (n % per_word)


@lru_cache(maxsize=256)
def _field_dims(kind: Kind, width: int, dim: int) -> tuple[tuple[int, ...], ...]:
    table = [[-1] * (8 // width) for _ in range(dim * width // 8)]
    for d in range(dim):
        byte, bit = _key_place(d, width, dim) if kind == "k" else _value_place(d, width)
        table[byte][bit // width] = d
    return tuple(tuple(row) for row in table)


@lru_cache(maxsize=256)
def field_dims(kind: Kind, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Dimension held by each field, int64 [dim * width / 8, 8 / width], low bits first."""
    return torch.tensor(_field_dims(kind, width, dim), dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _places(kind: Kind, width: int, dim: int, device: torch.device) -> Tensor:
    """Index of each dimension in the flattened fields: inverse of `field_dims`."""
    return torch.argsort(field_dims(kind, width, dim, device).flatten())


def _check(kind: str, bits: int) -> None:
    if kind not in ("k", "v"):
        raise TQError(f"kind={kind!r}: choose 'k' or 'v'")
    if bits not in PLANE_WIDTHS:
        raise TQError(f"bits={bits}: pages take 2, 3, 4 or 8 bits")


def plane_bytes(bits: int, dim: int) -> tuple[int, ...]:
    """Bytes of one token in each plane."""
    return tuple(dim * width // 8 for width in PLANE_WIDTHS[bits])


def pack_codes(codes: Tensor, bits: int, kind: Kind) -> tuple[Tensor, ...]:
    """Bytes of tokens, one tensor a plane.

    Parameters
    ----------
    codes : uint8 tensor [..., head_dim]
        Below ``2**bits``.
    bits : int
        2, 3, 4 or 8.
    kind : {"k", "v"}
        Keys and values order their fields differently.

    Returns
    -------
    tuple of uint8 tensors [..., head_dim * width / 8]
    """
    _check(kind, bits)
    if codes.dtype != torch.uint8:
        raise TQError(f"codes have dtype {codes.dtype}: needs torch.uint8; convert them")
    if bits == 8:
        return (codes.contiguous(),)
    planes = []
    for width, shift in PAGE_PLANES[bits]:
        table = field_dims(kind, width, codes.shape[-1], codes.device)
        mask = 2**width - 1
        plane = torch.zeros((*codes.shape[:-1], len(table)), dtype=torch.uint8, device=codes.device)
        for field in range(8 // width):
            part = (codes[..., table[:, field]] >> shift) & mask
            plane |= part << (width * field)
        planes.append(plane)
    return tuple(planes)


def unpack_codes(planes: tuple[Tensor, ...], bits: int, kind: Kind) -> Tensor:
    """Invert `pack_codes`: uint8 codes [..., head_dim]."""
    _check(kind, bits)
    if len(planes) != len(PLANE_WIDTHS[bits]):
        raise TQError(
            f"{len(planes)} planes: {bits} bits have {len(PLANE_WIDTHS[bits])}; pass all of them"
        )
    if bits == 8:
        return planes[0].clone()
    dim = planes[0].shape[-1] * 8 // PLANE_WIDTHS[bits][0]
    codes: Tensor | None = None
    for (width, shift), plane in zip(PAGE_PLANES[bits], planes, strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
        fields = ((plane[..., None] >> shifts) & (2**width - 1)).flatten(-2)
        part = fields[..., _places(kind, width, dim, plane.device)] << shift
        codes = part if codes is None else codes | part
    assert codes is not None
    return codes


@lru_cache(maxsize=64)
def slot_offsets(layout: PageLayout, device: torch.device | None = None) -> Tensor:
    """Where the bytes of each token lie in a record, int64 [page_size, slot_bytes].

    In the order: planes of the key, planes of the value, scale of the key, scale of the value.
    Every byte of the record occurs once.
    """
    token = torch.arange(layout.page_size, device=device)[:, None]
    parts = []
    for plane in layout.k_planes:
        byte = torch.arange(plane.row_bytes, device=device)
        parts.append(plane.offset + token * plane.row_bytes + byte)
    for plane in layout.v_planes:
        byte = torch.arange(plane.row_bytes // 4, device=device)
        parts.append(plane.offset + token // 4 * plane.row_bytes + 4 * byte + token % 4)
    byte = torch.arange(2, device=device)
    parts += [start + 2 * token + byte for start in (layout.k_scale_offset, layout.v_scale_offset)]
    return torch.cat(parts, dim=1)


def split_records(
    records: Tensor, layout: PageLayout
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor]:
    """Bytes and scales of all tokens of records; views where the layout allows it.

    Parameters
    ----------
    records : uint8 tensor [..., record_bytes]
        Last dimension contiguous.

    Returns
    -------
    k_planes, v_planes : tuples of uint8 tensors [..., page_size, head_dim * width / 8]
        Returned first and third.
    k_scales, v_scales : fp16 tensors [..., page_size]
    """
    lead = records.shape[:-1]

    def plane(p: Plane) -> Tensor:
        return records[..., p.offset : p.offset + p.nbytes].reshape(*lead, p.rows, p.row_bytes)

    def scales(start: int) -> Tensor:
        part = records[..., start : start + 2 * layout.page_size]
        return part.contiguous().view(torch.float16)

    keys = tuple(plane(p) for p in layout.k_planes)
    values = tuple(
        plane(p).reshape(*lead, p.rows, p.row_bytes // 4, 4).transpose(-1, -2).flatten(-3, -2)
        for p in layout.v_planes
    )
    return keys, scales(layout.k_scale_offset), values, scales(layout.v_scale_offset)
