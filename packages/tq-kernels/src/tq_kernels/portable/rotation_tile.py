# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rotation of a tile of vectors on tensor cores, to about the precision of float32.

The matrix is ``factor`` times one or two fp16 matrices. Hadamard rotations of a power-of-two size
are integers times a constant and mostly need one; otherwise the second holds what the first one's
rounding left. Vectors are brought to the range of fp16 by powers of two: 16-bit inputs are then
exact, and float32 is split like the matrix. Products are exact and sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tq_kernels.format import KVFormat

__all__ = ["RotationParts", "rotate_tile", "rotation_parts", "to_half_range"]


@dataclass(frozen=True)
class RotationParts:
    """A rotation as the right-hand side of a product with row vectors.

    Attributes
    ----------
    matrix : fp16 tensor [parts, rows, columns]
        Rows are padded with zeros to a power of two.
    factor : float
        The sum of the parts times this is the matrix.
    """

    matrix: Tensor
    factor: float

    @property
    def parts(self) -> int:
        """1 if one fp16 matrix is exact, else 2."""
        return self.matrix.shape[0]


@lru_cache(maxsize=256)
def rotation_parts(
    fmt: KVFormat,
    device: torch.device,
    inverse: bool = False,
    order: tuple[int, ...] | None = None,
) -> RotationParts:
    """Matrix ``M`` with ``y = x M`` for rows ``x``, in fp16 parts; cached, do not write to it.

    Parameters
    ----------
    order : tuple of int, optional
        Permutation of the rotated coordinates: the columns of ``M`` if it rotates, its rows if it
        rotates back.
    """
    dim = fmt.head_dim
    rotated = fmt.rotation_matrix(dtype=torch.float64)
    if order is not None:
        rotated = rotated[list(order)]
    exact = rotated if inverse else rotated.T
    integers = fmt.rotation == "hadamard" and dim & (dim - 1) == 0
    factor = float(dim) ** (-fmt.rounds / 2) if integers else 2.0**-11
    scaled = exact / factor
    if integers:
        scaled = scaled.round()
    rows = triton.next_power_of_2(dim)
    parts = torch.zeros(2, rows, dim, dtype=torch.float16)
    parts[0, :dim] = scaled.to(torch.float16)
    parts[1, :dim] = (scaled - parts[0, :dim].double()).to(torch.float16)
    kept = parts if bool(parts[1].any()) else parts[:1]
    return RotationParts(kept.contiguous().to(device), factor)


@triton.jit
def to_half_range(x, NARROW: tl.constexpr):
    """Bring each row to the range of fp16: the scaled row in float32, and what it was divided by.

    ``NARROW``: the input is fp16 and stays as it is. Else the largest magnitude of a row comes into
    [2**14, 2**15), but rows below 2**-112 are multiplied by 2**126 only.
    """
    wide = x.to(tl.float32)
    if NARROW:
        unit = tl.full([x.shape[0]], 1.0, tl.float32)
    else:
        top = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True)
        exponent = tl.minimum(tl.maximum(top >> 23, 15), 254)
        wide = wide * ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return wide, unit


@triton.jit
def rotate_tile(
    wide, matrix, columns,
    ROWS: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``wide @ matrix[:, columns]`` without the factor, float32.

    ``wide`` float32 [block, ROWS] is in the range of fp16; ``matrix`` fp16 [PARTS, ROWS, STRIDE].
    ``SPLIT``: ``wide`` holds more bits than fp16 does.
    """
    high = wide.to(tl.float16)
    rows = tl.arange(0, ROWS)
    place = matrix + rows[:, None] * STRIDE + columns[None, :]
    first = tl.load(place)
    y = tl.dot(high, first)
    if SPLIT:
        y = tl.dot((wide - high.to(tl.float32)).to(tl.float16), first, y)
    if PARTS == 2:
        y = tl.dot(high, tl.load(place + ROWS * STRIDE), y)
    return y
