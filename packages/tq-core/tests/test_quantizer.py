from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tq_core import (
    Encoded,
    HadamardRotation,
    MSEQuantizer,
    TQError,
    bounds,
    lloyd_max,
    pack_bits,
)

SCALES = ("mse", "norm", "unbiased", "none")
# MSE of unit vectors at dim 128, Haar rotations: scale 1, norm, mse, unbiased.
TABLE = {
    1: (0.3611, 0.4014, 0.3607, 0.5677),
    2: (0.1162, 0.1190, 0.1154, 0.1308),
    3: (0.0340, 0.0338, 0.0335, 0.0347),
    4: (0.00932, 0.00918, 0.00916, 0.00925),
}


def unit_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def squared_error(x: np.ndarray, quantizer: MSEQuantizer) -> np.ndarray:
    return np.sum((quantizer.decode(quantizer.encode(x)) - x) ** 2, axis=-1)


@pytest.mark.parametrize("bits", TABLE)
def test_errors_of_the_scales(bits: int) -> None:
    """8,000 vectors: the standard error of a mean is below 0.4 %, the limit is 1.5 %."""
    x = unit_vectors(8000, 128)
    for scale, expected in zip(("none", "norm", "mse", "unbiased"), TABLE[bits], strict=True):
        mean = float(squared_error(x, MSEQuantizer(128, bits, scale=scale)).mean())
        assert mean == pytest.approx(expected, rel=0.015)
        if scale == "mse":
            assert bounds.mse_lower(bits) < mean < bounds.mse_upper(bits)


@settings(max_examples=30)
@given(
    st.integers(2, 40),
    st.integers(1, 8),
    st.sampled_from(["haar", "hadamard"]),
    st.integers(0, 2**32),
)
def test_pointwise_identities(dim: int, bits: int, rotation: str, seed: int) -> None:
    """With cos the cosine of vector and codeword: D_unbiased = 1/cos² - 1, D_mse = 1 - cos²."""
    x = unit_vectors(16, dim, seed)
    y, c = {}, {}
    for scale in SCALES:
        quantizer = MSEQuantizer(dim, bits, rotation, scale, seed=3)
        encoded = quantizer.encode(x)
        y[scale] = quantizer.decode(encoded)
        c[scale] = encoded.codes
        np.testing.assert_array_equal(c[scale], c["mse"])
    cos = np.sum(x * y["none"], axis=1) / np.linalg.norm(y["none"], axis=1)
    error = {scale: np.sum((y[scale] - x) ** 2, axis=1) for scale in SCALES}
    np.testing.assert_allclose(error["unbiased"], 1 / cos**2 - 1, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(error["mse"], 1 - cos**2, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(1 / error["mse"], 1 + 1 / error["unbiased"], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(y["norm"], axis=1), 1, rtol=1e-12)
    # Projection: no scale does better than "mse".
    for scale in SCALES:
        assert np.all(error["mse"] <= error[scale] + 1e-14)
    # "unbiased" reproduces the vector's own component.
    np.testing.assert_allclose(np.sum(x * y["unbiased"], axis=1), 1, rtol=1e-12)


def z_score(samples: np.ndarray, mean: float) -> float:
    return float((samples.mean() - mean) / (samples.std(ddof=1) / math.sqrt(len(samples))))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_unbiased_scale_is_unbiased_over_haar(bits: int) -> None:
    """600 independent rotations; |z| < 5 fails by chance with probability 6e-7."""
    x, q = unit_vectors(2, 12, seed=4)
    estimates = {scale: [] for scale in ("unbiased", "mse")}
    for seed in range(600):
        for scale, values in estimates.items():
            quantizer = MSEQuantizer(12, bits, scale=scale, seed=seed)
            values.append(quantizer.decode(quantizer.encode(x)) @ (x + q))
    truth = float(x @ (x + q))
    assert abs(z_score(np.array(estimates["unbiased"]), truth)) < 5
    # The same test rejects the least-squares scale, which shrinks.
    assert z_score(np.array(estimates["mse"]), truth) < -10


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("hot", [1, 2])
def test_sparse_inputs_over_haar(bits: int, hot: int) -> None:
    """60 rotations of dim 32: the standard error is below 1.5 %, the limit 7 %."""
    dim = 32
    x = np.eye(dim) + (0 if hot == 1 else np.roll(np.eye(dim), 1, axis=1))
    x /= math.sqrt(hot)
    mean = np.mean(
        [squared_error(x, MSEQuantizer(dim, bits, scale="none", seed=s)).mean() for s in range(60)]
    )
    assert mean == pytest.approx(lloyd_max(dim, bits).mse, rel=0.07)


@given(
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 8),
    st.sampled_from(["haar", "hadamard"]),
    st.sampled_from(SCALES),
)
def test_any_shape_and_dtype(
    dtype: type, lead: list[int], bits: int, rotation: str, scale: str
) -> None:
    dim = 20
    x = np.random.default_rng(0).normal(size=(*lead, dim)).astype(dtype)
    quantizer = MSEQuantizer(dim, bits, rotation, scale)  # type: ignore[arg-type]
    encoded = quantizer.encode(x)
    back = quantizer.decode(encoded)
    assert encoded.shape == back.shape == x.shape and back.dtype == np.float64
    assert encoded.codes.shape == x.shape and encoded.codes.dtype == np.uint8
    assert encoded.scales.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert quantizer.decode(encoded, np.float32).dtype == np.float32
    # Every vector on its own gives the same codes.
    flat = x.reshape(-1, dim)
    for i in range(min(3, len(flat))):
        one = quantizer.encode(flat[i])
        np.testing.assert_array_equal(one.codes, encoded.codes.reshape(-1, dim)[i])


@given(st.integers(2, 50), st.integers(1, 8), st.integers(0, 9), st.sampled_from([2, 4, 8]))
def test_nbytes_counts_everything(dim: int, bits: int, n: int, width: int) -> None:
    x = np.ones((n, dim), dtype=np.float32)
    encoded = MSEQuantizer(dim, bits, "hadamard", scale_dtype=f"f{width}").encode(x)
    assert encoded.nbytes == n * (math.ceil(dim * bits / 8) + width)
    stored = encoded.data.tobytes() + encoded.scales.tobytes()
    assert encoded.nbytes == len(stored)
    if n:
        assert encoded.bits_per_coordinate == pytest.approx(8 * encoded.nbytes / (n * dim))


def test_encoded_is_frozen_and_enough_to_decode() -> None:
    quantizer = MSEQuantizer(24, 3)
    encoded = quantizer.encode(np.ones((2, 24)))
    with pytest.raises(AttributeError):
        encoded.bits = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        encoded.data[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        encoded.scales[0] = 0
    copy = Encoded(
        np.frombuffer(encoded.data.tobytes(), np.uint8).reshape(encoded.data.shape),
        np.array(encoded.scales),
        24,
        3,
    )
    np.testing.assert_array_equal(MSEQuantizer(24, 3).decode(copy), quantizer.decode(encoded))
    np.testing.assert_array_equal(pack_bits(encoded.codes, 3), encoded.data)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rotation", ["haar", "hadamard"])
def test_zero_vectors(scale: str, rotation: str) -> None:
    x = np.zeros((3, 10))
    x[1] = 1
    quantizer = MSEQuantizer(10, 2, rotation, scale)  # type: ignore[arg-type]
    encoded = quantizer.encode(x)
    assert encoded.scales[0] == 0 and encoded.scales[1] > 0
    back = quantizer.decode(encoded)
    assert np.all(back[[0, 2]] == 0) and np.any(back[1])
    # The code of coordinate 0.0: the lowest one above the middle.
    assert np.all(encoded.codes[0] == 2)
    assert quantizer.encode(np.zeros((0, 10))).nbytes == 0


@pytest.mark.parametrize("magnitude", [1e300, 1e-300, 1.0, 3e307])
@pytest.mark.parametrize("scale", SCALES)
def test_huge_and_tiny_vectors(magnitude: float, scale: str) -> None:
    x = unit_vectors(5, 16)
    for rotation in ("haar", "hadamard"):
        quantizer = MSEQuantizer(16, 4, rotation, scale)  # type: ignore[arg-type]
        with np.errstate(all="raise"):
            back = quantizer.decode(quantizer.encode(x * magnitude))
        np.testing.assert_allclose(
            back / magnitude, quantizer.decode(quantizer.encode(x)), rtol=1e-9
        )


def test_smallest_number() -> None:
    x = np.full((1, 8), 5e-324)
    quantizer = MSEQuantizer(8, 8)
    assert np.all(quantizer.decode(quantizer.encode(x)) == 5e-324)


@given(
    hnp.arrays(np.float64, (3, 6), elements=st.floats(-1e150, 1e150, allow_subnormal=False)),
    st.integers(2, 8),
)
def test_relative_error_of_any_input(x: np.ndarray, bits: int) -> None:
    quantizer = MSEQuantizer(6, bits, "haar")
    back = quantizer.decode(quantizer.encode(x))
    largest = np.max(np.abs(x), axis=1, keepdims=True)
    safe = np.where(largest == 0, 1, largest)
    norm = np.linalg.norm(x / safe, axis=1)
    error = np.linalg.norm((back - x) / safe, axis=1)
    # The widest cell bounds the error of each coordinate.
    edges = np.concatenate([[-1], quantizer.codebook.boundaries, [1]])
    worst = np.max(
        np.maximum(
            quantizer.codebook.centroids - edges[:-1], edges[1:] - quantizer.codebook.centroids
        )
    )
    assert np.all(error <= math.sqrt(6) * worst * norm + 1e-12)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_codes_do_not_depend_on_length_or_sign_beyond_reflection(factor: float, seed: int) -> None:
    x = unit_vectors(4, 16, seed)
    quantizer = MSEQuantizer(16, 3)
    codes = quantizer.encode(x).codes
    np.testing.assert_array_equal(quantizer.encode(x * 2.0**20).codes, codes)
    np.testing.assert_array_equal(7 - quantizer.encode(-x).codes, codes)
    scaled = quantizer.encode(x * factor)
    np.testing.assert_allclose(scaled.scales, quantizer.encode(x).scales * factor, rtol=1e-9)


@pytest.mark.parametrize("grid", ["int7", "e4m3"])
def test_grid_codebooks(grid: str) -> None:
    x = unit_vectors(4000, 64)
    free = squared_error(x, MSEQuantizer(64, 4)).mean()
    confined = squared_error(x, MSEQuantizer(64, 4, grid=grid)).mean()  # type: ignore[arg-type]
    assert confined == pytest.approx(free, rel=0.02) and confined > free * 0.995


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ones(7), r"shape \(7,\).*dim=8"),
        (np.float64(3), "dim=8"),
        (np.ones((2, 8), dtype=np.int64), "int64.*astype"),
        (np.ones((2, 8), dtype=complex), "complex128"),
        (np.ones((2, 8), dtype=np.longdouble), "float16, float32 and float64"),
    ],
)
def test_wrong_inputs(x: np.ndarray, match: str) -> None:
    with pytest.raises(TQError, match=match):
        MSEQuantizer(8, 2).encode(x)


@given(
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.integers(0, 2),
    st.integers(0, 7),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_first_bad_index_is_named(bad: float, row: int, column: int, dtype: type) -> None:
    x = np.ones((3, 8), dtype=dtype)
    x[row, column] = bad
    x[2, 7] = np.nan
    with pytest.raises(TQError, match=rf"x\[{row}, {column}\] is .*nan_to_num"):
        MSEQuantizer(8, 2).encode(x)


def test_lists_are_accepted() -> None:
    quantizer = MSEQuantizer(4, 4)
    np.testing.assert_array_equal(
        quantizer.encode([1, 2, 3, 4]).codes, quantizer.encode([1.0, 2.0, 3.0, 4.0]).codes
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MSEQuantizer(8, 0), "bits=0"),
        (lambda: MSEQuantizer(1, 2), "dim=1"),
        (lambda: MSEQuantizer(math.inf, 2), "finite"),
        (lambda: MSEQuantizer(8, 2, scale="max"), "scale='max'"),
        (lambda: MSEQuantizer(8, 2, rotation="qr"), "qr"),
        (lambda: MSEQuantizer(8, 2, HadamardRotation(4)), "dim 4"),
        (lambda: MSEQuantizer(8, 2, scale_dtype="i4"), "scale_dtype"),
        (lambda: MSEQuantizer(8, 2).decode(MSEQuantizer(8, 3).encode(np.ones(8))), "bits=3"),
        (lambda: MSEQuantizer(8, 2, scale_dtype="f2").encode(np.full(8, 1e6)), "65504"),
        (
            lambda: MSEQuantizer(8, 2).encode(np.full((2, 8), 3e38, dtype=np.float32)),
            r"vector \[0\].*float64",
        ),
        (lambda: MSEQuantizer(8, 2).encode(np.full((2, 8), 1.7e308)), "vector"),
        (lambda: Encoded(np.zeros((2, 3), np.uint8), np.zeros(2), 8, 2), r"\(2, 2\)"),
    ],
)
def test_errors(call: object, match: str) -> None:
    with pytest.raises(TQError, match=match):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("rotation", ["haar", "hadamard"])
@pytest.mark.parametrize(("dim", "bits"), [(128, 4), (127, 3), (80, 2), (64, 8), (33, 1)])
def test_single_precision_changes_codes_only_at_boundaries(
    rotation: str, dim: int, bits: int
) -> None:
    x = np.random.default_rng(9).standard_normal((400, dim)).astype(np.float32)
    x[0], x[1], x[2] = 0.0, x[1] * 1e-30, x[2] * 1e30
    double = MSEQuantizer(dim, bits, rotation)
    single = MSEQuantizer(dim, bits, rotation, compute_dtype="float32")
    a, b = double.encode(x), single.encode(x)
    unit = (
        double.rotation.apply(x)
        / np.maximum(np.linalg.norm(x.astype(float), axis=1), 1e-300)[:, None]
    )
    gap = np.min(np.abs(unit[..., None] - double.codebook.boundaries), axis=-1)
    different = a.codes != b.codes
    assert np.all(gap[different] < 2e-6)
    assert different.mean() < 0.01 * 2 ** (bits - 4)
    same = ~different.any(axis=1)
    np.testing.assert_allclose(b.scales[same], a.scales[same], rtol=1e-5)
    # Far from ordinary norms both are computed in float64.
    np.testing.assert_array_equal(a.codes[:3], b.codes[:3])


def test_single_precision_takes_values_beyond_its_range() -> None:
    x = np.random.default_rng(1).standard_normal((50, 16)) * np.logspace(-280, 280, 50)[:, None]
    a = MSEQuantizer(16, 4).encode(x)
    b = MSEQuantizer(16, 4, compute_dtype=np.float32).encode(x)
    np.testing.assert_allclose(a.scales, b.scales, rtol=1e-5)
    with pytest.raises(TQError, match="compute_dtype=float16"):
        MSEQuantizer(16, 4, compute_dtype=np.float16)
