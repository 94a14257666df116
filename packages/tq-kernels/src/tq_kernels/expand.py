"""Bytes of codes to numbers by table lookup, four codes at a time.

The numbers are ``centroid / step``, half-integers of at most 127.5 and so exact in every float
type down to bf16. Their order is that of the fields of the bytes, `field_order`: a dot
product does not care, if the query is permuted once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tq_kernels.codec import PLANE_WIDTHS, Kind, field_dims
from tq_kernels.format import KVFormat
from tq_kernels.quantize import codebook_of, step_of

__all__ = ["expand", "field_order"]

#: A type as wide as four numbers, so that a lookup moves all four as one element.
_FOUR = {
    torch.int8: torch.int32,
    torch.float16: torch.int64,
    torch.bfloat16: torch.int64,
    torch.float32: torch.complex128,
}


@lru_cache(maxsize=256)
def field_order(fmt: KVFormat, kind: Kind, device: torch.device) -> Tensor:
    """Dimension at each place of `expand`, int64 [head_dim]."""
    bits = fmt.k_bits if kind == "k" else fmt.v_bits
    return field_dims(kind, PLANE_WIDTHS[bits][0], fmt.head_dim, device).flatten()


@lru_cache(maxsize=64)
def _table(fmt: KVFormat, kind: Kind, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Four numbers of every index, [indices, 4]."""
    book = codebook_of(fmt, kind)
    halves = torch.from_numpy(book.centroids / step_of(fmt, kind))
    numbers = (halves.floor() if dtype == torch.int8 else halves).to(dtype)
    if book.bits == 4:  # two bytes
        codes = (torch.arange(2**16)[:, None] >> torch.arange(0, 16, 4)) & 15
    elif book.bits == 2:  # one byte
        codes = (torch.arange(2**8)[:, None] >> torch.arange(0, 8, 2)) & 3
    else:  # one byte of the first plane, above it the third bits in bits 0, 1, 4 and 5
        index = torch.arange(0x3400)
        low = (index[:, None] >> torch.arange(0, 8, 2)) & 3
        codes = low | ((index[:, None] >> torch.tensor([8, 9, 12, 13])) & 1) << 2
    return numbers[codes].contiguous().to(device)


def _view(plane: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as wider numbers; a view unless strides or the offset forbid it."""
    steps = (*plane.stride()[:-1], plane.storage_offset())
    if plane.stride(-1) != 1 or any(step % dtype.itemsize for step in steps):
        plane = plane.clone(memory_format=torch.contiguous_format)
    return plane.view(dtype)


def _third_bits(high: Tensor, kind: Kind, dim: int) -> Tensor:
    """Third bits [..., dim / 4]: bits 0, 1, 4, 5 of a byte for each byte of the first plane."""
    step = 4 if kind == "k" else 1  # bytes that repeat the pattern: a word, or a byte
    whole = dim // (8 * step) * step
    parts = []
    if whole and kind == "k":
        words = _view(high[..., :whole], torch.int32)
        spread = torch.stack((words & 0x33333333, (words >> 2) & 0x33333333), dim=-1)
        parts.append(spread.flatten(-2).view(torch.uint8))
    elif whole:
        pairs = high[..., :whole].to(torch.int16)
        parts.append(((pairs | pairs << 6) & 0x3333).view(torch.uint8))
    if whole < high.shape[-1]:
        tail = high[..., whole:]
        fields = torch.cat((tail & 0x55, (tail >> 1) & 0x55), dim=-1)
        parts.append((fields & 0x11) | (fields & 0x44) >> 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def expand(planes: tuple[Tensor, ...], fmt: KVFormat, kind: Kind, dtype: torch.dtype) -> Tensor:
    """``centroid / step`` of every code.

    Parameters
    ----------
    planes : tuple of uint8 tensors [..., head_dim * width / 8]
    fmt : KVFormat
    kind : {"k", "v"}
    dtype : torch.dtype
        fp16, bf16, float32, float64; or int8, for the numbers less one half.

    Returns
    -------
    tensor [..., head_dim] of ``dtype``, in the order of `field_order`
    """
    bits = fmt.k_bits if kind == "k" else fmt.v_bits
    if bits == 8:
        if dtype == torch.int8:
            return (planes[0] ^ 128).view(torch.int8)
        return planes[0].to(dtype) - 127.5
    table = _table(fmt, kind, planes[0].device, dtype)
    if bits == 4:
        index = _view(planes[0], torch.uint16).to(torch.int32)
    elif bits == 3:
        index = _third_bits(planes[1], kind, fmt.head_dim).to(torch.int32)
        index <<= 8
        index |= planes[0]
    else:
        index = planes[0].to(torch.int32)
    shape = (*planes[0].shape[:-1], fmt.head_dim)
    wide = _FOUR.get(dtype)
    if wide is None:
        return table[index].reshape(shape)
    flat = torch.index_select(table.view(wide).flatten(), 0, index.flatten())
    return flat.view(dtype).reshape(shape)
