# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
"""Split-KV decode on packed codes for 16 query rows a program: int8 scores and bf16 weights.

As `tq_kernels.nvidia.decode_kernel`, with a warp a program and one element a lane in every tensor,
but for programs of many rows: several query tokens, or many heads on a KV head. With lane
``4 g + t`` (``g`` 0-7, ``t`` 0-3) and the fragments of PTX:

- scores are ``Q Kᵀ``, for the high and the low int8 digit of queries: lane ``(g, t)`` brings a quarter
  of key ``g`` of 8, and receives rows ``g`` and ``g + 8`` for keys ``2 t`` and ``2 t + 1``;
- keys are dealt so that the four that lane ``(g, t)`` receives of 16 tokens are quad ``t`` of them.
  These are the weights that it needs as the first operand of ``P V``, and quad ``t`` are the
  values that it loads as the second: nothing moves between lanes;
- weights times value scales are bf16, and values bf16 numbers from 128 on. Sums of the weights as
  rounded, from a product with ones, take the difference off again;
- sums are only rescaled when a logit exceeds what they are relative to by more than `SLACK`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tq_kernels.nvidia.lanes import butterfly, cap_logit, half, load, store_four
from tq_kernels.nvidia.stages import (
    claim,
    commit,
    issue_step,
    place_of,
    step_key,
    step_quad,
    step_scales,
    wait,
)
from tq_kernels.nvidia.wide_ptx import pv_wide, qk_wide, raise_maximum, sums_wide
from tq_kernels.nvidia.work import entries_of_program, pair_at, tiles_of_each

__all__ = ["decode_wide", "wide_dims"]

#: Powers of two that a weight may exceed 1 by before sums are rescaled.
SLACK = tl.constexpr(8.0)


def wide_dims(head_dim: int) -> list[int]:
    """Dimensions in the order in which partial results hold them."""
    width = head_dim // 32
    return [
        side * (head_dim // 2) + 2 * ((2 * t + n % 2) * width + i) + n // 2
        for i in range(width)
        for side in range(2)
        for t in range(4)
        for n in range(4)
    ]


@triton.jit
def _sum_of_row(x):
    x += butterfly(x, 1)
    return x + butterfly(x, 2)


@triton.jit
def _two_to_bf16(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;",
        "=r,f,f",
        [high, low],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _scores(keys, query, table, K_BITS: tl.constexpr, D: tl.constexpr):
    """Products of rows ``g`` (two keys) and ``g + 8`` (two) with the high digit, then the low one.

    Each is 1.5 * 2^23 more than it is.
    """
    asm: tl.constexpr = qk_wide(K_BITS, D // 32)[0]
    constraints: tl.constexpr = qk_wide(K_BITS, D // 32)[1]
    return tl.inline_asm_elementwise(
        asm, constraints, keys + table + query, dtype=(tl.int32,) * 8, is_pure=True, pack=1
    )


@triton.jit
def _raise(state, tops, D: tl.constexpr):
    asm: tl.constexpr = raise_maximum(4 + D // 2, SLACK)[0]
    constraints: tl.constexpr = raise_maximum(4 + D // 2, SLACK)[1]
    return tl.inline_asm_elementwise(
        asm,
        constraints,
        state + tops,
        dtype=(tl.float32,) * (8 + D // 2),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _add_weights(sums, weights, STEPS: tl.constexpr):
    asm: tl.constexpr = sums_wide(STEPS)[0]
    constraints: tl.constexpr = sums_wide(STEPS)[1]
    return tl.inline_asm_elementwise(
        asm, constraints, sums + weights, dtype=(tl.float32,) * 4, is_pure=True, pack=1
    )


@triton.jit
def _weigh(
    values,
    weights,
    table,
    sums,
    INDEX: tl.constexpr,
    V_BITS: tl.constexpr,
    NW: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sums of the dimensions in nibble-word ``INDEX`` of both halves, on top of those before."""
    WORDS: tl.constexpr = 2 if V_BITS == 3 else 1
    ROW: tl.constexpr = NW * V_BITS // 4 if V_BITS != 3 else NW // 2 + max(1, NW // 4)
    asm: tl.constexpr = pv_wide(V_BITS, WORDS, INDEX, STEPS)[0]
    constraints: tl.constexpr = pv_wide(V_BITS, WORDS, INDEX, STEPS)[1]
    operands = ()
    for part in tl.static_range(2 * STEPS):
        if V_BITS == 3:
            operands = operands + (
                values[part * ROW + INDEX // 2],
                values[part * ROW + NW // 2 + INDEX // 4],
            )
        else:
            operands = operands + (values[part * ROW + INDEX * V_BITS // 4],)
    return tl.inline_asm_elementwise(
        asm,
        constraints,
        sums + operands + table + weights,
        dtype=(tl.float32,) * 16,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _attend(
    stage,
    lane_g,
    lane_t,
    query,
    affine,
    limits,
    starts,
    state,
    token,
    edge,
    length,
    oldest,
    k_table,
    v_table,
    soft_cap,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    STEPS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    """Take ``16 STEPS`` tokens into the state.

    That is, of two rows each: what logits are relative to, the lane's sums of weights, sums of
    weights times scales (four), and sums of values.
    """
    NW: tl.constexpr = D // 32
    SIZE: tl.constexpr = place_of("end", K_BITS, V_BITS, D)
    logits0 = ()
    logits1 = ()
    scales = ()
    for s in tl.static_range(STEPS):
        step = stage + s * SIZE
        k_scales = step_scales(step, lane_t, "k_scales", K_BITS, V_BITS, D)
        v_scales = step_scales(step, lane_t, "v_scales", K_BITS, V_BITS, D)
        for part in tl.static_range(2):
            key = step_key(step, lane_g // 2 * 4 + lane_g % 2 + 2 * part, lane_t, K_BITS, V_BITS, D)
            dots = _scores(key, query, k_table, K_BITS, D)
            for n in tl.static_range(2):
                scale = half(k_scales[part], n == 1)
                scales = scales + (half(v_scales[part], n == 1),)
                high = dots[n].to(tl.float32, bitcast=True)
                low = dots[4 + n].to(tl.float32, bitcast=True)
                dot = tl.fma(low, affine[0], tl.fma(high, affine[1], affine[2]))
                logits0 = logits0 + (dot * scale + affine[3],)
                high = dots[2 + n].to(tl.float32, bitcast=True)
                low = dots[6 + n].to(tl.float32, bitcast=True)
                dot = tl.fma(low, affine[4], tl.fma(high, affine[5], affine[6]))
                logits1 = logits1 + (dot * scale + affine[7],)
    if CAP:
        capped0 = ()
        capped1 = ()
        for n in tl.static_range(4 * STEPS):
            capped0 = capped0 + (cap_logit(logits0[n], soft_cap),)
            capped1 = capped1 + (cap_logit(logits1[n], soft_cap),)
        logits0 = capped0
        logits1 = capped1
    if edge:
        # Scales past the end and before all windows may be anything; as 0 they reach nothing.
        held_scales = ()
        seen0 = ()
        seen1 = ()
        for n in tl.static_range(4 * STEPS):
            place = token + n // 4 * 16 + n % 4
            held = place < length
            visible0 = place < limits[0]
            visible1 = place < limits[1]
            if WINDOW:
                held = held & (place >= oldest)
                visible0 = visible0 & (place >= starts[0])
                visible1 = visible1 & (place >= starts[1])
            held_scales = held_scales + (tl.where(held, scales[n], 0.0),)
            seen0 = seen0 + (tl.where(visible0, logits0[n], float("-inf")),)
            seen1 = seen1 + (tl.where(visible1, logits1[n], float("-inf")),)
        scales = held_scales
        logits0 = seen0
        logits1 = seen1
    top0 = logits0[0]
    top1 = logits1[0]
    for n in tl.static_range(1, 4 * STEPS):
        top0 = tl.maximum(top0, logits0[n])
        top1 = tl.maximum(top1, logits1[n])
    state = _raise(state, (top0, top1), D)
    base0 = tl.maximum(state[0], -1e30)
    base1 = tl.maximum(state[1], -1e30)
    sum0 = state[2]
    sum1 = state[3]
    operand = ()
    for n in tl.static_range(2 * STEPS):
        p0 = tl.exp2(logits0[2 * n] - base0)
        p1 = tl.exp2(logits0[2 * n + 1] - base0)
        sum0 += p0 + p1
        operand = operand + (_two_to_bf16(p0 * scales[2 * n], p1 * scales[2 * n + 1]),)
        p0 = tl.exp2(logits1[2 * n] - base1)
        p1 = tl.exp2(logits1[2 * n + 1] - base1)
        sum1 += p0 + p1
        operand = operand + (_two_to_bf16(p0 * scales[2 * n], p1 * scales[2 * n + 1]),)
    values = ()
    for s in tl.static_range(STEPS):
        values = values + step_quad(stage + s * SIZE, lane_g, lane_t, K_BITS, V_BITS, D)
    new_state = (state[0], state[1], sum0, sum1) + _add_weights(state[4:8], operand, STEPS)
    for i in tl.static_range(NW):
        sums = state[8 + 16 * i : 24 + 16 * i]
        new_state = new_state + _weigh(values, operand, v_table, sums, i, V_BITS, NW, STEPS)
    return new_state


@triton.jit
def _pages_of(table, tile, last_page, PAGE: tl.constexpr, STEPS: tl.constexpr):
    """Page of each step of a tile."""
    found = ()
    for s in tl.static_range(STEPS):
        found = found + (tl.load(table + tl.minimum((tile * STEPS + s) * 16 // PAGE, last_page)),)
    return found


@triton.jit
def _issue_tile(
    head,
    found,
    tile,
    finish,
    page_stride,
    target,
    lane,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Copy a tile on these pages to shared memory, if there is one, as a group."""
    for s in tl.static_range(STEPS):
        issue_step(
            head + found[s].to(tl.int64) * page_stride,
            0 if PAGE == 16 else (tile * STEPS + s) * 16 % PAGE,
            target + s * place_of("end", K_BITS, V_BITS, D),
            tile < finish,
            lane,
            K_BITS,
            V_BITS,
            D,
            PAGE,
        )
    commit(lane)


# With ``one`` = 1 known to the compiler, a product and a sum would become a plain sum.
@triton.jit(
    do_not_specialize=["one", "batch", "programs", "block_table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_query_lens"],
)
def decode_wide(
    pages,
    block_table,
    seq_lens,
    cu_query_lens,
    queries,
    q_affine,
    partial_out,
    partial_stats,
    k_table0,
    k_table1,
    k_table2,
    k_table3,
    v_table0,
    v_table1,
    v_table2,
    v_table3,
    one,
    v_middle,
    v_step,
    soft_cap,
    window,
    batch,
    kv_heads,
    chunks,
    group,
    programs,
    least,
    page_stride,
    record_stride,
    block_table_stride,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial attention of every (program, pair) that meet; see the module's description.

    ``queries`` int8 ``[pairs, 32, 2, D/32, 16]`` and ``q_affine`` come from
    `tq_kernels.nvidia.rows_kernel.prepare_queries`. ``partial_out`` float32
    ``[programs + pairs, 16, D]``, with dimensions in the order of `wide_dims`, and ``partial_stats``
    float32 ``[programs + pairs, 16, 2]`` (what weights are relative to in base 2, their sum) receive
    slot ``program + pair``.
    """
    NW: tl.constexpr = D // 32
    TILE: tl.constexpr = 16 * STEPS
    BYTES: tl.constexpr = STEPS * place_of("end", K_BITS, V_BITS, D)
    lane = tl.arange(0, 32)
    stages = claim(lane, STAGES * BYTES)
    lane_g = lane // 4
    lane_t = lane % 4

    heads_of = kv_heads * chunks
    tiles = tiles_of_each(seq_lens, cu_query_lens, batch, window, BATCH_BLOCK, WINDOW)
    entries = tiles * heads_of
    ends = tl.cumsum(entries, 0)
    total, taken = entries_of_program(entries, programs, least)
    position = tl.program_id(0) * taken
    stop = tl.minimum(position + taken, total)
    while position < stop:
        sequence, length, _query_start, query_len, head_chunk, first, count = pair_at(
            position, stop, entries, ends, seq_lens, cu_query_lens, window, BATCH_BLOCK, WINDOW
        )
        pair = sequence * heads_of + head_chunk
        table = block_table + sequence.to(tl.int64) * block_table_stride
        last_page = tl.maximum(length - 1, 0) // PAGE
        head = pages.to(tl.int64) + (head_chunk // chunks).to(tl.int64) * record_stride
        begin = first * (64 // TILE)
        finish = begin + count * (64 // TILE)

        # No lane still reads what the last pair left.
        wait(lane, 0)
        for n in tl.static_range(STAGES - 1):
            ahead = _pages_of(table, begin + n, last_page, PAGE, STEPS)
            _issue_tile(
                head, ahead, begin + n, finish, page_stride, stages + n * BYTES, lane,
                K_BITS, V_BITS, D, PAGE, STEPS,
            )  # fmt: skip
        following = _pages_of(table, begin + (STAGES - 1), last_page, PAGE, STEPS)
        if PDL:
            # Only queries come from the kernel before; first keys are on their way already.
            gdc_wait()
        fragments = queries.to(tl.int64) + (pair * 32 + lane).to(tl.int64) * D
        query = load(fragments, D // 4)
        affine = ()
        limits = ()
        starts = ()
        OFFSET: tl.constexpr = 12582912.0 * 257.0  # of both digits: see `_scores`
        for r in tl.static_range(2):
            at = q_affine + (pair * 16 + lane_g + 8 * r).to(tl.int64) * 4
            scale = tl.load(at)
            affine = affine + (scale, scale * 256.0, tl.load(at + 1) - OFFSET * scale)
            affine = affine + (tl.load(at + 2),)
            number = head_chunk % chunks * 16 + lane_g + 8 * r
            limit = tl.minimum(length - query_len + number // group + 1, length)
            limits = limits + (limit,)
            starts = starts + (limit - window,)
        state = ()
        for _ in tl.static_range(2):
            state = state + (tl.full([32], float("-inf"), tl.float32),)
        for _ in tl.static_range(6 + 16 * NW):
            state = state + (tl.zeros([32], tl.float32),)
        oldest = length - query_len + 1 - window

        for tile in range(begin, finish):
            wait(lane, STAGES - 2)
            turn = tile - begin
            _issue_tile(
                head, following, tile + (STAGES - 1), finish, page_stride,
                stages + (turn + (STAGES - 1)) % STAGES * BYTES, lane,
                K_BITS, V_BITS, D, PAGE, STEPS,
            )  # fmt: skip
            following = _pages_of(table, tile + STAGES, last_page, PAGE, STEPS)
            edge = (tile + 1) * TILE > length - query_len + 1
            if WINDOW:
                edge = edge | (tile * TILE < length - window)
            state = _attend(
                stages + turn % STAGES * BYTES,
                lane_g,
                lane_t,
                query,
                affine,
                limits,
                starts,
                state,
                tile * TILE + 4 * lane_t,
                edge,
                length,
                oldest,
                (k_table0, k_table1, k_table2, k_table3, one),
                (v_table0, v_table1, v_table2, v_table3, one),
                soft_cap,
                K_BITS,
                V_BITS,
                D,
                STEPS,
                WINDOW,
                CAP,
            )

        slot = (tl.program_id(0) + pair).to(tl.int64)
        for r in tl.static_range(2):
            row = slot * 16 + lane_g + 8 * r
            row_sum = _sum_of_row(state[2 + r])
            # Values were taken for 128 more than they are, and levels from 0 on.
            excess = state[4 + 2 * r] * (128.0 + v_middle)
            tl.store(partial_stats + row * 2, state[r], mask=lane_t == 0)
            tl.store(partial_stats + row * 2 + 1, row_sum, mask=lane_t == 0)
            for i in tl.static_range(NW):
                for side in tl.static_range(2):
                    store_four(
                        partial_out.to(tl.int64) + (row * D + i * 32 + side * 16 + lane_t * 4) * 4,
                        (state[8 + 16 * i + 8 * side + 2 * r] - excess) * v_step,
                        (state[9 + 16 * i + 8 * side + 2 * r] - excess) * v_step,
                        (state[12 + 16 * i + 8 * side + 2 * r] - excess) * v_step,
                        (state[13 + 16 * i + 8 * side + 2 * r] - excess) * v_step,
                    )
        position += count
    if PDL:
        # Not earlier: waiting programs would take room from the ones that work.
        gdc_launch_dependents()
