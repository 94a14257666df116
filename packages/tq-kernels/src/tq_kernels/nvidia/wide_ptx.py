# mypy: disable-error-code="untyped-decorator"
"""PTX of `tq_kernels.nvidia.wide_kernel`: products with 16 query rows, and their running maxima."""

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

__all__ = ["pv_wide", "qk_wide", "raise_maximum", "sums_wide"]


@triton.constexpr_function
def _mma_bf16(ptx: Text, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
    ptx.lines.append(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        f"{{{', '.join(d)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


@triton.constexpr_function
def _two_bf16(ptx: Text, word: str, first: int, second: int) -> str:
    """bf16 numbers 128 + byte for two bytes below 128: 0x43 before a byte is that in bf16."""
    return ptx.op("prmt.b32", word, "0x43434343", f"0x4{second}4{first}")


@triton.constexpr_function
def _tied(outputs: int, inputs: list[str]) -> str:
    """Float outputs that start as the first inputs."""
    return ",".join(["=&f"] * outputs + [str(i) for i in range(outputs)] + inputs)


@triton.constexpr_function
def qk_wide(bits: int, nibble_words: int) -> tuple[str, str]:
    """Integer dot products of 8 keys with two digits of 16 query rows.

    Outputs: 4 accumulators of the high digit, 4 of the low one. All start at 0x4B400000 and end as
    the bits of the float 1.5 * 2^23 plus the product. Inputs: the words of the lane's quarter of a
    key, the table, then for each digit and nibble-word four query registers.
    """
    per_row = words_per_lane(bits, nibble_words)
    counts = (per_row, TABLE_REGISTERS, 8 * nibble_words)
    names = iter([f"${8 + i}" for i in range(sum(counts))])
    row, table, query = ([next(names) for _ in range(count)] for count in counts)
    ptx = Text()
    if bits < 8:
        nibbles = selectors(ptx, bits, row, nibble_words)
    start = [ptx.op("mov.b32", "0x4B400000")] * 4
    for n in range(nibble_words):
        if bits < 8:
            b = list(lookup(ptx, bits, nibbles[n], table))
        else:
            b = [ptx.op("xor.b32", row[2 * n + i], "0x80808080") for i in range(2)]
        for digit in range(2):
            d = [f"${4 * digit + i}" for i in range(4)]
            at = 4 * (digit * nibble_words + n)
            mma(ptx, d, query[at : at + 4], b, d if n else start)
    return ptx.text(), constraints(8, sum(counts))


@triton.constexpr_function
def pv_wide(bits: int, words: int, select: int, steps: int) -> tuple[str, str]:
    """Weighted sums of ``16 steps`` tokens' values, for 16 rows of weights, on top of those before.

    Values are bf16 numbers 128 + level. Of them lane ``4 g + t`` has quad ``t`` of each step.
    Outputs: for each half of the dimensions and then even and odd ones 4 float accumulators. Inputs:
    for each step and each half the ``words`` words that hold the nibble-word ``select``; the table;
    4 registers of weights a step; the 16 accumulators before.
    """
    counts = (2 * steps * words, TABLE_REGISTERS, 4 * steps)
    names = iter([f"${32 + i}" for i in range(sum(counts))])
    own, table, weights = ([next(names) for _ in range(count)] for count in counts)
    ptx = Text()
    for step in range(steps):
        for side in range(2):
            at = (2 * step + side) * words
            nibbles = selector(ptx, bits, own[at : at + words], select)
            levels = lookup(ptx, bits, nibbles, table)
            for parity in range(2):
                at = 4 * (2 * side + parity)
                d = [f"${at + i}" for i in range(4)]
                b = [_two_bf16(ptx, word, parity, parity + 2) for word in levels]
                _mma_bf16(ptx, d, weights[4 * step : 4 * step + 4], b, d)
    return ptx.text(), _tied(16, ["r"] * sum(counts))


@triton.constexpr_function
def sums_wide(steps: int) -> tuple[str, str]:
    """Sums of the weights of 16 rows on top of those before: products with ones.

    Outputs: 4 float accumulators. Inputs: those before, 4 registers of weights a step.
    """
    ptx = Text()
    ones = ptx.op("mov.b32", "0x3F803F80")
    d = [f"${i}" for i in range(4)]
    for step in range(steps):
        a = [f"${8 + 4 * step + i}" for i in range(4)]
        _mma_bf16(ptx, d, a, [ones] * 2, d)
    return ptx.text(), _tied(4, ["r"] * 4 * steps)


@triton.constexpr_function
def raise_maximum(sums: int, slack: float) -> tuple[str, str]:
    """Take over the maxima of new logits and shrink sums, if one is more than ``slack`` above.

    Outputs: what logits of rows ``g`` and ``g + 8`` are taken relative to, a sum of the lane for
    either, then groups of four sums, two of row ``g`` and two of ``g + 8``. Inputs: the same before,
    then the largest new logits of either row in this lane.
    """
    outputs = 4 + sums
    new = [f"${2 * outputs + i}" for i in range(2)]
    lines = [".reg .pred p, q;", ".reg .f32 x, y, f0, f1;"]
    for r in range(2):
        lines.append(f"add.f32 x, ${r}, {slack};")
        joined = "setp.gt.or.f32 p, {}, x, p;" if r else "setp.gt.f32 p, {}, x;"
        lines.append(joined.format(new[r]))
    lines += ["vote.sync.any.pred q, p, 0xffffffff;", "@!q bra DONE;"]
    for r in range(2):
        lines.append(f"max.f32 x, ${r}, {new[r]};")
        for distance in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 y, x, {distance}, 31, 0xffffffff;")
            lines.append("max.f32 x, x, y;")
        lines.append("max.f32 y, x, 0fF149F2CA;")  # -1e30
        lines.append(f"sub.f32 y, ${r}, y;")
        lines.append(f"ex2.approx.ftz.f32 f{r}, y;")
        lines.append(f"mov.b32 ${r}, x;")
        lines.append(f"mul.f32 ${2 + r}, ${2 + r}, f{r};")
    for i in range(sums):
        lines.append(f"mul.f32 ${4 + i}, ${4 + i}, f{i % 4 // 2};")
    text = "{\n" + "\n".join(lines) + "\nDONE: mov.b32 y, 0;\n}"
    return text, _tied(outputs, ["f"] * 2)
