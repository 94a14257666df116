# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
"""Queries of one warp: Hadamard rotation in registers, then two int8 digits.

A warp takes four rows. Lane ``4 g + t`` holds row ``g div 2`` and, of it, the ``D/8`` dimensions
from ``t D/4 + (g mod 2) D/8`` on. Other rotations, and programs of more rows, take the queries of
`tq_kernels.nvidia.rows_kernel.prepare_queries`, a kernel that gives the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tq_kernels.nvidia.lanes import (
    butterfly,
    byte_of_each,
    half,
    load,
    max_over_lanes,
    second_byte_of_each,
    shuffle,
    shuffle_float,
    sum_over_lanes,
)

__all__ = ["query_digits"]


@triton.jit
def _load_row(q, address, valid, COUNT: tl.constexpr):
    """``COUNT`` 16-bit numbers from each lane's address on, 0 where not ``valid``."""
    words = load(address.to(tl.int64), COUNT // 2)
    x = ()
    for i in tl.static_range(COUNT):
        if q.dtype.element_ty == tl.bfloat16:
            bits = (words[i // 2] & -65536) if i % 2 else (words[i // 2] << 16)
            value = bits.to(tl.float32, bitcast=True)
        else:
            value = half(words[i // 2], i % 2 == 1)
        x = x + (tl.where(valid, value, 0.0),)
    return x


@triton.jit
def _flip_sign(x, bits, AT: tl.constexpr):
    """``x`` with its sign changed where bit ``AT`` of ``bits`` is set."""
    flipped = x.to(tl.int32, bitcast=True) ^ ((bits << (31 - AT)) & -2147483648)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def _hadamard_round(x, bits, lane, COUNT: tl.constexpr):
    """Signs, then the Walsh-Hadamard transform without its factor, of the rows of a warp."""
    signed = ()
    for i in tl.static_range(COUNT):
        signed = signed + (_flip_sign(x[i], bits, i),)
    x = signed
    # Dimensions of a lane have the lowest bits of the index, then comes g mod 2, then t.
    for stage in tl.static_range(5):
        if 1 << stage < COUNT:
            y = ()
            for i in tl.static_range(COUNT):
                if i & (1 << stage):
                    y = y + (x[i - (1 << stage)] - x[i],)
                else:
                    y = y + (x[i] + x[i + (1 << stage)],)
            x = y
    for stage in tl.static_range(3):
        own = tl.where((lane & (1 << stage)) == 0, 1.0, -1.0)
        y = ()
        for i in tl.static_range(COUNT):
            y = y + (x[i] * own + butterfly(x[i], 1 << stage),)
        x = y
    return x


@triton.jit
def query_digits(
    q,
    signs,
    key_center,
    token,
    head,
    kv_head,
    valid,
    lane,
    q_token_stride,
    q_head_stride,
    rounds,
    logit_scale,
    center_scale,
    k_center,
    D: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Rotated rows as digits in the lanes of the second operand of the scores.

    ``signs`` int32 ``[rounds, 8]`` has a bit for each dimension of a lane's part of a row, set
    where it changes sign. Returns the ``D/16`` words of lane ``4 g + t`` (digit ``g mod 2`` of row
    ``g div 2``) and three floats for query row ``t``: the scale and offset that turn an integer dot
    product into a base-2 logit before the key's scale, and the logit of the key centre.
    """
    COUNT: tl.constexpr = D // 8
    t = lane % 4
    digit = (lane // 4) % 2
    dims = t * (D // 4) + digit * COUNT
    row = q + token.to(tl.int64) * q_token_stride + head.to(tl.int64) * q_head_stride
    sign_bits = signs + t * 2 + digit
    bits = tl.load(sign_bits)  # not only when the row is there
    x = _load_row(q, row + dims, valid, COUNT)
    top = tl.full([32], 1e-30, tl.float32)
    for i in tl.static_range(COUNT):
        top = tl.maximum(top, tl.abs(x[i]))
    center = tl.zeros([32], tl.float32)
    if CENTER:
        for i in tl.static_range(COUNT):
            center += x[i] * tl.load(key_center + kv_head * D + dims + i).to(tl.float32)
        center = sum_over_lanes(center, 1) * center_scale
    # A power of two keeps the sums of any input in range without rounding it.
    unit = tl.exp2(tl.floor(tl.log2(max_over_lanes(top, 1))))
    scaled = ()
    for i in tl.static_range(COUNT):
        scaled = scaled + (x[i] / unit,)
    x = scaled
    for n in range(rounds):
        x = _hadamard_round(x, bits, lane, COUNT)
        bits = tl.load(sign_bits + tl.minimum(n + 1, rounds - 1) * 8)
    peak = tl.full([32], 1e-30, tl.float32)
    for i in tl.static_range(COUNT):
        peak = tl.maximum(peak, tl.abs(x[i]))
    peak = max_over_lanes(peak, 1)
    gain = 32639.0 / peak
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
    total = tl.zeros([32], tl.float32)
    numbers = ()
    for i in tl.static_range(COUNT):
        rounded = x[i] * gain + ROUND
        total += rounded - ROUND
        numbers = numbers + (rounded.to(tl.int32, bitcast=True),)
    total = sum_over_lanes(total, 1)
    # A lane keeps one digit of its dimensions and gets the same digit of its neighbour's.
    first = ()
    second = ()
    for n in tl.static_range(COUNT // 4):
        a, b, c, d = numbers[4 * n], numbers[4 * n + 1], numbers[4 * n + 2], numbers[4 * n + 3]
        low = byte_of_each(a, b, c, d)
        high = second_byte_of_each(a + 128, b + 128, c + 128, d + 128)
        own = tl.where(digit == 0, high, low)
        other = shuffle(tl.where(digit == 0, low, high), lane ^ 4)
        first = first + (tl.where(digit == 0, own, other),)
        second = second + (tl.where(digit == 0, other, own),)
    scale = unit * (peak * (logit_scale / 32639.0))
    offset = -k_center * total * scale
    source = 8 * t
    affine = (
        shuffle_float(scale, source),
        shuffle_float(offset, source),
        shuffle_float(center, source),
    )
    return first + second, affine
