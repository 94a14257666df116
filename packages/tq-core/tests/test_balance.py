"""Balancing: closed forms, and no neighbour that costs less."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from tq_core import TQError, balancing_matrix, balancing_scales
from tq_core.balance import geometric_mean

DIM = 6


def spread(seed: int, n: int = 400, dim: int = DIM) -> np.ndarray:
    """Vectors whose directions hold very different shares."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return np.asarray(rng.normal(size=(n, dim)) * np.logspace(0, -1.5, dim) @ basis)


def cost(t: np.ndarray, x: np.ndarray, g: np.ndarray) -> float:
    moved, gradients = x @ t.T, g @ np.linalg.inv(t)
    return float((np.sum(moved**2, axis=1) * np.sum(gradients**2, axis=1)).sum())


def test_the_geometric_mean_solves_its_equation() -> None:
    a, b = (y.T @ y for y in (spread(0), spread(1)))
    m = geometric_mean(a, b)
    np.testing.assert_allclose(m @ np.linalg.inv(a) @ m, b, rtol=1e-6, atol=1e-9 * b.max())
    np.testing.assert_allclose(m, geometric_mean(b, a), rtol=1e-6, atol=1e-9 * m.max())


def test_independent_gradients_have_the_closed_form() -> None:
    # With every gradient at every vector the cost is tr(M A) tr(M^-1 B), whose least value is
    # the squared trace of (A^1/2 B A^1/2)^1/2.
    x, g = spread(0, 40), spread(1, 40)
    every_x, every_g = np.repeat(x, 40, axis=0), np.tile(g, (40, 1))
    t = balancing_matrix(every_x, every_g)
    root = sqrtm(x.T @ x)
    least = np.trace(sqrtm(root @ (g.T @ g) @ root)).real ** 2
    assert cost(t, every_x, every_g) == pytest.approx(least, rel=2e-3)
    assert cost(np.eye(DIM), every_x, every_g) > 1.5 * least


def test_no_neighbour_costs_less() -> None:
    x, g = spread(0), spread(1)
    g *= np.linalg.norm(x, axis=1)[:, None]  # gradients that depend on the vectors
    t = balancing_matrix(x, g)
    np.testing.assert_allclose(t, t.T, atol=1e-12)
    assert np.sum((x @ t) ** 2) == pytest.approx(np.sum(x**2))
    best, rng = cost(t, x, g), np.random.default_rng(2)
    assert best < 0.5 * cost(np.eye(DIM), x, g)
    for _ in range(50):
        nudge = np.eye(DIM) + 0.05 * rng.normal(size=(DIM, DIM))
        assert cost(nudge @ t, x, g) > best * (1 - 1e-4)


def test_scales_are_the_best_diagonal() -> None:
    x, g = (spread(seed) ** 2 for seed in (0, 1))
    scales = balancing_scales(x, g)

    def diagonal_cost(s: np.ndarray) -> float:
        return float(((x @ s**2) * (g @ s**-2)).sum())

    best, rng = diagonal_cost(scales), np.random.default_rng(3)
    assert best < 0.9 * diagonal_cost(np.ones(DIM))
    assert (x @ scales**2).sum() == pytest.approx(x.sum())
    for _ in range(50):
        assert diagonal_cost(scales * np.exp(0.05 * rng.normal(size=DIM))) > best * (1 - 1e-4)


def test_one_pair_of_parts_has_the_closed_form() -> None:
    scales = balancing_scales([[9.0, 1.0]], [[1.0, 4.0]])
    # (9/1)**-0.25 and (1/4)**-0.25, up to a factor and damping
    assert (scales[1] / scales[0]) ** 4 == pytest.approx(9 * 4, rel=0.01)


def test_nothing_to_balance() -> None:
    x = spread(0)
    np.testing.assert_array_equal(balancing_matrix(x, 0 * x), np.eye(DIM))
    np.testing.assert_array_equal(balancing_scales(0 * x, x**2), np.ones(DIM))


def test_shapes_that_differ_are_refused() -> None:
    for function in (balancing_matrix, balancing_scales):
        with pytest.raises(TQError, match=r"\(3, 2\) and gradients \(3, 4\)"):
            function(np.ones((3, 2)), np.ones((3, 4)))
