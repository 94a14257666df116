# mypy: disable-error-code="untyped-decorator"
"""PTX of `tq_kernels.nvidia.decode_kernel`: int8 products of 64 tokens with blocks of 4 query rows."""

from __future__ import annotations

import triton

from tq_kernels.nvidia.ptx import (
    TABLE_REGISTERS,
    Text,
    constraints,
    lookup,
    mma,
    selector,
    selectors,
    words_per_lane,
)

__all__ = ["pv_tile", "qk_tile"]


@triton.constexpr_function
def qk_tile(bits: int, nibble_words: int, blocks: int) -> tuple[str, str]:
    """Integer dot products of 16 tokens with ``blocks`` groups of 8 query columns.

    Outputs: 4 accumulators a block. Inputs: the words of token row g, of row g + 8, the
    table, then for each block and each nibble-word two query registers.
    """
    per_row = words_per_lane(bits, nibble_words)
    outputs = [f"${i}" for i in range(4 * blocks)]
    inputs = [
        f"${4 * blocks + i}"
        for i in range(2 * per_row + TABLE_REGISTERS + 2 * nibble_words * blocks)
    ]
    rows = [inputs[:per_row], inputs[per_row : 2 * per_row]]
    table = inputs[2 * per_row : 2 * per_row + TABLE_REGISTERS]
    query = inputs[2 * per_row + TABLE_REGISTERS :]
    ptx = Text()
    if bits < 8:
        nibbles = [selectors(ptx, bits, row, nibble_words) for row in rows]
    zero = [ptx.zero()] * 4
    for n in range(nibble_words):
        if bits < 8:
            pairs = [lookup(ptx, bits, row[n], table) for row in nibbles]
        else:
            pairs = [
                [ptx.op("xor.b32", r[2 * n + i], "0x80808080") for i in range(2)] for r in rows
            ]
        for block in range(blocks):
            d = outputs[4 * block : 4 * block + 4]
            b = query[2 * (block * nibble_words + n) : 2 * (block * nibble_words + n) + 2]
            mma(ptx, d, [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]], b, d if n else zero)
    return ptx.text(), constraints(len(outputs), len(inputs))


@triton.constexpr_function
def pv_tile(bits: int, words: int, select: int, blocks: int) -> tuple[str, str]:
    """Integer sums of 64 tokens' values for two dimensions a row of the fragment.

    Inputs: for k-step 0, 1, quad 0, 1 of it and row g, g + 8 (8 combinations) the ``words``
    words that hold the nibble-word ``select``; the table; four registers of weights a block.
    Outputs: for even then odd dimension, for each block, 4 accumulators.
    """
    outputs = [f"${i}" for i in range(8 * blocks)]
    inputs = [f"${8 * blocks + i}" for i in range(8 * words + TABLE_REGISTERS + 4 * blocks)]
    table = inputs[8 * words : 8 * words + TABLE_REGISTERS]
    weights = inputs[8 * words + TABLE_REGISTERS :]
    ptx = Text()
    fragments = []
    for combination in range(8):
        own = inputs[combination * words : (combination + 1) * words]
        if bits == 8:
            even = ptx.op("xor.b32", own[0], "0x80808080")
            odd = ptx.op("xor.b32", own[1], "0x80808080")
        else:
            first, second = lookup(ptx, bits, selector(ptx, bits, own, select), table)
            # bytes (token 0: even, odd; token 1: even, odd) -> four tokens of one dimension
            even = ptx.op("prmt.b32", first, second, "0x6420")
            odd = ptx.op("prmt.b32", first, second, "0x7531")
        fragments.append((even, odd))
    zero = [ptx.zero()] * 4
    for parity in range(2):
        for step in range(2):
            a = [
                fragments[4 * step + 2 * quad + row][parity]
                for quad in range(2)
                for row in range(2)
            ]
            for block in range(blocks):
                d = outputs[4 * (parity * blocks + block) : 4 * (parity * blocks + block) + 4]
                b = weights[4 * block + 2 * step : 4 * block + 2 * step + 2]
                mma(ptx, d, a, b, d if step else zero)
    return ptx.text(), constraints(len(outputs), len(inputs))
