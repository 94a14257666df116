"""Attention of the last tokens of sequences on their pages."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.attend import attend_codes, merge_sink
from tq_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_cumulative,
    check_format,
    check_pages,
    check_range,
    check_softmax,
    check_tensor,
    values_checked,
)
from tq_kernels.codec import split_records
from tq_kernels.decode_plan import DecodePlan
from tq_kernels.format import KVFormat
from tq_kernels.ops.rotate import compute_dtype
from tq_kernels.quantize import TokenCodes

__all__ = [
    "check_attention",
    "check_block_table",
    "decode",
    "decode_ref",
    "first_visible_page",
    "gather_sequence",
    "power_of_two",
    "query_bounds",
]


def check_attention(
    q: Tensor,
    pages: Tensor,
    fmt: KVFormat,
    *,
    softmax_scale: float | None,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Tensor | None,
    key_center: Tensor | None,
) -> None:
    """Raise unless the arguments that all attention operations share belong together."""
    check_format(fmt)
    check_tensor("q", q, (None, None, fmt.head_dim), FLOATS)
    check_pages(pages, fmt, None, q.device)
    heads, kv_heads = q.shape[1], pages.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise TQError(
            f"heads={heads} of q is no multiple of kv_heads={kv_heads} of pages; pass the "
            "numbers of the model"
        )
    check_softmax(softmax_scale, soft_cap, sliding_window)
    if sinks is not None:
        check_tensor("sinks", sinks, (heads,), FLOATS, q.device)
    if key_center is not None:
        check_tensor("key_center", key_center, (kv_heads, fmt.head_dim), FLOATS, q.device)


def check_block_table(
    block_table: Tensor, lengths: Tensor, name: str, pages: Tensor, fmt: KVFormat
) -> None:
    """Raise unless the table and ``lengths`` [batch] fit each other and the pages.

    Contents are looked at on the CPU and in debug mode.
    """
    check_tensor(name, lengths, (None,), INTEGERS, pages.device)
    batch = lengths.shape[0]
    check_tensor("block_table", block_table, (batch, None), INTEGERS, pages.device)
    if not values_checked(lengths) or batch == 0:
        return
    limit = block_table.shape[1] * fmt.page_size
    check_range(
        name, lengths, 0, limit + 1, f"widen block_table, {block_table.shape[1]} pages a sequence"
    )
    used = -(-lengths.to(torch.int64) // fmt.page_size)
    columns = torch.arange(block_table.shape[1], device=lengths.device)
    table = block_table.masked_fill(columns >= used[:, None], 0)
    # Unused entries became page 0, which a cache without pages does not have.
    if bool((used > 0).any()):
        check_range("block_table", table, 0, pages.shape[0], "pass pages of this cache")


def gather_sequence(
    pages: Tensor, table: Tensor, tokens: int, fmt: KVFormat, first_page: int = 0
) -> tuple[TokenCodes, TokenCodes]:
    """Codes of tokens of one sequence up to ``tokens``, leading dimensions [1, kv_heads].

    They begin with ``first_page``: pages that no query sees may hold anything, also NaN as scales.
    """
    used = -(-tokens // fmt.page_size)
    records = pages[table[first_page:used].to(torch.int64)].transpose(0, 1)
    parts = split_records(records, fmt.layout)

    def join(planes: tuple[Tensor, ...], scales: Tensor) -> TokenCodes:
        whole = TokenCodes(tuple(p.flatten(1, 2)[None] for p in planes), scales.flatten(1, 2)[None])
        return whole.narrow(0, tokens - first_page * fmt.page_size)

    return join(parts[0], parts[1]), join(parts[2], parts[3])


def first_visible_page(position: int, sliding_window: int | None, fmt: KVFormat) -> int:
    """The first page that a query at ``position`` sees."""
    if sliding_window is None:
        return 0
    return max(position - sliding_window + 1, 0) // fmt.page_size


def query_bounds(cu_query_lens: Tensor | None, q: Tensor, batch: int) -> list[int]:
    """Where the queries of each sequence start in ``q``, and their end; checked."""
    if cu_query_lens is None:
        if q.shape[0] != batch:
            raise TQError(
                f"q has {q.shape[0]} tokens for {batch} sequences: needs one each; pass "
                "cu_query_lens for other numbers"
            )
        return list(range(batch + 1))
    check_tensor("cu_query_lens", cu_query_lens, (batch + 1,), INTEGERS, q.device)
    check_cumulative("cu_query_lens", cu_query_lens, q.shape[0])
    return [int(n) for n in cu_query_lens.tolist()]


def decode_ref(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    fmt: KVFormat,
    *,
    cu_query_lens: Tensor | None = None,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    key_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last tokens of each sequence on its pages.

    Parameters
    ----------
    q : float tensor [tokens, heads, head_dim]
        Queries of all sequences, one after the other. 16-bit queries are computed in float32.
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
        ``heads`` is a multiple of ``kv_heads``; query head ``h`` reads KV head
        ``h // (heads // kv_heads)``.
    block_table : int32 or int64 tensor [batch, max_pages]
        Pages of each sequence in order; entries past its length may hold anything, and so may
        pages that lie before the windows of all queries.
    seq_lens : int32 or int64 tensor [batch]
        Stored tokens of each sequence, those of the queries included.
    fmt : KVFormat
    cu_query_lens : int32 or int64 tensor [batch + 1], optional
        Where the queries of each sequence start in ``q``. They are its last tokens, and causal
        among them. Not given: one query a sequence.
    softmax_scale : float, optional
        Factor of the logits, ``head_dim ** -0.5`` if not given.
    soft_cap : float, optional
        Logits become ``soft_cap * tanh(logit / soft_cap)``.
    sliding_window : int, optional
        A query sees this many of the most recent tokens, itself included.
    sinks : float tensor [heads], optional
        Learned logits that take part in the softmax with value zero; never capped or scaled.
    key_center : float tensor [kv_heads, head_dim], optional
        What was subtracted from keys before they were stored. ``q · key_center`` is added to
        the logits; it changes the output only under ``soft_cap`` or ``sinks``, and the LSE always.

    Returns
    -------
    out : tensor like ``q``
        Zero where a query sees nothing.
    lse : float32 tensor (float64 for float64) [tokens, heads]
        Natural logarithm of the sum of exponentials, sinks included; -inf where it is empty.

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
    check_block_table(block_table, seq_lens, "seq_lens", pages, fmt)
    bounds = query_bounds(cu_query_lens, q, len(seq_lens))
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=compute_dtype(q.dtype), device=q.device)
    for n, length in enumerate(seq_lens.tolist()):
        rows = slice(bounds[n], bounds[n + 1])
        count = bounds[n + 1] - bounds[n]
        if count == 0:
            continue
        page = first_visible_page(length - count, sliding_window, fmt)
        keys, values = gather_sequence(pages, block_table[n], length, fmt, page)
        one, total = attend_codes(
            q[rows].transpose(0, 1)[None],
            keys,
            values,
            fmt,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
            query_positions=torch.arange(length - count, length, device=q.device)
            - page * fmt.page_size,
            sliding_window=sliding_window,
            key_center=key_center,
            dtype=compute_dtype(q.dtype),
        )
        out[rows], lse[rows] = one[0].transpose(0, 1), total[0].transpose(0, 1)
    return (out, lse) if sinks is None else merge_sink(out, lse, sinks)


@lru_cache(maxsize=16)
def _plan(
    fmt: KVFormat,
    heads: int,
    kv_heads: int,
    max_batch: int,
    max_query_len: int,
    dtype: torch.dtype,
    device: torch.device,
    softmax_scale: float | None,
    soft_cap: float | None,
    sliding_window: int | None,
) -> DecodePlan:
    return DecodePlan(
        fmt,
        heads,
        kv_heads,
        max_batch=max_batch,
        max_query_len=max_query_len,
        dtype=dtype,
        device=device,
        softmax_scale=softmax_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
    )


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    fmt: KVFormat,
    *,
    cu_query_lens: Tensor | None = None,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    key_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_ref` by Triton kernels: the same arguments and results.

    It keeps the plans of the shapes seen last and allocates its results; with ``cu_query_lens`` it
    waits for the device. Use `tq_kernels.DecodePlan` where either matters.

    Raises
    ------
    TQError
        As `decode_ref`; also for float64 and for a device that Triton cannot use.
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
    check_block_table(block_table, seq_lens, "seq_lens", pages, fmt)
    bounds = query_bounds(cu_query_lens, q, len(seq_lens))
    longest = max((b - a for a, b in pairwise(bounds)), default=1)
    plan = _plan(
        fmt,
        q.shape[1],
        pages.shape[1],
        power_of_two(len(seq_lens)),
        power_of_two(longest),
        q.dtype,
        q.device,
        softmax_scale,
        soft_cap,
        sliding_window,
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if cu_query_lens is not None:
        cu_query_lens = cu_query_lens.to(torch.int32).contiguous()
    plan.run(
        q if q.stride(-1) == 1 else q.contiguous(),
        pages,
        block_table.to(torch.int32),
        seq_lens.to(torch.int32).contiguous(),
        out,
        lse,
        cu_query_lens=cu_query_lens,
        sinks=sinks if sinks is None else sinks.contiguous(),
        key_center=key_center if key_center is None else key_center.contiguous(),
    )
    return out, lse


def power_of_two(n: int) -> int:
    """The least power of two from ``n`` on, at least 1."""
    return 1 << max(n - 1, 0).bit_length()
