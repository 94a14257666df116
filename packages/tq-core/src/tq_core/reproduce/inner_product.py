"""Bias and variance of estimated inner products (figures 2 and 3a of the paper, theorem 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tq_core import bounds
from tq_core.quantizer import InnerProductQuantizer, MSEQuantizer
from tq_core.reproduce import paper
from tq_core.reproduce.rows import Note, Row, select
from tq_core.reproduce.vectors import pairs
from tq_core.scale import ScaleName

__all__ = ["METHODS", "draw", "measure", "reconstructor"]

METHODS = {
    "mse": "MSE quantizer (paper)",
    "prod": "with sign sketch (paper)",
    "unbiased": "unbiased scale",
}
Reconstruct = Callable[[NDArray[Any]], NDArray[np.floating]]


def reconstructor(method: str, dim: int, bits: int, seed: int = 0) -> Reconstruct:
    """Encode-decode of a method, with Hadamard rotations."""
    if method == "prod":
        sketched = InnerProductQuantizer(dim, bits, "hadamard", seed)
        return lambda x: sketched.decode(sketched.encode(x))
    scale: ScaleName = "none" if method == "mse" else "unbiased"
    quantizer = MSEQuantizer(dim, bits, "hadamard", scale, seed)
    return lambda x: quantizer.decode(quantizer.encode(x))


def measure(quick: bool = False, note: Note = print) -> list[Row]:
    """Rows of method, bits, inner product: bias, dim times the variance, bounds, printed value.

    Means are over random directions and over seeds: the sketch is unbiased over its matrices, not for
    one of them. The standard error is that of the means of the seeds.
    """
    dim, count, seeds = (64, 50, 20) if quick else (128, 1000, 40)
    rows = []
    for bits in range(1, 5):
        note(f"inner products: {bits} bits")
        for method in METHODS:
            coders = [reconstructor(method, dim, bits, seed) for seed in range(seeds)]
            for product in (0.0, 0.3, 0.6, 0.9):
                error = np.empty((seeds, count))
                for seed, coder in enumerate(coders):
                    x, y = pairs(count, dim, product, 2 * seed)
                    error[seed] = np.einsum("ij,ij->i", coder(x), y) - product
                rows.append(
                    {
                        "dim": dim,
                        "method": method,
                        "bits": bits,
                        "product": product,
                        "bias": float(error.mean()),
                        "bias_standard_error": float(error.mean(axis=1).std(ddof=1) / seeds**0.5),
                        "dim_times_variance": float(dim * error.var()),
                        "dim_times_squared_error": float(dim * np.mean(error**2)),
                        "lower_bound": dim * bounds.inner_product_lower(dim, bits),
                        "upper_bound": dim * bounds.inner_product_upper(dim, bits),
                        "exact": dim * bounds.inner_product_error(dim, bits)
                        if method == "prod"
                        else None,
                        "printed": paper.INNER_PRODUCT.get(bits) if method == "prod" else None,
                    }
                )
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Variance against bits; bias against the inner product at 2 bits."""
    from tq_core.reproduce.figures import figure, save

    fig, (left, right) = figure(2)
    for method, label in METHODS.items():
        some = select(rows, method=method, product=0.0)
        left.semilogy(
            [r["bits"] for r in some],
            [r["dim_times_squared_error"] for r in some],
            "o-",
            label=label,
        )
        some = select(rows, method=method, bits=2)
        right.errorbar(
            [r["product"] for r in some],
            [r["bias"] for r in some],
            [3 * r["bias_standard_error"] for r in some],
            fmt="o-",
            capsize=3,
            label=label,
        )
    some = select(rows, method="prod", product=0.0)
    bits = [r["bits"] for r in some]
    left.semilogy(bits, [r["upper_bound"] for r in some], "k--", lw=1, label="upper bound")
    left.semilogy(bits, [r["lower_bound"] for r in some], "k:", lw=1, label="lower bound")
    left.set(xlabel="bits a coordinate", ylabel="dim × squared error", xticks=bits)
    left.set_title("Error at inner product 0")
    left.legend(loc="lower left", fontsize=8)
    right.axhline(0, color="k", lw=0.5)
    right.set(xlabel="inner product", ylabel="bias (bars: 3 standard errors)")
    right.set_title("Bias at 2 bits")
    right.legend(fontsize=8)
    save(fig, path)
