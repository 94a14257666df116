"""Attention of new tokens on each other and on a compressed prefix."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tq_kernels.attend import attend_codes, attend_dense, merge_sink, merge_states
from tq_kernels.checks import check_tensor
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import portable_kernels
from tq_kernels.ops.decode import (
    check_attention,
    check_block_table,
    first_visible_page,
    gather_sequence,
    power_of_two,
    query_bounds,
)
from tq_kernels.ops.rotate import compute_dtype

if TYPE_CHECKING:
    from tq_kernels.portable.prefill import PrefillPlan

__all__ = ["prefill", "prefill_ref"]


def prefill_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_query_lens: Tensor,
    context_lens: Tensor,
    fmt: KVFormat,
    *,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    key_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of new tokens, after a prefix that is stored on pages.

    Parameters
    ----------
    q : float tensor [tokens, heads, head_dim]
        Queries of all sequences, one after the other.
    k, v : float tensors [tokens, kv_heads, head_dim]
        Keys and values of the same tokens, not compressed and not centred.
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    block_table : int32 or int64 tensor [batch, max_pages]
    cu_query_lens : int32 or int64 tensor [batch + 1]
        Where the tokens of each sequence start.
    context_lens : int32 or int64 tensor [batch]
        Stored tokens before the new ones; 0 for a first chunk.
    fmt : KVFormat
    softmax_scale, soft_cap, sliding_window, sinks, key_center
        See `decode_ref`. ``key_center`` applies to the stored keys only.

    Returns
    -------
    out : tensor like ``q``
    lse : float32 tensor (float64 for float64) [tokens, heads]

    Raises
    ------
    TQError
        For arguments that do not belong together; for pages out of range (on the CPU or in debug
        mode).
    """
    check_attention(
        q,
        pages,
        fmt,
        softmax_scale=softmax_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        key_center=key_center,
    )
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (q.shape[0], pages.shape[1], fmt.head_dim), (q.dtype,), q.device)
    check_block_table(block_table, context_lens, "context_lens", pages, fmt)
    bounds = query_bounds(cu_query_lens, q, len(context_lens))
    out = torch.zeros_like(q)
    compute = compute_dtype(q.dtype)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=compute, device=q.device)
    for n, context in enumerate(context_lens.tolist()):
        rows = slice(bounds[n], bounds[n + 1])
        count = bounds[n + 1] - bounds[n]
        if count == 0:
            continue
        queries, new_k, new_v = (t[rows].transpose(0, 1)[None].to(compute) for t in (q, k, v))
        positions = torch.arange(context, context + count, device=q.device)
        state = attend_dense(
            queries,
            new_k,
            new_v,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
            query_positions=positions,
            key_offset=context,
            sliding_window=sliding_window,
        )
        page = first_visible_page(context, sliding_window, fmt)
        if context > page * fmt.page_size:
            prefix = attend_codes(
                queries,
                *gather_sequence(pages, block_table[n], context, fmt, page),
                fmt,
                softmax_scale=softmax_scale,
                soft_cap=soft_cap,
                query_positions=positions - page * fmt.page_size,
                sliding_window=sliding_window,
                key_center=key_center,
            )
            state = merge_states(*state, *prefix)
        if sinks is not None:
            state = merge_sink(*state, sinks[:, None])
        out[rows] = state[0][0].transpose(0, 1).to(out.dtype)
        lse[rows] = state[1][0].transpose(0, 1)
    return out, lse


@lru_cache(maxsize=8)
def _plan(
    fmt: KVFormat,
    heads: int,
    kv_heads: int,
    max_batch: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    softmax_scale: float | None,
    soft_cap: float | None,
    sliding_window: int | None,
) -> PrefillPlan:
    plan: PrefillPlan = portable_kernels("prefill", device).PrefillPlan(
        fmt,
        heads,
        kv_heads,
        max_batch,
        max_tokens,
        dtype,
        device,
        softmax_scale=softmax_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
    )
    return plan


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_query_lens: Tensor,
    context_lens: Tensor,
    fmt: KVFormat,
    *,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    key_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`prefill_ref` by Triton kernels: the same arguments and results.

    It keeps the plans of the shapes seen last, waits for the device to read the lengths, and
    allocates its results. Use `tq_kernels.PrefillPlan` where any of these matters.

    Raises
    ------
    TQError
        As `prefill_ref`; also for float64 and for a device that Triton cannot use.

    Notes
    -----
    The prefix of a sequence with many new tokens is expanded to fp16 (float32 for float32), and
    new tokens are attended in their dtype, so the error is that of dense attention in 16 bits.
    """
    check_attention(
        q,
        pages,
        fmt,
        softmax_scale=softmax_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        key_center=key_center,
    )
    check_block_table(block_table, context_lens, "context_lens", pages, fmt)
    bounds = query_bounds(cu_query_lens, q, len(context_lens))
    plan = _plan(
        fmt,
        q.shape[1],
        pages.shape[1],
        power_of_two(len(context_lens)),
        power_of_two(q.shape[0]),
        q.dtype,
        q.device,
        softmax_scale,
        soft_cap,
        sliding_window,
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    plan.run(
        q if q.stride(-1) == 1 else q.contiguous(),
        k if k.stride(-1) == 1 else k.contiguous(),
        v if v.stride(-1) == 1 else v.contiguous(),
        pages,
        block_table.to(torch.int32),
        cu_query_lens.to(torch.int32).contiguous(),
        context_lens.to(torch.int32).contiguous(),
        out,
        lse,
        query_lens_host=[b - a for a, b in pairwise(bounds)],
        context_lens_host=context_lens.tolist(),
        sinks=None if sinks is None else sinks.contiguous(),
        key_center=None if key_center is None else key_center.contiguous(),
    )
    return out, lse
