"""The per-vector scale that is stored in place of the norm.

With ``y`` the rotated vector and ``c`` its codeword, the decoded vector is ``scale * c``. The four
choices cost the same storage; ``mse`` has the least squared error and ``unbiased`` makes inner
products unbiased under Haar rotations.

References
----------
EDEN (ICML 2022), DRIVE (NeurIPS 2021), RaBitQ.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tq_core.errors import TQError

__all__ = ["SCALES", "ScaleName", "check_scale", "round_scales", "vector_scales"]

ScaleName = Literal["mse", "norm", "unbiased", "none"]
SCALES: tuple[str, ...] = get_args(ScaleName)


def check_scale(scale: str) -> None:
    """Raise unless ``scale`` is one of the four names."""
    if scale not in SCALES:
        raise TQError(f"scale={scale!r}: choose one of {', '.join(map(repr, SCALES))}")


def vector_scales(
    y: NDArray[np.floating], c: NDArray[np.floating], norm: NDArray[np.floating], scale: str
) -> NDArray[np.floating]:
    """Scales of vectors ``y`` [..., dim] with codewords ``c`` and norms ``norm`` [...].

    A zero vector has scale 0. ``y`` is not normalised.
    """
    if scale == "none":
        return norm
    if scale == "mse":
        return np.asarray(np.einsum("...i,...i->...", y, c) / np.einsum("...i,...i->...", c, c))
    if scale == "norm":
        return np.asarray(norm / np.sqrt(np.einsum("...i,...i->...", c, c)))
    # A codeword has the signs of its vector, so the product is positive unless y is zero.
    product = np.einsum("...i,...i->...", y, c)
    zero = norm == 0.0
    return np.where(zero, 0.0, norm * (norm / np.where(zero, 1.0, product)))


def round_scales(
    scales: NDArray[np.float64], dtype: np.dtype[np.floating], remedy: str
) -> NDArray[np.floating]:
    """Scales as ``dtype``, rounded to nearest even; raise where one exceeds its largest number."""
    limit = float(np.finfo(dtype).max)
    high = ~(np.abs(scales) <= limit)
    if high.any():
        index = tuple(int(i) for i in np.argwhere(high)[0])
        raise TQError(
            f"scale of vector {list(index)} is {scales[index]:.6g}: {dtype} holds at most "
            f"{limit:.6g}; {remedy}"
        )
    return scales.astype(dtype)
