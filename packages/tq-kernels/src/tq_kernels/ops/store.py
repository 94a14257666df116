"""Quantize new keys and values and write them to their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from tq_kernels.checks import INTEGERS, check_pages, check_range, check_tensor, values_checked
from tq_kernels.codec import slot_offsets
from tq_kernels.format import KVFormat
from tq_kernels.quantize import encode_tokens

__all__ = ["check_store", "store_ref"]


def check_store(k: Tensor, v: Tensor, pages: Tensor, slot_mapping: Tensor, fmt: KVFormat) -> None:
    """Raise unless the arguments of a store belong together."""
    check_tensor("pages", pages, (None, None, None), (torch.uint8,))
    kv_heads = pages.shape[1]
    check_pages(pages, fmt, kv_heads, pages.device)
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
