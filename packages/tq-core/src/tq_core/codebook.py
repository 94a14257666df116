"""Scalar codebooks that minimise the mean squared error for the coordinate law.

``lloyd_max`` solves the Lloyd-Max conditions with Newton's method on the centroid equations; every
conditional mean is closed. With ``grid=...`` the centroids are confined to a scaled set of numbers
that tensor cores multiply (see `tq_core.grid`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy import linalg

from tq_core import grid as _grid
from tq_core.distribution import CoordinateLaw, coordinate_law
from tq_core.errors import ConvergenceError, TQError

__all__ = ["Codebook", "GridName", "gaussian_codebook", "lloyd_max"]

Float = NDArray[np.float64]
GridName = Literal["int7", "int8", "e4m3"]

_RESIDUAL = 1e-11  # stationarity, in standard deviations
_ITERATIONS = 100
_BUCKET = 32000  # 16-bit integer of the largest boundary
_TABLE_BYTES = 1 << 19  # larger tables of pairs fall out of the cache
_SMALL = 4096  # coordinates below which a binary search is quicker than the table


@dataclass(frozen=True, eq=False)
class Codebook:
    """A symmetric scalar codebook for the coordinates of a unit vector.

    Attributes
    ----------
    dim : int or None
        Dimension of the vectors; ``None`` for the Gaussian limit (unit variance).
    bits : int
        Bits a coordinate.
    grid : {None, "int7", "int8", "e4m3"}
        Set of numbers that the centroids are confined to.
    centroids : float64 array [2**bits]
        Ascending reconstruction values.
    boundaries : float64 array [2**bits - 1]
        Midpoints of neighbouring centroids. A value on a boundary belongs to the upper cell.
    mse : float
        Mean squared error of a unit vector: ``dim`` times that of a coordinate.
    entropy : float
        Entropy of the codes in bits.
    levels : int64 array [2**bits] or None
        Integer levels on the grids "int7" (``step * (level - 63.5)``) and "int8"
        (``step * (level - 127.5)``).
    step : float or None
        Scale of the grid, with 16 significant bits, so that centroids and boundaries on the
        integer grids are exact in float32.
    """

    dim: int | None
    bits: int
    grid: GridName | None
    centroids: Float
    boundaries: Float
    mse: float
    entropy: float
    levels: NDArray[np.int64] | None = None
    step: float | None = None

    @property
    def size(self) -> int:
        """Number of centroids."""
        return len(self.centroids)

    @cached_property
    def _buckets(self) -> tuple[float, NDArray[np.uint8]]:
        """Factor from coordinates to 16-bit integers, and the code of each integer.

        255 stands for "look it up": the integers that values on both sides of a boundary have.
        """
        factor = _BUCKET / float(self.boundaries[-1] or 1.0)
        # astype truncates, so integer i holds values between i - 1 and i + 1; rounding of the
        # product moves a value by less than 2**-7 of a bucket.
        integers = np.arange(-(2**15), 2**15, dtype=np.float64)
        low = np.searchsorted(self.boundaries * factor, integers - 1.01, side="right")
        high = np.searchsorted(self.boundaries * factor, integers + 1.01, side="right")
        codes = np.where(low == high, low, 255).astype(np.uint8)
        return factor, np.roll(codes, 2**15)  # a negative integer is read as unsigned

    @cached_property
    def _pairs(self) -> dict[np.dtype[np.floating], NDArray[np.complexfloating]]:
        """By dtype, the centroids of two codes, read as one little-endian 16-bit number, as one entry."""
        number = np.arange((self.size - 1) * 257 + 1)
        codes = np.stack([number & 255, number >> 8], axis=1)
        pairs = self.centroids[np.minimum(codes, self.size - 1)].view(np.complex128).ravel()
        tables: dict[np.dtype[np.floating], NDArray[np.complexfloating]]
        tables = {np.dtype(np.float64): pairs, np.dtype(np.float32): pairs.astype(np.complex64)}
        return {dtype: table for dtype, table in tables.items() if table.nbytes <= _TABLE_BYTES}

    def encode(self, y: ArrayLike) -> NDArray[np.uint8]:
        """Codes (uint8) of coordinates ``y`` of unit vectors, same shape."""
        y = np.asarray(y)
        return self.encode_scaled(y if y.dtype == np.float32 else y.astype(np.float64), None)

    def encode_scaled(
        self, y: NDArray[np.floating], inverse: NDArray[np.floating] | None
    ) -> NDArray[np.uint8]:
        """Codes of ``y * inverse[..., None]``, float32 or float64; ``None`` stands for ones."""
        if y.size < _SMALL:
            unit = y if inverse is None else y * inverse[..., None]
            found = np.searchsorted(self.boundaries, unit.ravel(), side="right")
            return found.astype(np.uint8).reshape(y.shape)
        factor, table = self._buckets
        scaled = y * (y.dtype.type(factor) if inverse is None else factor * inverse[..., None])
        np.clip(scaled, -_BUCKET - 2, _BUCKET + 2, out=scaled)
        codes = table.take(scaled.astype(np.int16).view(np.uint16))
        near = np.flatnonzero(codes.ravel() == 255)
        exact = y.ravel()[near]
        if inverse is not None:
            exact = exact * inverse.ravel()[near // y.shape[-1]]
        codes.ravel()[near] = np.searchsorted(self.boundaries, exact, side="right")
        return codes

    def decode(self, codes: ArrayLike, dtype: DTypeLike = np.float64) -> NDArray[np.floating]:
        """Centroids of ``codes`` as float64 or float32, same shape."""
        codes = np.asarray(codes)
        dtype = np.dtype(np.float32 if np.dtype(dtype) == np.float32 else np.float64)
        if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= self.size):
            raise TQError(
                f"codes from {codes.min()} to {codes.max()}: this codebook has codes 0 to "
                f"{self.size - 1}; decode with the codebook that encoded them"
            )
        pairs = self._pairs.get(dtype)
        even = codes.ndim and codes.size and codes.shape[-1] % 2 == 0
        if pairs is not None and codes.dtype == np.uint8 and even:
            return pairs.take(np.ascontiguousarray(codes).view("<u2")).view(dtype)
        return np.asarray(self.centroids.astype(dtype).take(codes))


def _check(dim: float | None, bits: int) -> int | None:
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= 8:
        raise TQError(f"bits={bits}: a codebook has 1 to 8 bits; choose an integer in that range")
    if dim is None or dim == math.inf:
        return None
    if int(dim) != dim or dim < 2:
        raise TQError(f"dim={dim}: needs an integer >= 2, or None for the Gaussian limit")
    return int(dim)


def _newton(law: CoordinateLaw, bits: int) -> Float:
    """Positive half of the Lloyd-Max centroids, ascending."""
    n = 2 ** (bits - 1)
    sigma = math.sqrt(law.variance)

    def residual(c: Float) -> tuple[Float, Float, Float, Float]:
        edges = np.concatenate([[0.0], 0.5 * (c[1:] + c[:-1]), [law.upper]])
        mass = law.mass(edges[:-1], edges[1:])
        mean = law.first_moment(edges[:-1], edges[1:]) / mass
        return c - mean, edges, mass, mean

    c = law.companding().ppf(0.5 + (np.arange(n) + 0.5) / (2 * n))
    for _ in range(3):
        c = c - residual(c)[0]
    for _ in range(_ITERATIONS):
        f, edges, mass, mean = residual(c)
        error = float(np.max(np.abs(f)))
        if error <= _RESIDUAL * sigma:
            return mean
        density = law.pdf(edges[1:-1])
        up = density * (edges[1:-1] - mean[:-1]) / mass[:-1]
        down = density * (mean[1:] - edges[1:-1]) / mass[1:]
        bands = np.zeros((3, n))
        bands[1] = 1.0
        bands[1, :-1] -= 0.5 * up
        bands[1, 1:] -= 0.5 * down
        bands[0, 1:] = -0.5 * up
        bands[2, :-1] = -0.5 * down
        delta: Any = linalg.solve_banded((1, 1), bands, f)
        for halving in range(30):
            trial = c - delta * 0.5**halving
            ordered = trial[0] > 0 and bool(np.all(np.diff(trial) > 0)) and trial[-1] < law.upper
            if ordered and float(np.max(np.abs(residual(trial)[0]))) < error:
                c = trial
                break
        else:
            c = mean  # a plain Lloyd step never increases the error
    raise ConvergenceError(
        f"Lloyd-Max for {law} at {bits} bits: stationarity residual {error / sigma:.1e} standard "
        f"deviations after {_ITERATIONS} iterations, the limit is {_RESIDUAL:.0e}; report this"
    )


def _build(
    dim: int | None,
    bits: int,
    grid: GridName | None,
    half: Float,
    step: float | None,
    levels: NDArray[np.int64] | None,
) -> Codebook:
    law = coordinate_law(dim)
    centroids = np.concatenate([-half[::-1], half])
    boundaries = 0.5 * (centroids[1:] + centroids[:-1])
    edges = np.concatenate([[0.0], boundaries[len(half) :], [law.upper]])
    mass = law.mass(edges[:-1], edges[1:])
    first = law.first_moment(edges[:-1], edges[1:])
    second = law.second_moment(edges[:-1], edges[1:])
    mse = 2.0 * float(np.sum(second - 2.0 * half * first + half * half * mass)) / law.variance
    entropy = -2.0 * float(np.sum(mass * np.log2(mass)))
    for array in (centroids, boundaries, levels):
        if array is not None:
            array.setflags(write=False)
    return Codebook(dim, bits, grid, centroids, boundaries, mse, entropy, levels=levels, step=step)


@lru_cache(maxsize=256)
def _cached(dim: int | None, bits: int, grid: GridName | None) -> Codebook:
    law = coordinate_law(dim)
    if grid is None:
        return _build(dim, bits, None, _newton(law, bits), None, None)
    top = float(_cached(dim, bits, None).centroids[-1])
    step, half_values, levels = _grid.optimise(law, bits, grid, top)
    return _build(dim, bits, grid, step * half_values, step, levels)


def lloyd_max(dim: float | None, bits: int, grid: GridName | None = None) -> Codebook:
    """Codebook of least mean squared error for one coordinate of a random unit vector.

    Parameters
    ----------
    dim : int or None
        Dimension of the vectors, at least 2; ``None`` or infinity for the Gaussian limit.
    bits : int
        1 to 8.
    grid : {None, "int7", "int8", "e4m3"}
        ``None`` leaves the centroids free. "int7" confines them to ``step * (level - 63.5)`` with
        levels 0..127, "int8" to ``step * (level - 127.5)`` with levels 0..255, "e4m3" to ``step``
        times a number of the 8-bit float format.

    Returns
    -------
    Codebook
        Cached; its arrays are read-only.

    Raises
    ------
    TQError
        If an argument is out of range.
    ConvergenceError
        If the solver does not converge.

    Examples
    --------
    >>> lloyd_max(None, 2).centroids.round(6).tolist()
    [-1.510418, -0.45278, 0.45278, 1.510418]
    >>> round(lloyd_max(128, 4).mse, 6)
    0.009315
    """
    checked = _check(dim, bits)
    if grid is not None and grid not in _grid.GRIDS:
        raise TQError(f"grid={grid!r}: choose None or one of {', '.join(map(repr, _grid.GRIDS))}")
    return _cached(checked, int(bits), grid)


def gaussian_codebook(bits: int, grid: GridName | None = None) -> Codebook:
    """Codebook of the standard normal law; same as ``lloyd_max(None, bits, grid)``."""
    return lloyd_max(None, bits, grid)
