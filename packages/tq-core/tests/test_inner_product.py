from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tq_core import InnerProductQuantizer, MSEQuantizer, TQError, bounds

# dim · variance of the inner product at dim 128: Gaussian sketch, and unbiased scale.
TABLE = {1: (1.579, 0.559), 2: (0.561, 0.130), 3: (0.181, 0.034), 4: (0.0532, 0.0091)}


def unit_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_unbiased_over_sketches(sketch: str, bits: int) -> None:
    """600 sketches and rotations; |z| < 5 fails by chance with probability 6e-7.

    At dim 8 the limit √(π/2)/√d would be 3 % too large for an orthogonal sketch: about 8 standard
    errors at one bit.
    """
    x, q = unit_vectors(2, 8, seed=1)
    q = x + q
    samples = []
    for seed in range(600):
        quantizer = InnerProductQuantizer(8, bits, seed=seed, sketch=sketch)
        samples.append(float(quantizer.decode(quantizer.encode(x)) @ q))
    samples = np.array(samples)
    z = (samples.mean() - x @ q) / (samples.std(ddof=1) / math.sqrt(len(samples)))
    assert abs(z) < 5


def test_constants() -> None:
    gaussian = InnerProductQuantizer(64, 2)
    orthogonal = InnerProductQuantizer(64, 2, sketch="orthogonal")
    assert gaussian.constant == math.sqrt(math.pi / 2) / 64
    limit = math.sqrt(math.pi / 2) / math.sqrt(64)
    assert orthogonal.constant == pytest.approx(limit, rel=1 / 64)
    # E|X| of a coordinate on the circle is 2/π.
    assert InnerProductQuantizer(2, 1, sketch="orthogonal").constant == pytest.approx(math.pi / 4)
    s = orthogonal.sketch_matrix
    np.testing.assert_allclose(s @ s.T, np.eye(64), atol=1e-13)
    assert abs(gaussian.sketch_matrix.std() - 1) < 5 / math.sqrt(2 * 64 * 64)
    assert not np.allclose(orthogonal.stage.rotation.matrix, s)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", TABLE)
def test_variances_match_the_known_ones(bits: int) -> None:
    """24,000 pairs over 6 sketches: the relative standard error is about 1 %, the limit 5 %."""
    dim, errors = 128, {"sketch": [], "orthogonal": [], "scale": []}
    for seed in range(6):
        x, q = unit_vectors(4000, dim, seed), unit_vectors(4000, dim, seed + 100)
        for name, quantizer in (
            ("sketch", InnerProductQuantizer(dim, bits, seed=seed)),
            ("orthogonal", InnerProductQuantizer(dim, bits, seed=seed, sketch="orthogonal")),
            ("scale", MSEQuantizer(dim, bits, scale="unbiased", seed=seed)),
        ):
            back = quantizer.decode(quantizer.encode(x))  # type: ignore[arg-type]
            errors[name].append(np.sum((back - x) * q, axis=1))
    variance = {name: dim * float(np.mean(np.square(e))) for name, e in errors.items()}
    assert variance["sketch"] == pytest.approx(TABLE[bits][0], rel=0.05)
    assert variance["scale"] == pytest.approx(TABLE[bits][1], rel=0.05)
    assert variance["sketch"] == pytest.approx(
        dim * bounds.inner_product_error(dim, bits), rel=0.05
    )
    assert variance["orthogonal"] < 0.75 * variance["sketch"]
    assert dim * bounds.inner_product_lower(dim, bits) < variance["scale"]
    assert variance["sketch"] < dim * bounds.inner_product_upper(dim, bits)


@given(
    st.integers(2, 33),
    st.integers(1, 9),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_bytes_and_shapes(dim: int, bits: int, lead: list[int], dtype: type) -> None:
    x = np.random.default_rng(0).normal(size=(*lead, dim)).astype(dtype)
    quantizer = InnerProductQuantizer(dim, bits, "hadamard")
    encoded = quantizer.encode(x)
    assert quantizer.decode(encoded).shape == encoded.shape == x.shape
    norm = 8 if dtype == np.float64 else 4
    each = math.ceil(dim / 8) + norm
    if bits > 1:
        each += math.ceil(dim * (bits - 1) / 8) + norm
    assert encoded.nbytes == math.prod(lead) * each
    if encoded.nbytes:
        assert encoded.bits_per_coordinate == pytest.approx(8 * each / dim)


@pytest.mark.parametrize("magnitude", [0.0, 1e300, 1e-300])
def test_extreme_vectors(magnitude: float) -> None:
    x = unit_vectors(3, 16) * magnitude
    for bits in (1, 3):
        quantizer = InnerProductQuantizer(16, bits)
        back = quantizer.decode(quantizer.encode(x))
        assert np.all(np.isfinite(back))
        if magnitude == 0:
            assert np.all(back == 0)
        else:
            reference = quantizer.decode(quantizer.encode(x / magnitude))
            np.testing.assert_allclose(back / magnitude, reference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: InnerProductQuantizer(8, 0), "bits=0"),
        (lambda: InnerProductQuantizer(1, 2), "dim=1"),
        (lambda: InnerProductQuantizer(8, 2, sketch="srht"), "srht"),  # type: ignore[arg-type]
        (lambda: InnerProductQuantizer(8, 2).encode(np.full(8, np.nan)), r"x\[0\] is nan"),
        (
            lambda: InnerProductQuantizer(8, 2).decode(
                InnerProductQuantizer(8, 3).encode(np.ones(8))
            ),
            "bits=3",
        ),
    ],
)
def test_errors(call: object, match: str) -> None:
    with pytest.raises(TQError, match=match):
        call()  # type: ignore[operator]
