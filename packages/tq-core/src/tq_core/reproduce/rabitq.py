"""RaBitQ in NumPy, a reference for comparisons: one bit and the extended form of several bits.

References
----------
[1] Gao and Long, "RaBitQ: quantizing high-dimensional vectors with a theoretical error bound for
    approximate nearest neighbor search", SIGMOD 2024.
[2] Gao et al., "Practical and asymptotically optimal quantization of high-dimensional vectors in
    Euclidean space for approximate nearest neighbor search", SIGMOD 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tq_core.packing import packed_size
from tq_core.rotation import Rotation

__all__ = ["RaBitQ", "nearest_grid_codes"]

Float = NDArray[np.float64]


def nearest_grid_codes(unit: Float, bits: int) -> NDArray[np.uint8]:
    """Grid codeword of largest cosine with each unit vector ([2], section 3.2).

    The grid is all vectors with coordinates ``code - (2**bits - 1) / 2``. Scaled up from zero, a
    vector meets the codewords that can be nearest one after the other: whenever ``t |o_j|`` passes
    an integer, coordinate j moves to the next level. All of them are tried.

    Parameters
    ----------
    unit : float64 array [n, dim]
    bits : int

    Returns
    -------
    uint8 array [n, dim]
    """
    n, dim = unit.shape
    magnitude = np.abs(unit)
    steps = 2 ** (bits - 1) - 1  # levels 0.5, 1.5 … steps + 0.5
    level = np.zeros((n, dim), dtype=np.int64)
    if steps:
        size = np.maximum(magnitude, 1e-12)
        crossing = np.arange(1, steps + 1)[:, None] / size[:, None, :]  # [n, steps, dim]
        order = np.argsort(crossing.reshape(n, -1), axis=1)
        gain = np.take_along_axis(magnitude, order % dim, axis=1)
        dot = 0.5 * magnitude.sum(axis=1, keepdims=True) + np.cumsum(gain, axis=1)
        # (i + 1/2)² - (i - 1/2)² = 2 i
        square = 0.25 * dim + np.cumsum(2.0 * (order // dim + 1), axis=1)
        cosine = dot / np.sqrt(square)
        best = np.argmax(cosine, axis=1)
        scale = np.take_along_axis(crossing.reshape(n, -1), order, axis=1)[np.arange(n), best]
        start = 0.5 * magnitude.sum(axis=1) / np.sqrt(0.25 * dim)
        scale = np.where(cosine[np.arange(n), best] > start, scale, 0.0)
        level = np.minimum(np.floor(scale[:, None] * size * (1 + 1e-12)), steps).astype(np.int64)
    half = 2 ** (bits - 1)
    codes = np.where(unit >= 0, half + level, half - 1 - level)
    return np.asarray(codes, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class RaBitQ:
    """Codes of vectors around their mean.

    Attributes
    ----------
    centre : float64 array [dim]
        Mean of the vectors.
    codes : uint8 array [n, dim]
    factor : float64 array [n]
        ``‖x - centre‖ / ⟨codeword, o⟩`` with o the rotated unit residual: the estimate of
        ``⟨x - centre, q⟩`` is ``factor ⟨codeword, R q⟩``, unbiased over R ([1], theorem 3.2).
    bits : int
    rotation : Rotation
    """

    centre: Float
    codes: NDArray[np.uint8]
    factor: Float
    bits: int
    rotation: Rotation

    @classmethod
    def fit(cls, x: NDArray[np.floating], bits: int, rotation: Rotation) -> RaBitQ:
        """Encode vectors [n, dim]."""
        centre = x.mean(axis=0, dtype=np.float64)
        codes, factor = np.empty(x.shape, dtype=np.uint8), np.empty(len(x))
        rows = max(1, (1 << 21) // (x.shape[1] << bits))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            residual = rotation.apply(x[part] - centre)
            norm = np.linalg.norm(residual, axis=1)
            unit = residual / np.where(norm == 0.0, 1.0, norm)[:, None]
            codes[part] = nearest_grid_codes(unit, bits)
            product = np.einsum("ij,ij->i", cls._codewords(codes[part], bits), unit)
            factor[part] = norm / product
        return cls(centre, codes, factor, bits, rotation)

    @staticmethod
    def _codewords(codes: NDArray[np.uint8], bits: int) -> Float:
        return np.asarray(codes - (2**bits - 1) / 2)

    @property
    def nbytes(self) -> int:
        """Packed codes and two float32 numbers a vector (norm and factor), and the centre."""
        n, dim = len(self.codes), len(self.centre)
        return n * (packed_size(dim, self.bits) + 8) + 4 * dim

    def decode(self) -> NDArray[np.float32]:
        """Vectors whose inner products with queries are the estimates, float32 [n, dim]."""
        out = np.empty(self.codes.shape, dtype=np.float32)
        for start in range(0, len(out), 1024):
            part = slice(start, start + 1024)
            words = self._codewords(self.codes[part], self.bits) * self.factor[part, None]
            out[part] = self.rotation.inverse(words) + self.centre
        return out
