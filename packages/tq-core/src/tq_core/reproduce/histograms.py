"""Histograms of inner-product errors by bit width (figure 1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tq_core import bounds
from tq_core.reproduce.inner_product import METHODS, reconstructor
from tq_core.reproduce.rows import Note, Row, select
from tq_core.reproduce.vectors import clusters

__all__ = ["draw", "measure"]

BINS = 61


def measure(quick: bool = False, note: Note = print) -> list[Row]:
    """Rows of method, bits, centre of a bin and share of the errors in it; clustered data."""
    dim, count, queries = (64, 300, 20) if quick else (1536, 4000, 100)
    data = clusters(count + queries, dim, seed=1)
    x, q = data[:count], data[count:]
    exact = x @ q.T
    rows = []
    for bits in range(1, 5):
        note(f"histograms: {bits} bits")
        width = 4.0 * bounds.inner_product_error(dim, bits) ** 0.5
        edges = np.linspace(-width, width, BINS + 1)
        for method in METHODS:
            estimate = reconstructor(method, dim, bits)(x).astype(np.float32) @ q.T
            error = np.clip((estimate - exact).ravel(), edges[0], edges[-1])
            share = np.histogram(error, edges)[0] / error.size
            rows += [
                {
                    "dim": dim,
                    "method": method,
                    "bits": bits,
                    "error": float((low + high) / 2),
                    "share": float(s),
                    "mean": float(error.mean()),
                }
                for low, high, s in zip(edges, edges[1:], share, strict=False)
            ]
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """One panel for each bit width; the outermost bins hold all larger errors."""
    from tq_core.reproduce.figures import figure, save

    widths = sorted({r["bits"] for r in rows})
    fig, panels = figure(len(widths))
    for axes, bits in zip(panels, widths, strict=True):
        for method, label in METHODS.items():
            some = select(rows, bits=bits, method=method)
            axes.step(
                [r["error"] for r in some], [r["share"] for r in some], where="mid", label=label
            )
        axes.axvline(0, color="k", lw=0.5)
        axes.set(xlabel="error of the inner product", yticks=[])
        axes.set_title(f"{bits} bit" + "s" * (bits > 1))
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel("share of the pairs")
    panels[0].legend(fontsize=7)
    save(fig, path)
