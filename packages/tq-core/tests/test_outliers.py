from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import MSEQuantizer, OutlierQuantizer, TQError, outlier_channels, outlier_count


def heavy(n: int, dim: int, outliers: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, dim))
    x[:, rng.permutation(dim)[:outliers]] *= 8
    return x


def test_the_split_of_the_paper() -> None:
    # 32 channels at 3 bits and 96 at 2 are 2.25 bits; two fp16 scales make 2.5.
    assert outlier_count(128, 2.5) == (32, 2)
    assert outlier_count(128, 3.5) == (32, 3)
    quantizer = OutlierQuantizer.for_rate(heavy(50, 128, 20), 2.5)
    assert quantizer.code_bits == 2.25


@given(st.sampled_from([64, 80, 96, 128, 192, 256]), st.sampled_from([2.5, 3.5, 3.0, 4.25]))
def test_rate_is_never_exceeded_and_nearly_spent(dim: int, rate: float) -> None:
    x = heavy(30, dim, 10)
    quantizer = OutlierQuantizer.for_rate(x, rate, "hadamard")
    encoded = quantizer.encode(x)
    per_vector = encoded.nbytes / 30
    count, low = len(quantizer.channels), quantizer.others.bits
    assert per_vector == math.ceil(count * (low + 1) / 8) + math.ceil((dim - count) * low / 8) + 4
    # Up to what the split leaves: two bytes of rounding, or two channels that must stay low.
    assert rate - 2 * 8 / dim - 1e-9 <= encoded.bits_per_coordinate <= rate


def test_outliers_are_found() -> None:
    x = np.random.default_rng(1).normal(size=(3, 100, 32))
    x[..., [4, 9, 30]] *= 5
    assert outlier_channels(x, 3).tolist() == [4, 9, 30]


def test_split_helps_where_channels_differ() -> None:
    x = heavy(2000, 128, 32)
    energy = np.sum(x**2)

    def error(quantizer: MSEQuantizer | OutlierQuantizer) -> float:
        back = quantizer.decode(quantizer.encode(x))  # type: ignore[arg-type]
        return float(np.sum((back - x) ** 2) / energy)

    split = OutlierQuantizer.for_rate(x, 2.5)
    assert np.array_equal(split.channels, outlier_channels(x, 32))
    two, three = (error(MSEQuantizer(128, bits)) for bits in (2, 3))
    assert error(split) < 0.5 * two
    # Without outliers the split lies between its two rates.
    x = np.random.default_rng(3).normal(size=(2000, 128))
    energy = np.sum(x**2)
    assert three < error(OutlierQuantizer.for_rate(x, 2.5)) < two


def test_groups_are_independent_and_round_trip_shapes() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 20)).astype(np.float32)
    x[0, 0] = 0
    quantizer = OutlierQuantizer(20, [3, 0, 7], 4, seed=5)
    encoded = quantizer.encode(x)
    back = quantizer.decode(encoded, np.float32)
    assert back.shape == encoded.shape == x.shape and back.dtype == np.float32
    assert np.all(back[0, 0] == 0)
    changed = x.copy()
    changed[..., 3] += 1
    np.testing.assert_array_equal(
        quantizer.decode(quantizer.encode(changed))[..., quantizer.rest],
        quantizer.decode(encoded)[..., quantizer.rest],
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: OutlierQuantizer(8, [1], 2), "needs 2 to 6"),
        (lambda: OutlierQuantizer(8, [1, 1], 2), "different"),
        (lambda: OutlierQuantizer(8, [1, 8], 2), "0 to 7"),
        (lambda: outlier_count(16, 1.0), "raise the rate"),
        (lambda: outlier_channels(np.ones((4, 8)), 8), "count=8"),
        (lambda: OutlierQuantizer(8, [1, 2], 2).encode(np.ones(7)), "dim=8"),
    ],
)
def test_errors(call: object, match: str) -> None:
    with pytest.raises(TQError, match=match):
        call()  # type: ignore[operator]
