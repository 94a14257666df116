"""Squared error against bits, with the bounds of the paper (its figure 3b, theorems 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tq_core import bounds
from tq_core.codebook import gaussian_codebook
from tq_core.quantizer import MSEQuantizer
from tq_core.reproduce import paper
from tq_core.reproduce.rows import Note, Row, select
from tq_core.reproduce.vectors import unit_vectors
from tq_core.scale import ScaleName

__all__ = ["draw", "measure"]

SCALES: dict[ScaleName, str] = {
    "none": "paper (norm stored)",
    "mse": "least-squares scale",
    "unbiased": "unbiased scale",
}
STYLES: dict[ScaleName, str] = {"none": "s-", "mse": ".--", "unbiased": "^:"}


def measure(quick: bool = False, note: Note = print) -> list[Row]:
    """Rows of dim, bits, scale, mean squared error of unit vectors, bounds and the printed value."""
    rows = []
    for dim, count in ((128, 1000),) if quick else ((128, 40000), (1536, 4000)):
        x = unit_vectors(count, dim)
        for bits in range(1, 6):
            note(f"distortion: dim {dim}, {bits} bits")
            for scale in SCALES:
                quantizer = MSEQuantizer(dim, bits, "hadamard", scale)
                error = np.sum((quantizer.decode(quantizer.encode(x)) - x) ** 2, axis=1)
                rows.append(
                    {
                        "dim": dim,
                        "bits": bits,
                        "scale": scale,
                        "mse": float(error.mean()),
                        "standard_error": float(error.std() / np.sqrt(count)),
                        "exact": quantizer.codebook.mse if scale == "none" else None,
                        "gaussian_limit": gaussian_codebook(bits).mse,
                        "lower_bound": bounds.mse_lower(bits),
                        "upper_bound": bounds.mse_upper(bits),
                        "printed": paper.MSE.get(bits),
                    }
                )
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Distortion against bits on a logarithmic axis."""
    from tq_core.reproduce.figures import figure, save

    fig, (axes,) = figure()
    dim = rows[-1]["dim"]
    for scale, label in SCALES.items():
        some = select(rows, dim=dim, scale=scale)
        axes.semilogy(
            [r["bits"] for r in some], [r["mse"] for r in some], STYLES[scale], label=label
        )
    some = select(rows, dim=dim, scale="mse")
    bits = [r["bits"] for r in some]
    axes.semilogy(bits, [r["upper_bound"] for r in some], "k--", lw=1, label="upper bound")
    axes.semilogy(bits, [r["lower_bound"] for r in some], "k:", lw=1, label="lower bound")
    axes.set(xlabel="bits a coordinate", ylabel="squared error of a unit vector", xticks=bits)
    axes.set_title(f"Distortion, dim {dim}")
    axes.legend()
    save(fig, path)
