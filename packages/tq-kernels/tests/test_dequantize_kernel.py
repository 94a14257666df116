from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, debug_mode, dequantize, dequantize_ref, rotate_ref

pytest.importorskip("triton")

from tq_kernels.portable import dequantize as kernel

#: Largest error of a coordinate, over the norm of the vector.
#: Triton's interpreter cuts numbers off to bf16 where a GPU rounds them.
ERRORS = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
BITS = st.sampled_from([2, 3, 4, 8])


def random_pages(fmt: KVFormat, num_pages: int, kv_heads: int, seed: int) -> torch.Tensor:
    """Random codes with scales in [0.5, 2)."""
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 256, size=(num_pages, kv_heads, fmt.record_bytes), dtype=np.uint8)
    scales = rng.uniform(0.5, 2.0, size=(num_pages, kv_heads, 2 * fmt.page_size))
    pages[..., fmt.layout.k_scale_offset :] = scales.astype(np.float16).view(np.uint8)
    return torch.from_numpy(pages)


def check(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert got.shape == exact.shape
    norm = exact.norm(dim=-1, keepdim=True)
    error = (got.double() - exact).abs()
    assert not error[(norm == 0).expand_as(error)].any()
    relative = error / torch.where(norm == 0, 1.0, norm)
    assert float(relative.max() if relative.numel() else 0) < ERRORS[got.dtype]


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_sweep(dim: int, bits: tuple[int, int], device: str) -> None:
    fmt = KVFormat(dim, *bits, page_size={64: 16, 80: 32, 96: 64}.get(dim, 128))
    pages = random_pages(fmt, 2, 2, dim).to(device)
    slots = torch.tensor([2 * fmt.page_size - 1, 0, -1, 17, 5], device=device)
    expected = dequantize_ref(pages, slots, fmt, torch.float64)
    dtype = list(ERRORS)[(dim // 16 + bits[0]) % 3]
    for x, y in zip(dequantize(pages, slots, fmt, dtype), expected, strict=True):
        assert x.dtype == dtype
        check(x, y)


@settings(max_examples=20)
@given(
    st.builds(
        KVFormat,
        st.sampled_from(range(16, 257, 16)),
        BITS,
        BITS,
        st.sampled_from([16, 32, 48, 64, 128]),
        rotation=st.sampled_from(["hadamard", "haar"]),
        rounds=st.integers(1, 4),
    ),
    st.integers(1, 20),
    st.integers(1, 3),
    st.sampled_from(list(ERRORS)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_format(
    device: str,
    fmt: KVFormat,
    count: int,
    heads: int,
    dtype: torch.dtype,
    rotated: bool,
    wide: bool,
    seed: int,
) -> None:
    """Everything is written, nothing outside is; bytes of other slots are not read."""
    rng = np.random.default_rng(seed)
    pages = random_pages(fmt, 3, heads, seed % 1000)
    slots = rng.integers(-1, 3 * fmt.page_size, size=count)
    start = fmt.layout.k_scale_offset
    scales = pages[..., start:].view(torch.float16).reshape(3, heads, 2, fmt.page_size)
    used = np.zeros(3 * fmt.page_size, dtype=bool)
    used[slots[slots >= 0]] = True
    mask = torch.from_numpy(used).reshape(3, 1, 1, fmt.page_size)
    poison = torch.where(mask, scales, torch.tensor(float("nan"), dtype=torch.float16))
    pages[..., start:] = poison.reshape(3, heads, -1).view(torch.uint8)
    pages = pages.to(device)
    mapping = torch.from_numpy(slots).to(device, torch.int64 if wide else torch.int32)
    held = torch.full(
        (2, count + 2, heads + 1, fmt.head_dim + 8), float("nan"), dtype=dtype, device=device
    )
    k, v = held[:, 1:-1, :heads, 4:-4]
    kernel.dequantize(pages, mapping, k, v, fmt, rotated=rotated)
    for x, y in zip((k, v), dequantize_ref(pages, mapping, fmt, torch.float64), strict=True):
        check(x, rotate_ref(y, fmt) if rotated else y)
    k.fill_(float("nan"))
    v.fill_(float("nan"))
    assert torch.isnan(held).all()


def test_many_slots_take_larger_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = KVFormat(64, 3, 4)
    heads = 300  # with few slots
    pages = random_pages(fmt, 2, heads, 0).to(device)
    slots = torch.arange(30, device=device)
    assert kernel._block(30, heads, 64, False) == 64
    if device == "cpu":  # the interpreter runs one program after the other
        pages = pages[:, :2]
        monkeypatch.setattr(kernel, "_block", lambda *_: 64)
    got = dequantize(pages, slots, fmt)
    for x, y in zip(got, dequantize_ref(pages, slots, fmt, torch.float64), strict=True):
        check(x, y)


def test_offsets_beyond_31_bits(device: str) -> None:
    fmt = KVFormat(256, 8, 8, 128)
    count = 2**32 // fmt.record_bytes + 2
    pages = torch.empty(count, 1, fmt.record_bytes, dtype=torch.uint8, device=device)
    some = random_pages(fmt, 1, 1, 0).to(device)
    for page in (count - 1, 2**31 // fmt.record_bytes):
        pages[page] = some[0]
        slots = torch.tensor([page * 128 + 77], device=device)
        expected = dequantize_ref(some, torch.tensor([77], device=device), fmt, torch.float64)
        for x, y in zip(dequantize(pages, slots, fmt), expected, strict=True):
            check(x, y)


def test_permuted_pages_and_no_slots(device: str) -> None:
    fmt = KVFormat(32)
    pages = random_pages(fmt, 2, 3, 0).to(device)
    held = pages.transpose(0, 1).contiguous()
    slots = torch.tensor([20, 3], device=device)
    got = dequantize(held.transpose(0, 1), slots, fmt)
    for x, y in zip(got, dequantize(pages, slots, fmt), strict=True):
        assert torch.equal(x, y)
    k, v = dequantize(pages, slots[:0], fmt, torch.bfloat16)
    assert k.shape == v.shape == (0, 3, 32) and k.dtype == torch.bfloat16


def test_errors(device: str) -> None:
    fmt = KVFormat(32)
    pages = fmt.allocate_pages(1, 1, device)
    slots = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(TQError, match=r"float64.*dequantize_ref"):
        dequantize(pages, slots, fmt, torch.float64)
    with pytest.raises(TQError, match="slots is not contiguous"):
        dequantize(pages, slots[::2], fmt)
    with pytest.raises(TQError, match="slots has dtype"):
        dequantize(pages, slots.double(), fmt)
    with debug_mode(), pytest.raises(TQError, match=r"slots\[0\] is 16: needs at most 15"):
        dequantize(pages, slots + 16, fmt)
