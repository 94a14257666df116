# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Tokens of pages as keys and values in the rotated space, for dense attention on them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tq_kernels.format import KVFormat
from tq_kernels.portable.unpack import (
    field_count,
    key_words,
    load_scales,
    number,
    table_words,
    value_words,
)
from tq_kernels.quantize import step_of

__all__ = ["expand_pages", "key_order"]

#: Tokens of a program.
TOKENS = 16


def key_order(fmt: KVFormat) -> list[int]:
    """Dimension at each place of an expanded key: field by field."""
    fields = field_count(fmt.k_bits)
    return [fields * n + j for j in range(fields) for n in range(fmt.head_dim // fields)]


@triton.jit(
    do_not_specialize=["start", "tokens"],
    do_not_specialize_on_alignment=["table"],
)
def expand_kernel(
    pages, table, k, v, start, tokens, kv_heads, page_stride, record_stride, k_step, v_step,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    TOKENS: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """Tokens ``start`` (a multiple of 4) and more of one sequence and head, ``TOKENS`` of them."""
    FIELDS: tl.constexpr = 4 if K_BITS == 8 else 8
    head = tl.program_id(1)
    here = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = here < tokens
    token = start + here
    page = tl.load(table + token // PAGE, mask=inside, other=0).to(tl.int64)
    record = pages + page * page_stride + head.to(tl.int64) * record_stride
    scale = load_scales(record, token % PAGE, inside, False, K_BITS, V_BITS, D, PAGE) * k_step
    n = tl.arange(0, K_WIDTH)
    mask = inside[:, None] & (n < D // FIELDS)[None, :]
    words = key_words(record[:, None], (token % PAGE)[:, None], n[None, :], mask, K_BITS, D, PAGE)
    rows = k + (here.to(tl.int64) * kv_heads + head)[:, None] * D + n[None, :]
    for j in tl.static_range(FIELDS):
        x = number(words, j, K_BITS, K0, K1).to(tl.float32) * scale[:, None]
        tl.store(rows + j * (D // FIELDS), x.to(k.dtype.element_ty), mask=mask)

    QUADS: tl.constexpr = TOKENS // 4
    quad = tl.program_id(0) * TOKENS + 4 * tl.arange(0, QUADS)
    exists = quad < tokens
    first = start + quad
    page = tl.load(table + first // PAGE, mask=exists, other=0).to(tl.int64)
    record = pages + page * page_stride + head.to(tl.int64) * record_stride
    m = tl.arange(0, V_WIDTH)
    mask = exists[:, None] & (m < D // 2)[None, :]
    for parity in tl.static_range(2):
        words = value_words(
            record[:, None], (first % PAGE // 4)[:, None], m[None, :], mask, parity,
            V_BITS, K_BITS, D, PAGE,
        )  # fmt: skip
        for t in tl.static_range(4):
            live = quad + t < tokens
            scale = load_scales(record, first % PAGE + t, live, True, K_BITS, V_BITS, D, PAGE)
            x = number(words, t if V_BITS == 8 else 2 * t + parity, V_BITS, V0, V1).to(tl.float32)
            x = x * (scale * v_step)[:, None]
            row = ((quad + t).to(tl.int64) * kv_heads + head)[:, None] * D + parity * (D // 2)
            tl.store(v + row + m[None, :], x.to(v.dtype.element_ty), mask=mask & live[:, None])


def expand_constants(fmt: KVFormat) -> dict[str, int]:
    """Constants of `expand_kernel`."""
    k_table, v_table = table_words(fmt.k_codebook), table_words(fmt.v_codebook)
    return {
        "D": fmt.head_dim,
        "K_BITS": fmt.k_bits,
        "V_BITS": fmt.v_bits,
        "PAGE": fmt.page_size,
        "TOKENS": TOKENS,
        "K_WIDTH": triton.next_power_of_2(fmt.head_dim // field_count(fmt.k_bits)),
        "V_WIDTH": triton.next_power_of_2(fmt.head_dim // 2),
        "K0": k_table[0],
        "K1": k_table[1],
        "V0": v_table[0],
        "V1": v_table[1],
    }


def expand_pages(
    pages: Tensor, table: Tensor, start: int, k: Tensor, v: Tensor, fmt: KVFormat
) -> None:
    """Write tokens ``start`` and more of one sequence, as many as ``k`` and ``v`` have.

    Parameters
    ----------
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    table : int32 tensor [max_pages]
    start : int
        A multiple of 4.
    k, v : contiguous fp16 or float32 tensors [tokens, kv_heads, head_dim]
        Rotated, in the order of `key_order` and `unpack.value_order`.
    fmt : KVFormat
    """
    tokens, kv_heads, _ = k.shape
    expand_kernel[(-(-tokens // TOKENS), kv_heads)](
        pages, table, k, v, start, tokens, kv_heads, pages.stride(0), pages.stride(1),
        step_of(fmt, "k"), step_of(fmt, "v"),
        **expand_constants(fmt), num_warps=2,
    )  # fmt: skip
