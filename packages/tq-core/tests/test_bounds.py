from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError, bounds, lloyd_max


def test_values() -> None:
    assert bounds.mse_upper(1) == pytest.approx(2.7207 / 4, rel=1e-4)
    assert bounds.mse_lower(3) == bounds.shannon_mse(3) == 1 / 64
    # Limits of dim · variance of the sketch, from the Gaussian errors of the first stage.
    for bits, expected in ((1, 1.5708), (2, 0.5708), (3, 0.1845), (4, 0.0543)):
        limit = math.pi / 2 * (1 if bits == 1 else lloyd_max(None, bits - 1).mse)
        assert round(limit, 4) == expected
        assert 4096 * bounds.inner_product_error(4096, bits) == pytest.approx(limit, rel=2e-3)


@given(st.sampled_from([2, 3, 16, 128, 1536]), st.integers(1, 8))
def test_codebooks_lie_between(dim: int, bits: int) -> None:
    mse = lloyd_max(dim, bits).mse
    assert mse < bounds.mse_upper(bits)
    if dim >= 16:  # the coordinate's law is that of the bound only for large dims
        assert bounds.mse_lower(bits) < mse
    assert bounds.inner_product_lower(dim, bits) < bounds.inner_product_error(dim, bits)
    assert bounds.inner_product_error(dim, bits) < bounds.inner_product_upper(dim, bits)


def test_high_rate_limits() -> None:
    # Panter and Dite: the Gaussian error tends to the upper bound; entropy coding to πe/6.
    book = lloyd_max(None, 8)
    assert book.mse == pytest.approx(bounds.mse_upper(8), rel=0.015)
    assert bounds.shannon_mse(4) < bounds.entropy_coded_mse(4) < lloyd_max(None, 4).mse


@pytest.mark.parametrize("call", [lambda: bounds.mse_upper(-1), lambda: bounds.mse_lower(math.nan)])
def test_errors(call: object) -> None:
    with pytest.raises(TQError, match="bits="):
        call()  # type: ignore[operator]
    with pytest.raises(TQError, match="dim=1"):
        bounds.inner_product_lower(1, 2)
