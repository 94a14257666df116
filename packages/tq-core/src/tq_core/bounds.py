"""What a quantizer of ``bits`` bits a coordinate can and must lose.

All errors are for unit vectors. References: TurboQuant, arXiv 2504.19874, theorems 1 to 3; Panter
and Dite (1951) for the constant of the upper bound; Shannon (1959) for the lower ones.
"""

from __future__ import annotations

import math

from tq_core.codebook import lloyd_max
from tq_core.errors import TQError

__all__ = [
    "entropy_coded_mse",
    "inner_product_error",
    "inner_product_lower",
    "inner_product_upper",
    "mse_lower",
    "mse_upper",
    "shannon_mse",
]


def _rate(bits: float) -> float:
    if not (bits >= 0 and math.isfinite(bits)):
        raise TQError(f"bits={bits}: needs a finite rate >= 0")
    return math.pow(4.0, -bits)


def _dim(dim: int) -> int:
    if dim < 2:
        raise TQError(f"dim={dim}: needs an integer >= 2")
    return dim


def mse_upper(bits: float) -> float:
    """Upper bound ``(√3 π / 2) 4^-bits`` of the rotated scalar quantizer.

    Examples
    --------
    >>> round(mse_upper(0), 4)
    2.7207
    """
    return math.sqrt(3.0) * math.pi / 2.0 * _rate(bits)


def mse_lower(bits: float) -> float:
    """Lower bound ``4^-bits`` for every randomised quantizer, in the worst case over inputs."""
    return _rate(bits)


def shannon_mse(bits: float) -> float:
    """Distortion-rate function ``4^-bits`` of a unit-variance Gaussian source."""
    return _rate(bits)


def entropy_coded_mse(bits: float) -> float:
    """High-rate error ``(π e / 6) 4^-bits`` of an entropy-coded uniform scalar quantizer."""
    return math.pi * math.e / 6.0 * _rate(bits)


def inner_product_upper(dim: int, bits: float) -> float:
    """Upper bound ``√3 π² 4^-bits / dim`` on the variance of the sketch-based inner product."""
    return math.sqrt(3.0) * math.pi**2 * _rate(bits) / _dim(dim)


def inner_product_lower(dim: int, bits: float) -> float:
    """Lower bound ``4^-bits / dim`` for every unbiased quantizer, in the worst case."""
    return _rate(bits) / _dim(dim)


def inner_product_error(dim: int, bits: int) -> float:
    """Variance ``π/2 · D_mse(bits - 1) / dim`` of the Gaussian sketch.

    It is the exact variance for a query orthogonal to the residual, and an upper bound otherwise.
    """
    first = 1.0 if bits == 1 else lloyd_max(_dim(dim), bits - 1).mse
    return math.pi / 2.0 * first / dim
