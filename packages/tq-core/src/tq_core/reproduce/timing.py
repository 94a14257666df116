"""Time to quantize against dimension (table 2 of the paper)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tq_core.quantizer import MSEQuantizer
from tq_core.reproduce import paper
from tq_core.reproduce.neighbours import METHODS as PEERS
from tq_core.reproduce.neighbours import have_faiss
from tq_core.reproduce.rows import Note, Row, select
from tq_core.reproduce.vectors import clusters

__all__ = ["draw", "measure"]

BITS = 4
PEER_VECTORS = 1000
OURS = {
    "TurboQuant, float64, Hadamard": ("hadamard", np.float64),
    "TurboQuant, float32": ("hadamard", np.float32),
}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return float(best)


def measure(quick: bool = False, note: Note = print) -> list[Row]:
    """Rows of dim and method: CPU seconds of training and encoding, and a vector's share of them.

    The number of vectors is stated. The peers get fewer: their time a vector is the same until the
    10,000 vectors beyond which faiss trains on a sample. Decoding is not timed.
    """
    rows = []
    sizes = {64: 500} if quick else {64: 20000, 128: 20000, 200: 10000, 1536: 2000, 3072: 1000}
    for dim, count in sizes.items():
        x = clusters(count, dim, seed=5)
        printed = "TurboQuant", "RaBitQ", "product quantization"
        for method, (rotation, dtype) in OURS.items():
            note(f"timing: dim {dim}, {method}")
            quantizer = MSEQuantizer(dim, BITS, rotation, compute_dtype=dtype)
            quantizer.encode(x[:256])
            seconds = _seconds(lambda q=quantizer, x=x: q.encode(x), 3)  # type: ignore[misc]
            rows.append(_row(dim, count, method, seconds, printed[0]))
        for method in printed[1:]:
            if method == "product quantization" and not have_faiss():
                continue
            if not quick and dim not in paper.TIMES[method]:
                continue
            note(f"timing: dim {dim}, {method}")
            some = x[:PEER_VECTORS]
            seconds = _seconds(lambda m=method, x=some: PEERS[m](x, BITS), 1)  # type: ignore[misc]
            rows.append(_row(dim, len(some), method, seconds, method))
    return rows


def _row(dim: int, count: int, method: str, seconds: float, printed: str) -> Row:
    return {
        "dim": dim,
        "bits": BITS,
        "vectors": count,
        "method": method,
        "seconds": seconds,
        "microseconds_per_vector": 1e6 * seconds / count,
        "printed_seconds": paper.TIMES[printed].get(dim),
    }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Microseconds a vector against dimension, both logarithmic."""
    from tq_core.reproduce.figures import figure, save

    fig, (axes,) = figure()
    for method in dict.fromkeys(r["method"] for r in rows):
        some = select(rows, method=method)
        axes.loglog(
            [r["dim"] for r in some],
            [r["microseconds_per_vector"] for r in some],
            "o-",
            label=method,
        )
    axes.set(xlabel="dimension", ylabel="CPU µs a vector, training included")
    axes.set_title(f"Quantization time, {BITS} bits")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 20)  # room for the legend
    axes.legend(fontsize=8, loc="lower right")
    save(fig, path)
