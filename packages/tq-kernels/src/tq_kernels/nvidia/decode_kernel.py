# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
"""Split-KV decode on packed codes, one warp a program, codes straight into int8 tensor cores.

A pair is a sequence and a KV head, or one of ``chunks`` parts of its query rows where these are more
than a program takes. A program walks its tiles (`tq_kernels.nvidia.work`) and leaves one partial
result for each pair it touched. Within a warp, with lane
``4 g + t`` (``g`` 0-7, ``t`` 0-3) and the m16n8k32 fragments of PTX:

- scores are computed transposed, ``K Qᵀ``: rows are tokens, the 8 columns are four query
  rows with a high and a low int8 digit each (16 bits of query). Lane ``(g, t)`` receives query
  row ``t`` for 8 tokens of the tile, those that `tq_kernels.nvidia.tile_loads` gives group
  ``g``;
- the weights times the value scale become two int8 digits, and shuffles turn them into the second
  operand of ``Vᵀ P``, whose result lies on lane ``(g, t)`` for query row ``t`` again. Nothing goes
  through shared memory and no barrier is needed.

Every tensor of the kernel has 32 elements, one a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tq_kernels.nvidia.lanes import (
    byte_of_each,
    cap_logit,
    half,
    load,
    max_over_lanes,
    second_byte_of_each,
    store_four,
    sum_over_lanes,
)
from tq_kernels.nvidia.query_digits import query_digits
from tq_kernels.nvidia.tile_loads import (
    fetch_values,
    first_key,
    key_offset,
    load_tile_keys,
    load_tile_values,
    pages_of_tile,
    to_value_lanes,
)
from tq_kernels.nvidia.tile_ptx import pv_tile, qk_tile
from tq_kernels.nvidia.work import entries_of_program, pair_at, tiles_of_each

__all__ = ["decode_partials", "partial_dims"]


@triton.jit
def _scores(
    keys,
    query,
    table,
    PER_ROW: tl.constexpr,
    K_BITS: tl.constexpr,
    D: tl.constexpr,
    NB: tl.constexpr,
):
    """Integer scores: for each block of rows 8 tokens of a lane, high and low digits joined."""
    NW: tl.constexpr = D // 32
    asm: tl.constexpr = qk_tile(K_BITS, NW, NB)[0]
    constraints: tl.constexpr = qk_tile(K_BITS, NW, NB)[1]
    out = ()
    for i in tl.static_range(4):
        c = tl.inline_asm_elementwise(
            asm,
            constraints,
            keys[2 * i * PER_ROW : 2 * (i + 1) * PER_ROW] + table + query,
            dtype=(tl.int32,) * (4 * NB),
            is_pure=True,
            pack=1,
        )
        for n in tl.static_range(NB):
            out = out + (c[4 * n] * 256 + c[4 * n + 1], c[4 * n + 2] * 256 + c[4 * n + 3])
    return out


@triton.jit
def _joined(sums, AT: tl.constexpr):
    """High and low digit sums ``AT`` and ``AT + 1`` as one float."""
    return (sums[AT] * 256 + sums[AT + 1]).to(tl.float32)


@triton.jit
def _weigh(
    values,
    weights,
    table,
    INDEX: tl.constexpr,
    V_BITS: tl.constexpr,
    NW: tl.constexpr,
    NB: tl.constexpr,
):
    """Integer weighted sums of the dimensions in nibble-word ``INDEX`` of both halves."""
    WORDS: tl.constexpr = 1 if V_BITS == 2 or V_BITS == 4 else 2
    ROW: tl.constexpr = NW * V_BITS // 4 if V_BITS != 3 else NW // 2 + max(1, NW // 4)
    asm: tl.constexpr = pv_tile(V_BITS, WORDS, INDEX, NB)[0]
    constraints: tl.constexpr = pv_tile(V_BITS, WORDS, INDEX, NB)[1]
    operands = ()
    for part in tl.static_range(8):
        if V_BITS == 8:
            operands = operands + (
                values[part * ROW + 2 * INDEX],
                values[part * ROW + 2 * INDEX + 1],
            )
        elif V_BITS == 3:
            operands = operands + (
                values[part * ROW + INDEX // 2],
                values[part * ROW + NW // 2 + INDEX // 4],
            )
        else:
            operands = operands + (values[part * ROW + INDEX * V_BITS // 4],)
    return tl.inline_asm_elementwise(
        asm,
        constraints,
        operands + table + weights,
        dtype=(tl.int32,) * (8 * NB),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _attend(
    keys,
    values,
    k_scales,
    v_scales,
    query,
    affine,
    limits,
    starts,
    state,
    token,
    length,
    oldest,
    lane,
    k_table,
    v_table,
    soft_cap,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    NB: tl.constexpr,
    SPREAD: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    """One tile into the running state: (max, sum, centre) of each block, then the sums of values."""
    NW: tl.constexpr = D // 32
    PER_ROW: tl.constexpr = NW * K_BITS // 4 if K_BITS != 3 else NW // 2 + max(1, NW // 4)
    DIGITS: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
    dots = _scores(keys, query, k_table, PER_ROW, K_BITS, D, NB)
    # Scales past the end and before all windows may be anything; as 0 they reach nothing.
    scales = ()
    top_scale = tl.zeros([32], tl.float32)
    for i in tl.static_range(8):
        held = token + key_offset(i, SPREAD) < length
        if WINDOW:
            held = held & (token + key_offset(i, SPREAD) >= oldest)
        scale = tl.where(held, half(v_scales[i // 2], i % 2 == 1), 0.0)
        top_scale = tl.maximum(top_scale, scale)
        scales = scales + (scale,)
    top_scale = max_over_lanes(top_scale, 4)
    weights = ()
    gains = ()
    for n in tl.static_range(NB):
        row_max = state[3 * n]
        logits = ()
        tile_max = tl.full([32], float("-inf"), tl.float32)
        for i in tl.static_range(8):
            dot = dots[(i // 2) * 2 * NB + 2 * n + i % 2].to(tl.float32)
            logit = dot * affine[3 * n] + affine[3 * n + 1]
            logit = logit * half(k_scales[i // 2], i % 2 == 1) + affine[3 * n + 2]
            if CAP:
                logit = cap_logit(logit, soft_cap)
            visible = token + key_offset(i, SPREAD) < limits[n]
            if WINDOW:
                visible = visible & (token + key_offset(i, SPREAD) >= starts[n])
            logit = tl.where(visible, logit, float("-inf"))
            tile_max = tl.maximum(tile_max, logit)
            logits = logits + (logit,)
        tile_max = max_over_lanes(tile_max, 4)
        new_max = tl.maximum(row_max, tile_max)
        safe_max = tl.maximum(new_max, -1e30)
        shrink = tl.exp2(row_max - safe_max)
        products = ()
        row_sum = state[3 * n + 1] * shrink
        for i in tl.static_range(8):
            p = tl.exp2(logits[i] - safe_max)
            row_sum += p
            products = products + (p * scales[i],)
        # A bound of the products, of this tile: the digits keep their precision where all are small.
        top = tl.maximum(tl.exp2(tile_max - safe_max) * top_scale, 1e-30)
        gain = 32639.0 / top
        unit = top * (1.0 / 32639.0)
        total = tl.zeros([32], tl.float32)
        digits = ()
        for i in tl.static_range(8):
            rounded = products[i] * gain + DIGITS
            total += rounded - DIGITS
            digits = digits + (rounded.to(tl.int32, bitcast=True),)
        low = (
            byte_of_each(digits[0], digits[1], digits[2], digits[3]),
            byte_of_each(digits[4], digits[5], digits[6], digits[7]),
        )
        high = (
            second_byte_of_each(digits[0] + 128, digits[1] + 128, digits[2] + 128, digits[3] + 128),
            second_byte_of_each(digits[4] + 128, digits[5] + 128, digits[6] + 128, digits[7] + 128),
        )
        weights = weights + to_value_lanes(high, low, lane, SPREAD)
        gains = gains + (
            new_max,
            row_sum,
            state[3 * n + 2] * shrink + total * unit,
            shrink,
            unit,
        )

    new_state = ()
    for n in tl.static_range(NB):
        new_state = new_state + (gains[5 * n], gains[5 * n + 1], gains[5 * n + 2])
    for i in tl.static_range(NW):
        sums = _weigh(values, weights, v_table, i, V_BITS, NW, NB)
        for n in tl.static_range(NB):
            for parity in tl.static_range(2):
                for side in tl.static_range(2):
                    joined = _joined(sums, parity * 4 * NB + 4 * n + 2 * side)
                    old = state[3 * NB + (i * NB + n) * 4 + parity * 2 + side]
                    new_state = new_state + (old * gains[5 * n + 3] + joined * gains[5 * n + 4],)
    return new_state


@triton.jit
def _prepared(q_digits, block, lane_g, lane_t, D: tl.constexpr):
    """Words of four rows of queries that `prepare_queries` wrote."""
    start = block.to(tl.int64) * 8 * D
    return load(q_digits.to(tl.int64) + start + lane_g * D + lane_t * (D // 4), D // 16, True)


def partial_dims(head_dim: int) -> list[int]:
    """Dimensions in the order in which partial results hold them."""
    width = head_dim // 32
    return [
        side * (head_dim // 2) + 2 * (g * width + i) + parity
        for i in range(width)
        for g in range(8)
        for parity in range(2)
        for side in range(2)
    ]


# With ``one`` = 1 known to the compiler, a product and a sum would become a plain sum.
@triton.jit(
    do_not_specialize=["one", "batch", "programs", "early", "block_table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_query_lens"],
)
def decode_partials(
    q,
    signs,
    key_center,
    pages,
    block_table,
    seq_lens,
    cu_query_lens,
    q_digits,
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
    k_center,
    v_center,
    v_step,
    logit_scale,
    center_scale,
    soft_cap,
    window,
    rounds,
    batch,
    kv_heads,
    chunks,
    group,
    programs,
    least,
    early,
    q_token_stride,
    q_head_stride,
    page_stride,
    record_stride,
    block_table_stride,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    NB: tl.constexpr,
    SPREAD: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    ROTATE: tl.constexpr,
    CENTER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial attention of every (program, pair) that meet; see the module's description.

    With ``ROTATE`` queries come from ``q`` [tokens, heads, D], else from ``q_digits`` and
    ``q_affine`` as `tq_kernels.nvidia.rows_kernel.prepare_queries` writes them. If ``early`` is not
    0 the next kernel is let in at once. ``partial_out`` float32 ``[programs + pairs, 4 NB, D]``, with
    dimensions in the order of `partial_dims`, and ``partial_stats`` float32
    ``[programs + pairs, 4 NB, 2]`` (base-2 maximum, sum) receive slot ``program + pair``.
    """
    NW: tl.constexpr = D // 32
    program = tl.program_id(0)
    lane = tl.arange(0, 32)
    lane_g = lane // 4
    lane_t = lane % 4
    if PDL and ROTATE:
        gdc_wait()
    if PDL and early != 0:
        gdc_launch_dependents()

    heads_of = kv_heads * chunks
    tiles = tiles_of_each(seq_lens, cu_query_lens, batch, window, BATCH_BLOCK, WINDOW)
    entries = tiles * heads_of
    ends = tl.cumsum(entries, 0)
    total, taken = entries_of_program(entries, programs, least)
    position = program * taken
    stop = tl.minimum(position + taken, total)
    while position < stop:
        sequence, length, query_start, query_len, head_chunk, first, count = pair_at(
            position, stop, entries, ends, seq_lens, cu_query_lens, window, BATCH_BLOCK, WINDOW
        )
        kv_head = head_chunk // chunks
        pair = sequence * heads_of + head_chunk
        table = block_table + sequence.to(tl.int64) * block_table_stride
        last_page = tl.maximum(length - 1, 0) // PAGE

        head = pages.to(tl.int64) + kv_head.to(tl.int64) * record_stride
        found = pages_of_tile(table, first, last_page, lane_g, lane_t, SPREAD, PAGE)
        keys, k_scales = load_tile_keys(
            head,
            found,
            first,
            lane_g,
            lane_t,
            page_stride,
            K_BITS,
            V_BITS,
            D,
            PAGE,
            SPREAD,
        )
        fetch_values(head, found, first, lane_g, lane_t, page_stride, K_BITS, V_BITS, D, PAGE)
        if PDL and not ROTATE:
            # Only queries come from the kernel before; a first tile is on its way already.
            gdc_wait()
        query = ()
        affine = ()
        limits = ()
        starts = ()
        state = ()
        for n in tl.static_range(NB):
            first_row = (head_chunk % chunks * NB + n) * 4
            if ROTATE:
                row = first_row + lane_g // 2
                valid = row < query_len * group
                words, numbers = query_digits(
                    q,
                    signs,
                    key_center,
                    tl.where(valid, query_start + row // group, 0),
                    tl.where(valid, kv_head * group + row % group, 0),
                    kv_head,
                    valid,
                    lane,
                    q_token_stride,
                    q_head_stride,
                    rounds,
                    logit_scale,
                    center_scale,
                    k_center,
                    D,
                    CENTER,
                )
                query = query + words
                affine = affine + numbers
            else:
                if NB < 4:
                    query = query + _prepared(q_digits, pair * NB + n, lane_g, lane_t, D)
                for part in tl.static_range(3):
                    at = ((pair * NB + n) * 4 + lane_t).to(tl.int64) * 4 + part
                    affine = affine + (tl.load(q_affine + at),)
            row = first_row + lane_t
            limit = tl.minimum(length - query_len + row // group + 1, length)
            limits = limits + (limit,)
            starts = starts + (limit - window,)
            state = state + (tl.full([32], float("-inf"), tl.float32),)
            state = state + (tl.zeros([32], tl.float32), tl.zeros([32], tl.float32))
        for _ in tl.static_range(NB * D // 8):
            state = state + (tl.zeros([32], tl.float32),)

        for tile in range(first, first + count):
            # Values arrive while scores are computed, the next keys while values are summed.
            values, v_scales = load_tile_values(
                head,
                found,
                tile,
                lane_g,
                lane_t,
                page_stride,
                K_BITS,
                V_BITS,
                D,
                PAGE,
                SPREAD,
            )
            ahead = tl.minimum(tile + 1, first + count - 1)
            found = pages_of_tile(table, ahead, last_page, lane_g, lane_t, SPREAD, PAGE)
            rows = query
            if NB == 4:
                # Held from tile to tile they would push other registers into memory.
                for n in tl.static_range(NB):
                    rows = rows + _prepared(q_digits, pair * NB + n, lane_g, lane_t, D)
            state = _attend(
                keys,
                values,
                k_scales,
                v_scales,
                rows,
                affine,
                limits,
                starts,
                state,
                first_key(tile, lane_g, SPREAD),
                length,
                length - query_len + 1 - window,
                lane,
                (k_table0, k_table1, k_table2, k_table3, one),
                (v_table0, v_table1, v_table2, v_table3, one),
                soft_cap,
                K_BITS,
                V_BITS,
                D,
                NB,
                SPREAD,
                WINDOW,
                CAP,
            )
            keys, k_scales = load_tile_keys(
                head,
                found,
                ahead,
                lane_g,
                lane_t,
                page_stride,
                K_BITS,
                V_BITS,
                D,
                PAGE,
                SPREAD,
            )

        slot = (program + pair).to(tl.int64)
        for n in tl.static_range(NB):
            row = slot * (4 * NB) + n * 4 + lane_t
            row_sum = sum_over_lanes(state[3 * n + 1], 4)
            centre = sum_over_lanes(state[3 * n + 2], 4) * v_center
            tl.store(partial_stats + row * 2, state[3 * n], mask=lane_g == 0)
            tl.store(partial_stats + row * 2 + 1, row_sum, mask=lane_g == 0)
            for i in tl.static_range(NW):
                store_four(
                    partial_out.to(tl.int64) + (row * D + i * 32 + lane_g * 4) * 4,
                    (state[3 * NB + (i * NB + n) * 4] - centre) * v_step,
                    (state[3 * NB + (i * NB + n) * 4 + 1] - centre) * v_step,
                    (state[3 * NB + (i * NB + n) * 4 + 2] - centre) * v_step,
                    (state[3 * NB + (i * NB + n) * 4 + 3] - centre) * v_step,
                )
        position += count
    if PDL:
        # Not earlier where programs are many: waiting ones would take room from those that work.
        gdc_launch_dependents()
