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

__all__ = ["load_words", "pv_tile", "qk_tile"]

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
def _constraints(outputs: int, inputs: int) -> str:
    # Early clobber: results of the first products are written before all inputs are read.
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


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
            if bits == 4:
                selector = own[0]
            else:
                low = ptx.op("shr.u32", own[0], "2") if select % 2 else own[0]
                selector = ptx.op("and.b32", low, "0x33333333")
                if bits == 3:
                    high, position = own[1], select % 4
                    if position < 2:
                        high = ptx.op("shl.b32", high, str(2 - position))
                    elif position > 2:
                        high = ptx.op("shr.u32", high, str(position - 2))
                    selector = ptx.op("lop3.b32", high, "0x44444444", selector, "0xEA")
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
