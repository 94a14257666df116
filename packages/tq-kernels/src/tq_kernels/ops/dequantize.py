"""Read slots back as keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_pages,
    check_range,
    check_tensor,
    values_checked,
)
from tq_kernels.codec import plane_bytes, slot_offsets
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import check_slot_count, portable_kernels
from tq_kernels.quantize import TokenCodes, decode_tokens

__all__ = ["check_dequantize", "dequantize", "dequantize_ref", "gather_slots"]


def check_dequantize(pages: Tensor, slots: Tensor, fmt: KVFormat, dtype: torch.dtype) -> None:
    """Raise unless the arguments of a dequantize belong together."""
    check_pages(pages, fmt)
    check_tensor("slots", slots, (None,), INTEGERS, pages.device)
    check_tensor("dtype", torch.empty(0, dtype=dtype), (0,), FLOATS)


def gather_slots(pages: Tensor, slots: Tensor, fmt: KVFormat) -> tuple[TokenCodes, TokenCodes]:
    """Codes of keys and values of ``slots`` [n], each with leading dimensions [n, kv_heads]."""
    slots = slots.to(torch.int64)
    offsets = slot_offsets(fmt.layout, pages.device)[slots % fmt.page_size]
    heads = torch.arange(pages.shape[1], device=pages.device)
    data = pages[(slots // fmt.page_size)[:, None, None], heads[:, None], offsets[:, None, :]]
    sizes = [
        *plane_bytes(fmt.k_bits, fmt.head_dim),
        *plane_bytes(fmt.v_bits, fmt.head_dim),
        2,
        2,
    ]
    parts = torch.split(data, sizes, dim=-1)
    n = len(plane_bytes(fmt.k_bits, fmt.head_dim))
    scales = [p.contiguous().view(torch.float16)[..., 0] for p in parts[-2:]]
    return TokenCodes(parts[:n], scales[0]), TokenCodes(parts[n:-2], scales[1])


def dequantize_ref(
    pages: Tensor, slots: Tensor, fmt: KVFormat, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys and values of slots.

    Parameters
    ----------
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    slots : int32 or int64 tensor [n]
        Negative slots give zeros.
    fmt : KVFormat
    dtype : torch.dtype
        fp16, bf16 or float32, computed in float32; or float64, computed in float64.

    Returns
    -------
    k, v : tensors [n, kv_heads, head_dim] of ``dtype``

    Raises
    ------
    TQError
        For wrong shapes, dtypes or devices; for slots past the pages (on the CPU or in debug
        mode).
    """
    check_dequantize(pages, slots, fmt, dtype)
    if values_checked(slots):
        limit = pages.shape[0] * fmt.page_size
        check_range("slots", slots, None, limit, "pass slots of these pages")
    shape = (len(slots), pages.shape[1], fmt.head_dim)
    if pages.shape[0] == 0 or len(slots) == 0:
        zeros = torch.zeros(shape, dtype=dtype, device=pages.device)
        return zeros, zeros.clone()
    keys, values = gather_slots(pages, slots.clamp_min(0), fmt)
    missing = (slots < 0)[:, None, None]
    k = decode_tokens(keys, fmt, "k", dtype)
    v = decode_tokens(values, fmt, "v", dtype)
    return k.masked_fill(missing, 0.0), v.masked_fill(missing, 0.0)


def dequantize(
    pages: Tensor, slots: Tensor, fmt: KVFormat, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys and values of slots, in one launch: the kernel for `dequantize_ref`.

    Parameters
    ----------
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    slots : int32 or int64 tensor [n]
        Negative slots give zeros.
    fmt : KVFormat
    dtype : torch.dtype
        fp16, bf16 or float32.

    Returns
    -------
    k, v : tensors [n, kv_heads, head_dim] of ``dtype``
        Errors are those of the dtype or, for float32, below 1e-6 of the norm of the vector.

    Raises
    ------
    TQError
        For wrong shapes, dtypes or devices; where Triton cannot run; for slots past the pages in
        debug mode, else they are undefined.
    """
    check_dequantize(pages, slots, fmt, dtype)
    if dtype == torch.float64:
        raise TQError(
            "dtype=torch.float64: the kernel writes float16, bfloat16 or float32; choose one or "
            "use dequantize_ref"
        )
    if slots.numel() > 1 and slots.stride(0) != 1:
        raise TQError("slots is not contiguous: call .contiguous()")
    check_slot_count(pages, fmt)
    kernels = portable_kernels("dequantize", pages.device)
    if values_checked():
        limit = pages.shape[0] * fmt.page_size
        check_range("slots", slots, None, limit, "pass slots of these pages")
    shape = (len(slots), pages.shape[1], fmt.head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=pages.device) for _ in range(2))
    kernels.dequantize(pages, slots, k, v, fmt)
    return k, v
