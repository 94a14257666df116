# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rotate rows of vectors, or rotate them back, on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tq_kernels.aot import Variant
from tq_kernels.format import KVFormat
from tq_kernels.portable.fields import chunk_width
from tq_kernels.portable.rotation_tile import rotate_tile, rotation_parts, to_half_range

__all__ = ["rotate"]


@triton.jit
def rotate_kernel(
    x, matrix, out, total, factor, x_stride, out_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """``out`` [total, D] is ``x`` times the matrix; a program takes ``BLOCK`` rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    dims = tl.arange(0, ROWS)
    mask = inside[:, None] if ROWS == D else inside[:, None] & (dims < D)[None, :]
    source = x + row.to(tl.int64) * x_stride
    given = tl.load(source[:, None] + dims[None, :], mask=mask, other=0.0)
    wide, unit = to_half_range(given, given.dtype == tl.float16)
    target = out + row.to(tl.int64) * out_stride
    for start in range(0, D, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        y = rotate_tile(wide, matrix, columns, ROWS, D, PARTS, given.dtype == tl.float32)
        y = y * factor * unit[:, None]
        place = target[:, None] + columns[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=inside[:, None])


def _block(total: int, head_dim: int) -> int:
    return 64 if total > 4096 and head_dim <= 128 else 16


def _chunk(head_dim: int) -> int:
    return chunk_width(head_dim, 64 if head_dim <= 128 else 32)


def rotate(x: Tensor, out: Tensor, fmt: KVFormat, inverse: bool = False) -> None:
    """Launch the kernel on rows ``x`` [rows, head_dim] into ``out`` of the same shape, unchecked.

    Both need stride 1 in the last dimension. Allocates nothing but constants.
    """
    total, dim = x.shape
    if total == 0:
        return
    parts = rotation_parts(fmt, x.device, inverse)
    block = _block(total, dim)
    rotate_kernel[(triton.cdiv(total, block),)](
        x, parts.matrix, out, total, parts.factor, x.stride(0), out.stride(0),
        D=dim, BLOCK=block, ROWS=triton.next_power_of_2(dim), CHUNK=_chunk(dim),
        PARTS=parts.parts, num_warps=4, num_stages=2,
    )  # fmt: skip


def aot_variants() -> list[Variant]:
    """Variants over head_dim and dtype."""
    found = []
    for dim, dtype, total, quick in (
        (128, "bf16", 8192, False),
        (128, "bf16", 64, False),
        (80, "fp32", 8192, True),
        (192, "fp16", 8192, False),
        (256, "fp32", 8192, False),
    ):
        parts = rotation_parts(KVFormat(dim), torch.device("cpu"))
        found.append(
            Variant(
                name=f"d{dim}-{dtype}-rows{total}",
                kernel=rotate_kernel,
                signature={
                    **dict.fromkeys(("x", "out"), f"*{dtype}"),
                    "matrix": "*fp16",
                    "total": "i32",
                    "factor": "fp32",
                    **dict.fromkeys(("x_stride", "out_stride"), "i64"),
                },
                constexprs={
                    "D": dim,
                    "BLOCK": _block(total, dim),
                    "ROWS": triton.next_power_of_2(dim),
                    "CHUNK": _chunk(dim),
                    "PARTS": parts.parts,
                },
                num_warps=4,
                num_stages=2,
                aligned=("x_stride", "out_stride"),
                quick=quick,
            )
        )
    return found
