"""Law of one coordinate of a uniformly random unit vector, and its Gaussian limit.

For x uniform on the unit sphere of d dimensions a coordinate has the density

    f(x) = K (1 - x²)^((d - 3) / 2),   K = Γ(d/2) / (√π Γ((d - 1)/2)),   -1 ≤ x ≤ 1,

a scaled Beta law; √d x tends to a standard normal. All partial moments up to the second are closed,
so that nothing here is integrated numerically.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tq_core.errors import TQError

__all__ = ["CoordinateLaw", "GaussianCoordinate", "SphereCoordinate", "coordinate_law"]

Float = NDArray[np.float64]


class CoordinateLaw(ABC):
    """A symmetric law on the line with closed partial moments."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """Variance of the coordinate."""

    @property
    @abstractmethod
    def upper(self) -> float:
        """Upper end of the support (the lower end is its negative)."""

    @abstractmethod
    def pdf(self, x: ArrayLike) -> Float:
        """Density at ``x``."""

    @abstractmethod
    def tail_mass(self, x: ArrayLike) -> Float:
        """Probability of a value above ``x``, for ``x >= 0``."""

    @abstractmethod
    def central_mass(self, x: ArrayLike) -> Float:
        """Probability of a value between 0 and ``x``, for ``x >= 0``."""

    @abstractmethod
    def ppf(self, q: ArrayLike) -> Float:
        """Quantile at probability ``q``."""

    @abstractmethod
    def tail_first(self, x: ArrayLike) -> Float:
        """First moment above ``x``: the integral of ``t f(t)`` from ``x`` to the upper end."""

    @abstractmethod
    def _second_edge(self, x: Float) -> Float:
        """Term ``e(x)`` of ``M2(a, b) = variance * (M0(a, b) + e(a) - e(b))``."""

    @abstractmethod
    def companding(self) -> CoordinateLaw:
        """Law with density proportional to ``f^(1/3)`` (point density of fine quantizers)."""

    def cdf(self, x: ArrayLike) -> Float:
        """Probability of a value at most ``x``."""
        x = np.asarray(x, dtype=np.float64)
        tail = self.tail_mass(np.abs(x))
        return np.where(x < 0, tail, 1.0 - tail)

    def mass(self, a: ArrayLike, b: ArrayLike) -> Float:
        """Probability of a value between ``a`` and ``b``."""
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        near_a, near_b = self.central_mass(np.abs(a)), self.central_mass(np.abs(b))
        straddling = np.copysign(near_b, b) - np.copysign(near_a, a)
        # Far from the centre the difference of tails loses no digits.
        tails = np.abs(self.tail_mass(np.abs(a)) - self.tail_mass(np.abs(b)))
        sigma = math.sqrt(self.variance)
        far = ((a > sigma) & (b > sigma)) | ((a < -sigma) & (b < -sigma))
        return np.where(far, np.where(b >= a, tails, -tails), straddling)

    def first_moment(self, a: ArrayLike, b: ArrayLike) -> Float:
        """Integral of ``t f(t)`` from ``a`` to ``b``."""
        return self.tail_first(a) - self.tail_first(b)

    def second_moment(self, a: ArrayLike, b: ArrayLike) -> Float:
        """Integral of ``t² f(t)`` from ``a`` to ``b``."""
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        edges = self._second_edge(a) - self._second_edge(b)
        return self.variance * (self.mass(a, b) + edges)


@dataclass(frozen=True)
class SphereCoordinate(CoordinateLaw):
    """Coordinate of a uniform point on the unit sphere of ``dim`` dimensions.

    Parameters
    ----------
    dim : float
        Dimension, at least 2. Fractional values are allowed (the companding law needs them). At
        2 the density is the arcsine law, unbounded at ±1.

    References
    ----------
    TurboQuant, arXiv 2504.19874, lemma 1.
    """

    dim: float

    def __post_init__(self) -> None:
        if not (self.dim >= 2 and math.isfinite(self.dim)):
            raise TQError(
                f"dim={self.dim}: the coordinate law needs a finite dim >= 2; "
                "for the limit use GaussianCoordinate()"
            )

    @property
    def variance(self) -> float:
        return 1.0 / self.dim

    @property
    def upper(self) -> float:
        return 1.0

    @cached_property
    def _constant(self) -> float:
        d = self.dim
        if d < 1000:
            return math.exp(math.lgamma(d / 2) - math.lgamma((d - 1) / 2)) / math.sqrt(math.pi)
        # Ratio Γ(z + 1/2) / Γ(z) by its asymptotic series: differences of lgamma lose digits.
        z = (d - 1) / 2
        series = 1 - 1 / (8 * z) + 1 / (128 * z**2) + 5 / (1024 * z**3) - 21 / (32768 * z**4)
        return math.sqrt(z) * series / math.sqrt(math.pi)

    def _power(self, x: ArrayLike, exponent: float) -> Float:
        """``(1 - x²)^exponent``, zero outside of the support."""
        x = np.clip(np.asarray(x, dtype=np.float64), -1.0, 1.0)
        with np.errstate(divide="ignore"):
            if self.dim < 100:
                base = (1.0 - x) * (1.0 + x)
                return np.asarray(np.power(base, exponent), dtype=np.float64)
            # A large exponent would magnify the rounding of the base.
            return np.asarray(np.exp(exponent * np.log1p(-x * x)), dtype=np.float64)

    def pdf(self, x: ArrayLike) -> Float:
        x = np.asarray(x, dtype=np.float64)
        inside = self._constant * self._power(x, (self.dim - 3) / 2)
        return np.where(np.abs(x) <= 1.0, inside, 0.0)

    def tail_mass(self, x: ArrayLike) -> Float:
        x = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
        alpha = (self.dim - 1) / 2
        near: Any = special.betaincc(0.5, alpha, x * x)
        far: Any = special.betainc(alpha, 0.5, (1.0 - x) * (1.0 + x))
        return np.asarray(0.5 * np.where(x < 0.7, near, far), dtype=np.float64)

    def central_mass(self, x: ArrayLike) -> Float:
        x = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
        beta: Any = special.betainc(0.5, (self.dim - 1) / 2, x * x)
        return np.asarray(0.5 * beta, dtype=np.float64)

    def ppf(self, q: ArrayLike) -> Float:
        q = np.asarray(q, dtype=np.float64)
        alpha = (self.dim - 1) / 2
        tail = np.minimum(q, 1.0 - q)
        # x² from the central mass, from the tail, and 1 - x² near the ends: each without loss.
        centre: Any = special.betaincinv(0.5, alpha, np.clip(1.0 - 2.0 * tail, 0.0, 1.0))
        outer: Any = special.betainccinv(0.5, alpha, 2.0 * tail)
        end: Any = 1.0 - special.betaincinv(alpha, 0.5, 2.0 * tail)
        square = np.where(tail > 0.25, centre, np.where(outer < 0.5, outer, end))
        magnitude = np.sqrt(square)
        return np.asarray(np.copysign(magnitude, q - 0.5), dtype=np.float64)

    def tail_first(self, x: ArrayLike) -> Float:
        return self._constant / (self.dim - 1) * self._power(x, (self.dim - 1) / 2)

    def _second_edge(self, x: Float) -> Float:
        x = np.clip(x, -1.0, 1.0)
        return self._constant * x * self._power(x, (self.dim - 1) / 2)

    def companding(self) -> CoordinateLaw:
        return SphereCoordinate(self.dim / 3 + 2)


@dataclass(frozen=True)
class GaussianCoordinate(CoordinateLaw):
    """Centred normal law: the limit of ``√dim`` times a coordinate.

    Parameters
    ----------
    sigma : float
        Standard deviation.
    """

    sigma: float = 1.0

    @property
    def variance(self) -> float:
        return self.sigma**2

    @property
    def upper(self) -> float:
        return math.inf

    def _standard(self, x: ArrayLike) -> Float:
        return np.asarray(x, dtype=np.float64) / self.sigma

    def _phi(self, z: Float) -> Float:
        return np.asarray(np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi), dtype=np.float64)

    def pdf(self, x: ArrayLike) -> Float:
        return self._phi(self._standard(x)) / self.sigma

    def tail_mass(self, x: ArrayLike) -> Float:
        tail: Any = special.ndtr(-self._standard(x))
        return np.asarray(tail, dtype=np.float64)

    def central_mass(self, x: ArrayLike) -> Float:
        half: Any = 0.5 * special.erf(self._standard(x) / math.sqrt(2))
        return np.asarray(half, dtype=np.float64)

    def ppf(self, q: ArrayLike) -> Float:
        quantile: Any = self.sigma * special.ndtri(np.asarray(q, dtype=np.float64))
        return np.asarray(quantile, dtype=np.float64)

    def tail_first(self, x: ArrayLike) -> Float:
        return self.sigma * self._phi(self._standard(x))

    def _second_edge(self, x: Float) -> Float:
        z = self._standard(x)
        finite = np.where(np.isfinite(z), z, 0.0)
        return np.asarray(finite * self._phi(z), dtype=np.float64)

    def companding(self) -> CoordinateLaw:
        return GaussianCoordinate(self.sigma * math.sqrt(3.0))


def coordinate_law(dim: float | None) -> CoordinateLaw:
    """Law of a coordinate in ``dim`` dimensions; ``None`` or infinity is the Gaussian limit.

    The limit is the standard normal, that is, the law of ``√dim`` times a coordinate.
    """
    if dim is None or dim == math.inf:
        return GaussianCoordinate()
    return SphereCoordinate(dim)
