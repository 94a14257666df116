# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Store: scale, rotation, quantization, packing and scatter of keys and values in one launch.

A program takes a block of tokens of one head, keys or values. Rotated coordinates come in chunks
of columns. Up to 4 bits a coordinate in units of half a step is rounded down to an integer, which
no boundary lies strictly between, and looked up in a table that holds centroid and code in one
word; 8-bit codes are that integer. The sums that the scale needs are taken on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tq_kernels.aot import Variant
from tq_kernels.codec import Kind
from tq_kernels.format import KVFormat
from tq_kernels.portable.fields import chunk_width, column_order, store_codes
from tq_kernels.portable.rotation_tile import (
    RotationParts,
    rotate_tile,
    rotation_parts,
    to_half_range,
)
from tq_kernels.quantize import codebook_of

__all__ = ["StoreShape", "store"]

SCALES = {"mse": 0, "norm": 1, "unbiased": 2, "none": 3}

#: Adding 1.5 * 2**23 to a number rounds it to an integer, found in the low bits of the sum.
_ROUND = tl.constexpr(12582912.0)
#: Rounding ``x - 1/2`` rounds ``x`` down; a little more, so that 0 goes to 0.
_DOWN = tl.constexpr(-0.5 + 2.0**-25)
_DOWN_8_BITS = tl.constexpr(127.5 + 2.0**-17)


@triton.jit
def _encode_block(
    x, pages, slots, matrix, table, tokens, step, rotation_factor,
    x_token_stride, x_head_stride, page_stride, record_stride,
    D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
    PLANES: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Quantize and store one block of tokens of one head, keys or values."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token, mask=token < tokens, other=-1).to(tl.int64)
    mask = slot >= 0
    slot = tl.maximum(slot, 0)
    dims = tl.arange(0, ROWS)
    source = x + token.to(tl.int64) * x_token_stride + head * x_head_stride
    inside = mask[:, None] if ROWS == D else mask[:, None] & (dims < D)[None, :]
    given = tl.load(source[:, None] + dims[None, :], mask=inside, other=0.0)
    wide, unit = to_half_range(given, given.dtype == tl.float16)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    safe = tl.where(norm == 0.0, 1.0, norm)

    inner = (slot % PAGE).to(tl.int32)
    record = pages + slot // PAGE * page_stride + head * record_stride
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    byte_stride: tl.constexpr = 1 if KEYS else 4
    if KEYS:
        low = record + (PLANES + inner * (D * WIDTH // 8))
        high = record + (PLANES + PAGE * D // 4 + inner * (D // 8))
    else:
        low = record + (PLANES + inner // 4 * (D * WIDTH // 2) + inner % 4)
        high = record + (PLANES + PAGE * D // 4 + inner // 4 * (D // 2) + inner % 4)

    dot_yc = tl.zeros([BLOCK], tl.float32)
    dot_cc = tl.zeros([BLOCK], tl.float32)
    if BITS < 8:
        values = tl.load(table + tl.arange(0, 256))
    for start in range(0, D, CHUNK):
        y = rotate_tile(
            wide, matrix, start + tl.arange(0, CHUNK), ROWS, D, PARTS,
            given.dtype == tl.float32,
        )  # fmt: skip
        if BITS == 8:
            at = y * (rotation_factor / (safe * step))[:, None] + _DOWN_8_BITS
            rounded = tl.minimum(tl.maximum(at, 0.0), 255.0) + _ROUND
            codes = rounded.to(tl.int32, bitcast=True) & 255
            c = (rounded - _ROUND) - 127.5
        else:
            at = y * (2.0 * rotation_factor / (safe * step))[:, None] + _DOWN
            at = tl.minimum(tl.maximum(at, -128.0), 127.0) + _ROUND
            index = at.to(tl.int32, bitcast=True) & 255
            flat = tl.reshape(index, (BLOCK * CHUNK,))
            entry = tl.reshape(tl.gather(values, flat, 0), (BLOCK, CHUNK))
            codes = entry & 15
            c = (entry & -16).to(tl.float32, bitcast=True)
        dot_yc += tl.sum(y * c, 1)
        dot_cc += tl.sum(c * c, 1)
        store_codes(codes, low, high, byte_stride, mask, start, D, BITS, KEYS)

    if SCALE == 0:
        scale = dot_yc * rotation_factor / (dot_cc * step)
    elif SCALE == 1:
        scale = norm / (tl.sqrt(dot_cc) * step)
    elif SCALE == 2:
        dot_yc = tl.where(norm == 0.0, 1.0, dot_yc * rotation_factor)
        scale = norm * (norm / (dot_yc * step))
    else:
        scale = norm
    place = (record + (SCALE_OFFSET + 2 * inner)).to(tl.pointer_type(tl.float16), bitcast=True)
    tl.store(place, (scale * unit).to(tl.float16), mask=mask)


@triton.jit
def store_kernel(
    k, v, pages, slots, k_matrix, v_matrix, k_table, v_table,
    tokens, k_step, v_step, rotation_factor,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, page_stride, record_stride,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Store a block of tokens; the grid is [blocks of tokens, KV heads, (keys, values)]."""
    V_PLANES: tl.constexpr = PAGE * D * K_BITS // 8
    SCALES_AT: tl.constexpr = PAGE * D * (K_BITS + V_BITS) // 8
    if tl.program_id(2) == 0:
        _encode_block(
            k, pages, slots, k_matrix, k_table, tokens, k_step, rotation_factor,
            k_token_stride, k_head_stride, page_stride, record_stride,
            D, K_BITS, True, PAGE, 0, SCALES_AT, SCALE, BLOCK, ROWS, CHUNK, PARTS,
        )  # fmt: skip
    else:
        _encode_block(
            v, pages, slots, v_matrix, v_table, tokens, v_step, rotation_factor,
            v_token_stride, v_head_stride, page_stride, record_stride,
            D, V_BITS, False, PAGE, V_PLANES, SCALES_AT + 2 * PAGE, SCALE, BLOCK, ROWS, CHUNK,
            PARTS,
        )  # fmt: skip


@lru_cache(maxsize=64)
def code_table(fmt: KVFormat, kind: Kind, device: torch.device) -> Tensor:
    """int32 [256]: the bits of ``centroid / step`` in float32, with the code in the lowest four.

    Entry ``i`` modulo 256, from -128 to 127, is that of coordinates from ``i`` to ``i + 1`` half
    steps. No boundary is further out.
    """
    book = codebook_of(fmt, kind)
    assert book.step is not None
    if book.bits == 8:
        return torch.zeros(256, dtype=torch.int32, device=device)
    centres = (torch.arange(256) + 128) % 256 - 127.5
    boundaries = torch.from_numpy(book.boundaries / (0.5 * book.step)).round()
    codes = torch.bucketize(centres.double(), boundaries)
    numbers = torch.from_numpy(book.centroids / book.step).float()
    return (numbers[codes].view(torch.int32) | codes.to(torch.int32)).to(device)


@dataclass(frozen=True)
class StoreShape:
    """How a launch is cut: tokens a program, columns a chunk, warps and pipeline stages."""

    block: int
    chunk: int
    num_warps: int
    num_stages: int = 2

    @staticmethod
    def of(tokens: int, heads: int, head_dim: int, itemsize: int) -> StoreShape:
        """Many small programs for few tokens, else large ones that load the matrix less often."""
        if tokens * heads <= 8192:
            return StoreShape(16, 64, 4)
        return StoreShape(128 if head_dim in (16, 32, 64, 128) and itemsize == 2 else 64, 32, 8)


@dataclass(frozen=True)
class _Constants:
    k_rotation: RotationParts
    v_rotation: RotationParts
    k_table: Tensor
    v_table: Tensor
    k_step: float
    v_step: float
    chunk: int


@lru_cache(maxsize=256)
def _constants(fmt: KVFormat, device: torch.device, most: int) -> _Constants:
    chunk = chunk_width(fmt.head_dim, most)
    k_order = column_order("k", fmt.k_bits, fmt.head_dim, chunk)
    v_order = column_order("v", fmt.v_bits, fmt.head_dim, chunk)
    assert fmt.k_codebook.step is not None and fmt.v_codebook.step is not None
    return _Constants(
        rotation_parts(fmt, device, order=k_order),
        rotation_parts(fmt, device, order=v_order),
        code_table(fmt, "k", device),
        code_table(fmt, "v", device),
        fmt.k_codebook.step,
        fmt.v_codebook.step,
        chunk,
    )


def _constexprs(fmt: KVFormat, shape: StoreShape, constants: _Constants) -> dict[str, int]:
    return {
        "D": fmt.head_dim,
        "K_BITS": fmt.k_bits,
        "V_BITS": fmt.v_bits,
        "PAGE": fmt.page_size,
        "SCALE": SCALES[fmt.scale],
        "BLOCK": shape.block,
        "ROWS": triton.next_power_of_2(fmt.head_dim),
        "CHUNK": constants.chunk,
        "PARTS": constants.k_rotation.parts,
    }


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    fmt: KVFormat,
    shape: StoreShape | None = None,
) -> None:
    """Launch the kernel; arguments as of :func:`tq_kernels.store`, unchecked.

    Allocates nothing but constants, once for each format and device, so that the second call may
    be captured in a CUDA graph.
    """
    tokens, heads = k.shape[:2]
    if tokens == 0 or heads == 0:
        return
    if shape is None:
        shape = StoreShape.of(tokens, heads, fmt.head_dim, k.element_size())
    c = _constants(fmt, k.device, shape.chunk)
    store_kernel[(triton.cdiv(tokens, shape.block), heads, 2)](
        k, v, pages, slot_mapping,
        c.k_rotation.matrix, c.v_rotation.matrix, c.k_table, c.v_table,
        tokens, c.k_step, c.v_step, c.k_rotation.factor,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0), pages.stride(1),
        **_constexprs(fmt, shape, c),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def aot_variants() -> list[Variant]:
    """Variants over head_dim, bits, dtype and number of tokens."""
    cases = [
        (128, 4, 4, "bf16", 8192, True), (128, 4, 4, "bf16", 64, False),
        (128, 3, 3, "fp16", 8192, False), (128, 2, 8, "bf16", 8192, False),
        (128, 8, 8, "fp32", 8192, False), (64, 4, 3, "bf16", 8192, False),
        (80, 3, 3, "bf16", 8192, True), (96, 4, 4, "fp16", 8192, False),
        (192, 4, 4, "bf16", 8192, False), (256, 4, 4, "bf16", 8192, False),
        (256, 2, 3, "fp32", 64, False),
    ]  # fmt: skip
    strides = [f"{x}_{y}_stride" for x in "kv" for y in ("token", "head")]
    strides += ["page_stride", "record_stride"]
    found = []
    for dim, k_bits, v_bits, dtype, tokens, quick in cases:
        fmt = KVFormat(dim, k_bits, v_bits)
        shape = StoreShape.of(tokens, 8, dim, 4 if dtype == "fp32" else 2)
        found.append(
            Variant(
                name=f"d{dim}-k{k_bits}v{v_bits}-{dtype}-tokens{tokens}",
                kernel=store_kernel,
                signature={
                    **dict.fromkeys(("k", "v"), f"*{dtype}"),
                    "pages": "*u8",
                    "slots": "*i64",
                    **dict.fromkeys(("k_matrix", "v_matrix"), "*fp16"),
                    **dict.fromkeys(("k_table", "v_table"), "*i32"),
                    "tokens": "i32",
                    **dict.fromkeys(("k_step", "v_step", "rotation_factor"), "fp32"),
                    **dict.fromkeys(strides, "i64"),
                },
                constexprs=_constexprs(
                    fmt, shape, _constants(fmt, torch.device("cpu"), shape.chunk)
                ),
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
                aligned=tuple(strides),
                quick=quick,
            )
        )
    return found
