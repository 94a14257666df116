# mypy: disable-error-code="untyped-decorator"
"""PTX fragments for a warp that decodes packed codes straight into int8 tensor-core operands.

Every function returns the text of one ``inline_asm_elementwise`` call. The calls run on
tensors of exactly one element a lane, so an operand ``r`` is one 32-bit register of each of
the 32 lanes and warp-collective instructions (``mma.sync``, ``shfl.sync``) may stand inside.

A nibble-word of 8 codes becomes two registers of four bytes with ``prmt``, which looks four
table entries up at once. For 4 bits the table has 16 entries and ``prmt`` reads 8: bit 3 of a
selector makes it replicate the sign of the entry, which is 0 because levels are at most 127,
so the lower and the upper half are looked up apart and added. The sum is a product by one and
a sum, which the multipliers compute: all else here keeps the integer units busy.
"""

from __future__ import annotations

import triton

__all__ = [
    "load_shared_words",
    "load_words",
    "pv_tile",
    "pv_wide",
    "qk_tile",
    "qk_wide",
    "raise_maximum",
    "sums_wide",
]

#: Registers of the lookup table, whatever the bit width (unused ones are 0), and one that holds 1.
TABLE_REGISTERS = 5


@triton.constexpr_function
def words_per_lane(bits: int, nibble_words: int) -> int:
    """32-bit words that hold ``nibble_words`` nibble-words of ``bits``-bit codes."""
    return (
        max(1, nibble_words * bits // 4)
        if bits != 3
        else nibble_words // 2 + max(1, nibble_words // 4)
    )


class _Text:
    """PTX under construction: operand names by position, fresh temporaries by demand."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.temporaries = 0

    def new(self) -> str:
        self.temporaries += 1
        return f"t{self.temporaries - 1}"

    def op(self, instruction: str, *operands: str) -> str:
        result = self.new()
        self.lines.append(f"{instruction} {result}, {', '.join(operands)};")
        return result

    def zero(self) -> str:
        return self.op("mov.b32", "0")

    def text(self) -> str:
        head = f".reg .b32 t<{self.temporaries}>;" if self.temporaries else ""
        return "{\n" + head + "\n" + "\n".join(self.lines) + "\n}"


@triton.constexpr_function
def _nibble_words(ptx: _Text, bits: int, words: list[str], count: int) -> list[str]:
    """Selectors (one code in the low bits of each nibble) from the words of all planes."""
    if bits == 4:
        return words
    out = []
    for n in range(count):
        low = words[n // 2]
        if n % 2:
            low = ptx.op("shr.u32", low, "2")
        low = ptx.op("and.b32", low, "0x33333333")
        if bits == 3:
            high = words[count // 2 + n // 4]
            position = n % 4
            if position < 2:
                high = ptx.op("shl.b32", high, str(2 - position))
            elif position > 2:
                high = ptx.op("shr.u32", high, str(position - 2))
            # (high & 0x44444444) | low
            low = ptx.op("lop3.b32", high, "0x44444444", low, "0xEA")
        out.append(low)
    return out


@triton.constexpr_function
def _lookup(ptx: _Text, bits: int, word: str, table: list[str]) -> tuple[str, str]:
    """Levels of nibbles 0-3 and 4-7 of a selector word, a byte each."""
    upper = ptx.op("shr.u32", word, "16")
    if bits < 4:
        return ptx.op("prmt.b32", table[0], table[1], word), ptx.op(
            "prmt.b32", table[0], table[1], upper
        )
    flipped = ptx.op("xor.b32", word, "0x88888888")
    flipped_upper = ptx.op("shr.u32", flipped, "16")
    low = ptx.op(
        "mad.lo.u32",
        ptx.op("prmt.b32", table[0], table[1], word),
        table[4],
        ptx.op("prmt.b32", table[2], table[3], flipped),
    )
    high = ptx.op(
        "mad.lo.u32",
        ptx.op("prmt.b32", table[0], table[1], upper),
        table[4],
        ptx.op("prmt.b32", table[2], table[3], flipped_upper),
    )
    return low, high


@triton.constexpr_function
def _mma(ptx: _Text, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
    ptx.lines.append(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        f"{{{', '.join(d)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


@triton.constexpr_function
def _mma_bf16(ptx: _Text, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
    ptx.lines.append(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        f"{{{', '.join(d)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


@triton.constexpr_function
def _two_bf16(ptx: _Text, word: str, first: int, second: int) -> str:
    """bf16 numbers 128 + byte for two bytes below 128: 0x43 before a byte is that in bf16."""
    return ptx.op("prmt.b32", word, "0x43434343", f"0x4{second}4{first}")


@triton.constexpr_function
def _value_selector(ptx: _Text, bits: int, own: list[str], select: int) -> str:
    """Selectors of the nibble-word ``select`` of values from the words that hold it."""
    if bits == 4:
        return own[0]
    low = ptx.op("shr.u32", own[0], "2") if select % 2 else own[0]
    selector = ptx.op("and.b32", low, "0x33333333")
    if bits == 3:
        high, position = own[1], select % 4
        if position < 2:
            high = ptx.op("shl.b32", high, str(2 - position))
        elif position > 2:
            high = ptx.op("shr.u32", high, str(position - 2))
        selector = ptx.op("lop3.b32", high, "0x44444444", selector, "0xEA")
    return selector


@triton.constexpr_function
def _constraints(outputs: int, inputs: int) -> str:
    # Early clobber: results of the first products are written before all inputs are read.
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def _tied(outputs: int, inputs: list[str]) -> str:
    """Float outputs that start as the first inputs."""
    return ",".join(["=&f"] * outputs + [str(i) for i in range(outputs)] + inputs)


@triton.constexpr_function
def load_words(count: int, again: bool = False) -> tuple[str, str]:
    """``count`` consecutive 32-bit words at a 64-bit address, in the widest loads allowed.

    They stay in the first cache if they are to be loaded ``again``.
    """
    cached = "" if again else ".L1::no_allocate"
    ptx = _Text()
    width = 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1
    for i in range(0, count, width):
        registers = ", ".join(f"${j}" for j in range(i, i + width))
        vector = f".v{width}" if width > 1 else ""
        target = f"{{{registers}}}" if width > 1 else registers
        ptx.lines.append(f"ld.global.nc{cached}{vector}.b32 {target}, [${count} + {4 * i}];")
    return ptx.text(), ",".join(["=&r"] * count + ["l"])


@triton.constexpr_function
def load_shared_words(count: int) -> tuple[str, str]:
    """The same at a 32-bit address of shared memory."""
    text, _ = load_words(count, True)
    return text.replace("ld.global.nc", "ld.shared"), ",".join(["=&r"] * count + ["r"])


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
    ptx = _Text()
    if bits < 8:
        selectors = [_nibble_words(ptx, bits, row, nibble_words) for row in rows]
    zero = [ptx.zero()] * 4
    for n in range(nibble_words):
        if bits < 8:
            pairs = [_lookup(ptx, bits, s[n], table) for s in selectors]
        else:
            pairs = [
                [ptx.op("xor.b32", r[2 * n + i], "0x80808080") for i in range(2)] for r in rows
            ]
        for block in range(blocks):
            d = outputs[4 * block : 4 * block + 4]
            b = query[2 * (block * nibble_words + n) : 2 * (block * nibble_words + n) + 2]
            _mma(ptx, d, [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]], b, d if n else zero)
    return ptx.text(), _constraints(len(outputs), len(inputs))


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
    ptx = _Text()
    fragments = []
    for combination in range(8):
        own = inputs[combination * words : (combination + 1) * words]
        if bits == 8:
            even = ptx.op("xor.b32", own[0], "0x80808080")
            odd = ptx.op("xor.b32", own[1], "0x80808080")
        else:
            selector = _value_selector(ptx, bits, own, select)
            first, second = _lookup(ptx, bits, selector, table)
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
                _mma(ptx, d, a, b, d if step else zero)
    return ptx.text(), _constraints(len(outputs), len(inputs))


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
    ptx = _Text()
    if bits < 8:
        selectors = _nibble_words(ptx, bits, row, nibble_words)
    start = [ptx.op("mov.b32", "0x4B400000")] * 4
    for n in range(nibble_words):
        if bits < 8:
            b = list(_lookup(ptx, bits, selectors[n], table))
        else:
            b = [ptx.op("xor.b32", row[2 * n + i], "0x80808080") for i in range(2)]
        for digit in range(2):
            d = [f"${4 * digit + i}" for i in range(4)]
            at = 4 * (digit * nibble_words + n)
            _mma(ptx, d, query[at : at + 4], b, d if n else start)
    return ptx.text(), _constraints(8, sum(counts))


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
    ptx = _Text()
    for step in range(steps):
        for side in range(2):
            at = (2 * step + side) * words
            selector = _value_selector(ptx, bits, own[at : at + words], select)
            levels = _lookup(ptx, bits, selector, table)
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
    ptx = _Text()
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
