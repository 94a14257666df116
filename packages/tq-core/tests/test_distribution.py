from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from tq_core import GaussianCoordinate, SphereCoordinate, TQError, coordinate_law

DIMS = st.sampled_from([2, 3, 4, 5, 16, 64, 128, 1536, 4096])
UNIT = st.floats(-1.0, 1.0)


@pytest.mark.parametrize("dim", [3, 4, 7, 64, 1536])
def test_matches_scipy_beta(dim: int) -> None:
    law = SphereCoordinate(dim)
    beta = stats.beta((dim - 1) / 2, (dim - 1) / 2, loc=-1, scale=2)
    x = np.linspace(-0.95, 0.95, 41) if dim < 100 else np.linspace(-5, 5, 41) / math.sqrt(dim)
    np.testing.assert_allclose(law.pdf(x), beta.pdf(x), rtol=1e-11)
    np.testing.assert_allclose(law.cdf(x), beta.cdf(x), rtol=1e-10, atol=1e-16)
    q = np.linspace(0.001, 0.999, 41)
    np.testing.assert_allclose(law.ppf(q), beta.ppf(q), rtol=1e-9, atol=1e-12)


def test_arcsine_edge() -> None:
    law = SphereCoordinate(2)
    assert law.pdf(1.0) == math.inf and law.pdf(-1.0) == math.inf and law.pdf(1.1) == 0
    x = np.linspace(-1, 1, 21)
    np.testing.assert_allclose(law.cdf(x), 0.5 + np.arcsin(x) / math.pi, atol=1e-15)
    np.testing.assert_allclose(law.first_moment(0, 1), 1 / math.pi, rtol=1e-15)
    np.testing.assert_allclose(law.second_moment(-1, 1), 0.5, rtol=1e-15)


def test_gaussian_is_scipy_norm_and_the_limit() -> None:
    law, far = GaussianCoordinate(), SphereCoordinate(10**6)
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(law.cdf(x), stats.norm.cdf(x), rtol=1e-13)
    np.testing.assert_allclose(law.pdf(x), stats.norm.pdf(x), rtol=1e-13)
    np.testing.assert_allclose(law.ppf(law.cdf(x)), x, atol=1e-10)
    np.testing.assert_allclose(far.cdf(x / 1000), law.cdf(x), atol=1e-6)
    np.testing.assert_allclose(far.pdf(x / 1000) / 1000, law.pdf(x), rtol=1e-4)
    assert coordinate_law(None) == coordinate_law(math.inf) == law


@given(DIMS | st.none(), UNIT, UNIT)
def test_partial_moments_equal_quadrature(dim: int | None, a: float, b: float) -> None:
    law = coordinate_law(dim)
    sigma = math.sqrt(law.variance)
    # Away from ±1, where the density of dim 2 is unbounded.
    span = min(5 * sigma, 0.98) if dim else 5.0
    a, b = sorted((a * span, b * span))
    for power, closed in enumerate((law.mass, law.first_moment, law.second_moment)):
        numeric = integrate.quad(lambda t, p=power: t**p * law.pdf(t), a, b, epsabs=1e-13)[0]
        assert float(closed(a, b)) == pytest.approx(numeric, rel=1e-8, abs=1e-11 * sigma**power)


@given(DIMS)
def test_moments_of_the_whole_line(dim: int) -> None:
    law = SphereCoordinate(dim)
    assert float(law.mass(-1, 1)) == pytest.approx(1, abs=1e-14)
    assert float(law.first_moment(-1, 1)) == 0
    assert float(law.second_moment(-1, 1)) == pytest.approx(1 / dim, rel=1e-13)


@given(DIMS | st.none(), st.floats(1e-6, 1 - 1e-6))
def test_ppf_inverts_cdf(dim: int | None, q: float) -> None:
    law = coordinate_law(dim)
    x = float(law.ppf(q))
    spacing = 4 * float(np.spacing(x) * law.pdf(x))  # what the spacing of floats allows
    assert float(law.cdf(x)) == pytest.approx(q, rel=1e-8, abs=abs(spacing))
    assert float(law.ppf(1 - q)) == pytest.approx(-float(law.ppf(q)), rel=1e-6, abs=1e-12)


@given(st.sampled_from([3, 16, 128, 1536]))
def test_companding_density_is_the_cube_root(dim: int) -> None:
    law = SphereCoordinate(dim)
    x = np.linspace(-2, 2, 9) / math.sqrt(dim + 2)
    ratio = law.companding().pdf(x) / np.cbrt(law.pdf(x))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)


def test_law_is_that_of_random_unit_vectors() -> None:
    rng = np.random.default_rng(1)
    for dim in (2, 3, 17):
        x = rng.normal(size=(20000, dim))
        x = x[:, 0] / np.linalg.norm(x, axis=1)
        # False alarms have a probability of 1e-6.
        assert stats.kstest(x, SphereCoordinate(dim).cdf).pvalue > 1e-6


@pytest.mark.parametrize("dim", [1, 0, -3, math.nan, 1.5])
def test_bad_dim(dim: float) -> None:
    with pytest.raises(TQError, match="dim"):
        SphereCoordinate(dim)
