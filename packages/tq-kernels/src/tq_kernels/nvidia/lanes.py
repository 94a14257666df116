# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""What the lanes of a warp pass to each other, and bytes of their registers.

Every tensor has 32 elements, one a lane. Lane ``4 g + t`` stands in group ``g`` (0-7).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tq_kernels.nvidia.ptx import load_words

__all__ = [
    "butterfly",
    "byte_of_each",
    "cap_logit",
    "half",
    "load",
    "max_over_lanes",
    "pick_bytes",
    "second_byte_of_each",
    "shuffle",
    "shuffle_float",
    "store_four",
    "sum_over_lanes",
]


@triton.jit
def shuffle(x, source):
    """Lane ``i`` receives ``x`` of lane ``source[i]``."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        "=r,r,r",
        [x, source],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def shuffle_float(x, source):
    """Lane ``i`` receives float ``x`` of lane ``source[i]``."""
    return shuffle(x.to(tl.int32, bitcast=True), source).to(tl.float32, bitcast=True)


@triton.jit
def butterfly(x, distance: tl.constexpr):
    """Lane ``i`` receives float ``x`` of lane ``i ^ distance``."""
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
        "=f,f,r",
        [x, distance],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def max_over_lanes(x, distance: tl.constexpr):
    """Largest of the 8 lanes that differ in three bits from ``distance`` on.

    With distance 4 they are the lanes of one ``t``, with 1 those of two neighbouring groups.
    """
    x = tl.maximum(x, butterfly(x, distance))
    x = tl.maximum(x, butterfly(x, 2 * distance))
    return tl.maximum(x, butterfly(x, 4 * distance))


@triton.jit
def sum_over_lanes(x, distance: tl.constexpr):
    """Sum of the lanes that `max_over_lanes` takes together."""
    x += butterfly(x, distance)
    x += butterfly(x, 2 * distance)
    return x + butterfly(x, 4 * distance)


@triton.jit
def load(address, COUNT: tl.constexpr, AGAIN: tl.constexpr = False):
    """``COUNT`` consecutive words at each lane's byte address, as a tuple.

    ``AGAIN``: the same words will be loaded again.
    """
    asm: tl.constexpr = load_words(COUNT, AGAIN)[0]
    constraints: tl.constexpr = load_words(COUNT, AGAIN)[1]
    return tl.inline_asm_elementwise(
        asm, constraints, [address], dtype=(tl.int32,) * COUNT, is_pure=False, pack=1
    )


@triton.jit
def store_four(address, a, b, c, d):
    """Four floats to each lane's byte address, a multiple of 16."""
    tl.inline_asm_elementwise(
        "st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;",
        "=r,l,f,f,f,f",
        [address, a, b, c, d],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def cap_logit(logit, soft_cap):
    """``soft_cap * tanh(logit / soft_cap)``, for powers of two."""
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 / soft_cap)))
    return soft_cap * 1.4426950408889634 * tanh


@triton.jit
def half(word, UPPER: tl.constexpr):
    """One of the two fp16 numbers of a word, as float32."""
    bits = (word >> 16) if UPPER else word
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pick_bytes(a, b, selector):
    """Four of the bytes of two words; ``selector`` as of ``prmt``."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [a, b, selector],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def byte_of_each(a, b, c, d):
    """The low bytes of four registers in one."""
    return pick_bytes(pick_bytes(a, b, 0x0040), pick_bytes(c, d, 0x0040), 0x5410)


@triton.jit
def second_byte_of_each(a, b, c, d):
    """The second bytes of four registers in one."""
    return pick_bytes(pick_bytes(a, b, 0x0051), pick_bytes(c, d, 0x0051), 0x5410)
