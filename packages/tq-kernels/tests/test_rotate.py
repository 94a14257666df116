from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, rotate_ref

FORMATS = st.builds(
    KVFormat,
    st.sampled_from(range(16, 257, 16)),
    rotation=st.sampled_from(["hadamard", "haar"]),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
#: Largest error of a coordinate, over the norm of the vector.
ERRORS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@given(FORMATS, st.lists(st.integers(1, 3), max_size=3), st.integers(0, 2**32))
def test_float64_equals_tq_core(fmt: KVFormat, lead: list[int], seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(*lead, fmt.head_dim))
    got = rotate_ref(torch.from_numpy(x), fmt).numpy()
    back = rotate_ref(torch.from_numpy(got), fmt, inverse=True).numpy()
    if fmt.rotation == "hadamard":
        np.testing.assert_array_equal(got, fmt.core_rotation.apply(x))
        np.testing.assert_array_equal(back, fmt.core_rotation.inverse(got))
    np.testing.assert_allclose(got, fmt.core_rotation.apply(x), atol=1e-12)
    np.testing.assert_allclose(back, x, atol=1e-12)


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_every_dtype(dtype: torch.dtype, dim: int, rotation: str, any_device: str) -> None:
    fmt = KVFormat(dim, rotation=rotation)  # type: ignore[arg-type]
    x = torch.randn(7, 3, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    exact = x.double().numpy()
    for inverse in (False, True):
        got = rotate_ref(x.to(any_device), fmt, inverse)
        assert got.dtype == dtype and got.device.type == any_device
        matrix = fmt.core_rotation.matrix
        expected = exact @ (matrix if inverse else matrix.T)
        error = np.abs(got.double().cpu().numpy() - expected)
        assert np.max(error / np.linalg.norm(exact, axis=-1, keepdims=True)) < ERRORS[dtype]


def test_errors() -> None:
    fmt = KVFormat(64)
    with pytest.raises(TQError, match="int64"):
        rotate_ref(torch.zeros(64, dtype=torch.int64), fmt)
    with pytest.raises(TQError, match="ndarray"):
        rotate_ref(np.zeros(64), fmt)  # type: ignore[arg-type]
    with pytest.raises(TQError, match="head_dim=64"):
        rotate_ref(torch.zeros(3, 80), fmt)
    with pytest.raises(TQError, match="KVFormat"):
        rotate_ref(torch.zeros(64), 64)  # type: ignore[arg-type]
