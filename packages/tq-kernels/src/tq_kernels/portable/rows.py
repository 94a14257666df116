# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What surrounds the attention kernel: queries into the rotated space, partial results back.

Both rotate by a matrix product in float32, a block of columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_partials", "prepare_queries", "split_range"]


@triton.jit(
    do_not_specialize=["rows_total"],
)
def prepare_queries(
    q, matrix, key_center, q_digits, q_stats,
    logit_scale, center_scale, rows_total, heads, group, q_token_stride, q_head_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """Rotate queries and split each number into two of fp16, about 22 bits together.

    ``q_digits`` fp16 [rows, 2, WIDTH] in the order of the columns of ``matrix`` [D, WIDTH];
    ``q_stats`` float32 [rows, 2]: what turns a dot product into a base-2 logit, and ``q · centre``
    of ``key_center`` [kv_heads, D] as one. Row ``token * heads + head``.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_total
    head = rows % heads
    token = (rows // heads).to(tl.int64)
    source = q + token * q_token_stride + head.to(tl.int64) * q_head_stride
    columns = tl.arange(0, WIDTH)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    bias = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, STEP):
        dims = start + tl.arange(0, STEP)
        x = tl.load(source[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        x = x.to(tl.float32)
        block = tl.load(matrix + dims[:, None] * WIDTH + columns[None, :])
        y = tl.dot(x, block, y, input_precision="ieee")
        if CENTER:
            at = (head // group)[:, None] * D + dims[None, :]
            center = tl.load(key_center + at, mask=inside[:, None], other=0.0)
            bias += tl.sum(x * center.to(tl.float32), 1)
    peak = tl.maximum(tl.max(tl.abs(y), 1), 1e-30)
    y = y / peak[:, None]
    high = y.to(tl.float16)
    low = (y - high.to(tl.float32)).to(tl.float16)
    place = rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
    tl.store(q_digits + place, high, mask=inside[:, None])
    tl.store(q_digits + place + WIDTH, low, mask=inside[:, None])
    tl.store(q_stats + rows.to(tl.int64) * 2, peak * logit_scale, mask=inside)
    tl.store(q_stats + rows.to(tl.int64) * 2 + 1, bias * center_scale, mask=inside)


@triton.jit
def split_range(
    length, first_position, window, num_splits, least,
    WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """First tile that any query of a sequence sees, tiles from there on, tiles a split."""
    first = 0
    if WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // TILE
    count = tl.maximum((length + TILE - 1) // TILE - first, 0)
    per_split = tl.maximum((count + num_splits - 1) // num_splits, least)
    return first, count, per_split


@triton.jit(
    do_not_specialize_on_alignment=["seq_lens", "cu_query_lens", "lse"],
)
def merge_partials(
    partial_out, partial_stats, seq_lens, cu_query_lens, matrix, sinks, out, lse,
    v_step, window, num_splits, least, row_blocks, kv_heads, group, split_stride,
    out_token_stride, out_head_stride, lse_token_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Merge the splits of every row, rotate back, write output and natural LSE.

    ``matrix`` [D, D] holds the inverse rotation with rows in the order of ``partial_out``.
    """
    pair = tl.program_id(0) // row_blocks
    block = tl.program_id(0) % row_blocks
    sequence = pair // kv_heads
    kv_head = pair % kv_heads
    q_start = tl.load(cu_query_lens + sequence)
    q_len = tl.load(cu_query_lens + sequence + 1) - q_start
    rows = block * ROWS + tl.arange(0, ROWS)
    if block * ROWS >= q_len * group:
        return
    inside = rows < q_len * group
    token = (q_start + rows // group).to(tl.int64)
    head = kv_head * group + rows % group
    at = token * (kv_heads * group) + head
    length = tl.load(seq_lens + sequence)
    first_position = length if PREFIX else length - q_len
    _, count, per_split = split_range(
        length, first_position, window, num_splits, least, WINDOW, TILE
    )
    live = (count + per_split - 1) // per_split

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for split in range(live):
        stats = partial_stats + (split * split_stride + at) * 2
        m = tl.load(stats, mask=inside, other=float("-inf"))
        s = tl.load(stats + 1, mask=inside, other=0.0)
        new_top = tl.maximum(top, m)
        safe = tl.maximum(new_top, -1e30)
        total = total * tl.exp2(top - safe) + s * tl.exp2(m - safe)
        top = new_top
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        safe = tl.maximum(new_top, -1e30)
        total = total * tl.exp2(top - safe) + tl.exp2(sink - safe)
        top = new_top
    empty = total == 0.0
    safe = tl.maximum(top, -1e30)
    share = v_step / tl.where(empty, 1.0, total)

    columns = tl.arange(0, WIDTH)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, D, STEP):
        dims = start + tl.arange(0, STEP)
        part = tl.zeros([ROWS, STEP], tl.float32)
        for split in range(live):
            row = split * split_stride + at
            m = tl.load(partial_stats + row * 2, mask=inside, other=float("-inf"))
            weight = tl.exp2(m - safe) * share
            o = tl.load(
                partial_out + row[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0
            )
            part += o * weight[:, None]
        turn = tl.load(
            matrix + dims[:, None] * D + columns[None, :], mask=columns[None, :] < D, other=0.0
        )
        result = tl.dot(part, turn, result, input_precision="ieee")
    place = token[:, None] * out_token_stride + (head * out_head_stride)[:, None] + columns[None, :]
    inside_out = inside[:, None] & (columns < D)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside_out)
    value = tl.where(
        empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    )
    tl.store(lse + token * lse_token_stride + head, value, mask=inside)
