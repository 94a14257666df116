"""Fractional bit rates: a few outlier channels get one more bit than the rest.

The two groups of channels are rotated, quantized and scaled on their own. The rate that is stated
counts both scales: at dim 128 a rate of 2.5 means 32 channels at 3 bits, 96 at 2 bits (2.25 bits a
coordinate) and two fp16 scales (0.25 bits).

References
----------
TurboQuant, arXiv 2504.19874, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tq_core.errors import TQError
from tq_core.inputs import as_vectors
from tq_core.packing import packed_size
from tq_core.quantizer import Encoded, MSEQuantizer
from tq_core.scale import ScaleName
from tq_core.splitmix import splitmix64

__all__ = ["OutlierEncoded", "OutlierQuantizer", "outlier_channels", "outlier_count"]


def outlier_count(dim: int, rate: float, scale_bits: int = 16) -> tuple[int, int]:
    """Split that spends ``rate`` bits a coordinate, both scales included.

    Parameters
    ----------
    dim : int
        Coordinates a vector.
    rate : float
        Bits a coordinate, for example 2.5 or 3.5.
    scale_bits : int
        Bits of one scale.

    Returns
    -------
    count, low_bits : int
        Number of channels with ``low_bits + 1`` bits, and bits of the others. The bytes really
        stored never exceed the rate.

    Examples
    --------
    >>> outlier_count(128, 2.5)
    (32, 2)
    """
    budget = math.floor(rate * dim / 8 + 1e-9) - 2 * scale_bits // 8
    for low in range(7, 0, -1):
        for count in range(dim - 2, 1, -1):
            if packed_size(count, low + 1) + packed_size(dim - count, low) <= budget:
                return count, low
    raise TQError(
        f"rate={rate} at dim={dim}: two scales of {scale_bits} bits leave {budget} bytes, less than "
        "1 bit a coordinate; raise the rate or use float16 scales"
    )


def outlier_channels(x: ArrayLike, count: int) -> NDArray[np.int64]:
    """The ``count`` channels of largest mean square in calibration data [..., dim], ascending."""
    array = np.asarray(x)
    if array.ndim < 2:
        raise TQError(f"shape {array.shape}: pass calibration vectors [..., dim]")
    rows = as_vectors(array, array.shape[-1]).reshape(-1, array.shape[-1]).astype(np.float64)
    if not 0 < count < rows.shape[1]:
        raise TQError(f"count={count}: needs 1 to {rows.shape[1] - 1} of {rows.shape[1]} channels")
    energy = np.mean(np.square(rows / max(float(np.max(np.abs(rows))), 1e-300)), axis=0)
    return np.sort(np.argsort(-energy, kind="stable")[:count])


@dataclass(frozen=True, eq=False)
class OutlierEncoded:
    """Codes of both groups of channels; ``nbytes`` counts all codes and both scales."""

    outliers: Encoded
    others: Encoded

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return (*self.others.scales.shape, self.outliers.dim + self.others.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales of both groups."""
        return self.outliers.nbytes + self.others.nbytes

    @property
    def bits_per_coordinate(self) -> float:
        """Stored bits a coordinate, scales included."""
        return 8.0 * self.nbytes / max(1, math.prod(self.shape))


class OutlierQuantizer:
    """Two `MSEQuantizer`, one for the outlier channels with one more bit.

    Parameters
    ----------
    dim : int
        Coordinates a vector.
    channels : sequence of int
        Outlier channels (see `outlier_channels`), at least 2, leaving at least 2.
    low_bits : int
        Bits of the other channels, 1 to 7.
    rotation, scale, seed, rounds, scale_dtype
        As in `MSEQuantizer`; scales are float16 by default.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(100, 128))
    >>> x[:, :8] *= 10
    >>> quantizer = OutlierQuantizer.for_rate(x, 2.5)
    >>> quantizer.encode(x).bits_per_coordinate
    2.5
    """

    def __init__(
        self,
        dim: int,
        channels: Sequence[int] | NDArray[np.integer],
        low_bits: int,
        rotation: str = "haar",
        scale: ScaleName = "mse",
        seed: int = 0,
        *,
        rounds: int = 3,
        scale_dtype: DTypeLike | None = np.float16,
    ) -> None:
        chosen = np.unique(np.asarray(channels, dtype=np.int64))
        if len(chosen) != len(channels) or not 2 <= len(chosen) <= dim - 2:
            raise TQError(f"{len(channels)} channels: needs 2 to {dim - 2} different ones of {dim}")
        if chosen[0] < 0 or chosen[-1] >= dim:
            raise TQError(f"channels {chosen[0]} to {chosen[-1]}: must lie in 0 to {dim - 1}")
        if not isinstance(rotation, str):
            raise TQError("the groups have different dims: name the rotation, 'haar' or 'hadamard'")
        self.dim = dim
        self.channels = chosen
        self.rest = np.setdiff1d(np.arange(dim), chosen)
        self.outliers = MSEQuantizer(
            len(chosen),
            low_bits + 1,
            rotation,
            scale,
            seed,
            rounds=rounds,
            scale_dtype=scale_dtype,
        )
        self.others = MSEQuantizer(
            len(self.rest),
            low_bits,
            rotation,
            scale,
            int(splitmix64(seed, 1, start=2**33)[0]),
            rounds=rounds,
            scale_dtype=scale_dtype,
        )

    @classmethod
    def for_rate(
        cls,
        calibration: ArrayLike,
        rate: float,
        rotation: str = "haar",
        scale: ScaleName = "mse",
        seed: int = 0,
        *,
        rounds: int = 3,
        scale_dtype: DTypeLike = np.float16,
    ) -> OutlierQuantizer:
        """Quantizer of ``rate`` stored bits a coordinate, outliers chosen from data [..., dim]."""
        dim = np.shape(calibration)[-1]
        count, low = outlier_count(dim, rate, 8 * np.dtype(scale_dtype).itemsize)
        return cls(
            dim,
            outlier_channels(calibration, count),
            low,
            rotation,
            scale,
            seed,
            rounds=rounds,
            scale_dtype=scale_dtype,
        )

    @property
    def code_bits(self) -> float:
        """Bits a coordinate without the scales."""
        high, low = self.outliers, self.others
        return (high.dim * high.bits + low.dim * low.bits) / self.dim

    def encode(self, x: ArrayLike) -> OutlierEncoded:
        """Encode vectors [..., dim]; input rules and errors as in `MSEQuantizer.encode`."""
        array = as_vectors(x, self.dim)
        return OutlierEncoded(
            self.outliers.encode(array[..., self.channels]),
            self.others.encode(array[..., self.rest]),
        )

    def decode(
        self, encoded: OutlierEncoded, dtype: DTypeLike = np.float64
    ) -> NDArray[np.floating]:
        """Decoded vectors [..., dim]."""
        out = np.empty((*encoded.others.scales.shape, self.dim), dtype=dtype)
        out[..., self.channels] = self.outliers.decode(encoded.outliers, dtype)
        out[..., self.rest] = self.others.decode(encoded.others, dtype)
        return out
