from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError, decode_record
from tq_kernels import KVFormat, dequantize_ref

BITS = st.sampled_from([2, 3, 4, 8])
ERRORS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def random_pages(fmt: KVFormat, num_pages: int, kv_heads: int, seed: int) -> torch.Tensor:
    """Random codes with scales in [0.5, 2)."""
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 256, size=(num_pages, kv_heads, fmt.record_bytes), dtype=np.uint8)
    scales = rng.uniform(0.5, 2.0, size=(num_pages, kv_heads, 2 * fmt.page_size))
    pages[..., fmt.layout.k_scale_offset :] = scales.astype(np.float16).view(np.uint8)
    return torch.from_numpy(pages)


@given(
    st.sampled_from(range(16, 257, 16)),
    BITS,
    BITS,
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["hadamard", "haar"]),
    st.sampled_from(list(ERRORS)),
    st.integers(0, 2**32),
)
def test_equals_tq_core(
    dim: int, k_bits: int, v_bits: int, page: int, rotation: str, dtype: torch.dtype, seed: int
) -> None:
    fmt = KVFormat(dim, k_bits, v_bits, page, rotation=rotation)  # type: ignore[arg-type]
    pages = random_pages(fmt, 3, 2, seed)
    slots = np.random.default_rng(seed).integers(-1, 3 * page, size=12)
    expected = decode_record(pages.numpy(), fmt.layout, rotation=fmt.core_rotation)
    got = dequantize_ref(pages, torch.from_numpy(slots), fmt, dtype)
    for x, whole in zip(got, expected, strict=True):
        assert x.shape == (12, 2, dim) and x.dtype == dtype
        flat = whole.swapaxes(1, 2).reshape(3 * page, 2, dim)[slots]
        flat[slots < 0] = 0.0
        norm = np.linalg.norm(flat, axis=-1, keepdims=True) + 1e-30
        assert np.max(np.abs(x.double().numpy() - flat) / norm) < ERRORS[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_devices_agree(dim: int, bits: int, any_device: str) -> None:
    fmt = KVFormat(dim, bits, bits)
    pages = random_pages(fmt, 2, 3, dim)
    slots = torch.tensor([31, 0, -1, 17], dtype=torch.int32)
    expected = dequantize_ref(pages, slots, fmt, torch.float64)
    for dtype, error in ERRORS.items():
        got = dequantize_ref(pages.to(any_device), slots.to(any_device), fmt, dtype)
        for x, y in zip(got, expected, strict=True):
            assert x.device.type == any_device
            norm = y.norm(dim=-1, keepdim=True) + 1e-30
            assert float(((x.cpu().double() - y) / norm).abs().max()) < error


def test_unused_bytes_are_not_read() -> None:
    """NaN scales in other slots stay where they are."""
    fmt = KVFormat(32)
    pages = random_pages(fmt, 1, 1, 0)
    expected = dequantize_ref(pages, torch.tensor([3]), fmt)
    start = fmt.layout.k_scale_offset
    scales = pages[0, 0, start:].view(torch.float16)
    keep = torch.zeros(32, dtype=torch.bool)
    keep[[3, 19]] = True
    scales[~keep] = float("nan")
    for x, y in zip(dequantize_ref(pages, torch.tensor([3]), fmt), expected, strict=True):
        assert torch.equal(x, y) and torch.isfinite(x).all()


def test_zeroed_pages_give_zeros() -> None:
    fmt = KVFormat(64, 3, 2)
    for pages in (fmt.allocate_pages(1, 2), fmt.allocate_pages(0, 2)):
        slots = torch.full((4,), -1) if pages.shape[0] == 0 else torch.arange(4)
        k, v = dequantize_ref(pages, slots, fmt)
        assert k.shape == v.shape == (4, 2, 64) and not k.any() and not v.any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"slots": torch.tensor([16])}, r"slots\[0\] is 16: needs at most 15"),
        ({"slots": torch.tensor([[1]])}, "slots has shape"),
        ({"slots": torch.tensor([1.0])}, "slots has dtype"),
        ({"dtype": torch.int8}, "dtype"),
        ({"pages": torch.zeros(1, 1, 7, dtype=torch.uint8)}, "pages has shape"),
        ({"fmt": 128}, "KVFormat"),
    ],
)
def test_errors(change: dict[str, object], match: str) -> None:
    fmt = KVFormat(32)
    given_arguments = {"pages": fmt.allocate_pages(1, 1), "slots": torch.tensor([1]), "fmt": fmt}
    with pytest.raises(TQError, match=match):
        dequantize_ref(**{**given_arguments, **change})  # type: ignore[arg-type]
