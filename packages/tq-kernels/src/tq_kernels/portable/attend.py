# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
"""Attention of query rows on pages, split over the history, in plain Triton.

A program holds up to ``ROWS`` rows (query head of the group, query token) of one sequence and KV
head, and walks its split of the history in tiles of ``4 * QUADS`` tokens. Keys give one tile of
words for each token of the quads, and dot products add up field by field; values give one tile of
words for all four tokens, and fields of the same token meet the weights of that token. So neither
scores nor weights are ever rearranged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tq_kernels.portable.rows import split_range
from tq_kernels.portable.unpack import key_words, load_scales, number, value_words

__all__ = ["attend_pages"]


@triton.jit
def _weigh(
    shares, rests, words, PARITY: tl.constexpr, BITS: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Sums of the values of four tokens a quad, for the dimensions of one parity."""
    summed = tl.zeros([shares[0].shape[0], words.shape[1]], tl.float32)
    for t in tl.static_range(4):
        v = number(words, t if BITS == 8 else 2 * t + PARITY, BITS, T0, T1)
        summed = tl.dot(shares[t], v, summed)
        if FINE:
            summed = tl.dot(rests[t], v, summed)
    return summed


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_query_lens"],
)
def attend_pages(
    q_digits, q_stats, pages, block_table, seq_lens, cu_query_lens, partial_out, partial_stats,
    soft_cap, window, num_splits, least, row_blocks, kv_heads, group, split_stride,
    page_stride, record_stride, table_stride,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, QUADS: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, CENTER: tl.constexpr, PREFIX: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    """Partial attention of every (row, split).

    ``partial_out`` float32 [splits, tokens, heads, D], even dimensions before odd ones, and
    ``partial_stats`` float32 [splits, tokens, heads, 2] (base-2 maximum, sum). Queries are the
    last tokens of the sequence, or follow after it if ``PREFIX``. ``FINE`` splits weights into two
    fp16 numbers as well.
    """
    FIELDS: tl.constexpr = 4 if K_BITS == 8 else 8
    TILE: tl.constexpr = 4 * QUADS
    pair = tl.program_id(0) // row_blocks
    block = tl.program_id(0) % row_blocks
    split = tl.program_id(1)
    sequence = pair // kv_heads
    kv_head = pair % kv_heads
    q_start = tl.load(cu_query_lens + sequence)
    q_len = tl.load(cu_query_lens + sequence + 1) - q_start
    if block * ROWS >= q_len * group:
        return
    length = tl.load(seq_lens + sequence)
    first_position = length if PREFIX else length - q_len
    first, count, per_split = split_range(
        length, first_position, window, num_splits, least, WINDOW, TILE
    )
    start = first + split * per_split
    stop = tl.minimum(start + per_split, first + count)
    if start >= stop:
        return

    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < q_len * group
    position = first_position + rows // group
    head = kv_head * group + rows % group
    at = (q_start + rows // group).to(tl.int64) * (kv_heads * group) + head
    factor = tl.load(q_stats + at * 2, mask=inside, other=0.0)
    bias = tl.load(q_stats + at * 2 + 1, mask=inside, other=0.0)
    n = tl.arange(0, K_WIDTH)
    n_value = tl.arange(0, V_WIDTH)
    quads = tl.arange(0, QUADS)
    digits = q_digits + at[:, None] * (2 * FIELDS * K_WIDTH) + n[None, :]
    query = ()
    for j in tl.static_range(2 * FIELDS):
        query = query + (tl.load(digits + j * K_WIDTH, mask=inside[:, None], other=0.0),)

    table = block_table + sequence.to(tl.int64) * table_stride
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    even = tl.zeros([ROWS, V_WIDTH], tl.float32)
    odd = tl.zeros([ROWS, V_WIDTH], tl.float32)
    for tile in range(start, stop):
        token = tile * TILE + 4 * quads
        exists = token < length
        page = tl.load(table + token // PAGE, mask=exists, other=0).to(tl.int64)
        record = pages + page * page_stride + kv_head.to(tl.int64) * record_stride
        slot = token % PAGE

        words = ()
        scores = ()
        for t in tl.static_range(4):
            w = key_words(
                record[:, None], (slot + t)[:, None], n[None, :],
                exists[:, None] & (n < D // FIELDS)[None, :], K_BITS, D, PAGE,
            )  # fmt: skip
            words = words + (w,)
            scores = scores + (tl.zeros([ROWS, QUADS], tl.float32),)
        for j in tl.static_range(FIELDS):
            sums = ()
            for t in tl.static_range(4):
                k = tl.trans(number(words[t], j, K_BITS, K0, K1))
                sums = sums + (tl.dot(query[FIELDS + j], k, tl.dot(query[j], k, scores[t])),)
            scores = sums

        logits = ()
        new_top = top
        for t in tl.static_range(4):
            s = scores[t]
            scale = load_scales(
                record, slot + t, token + t < length, False, K_BITS, V_BITS, D, PAGE
            )
            s = s * factor[:, None] * scale[None, :]
            if CENTER:
                s += bias[:, None]
            if CAP:
                s = 1.4426950408889634 * soft_cap * (
                    1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / soft_cap)))
                )  # fmt: skip
            visible = (token + t < length)[None, :] & ((token + t)[None, :] <= position[:, None])
            if WINDOW:
                visible = visible & ((token + t)[None, :] > position[:, None] - window)
            s = tl.where(visible, s, float("-inf"))
            new_top = tl.maximum(new_top, tl.max(s, 1))
            logits = logits + (s,)

        safe = tl.maximum(new_top, -1e30)
        shrink = tl.exp2(top - safe)
        top = new_top
        total = total * shrink
        weights = ()
        peak = tl.full([ROWS], 1e-30, tl.float32)
        for t in tl.static_range(4):
            p = tl.exp2(logits[t] - safe[:, None])
            total += tl.sum(p, 1)
            held = token + t < length
            if WINDOW:  # pages before it may hold anything, and 0 * NaN is no zero
                held = held & (token + t > first_position - window)
            scale = load_scales(record, slot + t, held, True, K_BITS, V_BITS, D, PAGE)
            p = p * scale[None, :]
            peak = tl.maximum(peak, tl.max(tl.abs(p), 1))
            weights = weights + (p,)

        mask = exists[:, None] & (n_value < D // 2)[None, :]
        words_even = value_words(
            record[:, None], (slot // 4)[:, None], n_value[None, :], mask, 0,
            V_BITS, K_BITS, D, PAGE,
        )  # fmt: skip
        words_odd = words_even
        if V_BITS == 8:
            words_odd = value_words(
                record[:, None], (slot // 4)[:, None], n_value[None, :], mask, 1,
                V_BITS, K_BITS, D, PAGE,
            )  # fmt: skip
        shares = ()
        rests = ()
        for t in tl.static_range(4):
            p = weights[t] / peak[:, None]
            shares = shares + (p.to(tl.float16),)
            rests = rests + ((p - shares[t].to(tl.float32)).to(tl.float16),)
        summed = _weigh(shares, rests, words_even, 0, V_BITS, V0, V1, FINE)
        even = even * shrink[:, None] + summed * peak[:, None]
        summed = _weigh(shares, rests, words_odd, 1, V_BITS, V0, V1, FINE)
        odd = odd * shrink[:, None] + summed * peak[:, None]

    at += split.to(tl.int64) * split_stride
    tl.store(partial_stats + at * 2, top, mask=inside)
    tl.store(partial_stats + at * 2 + 1, total, mask=inside)
    place = partial_out + at[:, None] * D + n_value[None, :]
    mask = inside[:, None] & (n_value < D // 2)[None, :]
    tl.store(place, even, mask=mask)
    tl.store(place + D // 2, odd, mask=mask)
