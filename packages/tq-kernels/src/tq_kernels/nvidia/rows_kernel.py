# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""What surrounds the warp kernel: queries into int8 digits, partial results into outputs.

Both kernels work on *rows*, ``4 NB`` for each pair of
`tq_kernels.nvidia.decode_kernel`. Row ``4 NB pair + r`` of chunk ``c`` of a sequence and KV
head is, with ``n = 4 NB c + r``, query ``n div group`` of the sequence and query head
``kv_head * group + n mod group``; rows past the last query are padding. The rotation is a dense
matrix product on tensor cores, with the fp16 matrices of
`tq_kernels.portable.rotation_tile.rotation_parts`, ``STEP`` rows or columns of them at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tq_kernels.nvidia.work import entries_of_program, tiles_of_each

__all__ = ["combine_partials", "prepare_queries"]


@triton.jit
def _row_place(rows, cu_query_lens, group, kv_heads, chunks, pairs, ROWS_PER_PAIR: tl.constexpr):
    """Pair, sequence, KV head, query token, query head and validity of each row."""
    pair = rows // ROWS_PER_PAIR
    inside = rows % ROWS_PER_PAIR + pair % chunks * ROWS_PER_PAIR
    exists = pair < pairs
    sequence = tl.where(exists, pair // chunks // kv_heads, 0)
    kv_head = pair // chunks % kv_heads
    start = tl.load(cu_query_lens + sequence)
    query_len = tl.load(cu_query_lens + sequence + 1) - start
    valid = exists & (inside < query_len * group)
    token = (start + inside // group).to(tl.int64)
    head = kv_head * group + inside % group
    return pair, sequence, kv_head, token, head, valid


@triton.jit
def _matrix_part(rotation, n, rows, columns, D: tl.constexpr):
    """Rows and columns of part ``n`` of a rotation."""
    return tl.load(rotation + n * D * D + rows[:, None] * D + columns[None, :])


@triton.jit(
    do_not_specialize=["pairs"],
    do_not_specialize_on_alignment=["cu_query_lens"],
)
def prepare_queries(
    q,
    rotation,
    cu_query_lens,
    key_center,
    q_digits,
    q_affine,
    logit_scale,
    center_scale,
    k_center,
    group,
    kv_heads,
    chunks,
    pairs,
    q_token_stride,
    q_head_stride,
    D: tl.constexpr,
    NB: tl.constexpr,
    ROWS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate queries and split them into two int8 digits.

    ``q_digits`` int8 ``[pairs, NB, 4, 2, D]``, or ``[pairs, 32, 2, D/32, 16]`` if ``WIDE``: for each
    lane and digit the fragments of `tq_kernels.nvidia.wide_kernel`. ``q_affine`` float32
    ``[pairs, NB, 4, 4]``: the scale and offset that turn an integer dot product into a base-2 logit
    before the key's scale, the logit of the key centre, and one number that is not used.
    """
    if PDL:
        # In this order: what the next kernel loads before it waits may be new as well.
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    _, _, kv_head, token, head, valid = _row_place(
        rows, cu_query_lens, group, kv_heads, chunks, pairs, 4 * NB
    )
    offsets = token * q_token_stride + head.to(tl.int64) * q_head_stride
    x = tl.load(q + offsets[:, None] + dims[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    # A power of two brings any input into the range of fp16 without rounding it.
    top = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    unit = tl.exp2(tl.floor(tl.log2(top)))
    y = tl.zeros([ROWS, D], tl.float32)
    for start in tl.static_range(0, D, STEP):
        some = start + tl.arange(0, STEP)
        if STEP == D:
            scaled = x / unit[:, None]
        else:
            again = q + offsets[:, None] + some[None, :]
            scaled = tl.load(again, mask=valid[:, None], other=0.0).to(tl.float32) / unit[:, None]
        for n in tl.static_range(PARTS):
            y = tl.dot(scaled.to(tl.float16), _matrix_part(rotation, n, some, dims, D), y)
    peak = tl.maximum(tl.max(tl.abs(y), 1), 1e-30)
    inside = rows < pairs * 4 * NB
    rounded = (y * (32639.0 / peak)[:, None] + 12582912.0) - 12582912.0
    total = tl.sum(rounded, 1)
    digits = rounded.to(tl.int32)
    high = (digits + 128) >> 8
    low = digits - high * 256
    if WIDE:
        of_row = rows // 16 * (32 * D) + rows % 8 * (4 * D) + rows % 16 // 8 * 4
        of_dim = dims // (D // 4) * D + dims % (D // 4) // 8 * 16 + dims % 8 // 4 * 8 + dims % 4
        place = of_row.to(tl.int64)[:, None] + of_dim[None, :]
    else:
        place = (rows * (2 * D)).to(tl.int64)[:, None] + dims[None, :]
    tl.store(q_digits + place, high.to(tl.int8), mask=inside[:, None])
    SECOND: tl.constexpr = D // 2 if WIDE else D
    tl.store(q_digits + place + SECOND, low.to(tl.int8), mask=inside[:, None])
    scale = unit * (peak * (logit_scale / 32639.0))
    center = tl.zeros([ROWS], tl.float32)
    if CENTER:
        mu = tl.load(
            key_center + kv_head[:, None] * D + dims[None, :], mask=valid[:, None], other=0.0
        )
        center = tl.sum(x * mu.to(tl.float32), 1) * center_scale
    tl.store(q_affine + rows * 4, scale, mask=inside)
    tl.store(q_affine + rows * 4 + 1, -k_center * total * scale, mask=inside)
    tl.store(q_affine + rows * 4 + 2, center, mask=inside)


@triton.jit(
    do_not_specialize=["batch", "pairs", "programs"],
    do_not_specialize_on_alignment=["seq_lens", "cu_query_lens", "lse"],
)
def combine_partials(
    partial_out,
    partial_stats,
    seq_lens,
    cu_query_lens,
    rotation,
    sinks,
    out,
    lse,
    rotation_scale,
    batch,
    group,
    kv_heads,
    chunks,
    programs,
    least,
    pairs,
    window,
    out_token_stride,
    out_head_stride,
    lse_token_stride,
    D: tl.constexpr,
    NB: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the partial results of every row, rotate back and write output and LSE.

    With ``SPLITS`` = 1 a program merges ``ROWS`` rows one partial result after the other;
    otherwise it merges one row, ``SPLITS`` partial results at a time.
    """
    RP: tl.constexpr = 4 * NB
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    pair, sequence, _kv_head, token, head, valid = _row_place(
        rows, cu_query_lens, group, kv_heads, chunks, pairs, RP
    )
    sequences = tl.arange(0, BATCH_BLOCK)
    tile_counts = tiles_of_each(seq_lens, cu_query_lens, batch, window, BATCH_BLOCK, WINDOW)
    heads_of = kv_heads * chunks
    _total, per_program = entries_of_program(tile_counts * heads_of, programs, least)
    before = tl.sum(tl.where(sequences[None, :] < sequence[:, None], tile_counts[None, :], 0), 1)
    tiles = tl.sum(tl.where(sequences[None, :] == sequence[:, None], tile_counts[None, :], 0), 1)
    start = before * heads_of + pair % heads_of * tiles
    first = start // per_program
    count = tl.where(valid & (tiles > 0), (start + tiles - 1) // per_program - first + 1, 0)
    slot = first + pair
    if STEP == D:
        matrix = _matrix_part(rotation, 0, dims, dims, D)
    if PDL:
        gdc_wait()

    if SPLITS == 1:
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        for i in range(tl.max(count, 0)):
            live = i < count
            at = (slot + i).to(tl.int64) * RP + rows % RP
            m = tl.load(partial_stats + at * 2, mask=live, other=float("-inf"))
            s = tl.load(partial_stats + at * 2 + 1, mask=live, other=0.0)
            o = tl.load(
                partial_out + at[:, None] * D + dims[None, :], mask=live[:, None], other=0.0
            )
            new_max = tl.maximum(row_max, m)
            safe = tl.maximum(new_max, -1e30)
            old = tl.exp2(row_max - safe)
            new = tl.exp2(m - safe)
            acc = acc * old[:, None] + o * new[:, None]
            row_sum = row_sum * old + s * new
            row_max = new_max
    else:
        # one row: ROWS is 1 and reductions over it give scalars
        splits = tl.arange(0, SPLITS)
        n = tl.max(count, 0)
        base = tl.max(slot, 0).to(tl.int64)
        row = tl.max(rows % RP, 0)
        best = tl.full([SPLITS], float("-inf"), tl.float32)
        part_sum = tl.zeros([SPLITS], tl.float32)
        part = tl.zeros([SPLITS, D], tl.float32)
        for i in range(0, n, SPLITS):
            live = i + splits < n
            at = (base + i + splits) * RP + row
            m = tl.load(partial_stats + at * 2, mask=live, other=float("-inf"))
            s = tl.load(partial_stats + at * 2 + 1, mask=live, other=0.0)
            o = tl.load(
                partial_out + at[:, None] * D + dims[None, :], mask=live[:, None], other=0.0
            )
            new_best = tl.maximum(best, m)
            safe = tl.maximum(new_best, -1e30)
            old = tl.exp2(best - safe)
            new = tl.exp2(m - safe)
            part = part * old[:, None] + o * new[:, None]
            part_sum = part_sum * old + s * new
            best = new_best
        top = tl.max(best, 0)
        share = tl.exp2(best - tl.maximum(top, -1e30))
        row_max = tl.full([ROWS], 0.0, tl.float32) + top
        row_sum = tl.full([ROWS], 0.0, tl.float32) + tl.sum(part_sum * share, 0)
        acc = tl.sum(part * share[:, None], 0)[None, :] + tl.zeros([ROWS, D], tl.float32)

    denominator = row_sum
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=float("-inf")).to(tl.float32)
        sink = sink * 1.4426950408889634
        new_max = tl.maximum(row_max, sink)
        safe = tl.maximum(new_max, -1e30)
        old = tl.exp2(row_max - safe)
        acc = acc * old[:, None]
        denominator = row_sum * old + tl.exp2(sink - safe)
        row_max = new_max
    empty = denominator == 0.0
    acc = acc / tl.where(empty, 1.0, denominator)[:, None]
    if ROWS > 1:
        # fp16 has 11 bits of mantissa: the remainder goes into a second product
        scale = tl.maximum(tl.max(tl.abs(acc), 1), 1e-30)
        scaled = acc / scale[:, None]
        high = scaled.to(tl.float16)
        low = (scaled - high.to(tl.float32)).to(tl.float16)
    place = token[:, None] * out_token_stride + (head * out_head_stride)[:, None]
    for start in tl.static_range(0, D, STEP):
        columns = start + tl.arange(0, STEP)
        if STEP < D:
            matrix = _matrix_part(rotation, 0, dims, columns, D)
        if ROWS == 1:
            whole = matrix.to(tl.float32)
            for n in tl.static_range(1, PARTS):
                whole += _matrix_part(rotation, n, dims, columns, D).to(tl.float32)
            result = tl.sum(tl.sum(acc, 0)[:, None] * whole, 0)[None, :]
        else:
            result = tl.dot(high, matrix)
            result = tl.dot(low, matrix, result)
            for n in tl.static_range(1, PARTS):
                result = tl.dot(high, _matrix_part(rotation, n, dims, columns, D), result)
            result = result * scale[:, None]
        result = result * rotation_scale
        tl.store(
            out + place + columns[None, :], result.to(out.dtype.element_ty), mask=valid[:, None]
        )
    value = tl.where(empty, float("-inf"), (row_max + tl.log2(denominator)) * 0.6931471805599453)
    tl.store(lse + token * lse_token_stride + head, value, mask=valid)
