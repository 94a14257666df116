# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rotation of a tile of vectors on tensor cores, to about the precision of float32.

The matrix is ``factor`` times the sum of a few 16-bit matrices, each of which holds what rounding
left of those before it. Hadamard rotations of a power-of-two size are small integers times a
constant, so that one matrix is mostly enough, without any error. fp16 and bf16 vectors enter as
they are; float32 vectors are brought to the range of fp16 by powers of two and split like the
matrix. Products are exact and sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from tq_kernels.format import KVFormat

__all__ = [
    "RotationParts",
    "load_operand",
    "operand_dims",
    "rotate_operand",
    "rotate_rows",
    "rotation_parts",
    "step_width",
]


#: The interpreter multiplies the bits of bf16 numbers as integers.
_WIDEN = tl.constexpr(bool(knobs.runtime.interpret))


@dataclass(frozen=True)
class RotationParts:
    """A rotation as the right-hand side of a product with row vectors.

    Attributes
    ----------
    matrix : fp16 or bf16 tensor [parts, rows, columns]
    factor : float
        The sum of the parts times this is the matrix.
    """

    matrix: Tensor
    factor: float

    @property
    def parts(self) -> int:
        """1 if one matrix is exact, at most 2 of fp16 and 3 of bf16."""
        return self.matrix.shape[0]


@lru_cache(maxsize=256)
def rotation_parts(
    fmt: KVFormat,
    device: torch.device,
    inverse: bool = False,
    order: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float16,
) -> RotationParts:
    """Matrix ``M`` with ``y = x M`` for rows ``x``, in 16-bit parts; cached, do not write to it.

    Parameters
    ----------
    order : tuple of int, optional
        Which rotated coordinate is where, -1 for padding by zeros: in the columns of ``M`` if it
        rotates, in its rows if it rotates back.
    dtype : torch.dtype
        That of the vectors; the parts are bf16 for bf16 and else fp16.
    """
    dim = fmt.head_dim
    integers = fmt.rotation == "hadamard" and dim & (dim - 1) == 0
    factor = float(dim) ** (-fmt.rounds / 2) if integers else 2.0**-11
    scaled = fmt.rotation_matrix(dtype=torch.float64) / factor
    if integers:
        scaled = scaled.round()
    if order is not None:
        padded = torch.cat((scaled, torch.zeros(1, dim, dtype=torch.float64)))
        scaled = padded[list(order)]
    if not inverse:
        scaled = scaled.T
    part_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    parts: list[Tensor] = []
    while bool(scaled.any()) and len(parts) < (3 if part_dtype == torch.bfloat16 else 2):
        parts.append(scaled.to(part_dtype))
        scaled = scaled - parts[-1].double()
    return RotationParts(torch.stack(parts).contiguous().to(device), factor)


def step_width(dim: int) -> int:
    """Coordinates of the vectors that `rotate_rows` takes at a time."""
    lowest = dim & -dim
    if lowest == dim:
        return dim if dim <= 128 else 64
    return min(lowest, 32)


@triton.jit
def _dot(x, part, y):
    if _WIDEN and x.dtype == tl.bfloat16:
        return tl.dot(x.to(tl.float32), part.to(tl.float32), y, input_precision="ieee")
    else:
        return tl.dot(x, part, y)


@triton.jit
def _add_product(
    y, rows, mask, inverse, matrix, start,
    D: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add the product of ``STEP`` coordinates from ``start`` on."""
    dims = start + tl.arange(0, STEP)
    x = tl.load(rows[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
    place = matrix + dims[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    part = tl.load(place)
    if WIDE:
        scaled = x * inverse[:, None]
        x = scaled.to(tl.float16)
        y = _dot((scaled - x.to(tl.float32)).to(tl.float16), part, y)
    y = _dot(x, part, y)
    for n in tl.static_range(1, PARTS):
        y = _dot(x, tl.load(place + n * D * COLUMNS), y)
    return y


@triton.jit
def rotate_rows(
    rows, mask, matrix,
    BLOCK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Rotate vectors of D numbers that ``rows`` [BLOCK] point to, zero where masked.

    ``matrix`` [PARTS, D, COLUMNS]. Returns ``y`` float32 [BLOCK, COLUMNS] and ``unit`` [BLOCK]: the
    product is their product times the factor of the matrix.
    """
    WIDE: tl.constexpr = rows.dtype.element_ty == tl.float32
    unit = tl.full([BLOCK], 1.0, tl.float32)
    inverse = unit
    if WIDE:
        # The largest magnitude goes to [2**14, 2**15); below 2**-112 it is only raised by 2**126.
        top = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, STEP):
            dims = start + tl.arange(0, STEP)
            x = tl.load(rows[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
            top = tl.maximum(top, tl.max(tl.abs(x), 1))
        exponent = tl.minimum(tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 15), 254)
        inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    y = tl.zeros([BLOCK, COLUMNS], tl.float32)
    if D == STEP:
        y = _add_product(y, rows, mask, inverse, matrix, 0, D, COLUMNS, STEP, PARTS, WIDE)
    else:
        for start in range(0, D, STEP):
            y = _add_product(y, rows, mask, inverse, matrix, start, D, COLUMNS, STEP, PARTS, WIDE)
    return y, unit


@triton.jit
def load_operand(
    x, start, tokens, stride, BLOCK: tl.constexpr, D: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Load D numbers of 16 bits of ``BLOCK`` tokens for `rotate_operand`, zero beyond ``tokens``.

    With the layouts that Triton chooses for the load and for the left operand of a product, each
    lane loads 16 bytes at a time and has them where they belong. That takes rows [repetition, warp,
    8] to [warp, repetition, 8] and column ``j, t, e, b`` to ``j, e, t, b`` of sizes ..., 4, 4, 2;
    `operand_dims` has the columns.
    """
    row = tl.arange(0, D // 32 * BLOCK)
    token = start + row % BLOCK
    words = (x + token.to(tl.int64) * stride + row // BLOCK * 32).to(
        tl.pointer_type(tl.int16), bitcast=True
    )
    y = tl.load(words[:, None] + tl.arange(0, 32)[None, :], mask=(token < tokens)[:, None], other=0)
    # after any operation, this one too, the product takes its operand from registers
    y = y.to(x.dtype.element_ty, bitcast=True)
    y = tl.reshape(y, (D // 32, BLOCK // (8 * WARPS), WARPS, 8, 4, 4, 2))
    return tl.reshape(tl.permute(y, (2, 1, 3, 0, 5, 4, 6)), (BLOCK, D))


@triton.jit
def operand_dims(D: tl.constexpr):
    """Coordinate of each column of `load_operand`."""
    at = tl.arange(0, D)
    return (at & -32) | ((at & 6) << 2) | ((at & 24) >> 2) | (at & 1)


@triton.jit
def rotate_operand(x, part):
    """Product of `load_operand` with a matrix whose rows are in the order of `operand_dims`."""
    return _dot(x, part, tl.zeros([x.shape[0], part.shape[1]], tl.float32))
