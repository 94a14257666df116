# mypy: disable-error-code="untyped-decorator"
"""PTX for a warp that decodes packed codes straight into operands of its tensor cores.

`tq_kernels.nvidia.tile_ptx` and `tq_kernels.nvidia.wide_ptx` make texts of
``inline_asm_elementwise`` calls from these parts. The calls run on tensors of exactly one element a lane, so an operand ``r`` is one 32-bit register of each of
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
    "TABLE_REGISTERS",
    "Text",
    "constraints",
    "load_shared_words",
    "load_words",
    "lookup",
    "mma",
    "selector",
    "selectors",
    "words_per_lane",
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


class Text:
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
def selector(ptx: Text, bits: int, words: list[str], number: int) -> str:
    """Nibble-word ``number``, a code in the low bits of each nibble, from the words that hold it.

    That is the word itself for 4 bits, else one of the first plane and, for 3 bits, one of the
    second.
    """
    if bits == 4:
        return words[0]
    low = ptx.op("shr.u32", words[0], "2") if number % 2 else words[0]
    low = ptx.op("and.b32", low, "0x33333333")
    if bits == 2:
        return low
    high, position = words[1], number % 4
    if position < 2:
        high = ptx.op("shl.b32", high, str(2 - position))
    elif position > 2:
        high = ptx.op("shr.u32", high, str(position - 2))
    # (high & 0x44444444) | low
    return ptx.op("lop3.b32", high, "0x44444444", low, "0xEA")


@triton.constexpr_function
def selectors(ptx: Text, bits: int, words: list[str], count: int) -> list[str]:
    """All ``count`` nibble-words of the words of a row, of all its planes."""
    if bits == 4:
        return words
    second = count // 2
    return [
        selector(ptx, bits, [words[n // 2], *words[second + n // 4 :][:1]], n) for n in range(count)
    ]


@triton.constexpr_function
def lookup(ptx: Text, bits: int, word: str, table: list[str]) -> tuple[str, str]:
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
def mma(ptx: Text, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
    """``D = A B + C`` of signed bytes in 32-bit integers."""
    ptx.lines.append(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        f"{{{', '.join(d)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};"
    )


@triton.constexpr_function
def constraints(outputs: int, inputs: int) -> str:
    """Registers of the operands of a statement."""
    # Early clobber: results of the first products are written before all inputs are read.
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def load_words(count: int, again: bool = False) -> tuple[str, str]:
    """``count`` consecutive 32-bit words at a 64-bit address, in the widest loads allowed.

    They stay in the first cache if they are to be loaded ``again``.
    """
    cached = "" if again else ".L1::no_allocate"
    ptx = Text()
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
