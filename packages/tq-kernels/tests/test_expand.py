from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_kernels import KVFormat
from tq_kernels.codec import pack_codes
from tq_kernels.expand import expand, field_order

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(
    st.sampled_from(range(16, 257, 16)),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["k", "v"]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
def test_numbers_are_centroids_over_the_step(
    dim: int, bits: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    fmt = KVFormat(dim, bits, bits)
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(2, 3, dim), dtype=np.uint8)
    numbers = expand(pack_codes(torch.from_numpy(codes), bits, kind), fmt, kind, dtype)
    order = field_order(fmt, kind, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(dim))
    assert numbers.dtype == dtype
    exact = fmt.k_codebook.centroids[codes] / fmt.k_codebook.step
    np.testing.assert_array_equal(numbers.double().numpy(), exact[..., order.numpy()])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_devices_and_views(bits: int, any_device: str) -> None:
    fmt = KVFormat(80, bits, bits)
    codes = torch.randint(0, 2**bits, (2, 9, 80), dtype=torch.uint8)
    for kind in ("k", "v"):
        expected = expand(pack_codes(codes, bits, kind), fmt, kind, torch.float16)
        planes = tuple(p.to(any_device) for p in pack_codes(codes, bits, kind))
        got = expand(tuple(p[:, 2:7] for p in planes), fmt, kind, torch.float16)
        assert torch.equal(got.cpu(), expected[:, 2:7])
