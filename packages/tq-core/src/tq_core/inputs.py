"""Checks of vectors given by the caller, and norms that neither overflow nor vanish."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tq_core.errors import TQError

__all__ = ["as_vectors", "check_finite", "normalise"]

_KINDS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def as_vectors(
    x: ArrayLike, dim: int, name: str = "x", *, finite: bool = True
) -> NDArray[np.floating]:
    """Finite real vectors [..., dim] of dtype float16, float32 or float64.

    Python numbers and lists become float64. ``finite=False`` leaves it to the caller to check that
    values are finite (`check_finite`).

    Raises
    ------
    TQError
        If the dtype is another, the last axis is not ``dim``, or a value is not finite; the
        message names the first bad index.
    """
    is_array = hasattr(x, "dtype")
    array = np.asarray(x)
    if not is_array and array.dtype.kind in "iub":
        array = array.astype(np.float64)
    if array.dtype not in _KINDS:
        raise TQError(
            f"{name} has dtype {array.dtype}: float16, float32 and float64 are supported; convert "
            f"it, for example {name}.astype('float32')"
        )
    if array.ndim == 0 or array.shape[-1] != dim:
        raise TQError(
            f"{name} has shape {array.shape}: the last axis must be dim={dim}; reshape it or use "
            "a quantizer of that dim"
        )
    if finite:
        check_finite(array, name)
    return array


def check_finite(x: NDArray[np.floating], name: str = "x") -> None:
    """Raise if a value is not finite and name its index."""
    good = np.isfinite(x)
    if not good.all():
        index = [int(i) for i in np.unravel_index(int(np.argmin(good)), x.shape)]
        value = x[tuple(index)]
        raise TQError(
            f"{name}{index} is {value}: only finite values can be quantized or decoded; mask or "
            "replace them, for example with numpy.nan_to_num"
        )


def normalise(x: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Scale vectors by powers of two so that their largest magnitude is in [0.5, 1).

    Returns
    -------
    scaled : float64 array [..., dim]
        ``x * 2**-exponent``, exact; zero vectors stay zero.
    exponent : int32 array [...]
        Zero for zero vectors.
    """
    values = np.asarray(x, dtype=np.float64)
    largest = np.max(np.abs(values), axis=-1, initial=0.0)
    exponent = np.frexp(largest)[1].astype(np.int32)
    return np.asarray(np.ldexp(values, -exponent[..., None]), dtype=np.float64), exponent
