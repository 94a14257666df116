"""Quantize new keys and values and write them to their slots."""

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
from tq_kernels.codec import slot_offsets
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import check_slot_count, portable_kernels
from tq_kernels.quantize import check_finite, encode_tokens

__all__ = ["check_store", "store", "store_ref", "warm_up_store"]


def check_store(k: Tensor, v: Tensor, pages: Tensor, slot_mapping: Tensor, fmt: KVFormat) -> None:
    """Raise unless the arguments of a store belong together."""
    check_pages(pages, fmt)
    kv_heads = pages.shape[1]
    check_tensor("k", k, (None, kv_heads, fmt.head_dim), device=pages.device)
    check_tensor("v", v, (k.shape[0], kv_heads, fmt.head_dim), (k.dtype,), pages.device)
    check_tensor("slot_mapping", slot_mapping, (k.shape[0],), INTEGERS, pages.device)


def store_ref(k: Tensor, v: Tensor, pages: Tensor, slot_mapping: Tensor, fmt: KVFormat) -> None:
    """Quantize keys and values and write them to pages, in place.

    Parameters
    ----------
    k, v : float tensors [tokens, kv_heads, head_dim]
        fp16, bf16 or float32, computed in float32; or float64, computed in float64.
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    slot_mapping : int32 or int64 tensor [tokens]
        Slot ``s`` is token ``s % page_size`` of page ``s // page_size``. Negative: not stored.
    fmt : KVFormat

    Raises
    ------
    TQError
        For wrong shapes, dtypes or devices; for slots past the pages, values that are not finite
        and scales above 65504 (on the CPU or in debug mode).
    """
    check_store(k, v, pages, slot_mapping, fmt)
    kept = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[kept].to(torch.int64)
    if values_checked(slots):
        limit = pages.shape[0] * fmt.page_size
        check_range("slot_mapping", slot_mapping, None, limit, "allocate more pages")
    keys, values = encode_tokens(k[kept], fmt, "k"), encode_tokens(v[kept], fmt, "v")
    scales = [t.scales[..., None].view(torch.uint8) for t in (keys, values)]
    data = torch.cat((*keys.planes, *values.planes, *scales), dim=-1)
    offsets = slot_offsets(fmt.layout, pages.device)[slots % fmt.page_size]
    heads = torch.arange(pages.shape[1], device=pages.device)
    pages[(slots // fmt.page_size)[:, None, None], heads[:, None], offsets[:, None, :]] = data


def store(k: Tensor, v: Tensor, pages: Tensor, slot_mapping: Tensor, fmt: KVFormat) -> None:
    """Quantize keys and values and write them to pages, in place, in one launch.

    The kernel for `store_ref`. After a first call for the format, dtype and device it
    allocates nothing, and a CUDA graph may capture it.

    Parameters
    ----------
    k, v : fp16, bf16 or float32 tensors [tokens, kv_heads, head_dim]
        Any strides but 1 in the last dimension.
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    slot_mapping : int32 or int64 tensor [tokens]
        Slot ``s`` is token ``s % page_size`` of page ``s // page_size``. Negative: not stored.
    fmt : KVFormat

    Raises
    ------
    TQError
        For wrong shapes, dtypes, strides or devices; where Triton cannot run. Contents are looked
        at in debug mode only: else a vector that is not finite gets a scale that is not finite, a
        scale above 65504 becomes infinite, and slots past the pages are undefined.

    Notes
    -----
    Codes are those of `store_ref` but for coordinates of the unit vector within 2e-6 of a
    boundary; scales agree to one unit in the last place. Vectors whose largest magnitude is below
    1e-20 may get other codes; their scale is zero.
    """
    check_store(k, v, pages, slot_mapping, fmt)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype not in FLOATS[:3]:
            raise TQError(
                f"{name} has dtype {tensor.dtype}: the kernel takes float16, bfloat16 or float32; "
                "convert it or use store_ref"
            )
        if tensor.numel() and tensor.stride(-1) != 1:
            raise TQError(
                f"{name} has stride {tensor.stride(-1)} in the last dimension: needs 1; call "
                ".contiguous()"
            )
    if slot_mapping.numel() > 1 and slot_mapping.stride(0) != 1:
        raise TQError("slot_mapping is not contiguous: call .contiguous()")
    check_slot_count(pages, fmt)
    kernels = portable_kernels("store", pages.device)
    if values_checked():
        limit = pages.shape[0] * fmt.page_size
        check_range("slot_mapping", slot_mapping, None, limit, "allocate more pages")
        kept = slot_mapping >= 0
        check_finite(k[kept], "k")
        check_finite(v[kept], "v")
    kernels.store(k, v, pages, slot_mapping, fmt)


def warm_up_store(
    fmt: KVFormat, kv_heads: int, max_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compile what `store` needs for up to ``max_tokens`` tokens, by runs that store nothing.

    Parameters
    ----------
    fmt : KVFormat
    kv_heads, max_tokens : int
    dtype : torch.dtype
        Of keys and values.
    device : torch.device
    """
    pages = torch.zeros(1, kv_heads, fmt.record_bytes, dtype=torch.uint8, device=device)
    kernels = portable_kernels("store", device)
    for tokens in kernels.token_counts(kv_heads, max_tokens):
        kv = torch.zeros(tokens, kv_heads, fmt.head_dim, dtype=dtype, device=device)
        nowhere = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        store(kv, kv, pages, nowhere, fmt)
