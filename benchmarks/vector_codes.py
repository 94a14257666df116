"""Errors of lattice and trellis codes beside Lloyd-Max, at the same bits a coordinate.

``python benchmarks/vector_codes.py`` writes ``benchmarks/results/vector-codes.json``. Coordinates
are standard normal, the limit of rotated vectors. Every code spends exactly ``bits`` a coordinate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.spatial import cKDTree
from tq_core import lloyd_max

DIM = 128
OUT = Path(__file__).parent / "results" / "vector-codes.json"
Array = np.ndarray


def d4(reach: int) -> Array:
    """Points of D4 up to squared norm ``reach``, moved off the origin to a deep hole."""
    side = range(-int(reach**0.5) - 1, int(reach**0.5) + 2)
    points = np.array([p for p in itertools.product(side, repeat=4) if sum(p) % 2 == 0], float)
    points += 0.5
    return points[(points**2).sum(1) <= reach]


def e8_half(reach: int) -> Array:
    """Points of the coset of E8 by 1/4 in every coordinate, up to squared norm ``reach``."""
    levels = np.arange(-int(reach**0.5) - 1, int(reach**0.5) + 2)
    found = []
    for offset in (0.0, 0.5):
        points, norms = np.zeros((1, 0)), np.zeros(1)
        for _ in range(8):
            step = levels + offset
            points = np.concatenate(
                [np.repeat(points, len(step), 0), np.tile(step, len(points))[:, None]], axis=1
            )
            norms = np.repeat(norms, len(step)) + np.tile((step + 0.25) ** 2, len(norms))
            points, norms = points[norms <= reach], norms[norms <= reach]
        found.append(points[points.sum(1) % 2 == 0])
    return np.concatenate(found) + 0.25


def smallest(points: Array, count: int) -> Array:
    """The ``count`` points of smallest norm."""
    return points[np.argsort((points**2).sum(1), kind="stable")[:count]]


def lattice_scale(x: Array, points: Array, tree: cKDTree) -> float:
    """The scale of least squared error of the nearest point."""
    dim = points.shape[1]
    vectors = x.reshape(-1, dim)[:20000]

    def error(scale: float) -> float:
        near = points[tree.query(vectors / scale)[1]] * scale
        return float(((vectors - near) ** 2).mean())

    typical = dim**0.5 / float(((points**2).sum(1)).max() ** 0.5)
    best = minimize_scalar(
        error,
        bounds=(0.5 * typical, 3 * typical),
        method="bounded",
        options={"xatol": 1e-3 * typical},
    )
    return float(best.x)


def trellis_states(symbols: Array, memory: int, bits: int) -> Array:
    """The last ``memory`` bits at each symbol, from state 0; they index the table of numbers."""
    state = np.zeros(len(symbols), np.int64)
    out = np.empty(symbols.shape, np.int64)
    for i in range(symbols.shape[1]):
        state = ((state << bits) | symbols[:, i]) & ((1 << memory) - 1)
        out[:, i] = state
    return out


def trellis_encode(x: Array, table: Array, bits: int) -> Array:
    """Symbols [vectors, coordinates] of least squared error from state 0 (Viterbi)."""
    states, fan = len(table), 1 << bits
    cost = np.full((len(x), states), np.inf, np.float32)
    cost[:, 0] = 0
    choice = np.empty((x.shape[1], len(x), states // fan), np.uint8)
    for i in range(x.shape[1]):
        ways = cost.reshape(len(x), fan, states // fan)  # by the oldest symbol of a state
        choice[i] = ways.argmin(1)
        least = ways.min(1)
        cost = np.repeat(least, fan, 1) + (x[:, i : i + 1] - table).astype(np.float32) ** 2
    state = cost.argmin(1)
    symbols = np.empty(x.shape, np.int64)
    rows = np.arange(len(x))
    for i in reversed(range(x.shape[1])):
        symbols[:, i] = state & (fan - 1)
        older = state >> bits
        state = older + choice[i, rows, older].astype(np.int64) * (states // fan)
    return symbols


def trellis_table(memory: int, bits: int, rng: np.random.Generator, x: Array) -> Array:
    """A table of random normal numbers, then means of what was coded by each (Lloyd's step)."""
    table = rng.standard_normal(1 << memory)
    for _ in range(4):
        states = trellis_states(trellis_encode(x, table, bits), memory, bits).ravel()
        total = np.bincount(states, x.ravel(), len(table))
        count = np.bincount(states, minlength=len(table))
        table = np.where(count > 0, total / np.maximum(count, 1), table)
    return table


def switched_cosets() -> Array:
    """Cosets of the doubled codebook by state and lowest bit of the code (Ungerboeck, 4 states).

    A state is the lowest bits of the last two codes. The level is ``4 * (code >> 1) + 2 * last +
    (bit ^ last but one)``, so that decoding looks at three codes and at no state.
    """
    return np.array([[2 * (s & 1) + (bit ^ (s >> 1)) for bit in (0, 1)] for s in range(4)])


def switched_encode(x: Array, table: Array) -> Array:
    """Levels [vectors, coordinates] of least squared error, from state 0 (Viterbi)."""
    cosets = switched_cosets()
    nearest = []
    for coset in range(4):
        levels = table[coset::4]
        nearest.append(np.searchsorted((levels[1:] + levels[:-1]) / 2, x) * 4 + coset)
    found = np.stack(nearest)  # [coset, vectors, coordinates]
    errors = (x - table[found]) ** 2
    rows = np.arange(len(x))
    cost = np.full((len(x), 4), np.inf)
    cost[:, 0] = 0
    came = np.empty((x.shape[1], len(x), 4), np.uint8)
    for i in range(x.shape[1]):
        new = np.empty_like(cost)
        for state in range(4):
            bit, last = state & 1, state >> 1
            ways = [(older, cosets[older, bit]) for older in (last, last + 2)]
            costs = np.stack([cost[:, older] + errors[c, :, i] for older, c in ways], 1)
            pick = costs.argmin(1)
            new[:, state] = costs[rows, pick]
            came[i, :, state] = last + 2 * pick
        cost = new
    state = cost.argmin(1)
    out = np.empty(x.shape, np.int64)
    for i in reversed(range(x.shape[1])):
        older = came[i, rows, state].astype(np.int64)
        out[:, i] = found[cosets[older, state & 1], rows, i]
        state = older
    return out


def switched_table(bits: int, x: Array) -> Array:
    """Twice as many levels as codes: of one more bit at first, then means (Lloyd's step)."""
    table = lloyd_max(DIM, bits + 1).centroids * DIM**0.5
    for _ in range(12):
        levels = switched_encode(x, table).ravel()
        count = np.bincount(levels, minlength=len(table))
        mean = np.bincount(levels, x.ravel(), len(table)) / np.maximum(count, 1)
        table = np.sort(np.where(count > 0, mean, table))
    return table


def switched_codes(levels: Array) -> Array:
    """Codes of the levels that `switched_encode` chose."""
    bit = np.zeros((len(levels), levels.shape[1] + 2), np.int64)
    for i in range(levels.shape[1]):
        bit[:, i + 2] = (levels[:, i] & 1) ^ bit[:, i]
    return (levels >> 2 << 1) | bit[:, 2:]


def switched_levels(codes: Array) -> Array:
    """Levels of codes; see `switched_cosets`."""
    bit = np.pad(codes & 1, ((0, 0), (2, 0)))
    return (codes >> 1 << 2) + 2 * bit[:, 1:-1] + (bit[:, 2:] ^ bit[:, :-2])


def timed(call: Callable[[], Array], repeats: int = 1) -> tuple[Array, float]:
    """Result, and least seconds of processor time of a few calls."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x, train = (rng.standard_normal((options.vectors, DIM)) for _ in range(2))
    rows: list[dict[str, object]] = []

    def add(
        code: str, bits: int, entries: int,
        encode: Callable[[Array], Array], decode: Callable[[Array], Array],
    ) -> None:  # fmt: skip
        codes, encoding = timed(lambda: encode(x))
        numbers, decoding = timed(lambda: decode(codes), 5)
        mse = float(((x - numbers.reshape(x.shape)) ** 2).mean())
        rows.append(
            {
                "code": code,
                "bits": bits,
                "mse": mse,
                "entries": entries,
                "encode_s": encoding,
                "decode_s": decoding,
            }
        )
        print(code, bits, mse, encoding, decoding, flush=True)

    def add_lattice(name: str, bits: int, points: Array) -> None:
        tree = cKDTree(points)
        scale, dim = lattice_scale(x, points, tree), points.shape[1]
        table = points * scale
        add(name, bits, len(points), lambda v: tree.query(v.reshape(-1, dim) / scale)[1],
            lambda c: table[c])  # fmt: skip

    def add_scalar(name: str, bits: int, numbers: Array) -> None:
        cut = (numbers[1:] + numbers[:-1]) / 2
        add(name, bits, 1 << bits, lambda v: np.searchsorted(cut, v), lambda c: numbers[c])

    def add_trellis(memory: int, bits: int) -> None:
        table = trellis_table(memory, bits, rng, train)
        add(f"trellis of {memory} bits", bits, len(table),
            lambda v: trellis_encode(v, table, bits),
            lambda c: table[trellis_states(c, memory, bits)])  # fmt: skip

    for bits in (2, 3, 4):
        add_scalar("Lloyd-Max", bits, lloyd_max(DIM, bits).centroids * DIM**0.5)
        for grid, label in (("int7", "int8 numbers, as the page format"), ("e4m3", "FP8 numbers")):
            numbers = lloyd_max(DIM, bits, grid).centroids * DIM**0.5
            add_scalar(f"Lloyd-Max on {label}", bits, numbers)
        levels = switched_table(bits, train)
        add("trellis of 4 states, doubled codebook", bits, len(levels),
            lambda v, t=levels: switched_codes(switched_encode(v, t)),
            lambda c, t=levels: t[switched_levels(c)])  # fmt: skip
        add_lattice("D4 in a ball", bits, smallest(d4({2: 12, 3: 60, 4: 240}[bits]), 1 << 4 * bits))
        if bits == 2:
            add_lattice("E8 in a ball", bits, smallest(e8_half(12), 1 << 8 * bits))
        for memory in (6, 8, 10, 12):
            add_trellis(memory, bits)
    result = {
        "vectors": options.vectors,
        "dim": DIM,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
