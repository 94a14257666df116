from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, rotate

pytest.importorskip("triton")

#: Largest error of a coordinate, over the norm of the vector.
#: Triton's interpreter cuts numbers off to bf16 where a GPU rounds them.
ERRORS = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def worst(x: torch.Tensor, got: torch.Tensor, fmt: KVFormat, inverse: bool) -> float:
    exact = x.detach().cpu().double().numpy()
    matrix = fmt.core_rotation.matrix
    error = np.abs(got.cpu().double().numpy() - exact @ (matrix if inverse else matrix.T))
    norm = np.linalg.norm(exact, axis=-1, keepdims=True)
    assert np.isfinite(error).all() and not error[norm[..., 0] == 0].any()
    return float(np.max(error / np.where(norm == 0, 1.0, norm), initial=0))


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_sweep(dtype: torch.dtype, dim: int, device: str) -> None:
    fmt = KVFormat(dim, rotation="haar" if dim == 64 else "hadamard")
    x = torch.randn(5, 4, dim, generator=torch.Generator().manual_seed(dim))
    x = x.to(device, dtype)
    x[2, 1] = 0.0
    for inverse in (False, True):
        got = rotate(x, fmt, inverse)
        assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
        assert worst(x, got, fmt, inverse) < ERRORS[dtype]


@settings(max_examples=20)
@given(
    st.builds(
        KVFormat,
        st.sampled_from(range(16, 257, 16)),
        rotation=st.sampled_from(["hadamard", "haar"]),
        rounds=st.integers(1, 4),
        seed=st.integers(0, 2**64 - 1),
    ),
    st.sampled_from(list(ERRORS)),
    st.lists(st.integers(0, 5), max_size=3),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_format(
    device: str, fmt: KVFormat, dtype: torch.dtype, lead: list[int], inverse: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*lead, fmt.head_dim)) * 10.0 ** rng.integers(-2, 4, size=(*lead, 1))
    # float32 of a wide spread inside one vector loses nothing that matters to its norm
    x *= np.where(rng.random(x.shape) < 0.1, 1e-4, 1.0)
    tensor = torch.from_numpy(x).to(device, dtype)
    assert worst(tensor, rotate(tensor, fmt, inverse), fmt, inverse) < ERRORS[dtype]


def test_strides(device: str) -> None:
    fmt = KVFormat(32)
    wide = torch.randn(6, 3, 64, device=device)
    for x in (wide[:, :, :32], wide[::2, 1, 32:], wide[..., ::2], wide[0, 0, :32]):
        assert worst(x, rotate(x, fmt), fmt, False) < 1e-6


def test_extreme_magnitudes(device: str) -> None:
    fmt = KVFormat(64)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    powers = torch.tensor([-100.0, -60, -30, -14, 0, 14, 60, 100])
    for dtype in (torch.float32, torch.bfloat16):
        scaled = (x * 2.0 ** powers[:, None]).to(device, dtype)
        assert worst(scaled, rotate(scaled, fmt), fmt, False) < ERRORS[dtype]
    small = (x * 2.0**-20).to(device, torch.float16)
    got = rotate(small, fmt).cpu().double().numpy()
    exact = small.cpu().double().numpy() @ fmt.core_rotation.matrix.T
    assert np.max(np.abs(got - exact)) <= 2.0**-25  # half of the last place of a subnormal


def test_a_vector_that_is_not_finite_spoils_only_itself(device: str) -> None:
    fmt = KVFormat(64)
    x = torch.randn(5, 64, device=device)
    expected = rotate(x, fmt)
    x[3, 7] = float("nan")
    got = rotate(x, fmt)
    keep = torch.tensor([0, 1, 2, 4], device=device)
    assert torch.equal(got[keep], expected[keep]) and not torch.isfinite(got[3]).any()


def test_errors(device: str) -> None:
    fmt = KVFormat(64)
    with pytest.raises(TQError, match=r"float64.*rotate_ref"):
        rotate(torch.zeros(64, dtype=torch.float64, device=device), fmt)
    with pytest.raises(TQError, match="head_dim=64"):
        rotate(torch.zeros(3, 80, device=device), fmt)
    with pytest.raises(TQError, match="device meta"):
        rotate(torch.zeros(3, 64, device="meta"), fmt)


def test_where_triton_cannot_run() -> None:
    """The package imports, the references work, and the operation says what to do."""
    code = """
import os, re, sys
os.environ.pop("TRITON_INTERPRET", None)
import torch, tq_core, tq_kernels
fmt, x = tq_kernels.KVFormat(32), torch.zeros(1, 32)
assert tq_kernels.rotate_ref(x, fmt).shape == x.shape

def check(match):
    try:
        tq_kernels.rotate(x, fmt)
    except tq_core.TQError as error:
        assert re.search(match, str(error)), error
    else:
        raise AssertionError("no error")

assert "triton.language" not in sys.modules
check("device cpu.*GPU; use rotate_ref")
sys.modules["triton"] = None
check("needs Triton, which is not installed.*rotate_ref")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
