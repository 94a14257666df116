"""Attention of new tokens on each other and on a compressed prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from tq_kernels.attend import attend_codes, attend_dense, merge_sink, merge_states
from tq_kernels.checks import check_tensor
from tq_kernels.format import KVFormat
from tq_kernels.ops.decode import (
    check_attention,
    check_block_table,
    gather_sequence,
    query_bounds,
)
from tq_kernels.ops.rotate import compute_dtype

__all__ = ["prefill_ref"]


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
        See :func:`decode_ref`. ``key_center`` applies to the stored keys only.

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
        if context:
            prefix = attend_codes(
                queries,
                *gather_sequence(pages, block_table[n], context, fmt),
                fmt,
                softmax_scale=softmax_scale,
                soft_cap=soft_cap,
                query_positions=positions,
                sliding_window=sliding_window,
                key_center=key_center,
            )
            state = merge_states(*state, *prefix)
        if sinks is not None:
            state = merge_sink(*state, sinks[:, None])
        out[rows] = state[0][0].transpose(0, 1).to(out.dtype)
        lse[rows] = state[1][0].transpose(0, 1)
    return out, lse
