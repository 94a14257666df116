# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Store: scale, rotation, quantization, packing and scatter of keys and values in one launch.

A program takes a block of tokens of one head, keys or values; or of several heads in turn, whose
numbers go from memory to registers to the tensor cores to memory, with the rotation in shared
memory. For up to 4 bits, a coordinate in units of half a step, of which all boundaries are
multiples, is rounded down to an integer and looked up in a table. Shared memory serves a warp as
fast as its lanes find words in different banks, so that the table is made of bytes. An 8-bit code is
128 more than the coordinate in steps, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from tq_kernels.aot import TARGETS, Variant
from tq_kernels.codec import Kind
from tq_kernels.format import KVFormat
from tq_kernels.portable.fields import (
    column_order,
    lane_order,
    store_by_lanes,
    store_codes,
    sum_products,
    token_places,
)
from tq_kernels.portable.rotation_tile import (
    RotationParts,
    load_operand,
    operand_dims,
    rotate_operand,
    rotate_rows,
    rotation_parts,
    step_width,
)
from tq_kernels.quantize import codebook_of, step_of

__all__ = ["StoreShape", "store", "token_counts"]

SCALES = {"mse": 0, "norm": 1, "unbiased": 2, "none": 3}

#: Adding 1.5 * 2**23 to a number rounds it to an integer, found in the low bits of the sum.
_ROUND = tl.constexpr(12582912.0)
#: Rounding ``x - 1/2`` rounds ``x`` down; a little more, so that 0 goes to 0.
_DOWN = tl.constexpr(-0.5 + 2.0**-25)
_DOWN_8_BITS = tl.constexpr(127.5 + 2.0**-17)


@triton.jit
def _encode(
    y, unit, entries, slot, lane_slot, pages, step, factor, page_stride, head_offset,
    D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
    PLANES: tl.constexpr, SCALES_AT: tl.constexpr, SCALE: tl.constexpr, TABLE: tl.constexpr,
    SLOPE: tl.constexpr, OFFSET: tl.constexpr, LANES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Quantize and store vectors ``unit * y`` of one head, keys or values, but for ``factor``.

    ``entries`` are those of a `CodeTable`. ``lane_slot`` are the slots in the order of `store_by_lanes`, used if ``LANES``.
    """
    BLOCK: tl.constexpr = y.shape[0]
    COLUMNS: tl.constexpr = y.shape[1]
    norm = tl.sqrt(sum_products(y, y))
    safe = tl.where(norm == 0.0, 1.0, norm)
    if BITS == 8:
        at = y * (1.0 / (safe * step))[:, None] + _DOWN_8_BITS
        rounded = tl.minimum(tl.maximum(at, 0.0), 255.0) + _ROUND
        codes = rounded.to(tl.int32, bitcast=True) & 255
        c = (rounded - _ROUND) - 127.5
    else:
        at = y * (2.0 / (safe * step))[:, None] + _DOWN
        if TABLE == 256:
            at = tl.minimum(tl.maximum(at, -128.0), 127.0)
        index = (at + _ROUND).to(tl.int32, bitcast=True) & (TABLE - 1)
        entry = tl.gather(entries, tl.reshape(index, (BLOCK * COLUMNS,)), 0)
        entry = tl.reshape(entry, (BLOCK, COLUMNS)).to(tl.int32)
        codes = entry & ((1 << BITS) - 1)
        # an integer in the low bits of 2**23, less a constant: 2**BITS times centroid / step
        c = ((entry | 0x4B000000) + SLOPE * codes).to(tl.float32, bitcast=True) - OFFSET
        step = step * (1.0 / (1 << BITS))
    if COLUMNS > D:
        # columns come by field: of the bytes of a field the last ones are padding
        FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
        byte = tl.arange(0, COLUMNS) % (COLUMNS // FIELDS)
        c = tl.where((byte < D // FIELDS)[None, :], c, 0.0)

    low, high, place = token_places(
        pages, slot, page_stride, head_offset, PLANES, SCALES_AT, D, BITS, KEYS, PAGE
    )
    if LANES:
        lane_low, _, _ = token_places(
            pages, lane_slot, page_stride, head_offset, PLANES, SCALES_AT, D, BITS, KEYS, PAGE
        )
        store_by_lanes(codes, lane_low, lane_slot >= 0, BITS, KEYS, WARPS)
    else:
        store_codes(codes, low, high, slot >= 0, D, BITS, KEYS)

    if SCALE == 0:
        scale = sum_products(y, c) * factor / (sum_products(c, c) * step)
    elif SCALE == 1:
        scale = norm * factor / (tl.sqrt(sum_products(c, c)) * step)
    elif SCALE == 2:
        scale = norm * (norm / (tl.where(norm == 0.0, 1.0, sum_products(y, c)) * step)) * factor
    else:
        scale = norm * factor
    tl.store(place, (scale * unit).to(tl.float16), mask=slot >= 0)


@triton.jit
def _encode_blocks(
    x, pages, slots, matrix, table, tokens, step, factor,
    x_token_stride, x_head_stride, page_stride, record_stride,
    D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
    PLANES: tl.constexpr, SCALES_AT: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    TABLE: tl.constexpr, SLOPE: tl.constexpr, OFFSET: tl.constexpr, HEADS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Quantize and store a block of tokens of ``HEADS`` heads, or of one if that is 0."""
    start = tl.program_id(0) * BLOCK
    row = tl.arange(0, BLOCK)
    entries = tl.load(table + tl.arange(0, TABLE))
    if HEADS == 0:
        head = tl.program_id(1).to(tl.int64)
        token = start + row
        slot = tl.load(slots + token, mask=token < tokens, other=-1).to(tl.int32)
        rows = x + token.to(tl.int64) * x_token_stride + head * x_head_stride
        # tokens that are not stored are computed as well, so as not to wait for their slots
        y, unit = rotate_rows(rows, token < tokens, matrix, BLOCK, D, COLUMNS, STEP, PARTS)
        _encode(
            y, unit, entries, slot, slot, pages, step, factor, page_stride, head * record_stride,
            D, BITS, KEYS, PAGE, PLANES, SCALES_AT, SCALE, TABLE, SLOPE, OFFSET, False, WARPS,
        )  # fmt: skip
    else:
        first = tl.program_id(1).to(tl.int64) * HEADS
        # the rows of `load_operand` before and after
        loaded = start + row
        REPEATS: tl.constexpr = BLOCK // (8 * WARPS)
        token = start + row // 8 % REPEATS * (8 * WARPS) + row // (8 * REPEATS) * 8 + row % 8
        slot = tl.load(slots + token, mask=token < tokens, other=-1).to(tl.int32)
        lane_slot = tl.load(slots + loaded, mask=loaded < tokens, other=-1).to(tl.int32)
        dims = operand_dims(D)
        part = tl.load(matrix + dims[:, None] * D + tl.arange(0, D)[None, :])
        unit = tl.full([BLOCK], 1.0, tl.float32)
        for n in tl.range(0, HEADS, num_stages=1):
            head = first + n
            operand = load_operand(
                x + head * x_head_stride, start, tokens, x_token_stride, BLOCK, D, WARPS
            )
            y = rotate_operand(operand, part)
            _encode(
                y, unit, entries, slot, lane_slot, pages, step, factor, page_stride,
                head * record_stride, D, BITS, KEYS, PAGE, PLANES, SCALES_AT, SCALE, TABLE,
                SLOPE, OFFSET, BITS != 3, WARPS,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["slots"],
)
def store_kernel(
    k, v, pages, slots, k_matrix, v_matrix, k_table, v_table, tokens, k_step, v_step, factor,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, page_stride, record_stride,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PARTS: tl.constexpr, K_TABLE: tl.constexpr, V_TABLE: tl.constexpr, K_SLOPE: tl.constexpr,
    V_SLOPE: tl.constexpr, K_OFFSET: tl.constexpr, V_OFFSET: tl.constexpr, HEADS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Store a block of tokens; the grid is [blocks of tokens, groups of heads, (keys, values)]."""
    V_PLANES: tl.constexpr = PAGE * D * K_BITS // 8
    SCALES_AT: tl.constexpr = PAGE * D * (K_BITS + V_BITS) // 8
    if tl.program_id(2) == 0:
        _encode_blocks(
            k, pages, slots, k_matrix, k_table, tokens, k_step, factor,
            k_token_stride, k_head_stride, page_stride, record_stride,
            D, K_BITS, True, PAGE, 0, SCALES_AT, SCALE, BLOCK, COLUMNS, STEP, PARTS,
            K_TABLE, K_SLOPE, K_OFFSET, HEADS, WARPS,
        )  # fmt: skip
    else:
        _encode_blocks(
            v, pages, slots, v_matrix, v_table, tokens, v_step, factor,
            v_token_stride, v_head_stride, page_stride, record_stride,
            D, V_BITS, False, PAGE, V_PLANES, SCALES_AT + 2 * PAGE, SCALE, BLOCK, COLUMNS, STEP,
            PARTS, V_TABLE, V_SLOPE, V_OFFSET, HEADS, WARPS,
        )  # fmt: skip


@dataclass(frozen=True)
class CodeTable:
    """Codes and levels of coordinates in half steps.

    Attributes
    ----------
    entries : uint8 tensor
        Entry ``i`` modulo the size is that of coordinates from ``i`` to ``i + 1`` half steps. With
        1024 entries and more all coordinates of unit vectors are in it; with 256 those from -128 to
        127, beyond which no boundary is, and coordinates have to be clamped.
    slope, offset : int
        The lowest bits of an entry are the code. The others are the distance of the level from a
        line through the codes, so that ``2**bits * centroid / step`` is
        ``entry + slope * code + 2**23 - offset``.
    """

    entries: Tensor
    slope: int
    offset: int


@lru_cache(maxsize=64)
def code_table(fmt: KVFormat, kind: Kind, device: torch.device) -> CodeTable:
    """Table for up to 4 bits, zeros for 8; cached, do not write to it."""
    book, step = codebook_of(fmt, kind), step_of(fmt, kind)
    if book.bits == 8:
        return CodeTable(torch.zeros(256, dtype=torch.uint8, device=device), 0, 0)
    size = 2 * triton.next_power_of_2(int(2.0 / step) + 4)
    if size not in (1024, 2048):
        size = 256
    centres = (torch.arange(size) + size // 2) % size - (size // 2 - 0.5)
    boundaries = torch.from_numpy(book.boundaries / (0.5 * step)).round()
    codes = torch.bucketize(centres.double(), boundaries)
    count = 2**book.bits
    levels = torch.from_numpy(book.centroids / step + 63.5).round().long()
    lines = [levels - slope * torch.arange(count) for slope in range(128)]
    slope = min(range(128), key=lambda n: int(lines[n].max() - lines[n].min()))
    lowest = int(lines[slope].min())
    entries = codes + count * (lines[slope] - lowest)[codes]
    offset = 2**23 + count * 127 // 2 - count * lowest
    return CodeTable(entries.to(torch.uint8).to(device), count * slope - 1, offset)


#: Pipeline stages of a launch.
STAGES = 2
#: Vectors of keys, or of values, from which on programs are larger, and on Hopper take several heads.
MANY, VERY_MANY = 8193, 65536


@dataclass(frozen=True)
class StoreShape:
    """How a launch is cut: tokens a program, warps and heads in turn.

    ``heads`` divides the number of KV heads and only counts where `takes_operands`; 0 never does.
    """

    block: int
    num_warps: int
    heads: int = 0

    @staticmethod
    def of(tokens: int, heads: int, head_dim: int, *, hopper: bool) -> StoreShape:
        """Many small programs for few tokens, else large ones that load the matrix less often.

        Multiplying from registers pays where 4 warps share a tensor core's right operand.
        """
        if tokens * heads < MANY:
            return StoreShape(16, 4)
        if head_dim not in (16, 32, 64, 128):
            return StoreShape(32, 4)
        in_turn = gcd(heads, 4) if tokens * heads >= VERY_MANY else 1
        return StoreShape(64, 4, heads=in_turn if hopper else 0)

    def takes_operands(self, fmt: KVFormat, dtype: torch.dtype, parts: int) -> bool:
        """Whether each warp loads the rows that its tensor cores multiply."""
        return (
            self.heads > 0
            and self.block % (16 * self.num_warps) == 0
            and fmt.head_dim in (32, 64, 128)
            and dtype.itemsize == 2
            and parts == 1
        )


@lru_cache(maxsize=64)
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@dataclass(frozen=True)
class _Constants:
    k_rotation: RotationParts
    v_rotation: RotationParts
    k_table: CodeTable
    v_table: CodeTable
    k_step: float
    v_step: float
    heads: int


@lru_cache(maxsize=256)
def _constants(
    fmt: KVFormat, device: torch.device, dtype: torch.dtype, shape: StoreShape
) -> _Constants:
    plain = rotation_parts(fmt, device, dtype=dtype)
    operands = shape.takes_operands(fmt, dtype, plain.parts)

    def rotation(kind: Kind, bits: int) -> RotationParts:
        order = lane_order if operands and bits != 3 else column_order
        return rotation_parts(fmt, device, order=order(kind, bits, fmt.head_dim), dtype=dtype)

    return _Constants(
        rotation("k", fmt.k_bits),
        rotation("v", fmt.v_bits),
        code_table(fmt, "k", device),
        code_table(fmt, "v", device),
        step_of(fmt, "k"),
        step_of(fmt, "v"),
        shape.heads if operands else 0,
    )


def _constexprs(fmt: KVFormat, shape: StoreShape, constants: _Constants) -> dict[str, int]:
    return {
        "D": fmt.head_dim,
        "K_BITS": fmt.k_bits,
        "V_BITS": fmt.v_bits,
        "PAGE": fmt.page_size,
        "SCALE": SCALES[fmt.scale],
        "BLOCK": shape.block,
        "COLUMNS": triton.next_power_of_2(fmt.head_dim),
        "STEP": step_width(fmt.head_dim),
        "PARTS": constants.k_rotation.parts,
        "K_TABLE": constants.k_table.entries.numel(),
        "V_TABLE": constants.v_table.entries.numel(),
        "K_SLOPE": constants.k_table.slope,
        "V_SLOPE": constants.v_table.slope,
        "K_OFFSET": constants.k_table.offset,
        "V_OFFSET": constants.v_table.offset,
        "HEADS": constants.heads,
        "WARPS": shape.num_warps,
    }


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    fmt: KVFormat,
    shape: StoreShape | None = None,
) -> None:
    """Launch the kernel; arguments as of `tq_kernels.store`, unchecked.

    Allocates nothing but constants, once for each format and device, so that the second call may
    be captured in a CUDA graph.
    """
    tokens, heads = k.shape[:2]
    if tokens == 0 or heads == 0:
        return
    if shape is None:
        shape = StoreShape.of(tokens, heads, fmt.head_dim, hopper=_is_hopper(k.device))
    c = _constants(fmt, k.device, k.dtype, shape)
    store_kernel[(triton.cdiv(tokens, shape.block), heads // max(1, c.heads), 2)](
        k, v, pages, slot_mapping,
        c.k_rotation.matrix, c.v_rotation.matrix, c.k_table.entries, c.v_table.entries,
        tokens, c.k_step, c.v_step, c.k_rotation.factor,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0), pages.stride(1),
        **_constexprs(fmt, shape, c),
        num_warps=shape.num_warps, num_stages=STAGES,
    )  # fmt: skip


def token_counts(heads: int, most: int) -> list[int]:
    """Numbers of tokens, up to ``most``, that between them need all kernels."""
    return [n for n in (1, *(-(-count // heads) for count in (MANY, VERY_MANY))) if n <= most]


def aot_variants() -> list[Variant]:
    """Variants over head_dim, bits, dtype and number of tokens."""
    cases = [
        (128, 4, 4, "bf16", 8192, True), (128, 4, 4, "bf16", 2048, False),
        (128, 4, 4, "bf16", 64, False),
        (128, 3, 3, "fp16", 8192, False), (128, 2, 8, "bf16", 8192, False),
        (128, 8, 8, "fp32", 8192, False), (64, 4, 3, "bf16", 8192, False), (32, 8, 2, "fp16", 8192, False),
        (80, 3, 3, "bf16", 8192, True), (96, 4, 4, "fp16", 8192, False),
        (192, 4, 4, "bf16", 8192, False), (256, 4, 4, "bf16", 8192, False),
        (256, 2, 3, "fp32", 64, False),
    ]  # fmt: skip
    strides = [f"{x}_{y}_stride" for x in "kv" for y in ("token", "head")]
    strides += ["page_stride", "record_stride"]
    found = []
    for (dim, k_bits, v_bits, dtype, tokens, quick), hopper in product(cases, (True, False)):
        fmt = KVFormat(dim, k_bits, v_bits)
        shape = StoreShape.of(tokens, 8, dim, hopper=hopper)
        torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        constants = _constants(fmt, torch.device("cpu"), torch_dtype, shape)
        parts = "*bf16" if dtype == "bf16" else "*fp16"
        found.append(
            Variant(
                name=f"d{dim}-k{k_bits}v{v_bits}-{dtype}-tokens{tokens}",
                kernel=store_kernel,
                signature={
                    **dict.fromkeys(("k", "v"), f"*{dtype}"),
                    "pages": "*u8",
                    "slots": "*i64",
                    **dict.fromkeys(("k_matrix", "v_matrix"), parts),
                    **dict.fromkeys(("k_table", "v_table"), "*u8"),
                    "tokens": "i32",
                    **dict.fromkeys(("k_step", "v_step", "factor"), "fp32"),
                    **dict.fromkeys(strides, "i32"),
                },
                constexprs=_constexprs(fmt, shape, constants),
                num_warps=shape.num_warps,
                num_stages=STAGES,
                targets=tuple(t for t in TARGETS if (t == "sm_90") == hopper),
                aligned=tuple(strides),
                # sm_80: ptxas keeps to 168 registers, for three programs at a time
                spills=8 if (k_bits, v_bits) == (2, 8) else 0,
                quick=quick,
            )
        )
    return found
