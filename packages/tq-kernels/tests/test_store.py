from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tq_core import TQError, encode_record, unpack_record
from tq_kernels import KVFormat, debug_mode, dequantize_ref, store_ref

BITS = st.sampled_from([2, 3, 4, 8])
PAGES = st.sampled_from([16, 32, 64, 128])


def poisoned(fmt: KVFormat, num_pages: int, kv_heads: int, device: str = "cpu") -> torch.Tensor:
    """Pages of random bytes: what is not written must stay as it is."""
    shape = (num_pages, kv_heads, fmt.record_bytes)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


@given(
    st.sampled_from(range(16, 257, 16)), BITS, BITS, PAGES, st.integers(1, 3), st.integers(0, 2**32)
)
def test_whole_pages_equal_tq_core_bit_for_bit(
    dim: int, k_bits: int, v_bits: int, page: int, heads: int, seed: int
) -> None:
    fmt = KVFormat(dim, k_bits, v_bits, page)
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 2 * page, heads, dim))
    order = rng.permutation(2)
    slots = (order[:, None] * page + np.arange(page)).ravel()
    pages = poisoned(fmt, 2, heads)
    store_ref(*map(torch.from_numpy, (k, v)), pages, torch.from_numpy(slots), fmt)
    split = [x.reshape(2, page, heads, dim).swapaxes(1, 2) for x in (k, v)]
    expected = encode_record(*split, fmt.layout, rotation=fmt.core_rotation)
    np.testing.assert_array_equal(pages.numpy()[order], expected)


@given(BITS, BITS, PAGES, st.integers(0, 2**32))
def test_only_the_slots_are_written(k_bits: int, v_bits: int, page: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fmt = KVFormat(48, k_bits, v_bits, page)
    tokens = int(rng.integers(0, 20))
    slots = rng.permutation(3 * page)[:tokens]
    slots[rng.random(tokens) < 0.3] = -int(rng.integers(1, 5))
    k, v = (torch.from_numpy(x) for x in rng.normal(size=(2, tokens, 2, 48)))
    pages = poisoned(fmt, 3, 2)
    before = unpack_record(pages.numpy().copy(), fmt.layout)
    store_ref(k, v, pages, torch.from_numpy(slots), fmt)
    after = unpack_record(pages.numpy(), fmt.layout)
    stored = np.zeros(3 * page, dtype=bool)
    stored[slots[slots >= 0]] = True
    for a, b in zip(before, after, strict=True):
        a, b = (np.moveaxis(x, 1, 2).reshape(3 * page, 2, -1) for x in (a, b))
        np.testing.assert_array_equal(a[~stored], b[~stored])
    whole = fmt.allocate_pages(3, 2)
    store_ref(k, v, whole, torch.from_numpy(slots), fmt)
    for a, b in zip(unpack_record(whole.numpy(), fmt.layout), after, strict=True):
        a, b = (np.moveaxis(x, 1, 2).reshape(3 * page, 2, -1) for x in (a, b))
        np.testing.assert_array_equal(a[stored], b[stored])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("bits", [(2, 3), (3, 4), (4, 8), (8, 2)], ids=str)
def test_sweep(
    check_quantized: Callable[..., None],
    vector_families: Callable[..., np.ndarray],
    any_device: str,
    bits: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
) -> None:
    fmt = KVFormat(dim, *bits, page_size=32)
    rng = np.random.default_rng(dim)
    k, v = (torch.from_numpy(vector_families(rng, dim)).to(dtype)[:, None] for _ in range(2))
    pages = poisoned(fmt, 2, 1, any_device)
    slots = torch.from_numpy(rng.permutation(64)[:12]).to(any_device, torch.int32)
    strided = torch.stack((k, v), dim=1).to(any_device)
    store_ref(strided[:, 0], strided[:, 1], pages, slots, fmt)
    parts = unpack_record(pages.cpu().numpy(), fmt.layout)
    for x, codes, scales, kind in ((k, *parts[0::2], "k"), (v, *parts[1::2], "v")):
        chosen = slots.cpu().numpy()
        got = (torch.from_numpy(a.reshape(64, *a.shape[3:])[chosen]) for a in (codes, scales))
        check_quantized(x, *got, fmt, kind, 2e-6)


def test_storing_into_an_occupied_slot_replaces_it() -> None:
    fmt = KVFormat(32)
    pages = fmt.allocate_pages(1, 1)
    first, second = torch.randn(2, 1, 1, 32)
    store_ref(first, first, pages, torch.tensor([5]), fmt)
    store_ref(second, second, pages, torch.tensor([5]), fmt)
    fresh = fmt.allocate_pages(1, 1)
    store_ref(second, second, fresh, torch.tensor([5]), fmt)
    assert torch.equal(pages, fresh)


def test_permuted_page_views_are_written() -> None:
    fmt = KVFormat(32)
    held = torch.zeros(2, 3, fmt.record_bytes, dtype=torch.uint8)
    x = torch.randn(1, 2, 32)
    store_ref(x, x, held.transpose(0, 1), torch.tensor([20]), fmt)
    pages = fmt.allocate_pages(3, 2)
    store_ref(x, x, pages, torch.tensor([20]), fmt)
    assert torch.equal(held.transpose(0, 1), pages) and pages[1].any()


def arguments() -> dict[str, object]:
    fmt = KVFormat(32)
    return {
        "k": torch.zeros(2, 3, 32),
        "v": torch.zeros(2, 3, 32),
        "pages": fmt.allocate_pages(2, 3),
        "slot_mapping": torch.tensor([0, 1]),
        "fmt": fmt,
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": torch.zeros(2, 2, 32)}, r"k has shape \(2, 2, 32\)"),
        ({"v": torch.zeros(3, 3, 32)}, r"v has shape \(3, 3, 32\)"),
        ({"v": torch.zeros(2, 3, 32).half()}, "v has dtype"),
        ({"k": torch.zeros(2, 3, 32).int()}, "k has dtype"),
        ({"k": [0.0]}, "k is a list"),
        ({"pages": torch.zeros(2, 3, 5, dtype=torch.uint8)}, "pages has shape.*record_bytes"),
        ({"pages": torch.zeros(2, 3, KVFormat(32).record_bytes)}, "pages has dtype"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, "slot_mapping has shape"),
        ({"slot_mapping": torch.zeros(2)}, "slot_mapping has dtype"),
        ({"slot_mapping": torch.tensor([0, 32])}, r"slot_mapping\[1\] is 32.*more pages"),
        ({"fmt": None}, "KVFormat"),
        ({"k": torch.full((2, 3, 32), float("nan"))}, r"k\[0, 0, 0\] is nan"),
    ],
)
def test_errors(change: dict[str, object], match: str) -> None:
    with pytest.raises(TQError, match=match):
        store_ref(**{**arguments(), **change})  # type: ignore[arg-type]


def test_strided_records_are_refused() -> None:
    given_arguments = arguments()
    wide = torch.zeros(2, 3, 2 * KVFormat(32).record_bytes, dtype=torch.uint8)
    given_arguments["pages"] = wide[..., ::2]
    with pytest.raises(TQError, match="stride 2"):
        store_ref(**given_arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="contents on a GPU")
def test_debug_mode_checks_contents_on_the_gpu() -> None:
    on_gpu = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in arguments().items()}
    on_gpu["slot_mapping"] = torch.tensor([0, 32], device="cuda")
    with debug_mode(), pytest.raises(TQError, match=r"slot_mapping\[1\]"):
        store_ref(**on_gpu)  # type: ignore[arg-type]


def test_no_tokens() -> None:
    fmt = KVFormat(32)
    pages = poisoned(fmt, 1, 2)
    before = pages.clone()
    none = torch.zeros(0, 2, 32)
    store_ref(none, none, pages, torch.zeros(0, dtype=torch.int64), fmt)
    assert torch.equal(pages, before)
    k, _ = dequantize_ref(pages, torch.zeros(0, dtype=torch.int64), fmt)
    assert k.shape == (0, 2, 32)
