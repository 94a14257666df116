# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Read slots back: unpacking, centroids, scale and the inverse rotation in one launch."""

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
from tq_kernels.portable.fields import column_order, load_codes, token_places
from tq_kernels.portable.rotation_tile import RotationParts, rotation_parts
from tq_kernels.quantize import codebook_of, step_of

__all__ = ["dequantize"]


@triton.jit
def _add_product(numbers, part, y):
    """Add the product of two fp16 tiles.

    Of 16 columns that were joined of bytes, tensor cores of NVIDIA get eight twice and the others
    not at all (triton-lang/triton#11691): those are multiplied without.
    """
    if numbers.shape[1] == 16:
        return tl.dot(numbers.to(tl.float32), part.to(tl.float32), y, input_precision="ieee")
    else:
        return tl.dot(numbers, part, y)


@triton.jit
def _decode_block(
    pages, slots, out, matrix, table, order, count, step, factor,
    out_token_stride, out_head_stride, page_stride, record_stride,
    D: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
    PLANES: tl.constexpr, SCALES_AT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Decode one block of slots of one head, keys or values."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int32)
    stored = slot >= 0
    low, high, place = token_places(
        pages, slot, page_stride, head * record_stride, PLANES, SCALES_AT, D, BITS, KEYS, PAGE
    )
    scale = tl.load(place, mask=stored, other=0.0).to(tl.float32)
    codes = load_codes(low, high, stored, WIDE, D, BITS, KEYS)
    numbers = codes.to(tl.float32) - 127.5 if BITS == 8 else tl.load(table + codes)
    target = out + row.to(tl.int64) * out_token_stride + head * out_head_stride
    wide = tl.arange(0, WIDE)
    if ROTATED:
        at = tl.load(order + wide)
        y = numbers.to(tl.float32) * (scale * step)[:, None]
        mask = inside[:, None] if WIDE == D else inside[:, None] & (at >= 0)[None, :]
        tl.store(target[:, None] + at[None, :], y.to(out.dtype.element_ty), mask=mask)
    else:
        numbers = numbers.to(tl.float16)
        for start in range(0, D, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            spot = matrix + wide[:, None] * D + columns[None, :]
            x = tl.zeros([BLOCK, CHUNK], tl.float32)
            for n in tl.static_range(PARTS):
                x = _add_product(numbers, tl.load(spot + n * WIDE * D), x)
            x = (x * (scale * (step * factor))[:, None]).to(out.dtype.element_ty)
            tl.store(target[:, None] + columns[None, :], x, mask=inside[:, None])


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["slots"],
)
def dequantize_kernel(
    pages, slots, k_out, v_out, k_matrix, v_matrix, k_table, v_table, k_order, v_order,
    count, k_step, v_step, factor,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, page_stride, record_stride,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """Decode a block of slots; the grid is [blocks of slots, KV heads, (keys, values)]."""
    V_PLANES: tl.constexpr = PAGE * D * K_BITS // 8
    SCALES_AT: tl.constexpr = PAGE * D * (K_BITS + V_BITS) // 8
    if tl.program_id(2) == 0:
        _decode_block(
            pages, slots, k_out, k_matrix, k_table, k_order, count, k_step, factor,
            k_token_stride, k_head_stride, page_stride, record_stride,
            D, K_BITS, True, PAGE, 0, SCALES_AT, BLOCK, WIDE, CHUNK, PARTS, ROTATED,
        )  # fmt: skip
    else:
        _decode_block(
            pages, slots, v_out, v_matrix, v_table, v_order, count, v_step, factor,
            v_token_stride, v_head_stride, page_stride, record_stride,
            D, V_BITS, False, PAGE, V_PLANES, SCALES_AT + 2 * PAGE, BLOCK, WIDE, CHUNK, PARTS,
            ROTATED,
        )  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """Constants of the keys or the values."""

    rotation: RotationParts
    table: Tensor
    order: Tensor
    step: float


@lru_cache(maxsize=256)
def _side(fmt: KVFormat, kind: Kind, device: torch.device) -> _Side:
    book, step = codebook_of(fmt, kind), step_of(fmt, kind)
    order = column_order(kind, book.bits, fmt.head_dim)
    numbers = torch.zeros(16, dtype=torch.float16)
    if book.bits < 8:
        numbers[: 2**book.bits] = torch.from_numpy(book.centroids / step).half()
    return _Side(
        rotation_parts(fmt, device, True, order),
        numbers.to(device),
        torch.tensor(order, dtype=torch.int32, device=device),
        step,
    )


def _constexprs(fmt: KVFormat, block: int, rotated: bool, side: _Side) -> dict[str, int]:
    return {
        "D": fmt.head_dim,
        "K_BITS": fmt.k_bits,
        "V_BITS": fmt.v_bits,
        "PAGE": fmt.page_size,
        "BLOCK": block,
        "WIDE": triton.next_power_of_2(fmt.head_dim),
        "CHUNK": _chunk(fmt.head_dim),
        "PARTS": side.rotation.parts,
        "ROTATED": rotated,
    }


def _chunk(head_dim: int) -> int:
    return min(head_dim & -head_dim, 64 if head_dim <= 128 else 32)


def _block(count: int, heads: int, head_dim: int, rotated: bool) -> int:
    if count * heads <= 8192 or head_dim not in (16, 32, 64, 128):
        return 16
    return 32 if rotated else 64


def dequantize(
    pages: Tensor,
    slots: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    fmt: KVFormat,
    *,
    rotated: bool = False,
) -> None:
    """Launch the kernel into ``k_out`` and ``v_out``, unchecked; allocates only constants.

    Parameters
    ----------
    pages : uint8 tensor [num_pages, kv_heads, record_bytes]
    slots : int32 or int64 tensor [n]
        Negative slots give zeros.
    k_out, v_out : fp16, bf16 or float32 tensors [n, kv_heads, head_dim]
        Stride 1 in the last dimension.
    fmt : KVFormat
    rotated : bool
        Leave out the inverse rotation: ``scale * centroid`` of every coordinate, in their order.
    """
    count, heads = k_out.shape[:2]
    if count == 0 or heads == 0:
        return
    k, v = _side(fmt, "k", pages.device), _side(fmt, "v", pages.device)
    block = _block(count, heads, fmt.head_dim, rotated)
    dequantize_kernel[(triton.cdiv(count, block), heads, 2)](
        pages, slots, k_out, v_out, k.rotation.matrix, v.rotation.matrix,
        k.table, v.table, k.order, v.order, count, k.step, v.step, k.rotation.factor,
        k_out.stride(0), k_out.stride(1), v_out.stride(0), v_out.stride(1),
        pages.stride(0), pages.stride(1),
        **_constexprs(fmt, block, rotated, k), num_warps=4, num_stages=2,
    )  # fmt: skip


def aot_variants() -> list[Variant]:
    """Variants over head_dim, bits, dtype and the rotated space."""
    cases = [
        (128, 4, 4, "bf16", 8192, False, True), (128, 3, 8, "fp32", 64, False, False),
        (80, 3, 3, "fp16", 8192, False, False), (192, 2, 4, "bf16", 8192, False, False),
        (256, 4, 4, "bf16", 8192, False, False), (128, 4, 3, "fp16", 8192, True, False),
    ]  # fmt: skip
    strides = [f"{x}_{y}_stride" for x in "kv" for y in ("token", "head")]
    strides += ["page_stride", "record_stride"]
    found = []
    for dim, k_bits, v_bits, dtype, count, rotated, quick in cases:
        fmt = KVFormat(dim, k_bits, v_bits)
        side = _side(fmt, "k", torch.device("cpu"))
        space = "-rotated" if rotated else ""
        found.append(
            Variant(
                name=f"d{dim}-k{k_bits}v{v_bits}-{dtype}-slots{count}{space}",
                kernel=dequantize_kernel,
                signature={
                    "pages": "*u8",
                    "slots": "*i64",
                    **dict.fromkeys(("k_out", "v_out"), f"*{dtype}"),
                    **dict.fromkeys(("k_matrix", "v_matrix", "k_table", "v_table"), "*fp16"),
                    **dict.fromkeys(("k_order", "v_order"), "*i32"),
                    "count": "i32",
                    **dict.fromkeys(("k_step", "v_step", "factor"), "fp32"),
                    **dict.fromkeys(strides, "i32"),
                },
                constexprs=_constexprs(fmt, _block(count, 8, dim, rotated), rotated, side),
                num_warps=4,
                num_stages=2,
                aligned=tuple(strides),
                quick=quick,
            )
        )
    return found
