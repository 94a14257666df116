"""Dot products with half-integers by int8 matrix products on the CPU.

Centroids over the step are half-integers ``n + 1/2`` with ``n`` from -64 to 63, or -128 to 127. A
row of floats becomes integers of 16 bits, in two int8 digits, and its product with ``n`` is exact::

    sum(x (n + 1/2)) = unit * (256 sum(high n) + sum(low n) + sum(256 high + low) / 2)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Digits", "dot_half_integers", "to_digits"]

#: Largest integer of two digits whose high one is at most 127.
LARGEST = 127 * 256 + 127


@dataclass(frozen=True, eq=False)
class Digits:
    """Rows of floats as integers times a unit.

    Attributes
    ----------
    digits : int8 tensor [..., 2 * rows, columns]
        The high digits of all rows, then the low ones.
    unit, total : float32 tensors [..., rows, 1]
        What the integer 1 stands for; sum of the integers of a row.
    """

    digits: Tensor
    unit: Tensor
    total: Tensor


def to_digits(x: Tensor) -> Digits:
    """Digits of float32 rows [..., rows, columns]; errors of about 2**-16 of a row's peak."""
    peak = x.abs().amax(dim=-1, keepdim=True)
    unit = peak / LARGEST
    rounded = torch.round(x * (LARGEST / peak.clamp_min(1e-30)))
    whole = rounded.to(torch.int32)
    high = (whole + 128) >> 8
    low = whole - (high << 8)
    digits = torch.cat((high.to(torch.int8), low.to(torch.int8)), dim=-2)
    return Digits(digits, unit, rounded.sum(dim=-1, keepdim=True))


def dot_half_integers(x: Digits, numbers: Tensor) -> Tensor:
    """Products of rows with columns ``numbers + 1/2``.

    Parameters
    ----------
    x : Digits
        Leading dimensions [batch, kv_heads].
    numbers : int8 tensor [batch, kv_heads, columns, n]
        On the CPU; a transposed view is fine. ``columns`` is at most 2**17.

    Returns
    -------
    float32 tensor [batch, kv_heads, rows, n]
    """
    batch, heads, rows, _ = x.digits.shape
    size = (batch, heads, rows, numbers.shape[-1])
    sums = torch.empty(size, dtype=torch.int32, device=numbers.device)
    for b in range(batch):
        for h in range(heads):
            torch._int_mm(x.digits[b, h], numbers[b, h], out=sums[b, h])
    high, low = sums.to(torch.float32).chunk(2, dim=-2)
    return high.mul_(256.0).add_(low).add_(x.total, alpha=0.5).mul_(x.unit)
