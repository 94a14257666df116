"""Inline PTX in Triton's interpreter: enough of it to run the NVIDIA kernels of one warp on a CPU.

Every tensor that such a kernel passes to ``inline_asm_elementwise`` has 32 elements, one a lane, so a
register is an array of 32 words, and instructions of a whole warp (``mma``, ``shfl``) see all of it.
The semantics are those of the PTX ISA manual.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["INSTRUCTIONS", "install", "run"]

Words = NDArray[Any]

LANES = 32
GROUP, THREAD = np.arange(LANES) // 4, np.arange(LANES) % 4


def words(x: Words) -> Words:
    """Any 32-bit array as uint32, scalars for all lanes."""
    x = np.broadcast_to(np.asarray(x), (LANES,))
    return x.view(np.uint64) if x.itemsize == 8 else np.ascontiguousarray(x).view(np.uint32)


def _byte(word: Words, index: int) -> Words:
    """Byte ``index`` of every lane."""
    return (word >> np.uint32(8 * index)) & np.uint32(255)


def signed_bytes(registers: list[Words]) -> Words:
    """int64 [registers, lanes, 4]: the bytes of each register."""
    return np.stack(registers).view(np.int8).reshape(len(registers), LANES, 4).astype(np.int64)


def bf16_numbers(registers: list[Words]) -> Words:
    """float32 [registers, lanes, 2]: the bf16 numbers of each register."""
    data = np.stack(registers).view(np.uint16).reshape(len(registers), LANES, 2)
    return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def operand_a(parts: Words) -> Words:
    """Matrix ``A`` [16, 4 * width * 2] from four registers of ``width`` numbers a lane."""
    width = parts.shape[-1]
    a = np.zeros((16, 8 * width), parts.dtype)
    for register in range(4):
        for i in range(width):
            column = THREAD * width + i + 4 * width * (register // 2)
            a[GROUP + 8 * (register % 2), column] = parts[register, :, i]
    return a


def operand_b(parts: Words) -> Words:
    """Matrix ``B`` [8 * width, 8] from two registers of ``width`` numbers a lane."""
    width = parts.shape[-1]
    b = np.zeros((8 * width, 8), parts.dtype)
    for register in range(2):
        for i in range(width):
            b[THREAD * width + i + 4 * width * register, GROUP] = parts[register, :, i]
    return b


def accumulators(matrix: Words) -> list[Words]:
    """Four registers of the result [16, 8]."""
    return [matrix[GROUP + 8 * (i // 2), 2 * THREAD + i % 2] for i in range(4)]


def result_matrix(registers: list[Words]) -> Words:
    """The inverse of `accumulators`."""
    matrix = np.zeros((16, 8), registers[0].dtype)
    for i, register in enumerate(registers):
        matrix[GROUP + 8 * (i // 2), 2 * THREAD + i % 2] = register
    return matrix


def _truth_table(a: Words, b: Words, c: Words, table: Words) -> Words:
    """``lop3``: bit ``4 a + 2 b + c`` of the table."""
    out = np.zeros(LANES, np.uint32)
    for bits in range(8):
        if int(table[0]) >> bits & 1:
            chosen = [x if bits >> (2 - i) & 1 else ~x for i, x in enumerate((a, b, c))]
            out |= chosen[0] & chosen[1] & chosen[2]
    return out


def _permute(a: Words, b: Words, selector: Words) -> Words:
    """``prmt``: a byte of the pair for each nibble, or its sign eight times where bit 3 is set."""
    pool = np.stack([_byte(x, i) for x in (a, b) for i in range(4)])
    out = np.zeros(LANES, np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        chosen = pool[choice & 7, np.arange(LANES)]
        sign = np.where(chosen & 128, np.uint32(255), np.uint32(0))
        out |= np.where(choice & 8, sign, chosen) << np.uint32(8 * i)
    return out


def _of_floats(function: Callable[..., Words]) -> Callable[..., Words]:
    return lambda *inputs: function(*(x.view(np.float32) for x in inputs)).view(np.uint32)


def _nearest_bf16(x: Words) -> Words:
    """Upper halves of floats, rounded to the nearest, ties to even."""
    odd = x >> np.uint32(16) & np.uint32(1)
    return np.asarray((x + np.uint32(0x7FFF) + odd) >> np.uint32(16), np.uint32)


def _two_to_bf16(high: Words, low: Words) -> Words:
    return np.asarray(_nearest_bf16(low) | _nearest_bf16(high) << np.uint32(16), np.uint32)


def _shuffle(x: Words, source: Any, clamp: Words, mask: Words) -> Words:
    assert (clamp == 31).all()
    assert (mask == 0xFFFFFFFF).all()
    return np.asarray(x[source], np.uint32)


#: Instructions of one result whose lanes do not meet, and shuffles.
INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda x: x,
    "mov.u32": lambda x: x,
    "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor,
    "shr.u32": np.right_shift,
    "shl.b32": np.left_shift,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _truth_table,
    "prmt.b32": _permute,
    "add.f32": _of_floats(np.add),
    "sub.f32": _of_floats(np.subtract),
    "mul.f32": _of_floats(np.multiply),
    "max.f32": _of_floats(np.fmax),
    "ex2.approx.ftz.f32": _of_floats(np.exp2),
    "cvt.rn.bf16x2.f32": _two_to_bf16,
    "shfl.sync.idx.b32": lambda x, source, *rest: _shuffle(x, source & 31, *rest),
    "shfl.sync.bfly.b32": lambda x, at, *rest: _shuffle(x, np.arange(LANES) ^ at, *rest),
}


class Shared:
    """Shared memory of a program, and copies to it that are on their way."""

    def __init__(self) -> None:
        self.data = bytearray(b"\xff" * 65536)
        self.pending: list[tuple[int, bytes]] = []
        self.groups: list[list[tuple[int, bytes]]] = []

    def commit(self) -> None:
        """All copies since the last time become a group."""
        self.groups.append(self.pending)
        self.pending = []

    def wait(self, later: int) -> None:
        """Let all groups but the last ``later`` arrive."""
        while len(self.groups) > later:
            for target, data in self.groups.pop(0):
                self.data[target : target + len(data)] = data


SHARED = [Shared()]


class Warp:
    """Registers of one asm statement."""

    def __init__(self, operands: dict[str, Words]) -> None:
        self.registers = operands

    def get(self, name: str) -> Words:
        """A register or an immediate."""
        name = name.strip()
        if re.fullmatch(r"-?\d+|0[xf][0-9a-fA-F]+", name):
            return np.full(LANES, int(name.replace("0f", "0x"), 0) & 0xFFFFFFFF, np.uint32)
        if re.fullmatch(r"-?\d+\.\d+", name):
            return np.full(LANES, float(name), np.float32).view(np.uint32)
        return self.registers[name]

    def address(self, text: str) -> Words:
        """Addresses of ``[register + offset]``."""
        name, _, offset = text.strip("[] ").partition("+")
        return self.get(name).astype(np.uint64) + np.uint64(int(offset or 0))

    def run(self, line: str) -> str | None:
        """One instruction; returns the label where to go on, if not with the next."""
        if line.startswith("@"):
            predicate, _, line = line.partition(" ")
            wanted = self.get(predicate.strip("@!")) != predicate.startswith("@!")
            if line.startswith("cp.async"):
                self.copy([x.strip() for x in re.findall(r"\[[^\]]*\]", line)], wanted)
                return None
            assert line.startswith("bra ")
            assert wanted.all() or not wanted.any(), "lanes part"
            return line.split()[1] if wanted.all() else None
        name, _, rest = line.partition(" ")
        arguments = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        kind = name.split(".")[0]
        if name == ".shared":
            SHARED[0] = Shared()
            self.registers["stages"] = np.zeros(LANES, np.uint32)
        elif name == "cp.async.commit_group":
            SHARED[0].commit()
        elif name == "cp.async.wait_group":
            SHARED[0].wait(int(arguments[0]))
        elif name == "bar.warp.sync":
            pass
        elif name == "vote.sync.any.pred":
            self.registers[arguments[0]] = np.full(LANES, self.get(arguments[1]).any())
        elif kind == "setp":
            self.registers[arguments[0]] = self.compare(name.split("."), arguments[1:])
        elif kind == "st":
            self.store(arguments)
        elif kind == "mma":
            self.mma(name, arguments)
        elif kind == "ld":
            self.load(name, arguments)
        elif kind == "prefetch":
            self.address(arguments[0])
        elif name == "mov.b32" and arguments[1].startswith("{"):
            low, high = (self.get(x) for x in arguments[1].strip("{}").split(","))
            self.registers[arguments[0]] = (low & 0xFFFF) | (high << np.uint32(16))
        else:
            inputs = [self.get(x) for x in arguments[1:]]
            with np.errstate(all="ignore"):
                self.registers[arguments[0]] = INSTRUCTIONS[name](*inputs)
        return None

    def compare(self, parts: list[str], arguments: list[str]) -> Words:
        """``setp``, for all lanes."""
        a, b, *other = (self.get(x) for x in arguments)
        if parts[-1] == "f32":
            a, b = a.view(np.float32), b.view(np.float32)
        found = {"gt": np.greater, "lt": np.less, "ne": np.not_equal}[parts[1]](a, b)
        if other:
            return found | other[0] if parts[2] == "or" else found & other[0]
        return found

    def store(self, arguments: list[str]) -> None:
        """Four words of each lane."""
        data = np.stack([self.get(x.strip()) for x in arguments[1].strip("{}").split(",")], 1)
        at = self.address(arguments[0])
        assert not (at % np.uint64(16)).any(), "misaligned"
        for address, own in zip(at, np.ascontiguousarray(data, np.uint32), strict=True):
            ctypes.memmove(int(address), own.ctypes.data, 16)

    def mma(self, name: str, arguments: list[str]) -> None:
        """``D = A B + C``."""
        d, a, b, c = ([x.strip() for x in part.strip("{}").split(",")] for part in arguments)
        left, right, before = ([self.get(x) for x in part] for part in (a, b, c))
        if name == "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32":
            product = operand_a(signed_bytes(left)) @ operand_b(signed_bytes(right))
            total = product + result_matrix([x.view(np.int32).astype(np.int64) for x in before])
            assert np.abs(total).max() < 2**31
            done = [x.astype(np.int32).view(np.uint32) for x in accumulators(total)]
        elif name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
            product = operand_a(bf16_numbers(left)) @ operand_b(bf16_numbers(right))
            total = product + result_matrix([x.view(np.float32) for x in before])
            done = [x.astype(np.float32).view(np.uint32) for x in accumulators(total)]
        else:
            raise NotImplementedError(name)
        self.registers.update(zip(d, done, strict=True))

    def copy(self, arguments: list[str], wanted: Words) -> None:
        """16 bytes of each lane that wants them."""
        targets, sources = (self.address(x) for x in arguments)
        assert not (targets % 16).any()
        assert not (sources % 16).any()
        for target, source, own in zip(targets, sources, wanted, strict=True):
            if own:
                data = ctypes.string_at(int(source), 16)
                SHARED[0].pending.append((int(target), data))

    def load(self, name: str, arguments: list[str]) -> None:
        """Loads of one or more words, or of one half-word."""
        targets = [x.strip() for x in arguments[0].strip("{}").split(",")]
        size = 2 if name.endswith("b16") else 4
        at = self.address(arguments[1])
        assert not (at % np.uint64(size * len(targets))).any(), "misaligned"
        if ".shared" in name:
            data = [bytes(SHARED[0].data[int(x) : int(x) + size * len(targets)]) for x in at]
        else:
            data = [ctypes.string_at(int(x), size * len(targets)) for x in at]
        kind = np.uint16 if size == 2 else np.uint32
        table = np.stack([np.frombuffer(x, kind) for x in data]).astype(np.uint32)
        self.registers.update({t: table[:, i].copy() for i, t in enumerate(targets)})


def run(asm: str, constraints: str, inputs: list[Words]) -> list[Words]:
    """Registers that an asm statement returns, as uint32 [32] each."""
    kinds = constraints.split(",")
    outputs = constraints.count("=")
    assert len(inputs) == len(kinds) - outputs
    warp = Warp({f"${outputs + i}": words(x) for i, x in enumerate(inputs)})
    for kind, x in zip(kinds[outputs:], inputs, strict=True):
        if kind.isdigit():  # the register of an output
            warp.registers[f"${kind}"] = words(x)
    statements: list[str] = []
    labels: dict[str, int] = {}
    for part in asm.replace("\n", " ").split(";"):
        line = re.sub(r"^\s*[{}]\s*(?![$\w]+[,}])", "", part).strip()
        label = re.match(r"(\w+):\s*", line)
        if label:
            labels[label[1]] = len(statements)
            line = line[label.end() :]
        if line and not line.startswith(".reg "):
            statements.append(line)
    at = 0
    while at < len(statements):
        target = warp.run(statements[at])
        at = at + 1 if target is None else labels[target]
    return [warp.registers[f"${i}"] for i in range(outputs)]


@dataclass
class _Call:
    """What the interpreter expects of a call."""

    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def install(patch: Any) -> None:
    """Let the interpreter run inline assembly, by ``patch`` of pytest."""
    import triton.language as tl
    from triton.runtime import interpreter

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> _Call:
        assert pack == 1
        results = run(asm, constraints, [v.data for v in values])
        handles = []
        for data, kind in zip(results, types, strict=True):
            element = getattr(kind, "element_ty", kind)
            view = np.float32 if element.is_floating() else np.int32
            handles.append(interpreter.TensorHandle(data.view(view).copy(), element))
        return _Call(handles)

    def radd(self: Any, other: Sequence[Any]) -> Any:
        return tl.tuple([*other, *self.values])

    convert = interpreter._convert_float

    def convert_float(data: Words, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16 and rounding_mode is None:
            # The interpreter cuts off what GPUs round.
            flat = np.ascontiguousarray(data).view(np.uint32)
            return _nearest_bf16(flat).astype(np.uint16)
        return convert(data, source, target, rounding_mode)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # Interpreters before Triton 3.7 round the product.
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype)

    patch.setattr(interpreter, "_convert_float", convert_float)
    patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    # In the interpreter some tuples are Python's, which the compiler never sees.
    patch.setattr(tl.tuple, "__radd__", radd, raising=False)
