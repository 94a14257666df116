# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rotate rows of vectors, or rotate them back, on tensor cores."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tq_kernels.aot import Variant
from tq_kernels.format import KVFormat
from tq_kernels.portable.rotation_tile import RotationParts, rotate_rows, rotation_parts, step_width

__all__ = ["LARGE_ROTATION", "rotate"]

#: Rows from which on a program takes more of them.
LARGE_ROTATION = 4097


@triton.jit(
    do_not_specialize=["total"],
)
def rotate_kernel(
    x, matrix, out, total, factor, x_stride, out_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """``out`` [total, D] is ``x`` times the matrix; a program takes ``BLOCK`` rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    rows = x + row.to(tl.int64) * x_stride
    y, unit = rotate_rows(rows, inside, matrix, BLOCK, D, COLUMNS, STEP, PARTS)
    y = y * factor * unit[:, None]
    columns = tl.arange(0, COLUMNS)
    target = out + row.to(tl.int64) * out_stride
    mask = inside[:, None] & (columns < D)[None, :]
    tl.store(target[:, None] + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


def _block(total: int, head_dim: int) -> int:
    return 64 if total >= LARGE_ROTATION and head_dim <= 128 else 16


@lru_cache(maxsize=256)
def _parts(
    fmt: KVFormat,
    device: torch.device,
    inverse: bool,
    dtype: torch.dtype,
    order: tuple[int, ...] | None = None,
) -> RotationParts:
    """The matrix, with its columns padded to a power of two."""
    parts = rotation_parts(fmt, device, inverse, order, dtype)
    padding = triton.next_power_of_2(fmt.head_dim) - fmt.head_dim
    return RotationParts(torch.nn.functional.pad(parts.matrix, (0, padding)), parts.factor)


def rotate(
    x: Tensor,
    out: Tensor,
    fmt: KVFormat,
    inverse: bool = False,
    order: tuple[int, ...] | None = None,
) -> None:
    """Launch the kernel on rows ``x`` [rows, head_dim] into ``out`` of the same shape, unchecked.

    Both need stride 1 in the last dimension; their dtypes may differ. ``order`` says which rotated
    coordinate is where. Allocates nothing but constants.
    """
    total, dim = x.shape
    if total == 0:
        return
    parts = _parts(fmt, x.device, inverse, x.dtype, order)
    block = _block(total, dim)
    rotate_kernel[(triton.cdiv(total, block),)](
        x, parts.matrix, out, total, parts.factor, x.stride(0), out.stride(0),
        D=dim, BLOCK=block, COLUMNS=triton.next_power_of_2(dim),
        STEP=step_width(dim), PARTS=parts.parts, num_warps=4, num_stages=2,
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
        torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        parts = _parts(KVFormat(dim), torch.device("cpu"), False, torch_dtype)
        found.append(
            Variant(
                name=f"d{dim}-{dtype}-rows{total}",
                kernel=rotate_kernel,
                signature={
                    **dict.fromkeys(("x", "out"), f"*{dtype}"),
                    "matrix": "*bf16" if dtype == "bf16" else "*fp16",
                    "total": "i32",
                    "factor": "fp32",
                    **dict.fromkeys(("x_stride", "out_stride"), "i32"),
                },
                constexprs={
                    "D": dim,
                    "BLOCK": _block(total, dim),
                    "COLUMNS": triton.next_power_of_2(dim),
                    "STEP": step_width(dim),
                    "PARTS": parts.parts,
                },
                num_warps=4,
                num_stages=2,
                aligned=("x_stride", "out_stride"),
                quick=quick,
            )
        )
    return found
