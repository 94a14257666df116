"""The linear map after which rounding costs least.

The error of a rotated and quantized vector ``x`` is as large in all directions and in proportion to
the length of ``x``. If it enters a loss by a gradient ``g``, it costs ``|x|**2 |g|**2``, up to a
constant. With ``T x`` quantized in place of ``x`` the gradient is ``T**-T g``, and the cost
``|T x|**2 |T**-T g|**2``: directions that hold much and matter little shrink.

References
----------
SmoothQuant, arXiv 2211.10438, balances activations and weights channel by channel. Geometric means
of matrices: Bhatia, Positive Definite Matrices (2007), chapter 4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tq_core.errors import TQError

__all__ = ["balancing_matrix", "balancing_scales", "geometric_mean"]

#: Share of the mean of a diagonal that is added to it.
_DAMPING = 1e-3
#: Most steps, and the relative change after which there are no more.
_ITERATIONS, _TOLERANCE = 30, 1e-9


def geometric_mean(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Geometric mean of two positive definite matrices.

    The one positive definite ``m`` with ``m @ inv(a) @ m == b``.

    Parameters
    ----------
    a, b : array_like [dim, dim]
        Symmetric, positive definite.

    Examples
    --------
    >>> geometric_mean(np.diag([1.0, 4.0]), np.diag([9.0, 1.0])).round(6)
    array([[3., 0.],
           [0., 2.]])
    """
    root, inverse = _powers(np.asarray(a, dtype=np.float64))
    inner, _ = _powers(inverse @ np.asarray(b, dtype=np.float64) @ inverse)
    found: NDArray[np.float64] = root @ inner @ root
    return found


def _powers(a: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Square root and inverse square root of a positive definite matrix."""
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    roots = np.sqrt(np.maximum(values, np.finfo(np.float64).tiny))
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def balancing_matrix(vectors: ArrayLike, gradients: ArrayLike) -> NDArray[np.float64]:
    """Symmetric ``T`` with the least sum of ``|T x|**2 |inv(T) g|**2`` over pairs of vectors.

    Parameters
    ----------
    vectors, gradients : array_like [n, dim]
        Vectors ``x`` to be quantized, and gradients ``g`` of a loss with respect to each.

    Returns
    -------
    array [dim, dim]
        Positive definite, and such that vectors keep their mean squared length. The identity
        if all vectors or all gradients are zero.

    Raises
    ------
    TQError
        If the shapes differ.

    Notes
    -----
    ``M = T @ T`` solves ``M A M = B``, where ``A`` and ``B`` are the second moments of the vectors
    and the gradients, each weighted by what the other costs under ``M``; this is iterated. A
    thousandth of the mean diagonal is added to both, for directions that few pairs tell of.

    Examples
    --------
    >>> x, g = np.array([[10.0, 1.0], [10.0, -1.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
    >>> t = balancing_matrix(x, g)
    >>> round(float((t[1, 1] / t[0, 0]) ** 2))  # ten times as much of the first
    10
    """
    x, g = _pairs(vectors, gradients)
    dim = x.shape[1]
    if not (x.any() and g.any()):
        return np.eye(dim)

    def step(square: NDArray[np.float64]) -> NDArray[np.float64]:
        cost_x = np.einsum("ni,ij,nj->n", x, square, x, optimize=True)
        cost_g = np.einsum("ni,ij,nj->n", g, np.linalg.inv(square), g, optimize=True)
        a, b = (_damped((y * w[:, None]).T @ y) for y, w in ((x, cost_g), (g, cost_x)))
        return geometric_mean(np.linalg.inv(a), b)

    square = _fixed_point(step, np.eye(dim))
    root, _ = _powers(square)
    moved = x @ root
    found: NDArray[np.float64] = root * np.sqrt(np.sum(x * x) / np.sum(moved * moved))
    return found


def balancing_scales(vectors: ArrayLike, gradients: ArrayLike) -> NDArray[np.float64]:
    """Diagonal of the best diagonal ``T``, for squared lengths of parts of vectors.

    Parameters
    ----------
    vectors, gradients : array_like [n, parts]
        Squared lengths of the parts of each vector and of its gradient. A part has one scale.

    Returns
    -------
    array [parts]
        As `balancing_matrix`.
    """
    x, g = _pairs(vectors, gradients)
    if not (x.any() and g.any()):
        return np.ones(x.shape[1])

    def step(square: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = x.T @ (g @ (1 / square)), g.T @ (x @ square)
        a, b = (y + _DAMPING * y.mean() for y in (a, b))
        return np.asarray(np.sqrt(b / a))

    square = _fixed_point(step, np.ones(x.shape[1]))
    found: NDArray[np.float64] = np.sqrt(square * (x.sum() / (x @ square).sum()))
    return found


def _fixed_point(
    step: Callable[[NDArray[np.float64]], NDArray[np.float64]], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where steps lead."""
    for _ in range(_ITERATIONS):
        last, x = x, step(x)
        if np.linalg.norm(x - last) < _TOLERANCE * np.linalg.norm(x):
            break
    return x


def _damped(a: NDArray[np.float64]) -> NDArray[np.float64]:
    added: NDArray[np.float64] = _DAMPING * np.trace(a) / len(a) * np.eye(len(a))
    return a + added


def _pairs(x: ArrayLike, g: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = (np.asarray(y, dtype=np.float64) for y in (x, g))
    if one.ndim != 2 or one.shape != two.shape:
        raise TQError(
            f"vectors have shape {one.shape} and gradients {two.shape}: needs [n, dim] of both"
        )
    return one, two
