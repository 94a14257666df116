"""SplitMix64: the only source of random bits of the formats.

The state advances by a constant, so draw ``n`` is a function of ``seed + (n + 1) * γ`` and whole
blocks are computed at once.

References
----------
Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tq_core.errors import TQError

__all__ = ["check_seed", "signs", "splitmix64", "standard_normals"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_LN2 = 0.6931471805599453


def check_seed(seed: int) -> int:
    """Return ``seed`` if it fits 64 unsigned bits, else raise."""
    if isinstance(seed, bool) or int(seed) != seed or not 0 <= seed < 2**64:
        raise TQError(f"seed={seed}: needs an integer from 0 to 2**64 - 1")
    return int(seed)


def splitmix64(seed: int, count: int, start: int = 0) -> NDArray[np.uint64]:
    """Draws ``start`` to ``start + count - 1`` of the generator that starts at ``seed``.

    Examples
    --------
    >>> hex(int(splitmix64(0, 1)[0]))
    '0xe220a8397b1dcdaf'
    """
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.full(count, check_seed(seed), dtype=np.uint64) + index * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def signs(seed: int, count: int) -> NDArray[np.float64]:
    """``count`` signs ±1.0; bits of consecutive draws, least significant first, 1 means -1."""
    draws = splitmix64(seed, -(-count // 64))
    bits = (draws[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return 1.0 - 2.0 * bits.ravel()[:count].astype(np.float64)


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers from IEEE-exact operations in a fixed order."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    power = (exponent - low).astype(np.float64)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    series = np.full_like(t, 1.0 / 25.0)
    for k in range(23, 0, -2):
        series = series * square + 1.0 / k
    return np.asarray(2.0 * t * series + power * _LN2, dtype=np.float64)


def standard_normals(seed: int, count: int, start: int = 0) -> NDArray[np.float64]:
    """``count`` independent standard normals by Marsaglia's polar method.

    Draws ``start + 2n`` and ``start + 2n + 1`` make the pair ``u, v = 2 (draw >> 11) 2^-53 - 1``. A
    pair with ``0 < s = u² + v² < 1`` gives ``u m`` and ``v m`` with ``m = √(-2 log(s) / s)``, other
    pairs give nothing. Only ``+ - * / √``, ``frexp`` and comparisons occur, so the result has the
    same bits on every machine.
    """
    pieces: list[NDArray[np.float64]] = []
    have = 0
    while have < count:
        pairs = (count - have) * 2 // 3 + 16
        draws = splitmix64(seed, 2 * pairs, start)
        start += 2 * pairs
        uniform = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
        u, v = (2.0 * uniform - 1.0).reshape(pairs, 2).T
        s = u * u + v * v
        keep = (s > 0.0) & (s < 1.0)
        u, v, s = u[keep], v[keep], s[keep]
        factor = np.sqrt(-2.0 * _log(s) / s)
        pieces.append(np.stack([u * factor, v * factor], axis=1).ravel())
        have += 2 * len(s)
    return np.concatenate(pieces)[:count] if pieces else np.zeros(0)
