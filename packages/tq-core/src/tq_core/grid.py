"""Codebooks confined to a scaled set of numbers that hardware multiplies.

For a fixed step the best choice of ``2**(bits-1)`` numbers out of the positive half of the set is
found exactly, by dynamic programming over neighbouring pairs; the step is scanned and then refined
to a zero of the derivative of the mean squared error.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from tq_core.distribution import CoordinateLaw
from tq_core.errors import ConvergenceError, TQError

__all__ = ["GRIDS", "MAX_BITS", "half_values", "optimise"]

Float = NDArray[np.float64]

GRIDS = ("int7", "int8", "e4m3")
MAX_BITS = {"int7": 7, "int8": 8, "e4m3": 6}
_OFFSET = {"int7": 64, "int8": 128}
_STEP_BITS = 16  # significant bits of a step
_SCAN = 384  # steps tried
_TIE = 1e-9  # relative difference in MSE below which two choices count as equal


@lru_cache(maxsize=3)
def half_values(grid: str) -> Float:
    """Positive numbers of the grid, ascending, in units of the step."""
    if grid in _OFFSET:
        return np.arange(_OFFSET[grid], dtype=np.float64) + np.float64(0.5)
    # e4m3: subnormals m/8 * 2^-6, normals (1 + m/8) * 2^e. The scale is fixed by keeping all
    # values below 256, one binade under the largest.
    mantissa = np.arange(8) / 8
    normal = (1 + mantissa) * 2.0 ** np.arange(-6, 8)[:, None]
    values = np.concatenate([mantissa[1:] * 2.0**-6, normal.ravel()])
    return np.asarray(values, dtype=np.float64)


def _round_step(step: float) -> float:
    mantissa, exponent = math.frexp(step)
    return math.ldexp(round(math.ldexp(mantissa, _STEP_BITS)), exponent - _STEP_BITS)


def _mse(law: CoordinateLaw, values: Float, step: float) -> float:
    """MSE of a coordinate over the variance, up to rounding."""
    c = step * values
    edges = np.concatenate([[0.0], 0.5 * (c[1:] + c[:-1]), [law.upper]])
    mass = law.mass(edges[:-1], edges[1:])
    first = law.first_moment(edges[:-1], edges[1:])
    gain = float(np.sum(2.0 * c * first - c * c * mass))
    return 1.0 - 2.0 * gain / law.variance


def _slope(step: float, law: CoordinateLaw, values: Float) -> float:
    """Derivative of the MSE in the step, up to a positive factor."""
    c = step * values
    edges = np.concatenate([[0.0], 0.5 * (c[1:] + c[:-1]), [law.upper]])
    mass = law.mass(edges[:-1], edges[1:])
    first = law.first_moment(edges[:-1], edges[1:])
    return float(np.sum(values * (c * mass - first)))


def _refine(law: CoordinateLaw, values: Float, step: float) -> float:
    """Zero of the derivative next to ``step``, rounded to 16 bits."""
    low, high = step, step
    for _ in range(200):
        if _slope(low, law, values) < 0.0:
            break
        low *= 0.99
    for _ in range(200):
        if _slope(high, law, values) > 0.0:
            break
        high *= 1.01
    if not _slope(low, law, values) < 0.0 < _slope(high, law, values):
        raise ConvergenceError(f"no stationary step near {step} for {law}; report this")
    root = float(optimize.brentq(_slope, low, high, args=(law, values), xtol=1e-15, rtol=1e-14))
    return _round_step(root)


@lru_cache(maxsize=3)
def _pairs(grid: str) -> tuple[Float, NDArray[np.intp]]:
    """Different midpoints of pairs of values, and the place of each pair among them."""
    values = half_values(grid)
    middles, where = np.unique(0.5 * (values[:, None] + values[None, :]), return_inverse=True)
    return middles, where.reshape(len(values), len(values))


@lru_cache(maxsize=3)
def _order(n: int) -> Float:
    """Infinite where the second of a pair is not the larger one."""
    return np.asarray(np.where(np.tri(n, dtype=bool), np.inf, 0.0), dtype=np.float64)


def _choose(law: CoordinateLaw, grid: str, count: int, step: float) -> NDArray[np.int64]:
    """Indices of the ``count`` numbers of least MSE at a fixed step (exact)."""
    values = half_values(grid)
    n = len(values)
    c = step * values
    middles, where = _pairs(grid)
    mass = law.central_mass(step * middles)[where]
    first = (law.tail_first(0.0) - law.tail_first(step * middles))[where]
    # Sum over cells of ∫(x - c)² telescopes into terms of neighbouring pairs.
    pair = 2.0 * (c[None, :] - c[:, None]) * first + (c[:, None] ** 2 - c[None, :] ** 2) * mass
    pair += _order(n)
    last = 0.5 * c * c - 2.0 * c * float(law.tail_first(0.0))
    cost = np.zeros(n)
    trail: list[NDArray[np.int64]] = []
    for _ in range(count - 1):
        total = cost[:, None] + pair
        best = np.argmin(total, axis=0)
        cost = total[best, np.arange(n)]
        trail.append(best)
    index = int(np.argmin(cost + last))
    chosen = [index]
    for best in reversed(trail):
        index = int(best[index])
        chosen.append(index)
    return np.array(chosen[::-1], dtype=np.int64)


def optimise(
    law: CoordinateLaw, bits: int, grid: str, top: float
) -> tuple[float, Float, NDArray[np.int64] | None]:
    """Step, positive grid numbers and (integer grids) levels of least MSE.

    Parameters
    ----------
    law : CoordinateLaw
        Law of a coordinate.
    bits : int
        Bits a coordinate.
    grid : {"int7", "int8", "e4m3"}
        Name of the set.
    top : float
        Largest centroid of the codebook without a grid.

    Returns
    -------
    step : float
        With 16 significant bits.
    values : float64 array [2**(bits-1)]
        Positive half of the codebook in units of the step.
    levels : int64 array [2**bits] or None
        All levels on the integer grids.
    """
    if bits > MAX_BITS[grid]:
        raise TQError(
            f"bits={bits}: grid {grid!r} holds codebooks of at most {MAX_BITS[grid]} bits; "
            "use fewer bits or grid='int8'"
        )
    values = half_values(grid)
    count = 2 ** (bits - 1)
    if count == len(values):
        candidates = {tuple(range(count)): top / float(values[-1])}
    elif count == 1:
        candidates = {(0,): top / float(values[0])}
    else:
        if grid == "e4m3":
            # All steps within a factor of two, so that every mantissa alignment is met once.
            steps = top / 128.0 * 2.0 ** (-np.arange(_SCAN // 4) * 4 / _SCAN)
        else:
            # From the coarsest grid that has enough levels to the finest that reaches the top.
            finest = 1.1 * float(values[-1])
            steps = top / np.geomspace(max(count / 2, 4.0), finest, _SCAN)
        candidates = {tuple(_choose(law, grid, count, s).tolist()): float(s) for s in steps}
    found: list[tuple[float, int, float, tuple[int, ...]]] = []
    scored = sorted(
        (_mse(law, values[list(chosen)], step), step, chosen) for chosen, step in candidates.items()
    )
    for _, step, chosen in scored[:24]:
        refined = _refine(law, values[list(chosen)], step)
        found.append((_mse(law, values[list(chosen)], refined), chosen[-1], refined, chosen))
    least = min(found)[0]
    # Multiples of one ratio give equal errors: among equals the smallest numbers win.
    ties = [entry for entry in found if entry[0] <= least * (1 + _TIE) + 1e-15]
    _, _, step, chosen = min(ties, key=lambda entry: (entry[1], entry[3]))
    levels = None
    if grid in _OFFSET:
        upper = np.array(chosen, dtype=np.int64) + _OFFSET[grid]
        levels = np.concatenate([2 * _OFFSET[grid] - 1 - upper[::-1], upper])
    return step, values[list(chosen)], levels
