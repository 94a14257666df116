from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError, unpack_record
from tq_kernels import KVFormat, debug_mode, store, store_ref, warm_up_store

pytest.importorskip("triton")

from tq_kernels.portable import store as kernel
from tq_kernels.portable.fields import column_order, lane_order
from tq_kernels.portable.rotation_tile import rotation_parts
from tq_kernels.testing import copy_to

#: Largest distance of a coordinate of a unit vector to a boundary at which the kernel may choose
#: the other side.
DISTANCE = 2e-6
BITS = [2, 3, 4, 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = st.builds(
    KVFormat,
    st.sampled_from(range(16, 257, 16)),
    st.sampled_from(BITS),
    st.sampled_from(BITS),
    st.sampled_from([16, 32, 48, 64, 128]),
    rotation=st.sampled_from(["hadamard", "haar"]),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 3),
    scale=st.sampled_from(["mse", "norm", "unbiased", "none"]),
)
Check = Callable[..., None]
Families = Callable[[np.random.Generator, int], np.ndarray]


def poisoned(fmt: KVFormat, num_pages: int, kv_heads: int, device: str) -> torch.Tensor:
    shape = (num_pages, kv_heads, fmt.record_bytes)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def by_slot(pages: torch.Tensor, fmt: KVFormat) -> tuple[np.ndarray, ...]:
    """Key codes, value codes, key scales and value scales, [slots, kv_heads, ...] each."""
    parts = unpack_record(pages.cpu().numpy(), fmt.layout)
    moved = (np.moveaxis(p, 1, 2) for p in parts)
    return tuple(p.reshape(-1, *p.shape[2:]) for p in moved)


def check_stored(
    check_quantized: Check,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    fmt: KVFormat,
) -> None:
    """Stored slots hold what the definition says, all others what they held before."""
    after = by_slot(pages, fmt)
    chosen = slots.cpu().numpy()
    kept = chosen >= 0
    untouched = np.ones(len(after[0]), dtype=bool)
    untouched[chosen[kept]] = False
    for old, new in zip(by_slot(before, fmt), after, strict=True):
        np.testing.assert_array_equal(old[untouched], new[untouched])
    for x, codes, scales, kind in ((k, *after[0::2], "k"), (v, *after[1::2], "v")):
        got = (torch.from_numpy(a[chosen[kept]]) for a in (codes, scales))
        check_quantized(x.cpu()[torch.from_numpy(kept)], *got, fmt, kind, DISTANCE)


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_sweep(
    check_quantized: Check,
    vector_families: Families,
    device: str,
    dim: int,
    bits: tuple[int, int],
) -> None:
    dtype = DTYPES[(dim // 16 + bits[0]) % 3]
    page = {16: 48, 32: 64, 64: 16, 80: 32, 96: 64, 128: 128, 192: 16, 256: 32}[dim]
    fmt = KVFormat(dim, *bits, page_size=page)
    rng = np.random.default_rng(dim)
    k, v = (torch.from_numpy(vector_families(rng, dim)).to(device, dtype)[:, None] for _ in "kv")
    pages = poisoned(fmt, 2, 1, device)
    before = pages.clone()
    slots = torch.from_numpy(rng.permutation(2 * page)[:12]).to(device)
    store(k, v, pages, slots, fmt)
    check_stored(check_quantized, k, v, before, pages, slots, fmt)


@settings(max_examples=25)
@given(
    FORMATS,
    st.integers(1, 20),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_format(
    check_quantized: Check,
    device: str,
    fmt: KVFormat,
    tokens: int,
    heads: int,
    dtype: torch.dtype,
    block: int,
    wide: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-3, 4, size=(tokens, heads, 1))
    both = torch.from_numpy(rng.normal(size=(tokens, heads, 2, fmt.head_dim)) * scale[..., None])
    both = both.to(device, dtype)
    k, v = both[:, :, 0], both[:, :, 1]
    slots = rng.permutation(3 * fmt.page_size)[:tokens]
    slots[rng.random(tokens) < 0.2] = -1 - int(rng.integers(5))
    mapping = torch.from_numpy(slots).to(device, torch.int64 if wide else torch.int32)
    pages = poisoned(fmt, 3, heads, device)
    before = pages.clone()
    shape = kernel.StoreShape(block, 4 if block > 16 else 1, heads=heads)
    kernel.store(k, v, pages, mapping, fmt, shape)
    check_stored(check_quantized, k, v, before, pages, mapping, fmt)


@pytest.mark.parametrize("bits", [(2, 3), (3, 8), (4, 2), (8, 4)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_operands_from_registers(
    check_quantized: Check, device: str, dim: int, bits: tuple[int, int]
) -> None:
    """What many tokens get on Hopper, here with a few more or fewer than a block."""
    fmt = KVFormat(dim, *bits)
    rng = np.random.default_rng(dim + bits[0])
    for heads, tokens, dtype in (
        (1, 65, torch.float16), (2, 64, torch.bfloat16), (6, 63, torch.bfloat16),
    ):  # fmt: skip
        shape = kernel.StoreShape.of(kernel.VERY_MANY, heads, dim, hopper=True)
        assert shape.takes_operands(fmt, dtype, parts=1)
        k, v = torch.from_numpy(rng.normal(size=(2, tokens, heads, dim))).to(device, dtype)
        slots = rng.permutation(5 * fmt.page_size)[:tokens]
        slots[::7] = -1
        mapping = torch.from_numpy(slots).to(device)
        pages = poisoned(fmt, 5, heads, device)
        before = pages.clone()
        kernel.store(k, v, pages, mapping, fmt, shape)
        check_stored(check_quantized, k, v, before, pages, mapping, fmt)


def test_operands_from_registers_where_they_fit() -> None:
    def takes(dim: int, tokens: int = kernel.VERY_MANY, dtype: torch.dtype = torch.bfloat16,
              parts: int = 1, hopper: bool = True) -> bool:  # fmt: skip
        shape = kernel.StoreShape.of(tokens, 1, dim, hopper=hopper)
        return shape.takes_operands(KVFormat(dim), dtype, parts)

    assert [dim for dim in range(16, 257, 16) if takes(dim)] == [32, 64, 128]
    assert takes(128, tokens=kernel.MANY) and not takes(128, tokens=kernel.MANY - 1)
    assert not takes(128, hopper=False)
    assert not takes(128, parts=2)
    assert not takes(128, dtype=torch.float32)


def test_programs_take_as_many_heads_as_divide_them() -> None:
    heads = {n: kernel.StoreShape.of(kernel.VERY_MANY, n, 128, hopper=True).heads
             for n in (1, 2, 6, 7, 8)}  # fmt: skip
    assert heads == {1: 1, 2: 2, 6: 2, 7: 1, 8: 4}
    assert kernel.StoreShape.of(kernel.MANY // 4, 8, 128, hopper=True).heads == 1


@pytest.mark.parametrize("tokens", [40, 1200])
def test_equals_the_reference_almost_everywhere(tokens: int, device: str) -> None:
    """Also with the launch for many tokens, whose blocks are larger."""
    if tokens > 1000 and device == "cpu":
        tokens = 129
    fmt = KVFormat(128, 4, 3)
    k, v = torch.randn(2, tokens, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v, slots = k.to(device), v.to(device), torch.arange(tokens, device=device)
    expected = fmt.allocate_pages(-(-tokens // 16), 2, device)
    store_ref(k, v, expected, slots, fmt)
    shapes = [(16, 4, 1), (64, 4, 1), (64, 4, 2), (64, 2, 2), (128, 8, 2)]
    for shape in (kernel.StoreShape(*numbers) for numbers in shapes):
        pages = torch.zeros_like(expected)
        kernel.store(k, v, pages, slots, fmt, shape)
        assert float((pages != expected).double().mean()) < 1e-4


def test_zero_vectors_have_the_code_of_zero(device: str) -> None:
    for bits in BITS:
        fmt = KVFormat(64, bits, bits)
        pages = poisoned(fmt, 1, 1, device)
        zeros = torch.zeros(16, 1, 64, dtype=torch.bfloat16, device=device)
        store(zeros, zeros, pages, torch.arange(16, device=device), fmt)
        expected = fmt.allocate_pages(1, 1, device)
        store_ref(zeros, zeros, expected, torch.arange(16, device=device), fmt)
        assert torch.equal(pages, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_magnitudes(check_quantized: Check, device: str, dtype: torch.dtype) -> None:
    fmt = KVFormat(64, 4, 3)
    x = torch.randn(16, 1, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    powers = torch.tensor([-24, -20, -14, -10, 0, 5, 10, 12] * 2, dtype=torch.float64)
    x = (x * 2.0 ** powers[:, None, None]).to(device, dtype)
    pages = poisoned(fmt, 1, 1, device)
    before = pages.clone()
    slots = torch.arange(16, device=device)
    store(x, x, pages, slots, fmt)
    check_stored(check_quantized, x, x, before, pages, slots, fmt)
    if dtype != torch.float16:
        tiny = (x.double() * 2.0**-90).to(dtype)
        store(tiny, tiny, pages, slots, fmt)
        assert not by_slot(pages, fmt)[2].any()


def test_a_vector_that_is_not_finite_spoils_only_itself(device: str) -> None:
    fmt = KVFormat(64, 4, 3)
    x = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(3)).to(device)
    expected, pages = (fmt.allocate_pages(1, 2, device) for _ in range(2))
    slots = torch.arange(4, device=device)
    store(x, x, expected, slots, fmt)
    bad = x.clone()
    bad[1, 0, 3], bad[2, 1, 4] = float("nan"), float("inf")
    store(bad, bad, pages, slots, fmt)
    good = np.ones((4, 2), dtype=bool)
    good[1, 0] = good[2, 1] = False
    got, want = (by_slot(p, fmt) for p in (pages, expected))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a[:4][good], b[:4][good])
    assert not np.isfinite(got[2][:4][~good]).any() and not np.isfinite(got[3][:4][~good]).any()
    with debug_mode(), pytest.raises(TQError, match=r"k\[1, 0, 3\] is nan"):
        store(bad, bad, pages, slots, fmt)


def test_debug_mode_checks_slots(device: str) -> None:
    fmt = KVFormat(64)
    x = torch.zeros(2, 1, 64, device=device)
    pages = fmt.allocate_pages(1, 1, device)
    with debug_mode(), pytest.raises(TQError, match=r"slot_mapping\[1\] is 16.*more pages"):
        store(x, x, pages, torch.tensor([-1, 16], device=device), fmt)


def test_offsets_beyond_31_bits(check_quantized: Check, device: str) -> None:
    fmt = KVFormat(256, 8, 8, 128)
    count = 2**32 // fmt.record_bytes + 2
    pages = torch.empty(count, 1, fmt.record_bytes, dtype=torch.uint8, device=device)
    x = torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(0)).to(device)
    slots = torch.tensor([(count - 1) * 128 + 5, 2**31 // fmt.record_bytes * 128], device=device)
    store(x, x, pages, slots, fmt)
    for n, slot in enumerate(slots.tolist()):
        codes, _, scales, _ = by_slot(pages[slot // 128, None], fmt)
        got = (torch.from_numpy(a[slot % 128]) for a in (codes, scales))
        check_quantized(x[n], *got, fmt, "k", DISTANCE)


def test_permuted_pages_and_no_tokens(device: str) -> None:
    fmt = KVFormat(32)
    held = torch.zeros(2, 3, fmt.record_bytes, dtype=torch.uint8, device=device)
    x = torch.randn(1, 2, 32, device=device)
    store(x, x, held.transpose(0, 1), torch.tensor([20], device=device), fmt)
    pages = fmt.allocate_pages(3, 2, device)
    store(x, x, pages, torch.tensor([20], device=device), fmt)
    assert torch.equal(held.transpose(0, 1), pages) and pages[1].any()
    before = pages.clone()
    store(x[:0], x[:0], pages, torch.zeros(0, dtype=torch.int64, device=device), fmt)
    assert torch.equal(pages, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_cuda_graph() -> None:
    fmt = KVFormat(128)
    k, v = torch.randn(2, 64, 8, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(64, device="cuda")
    pages = fmt.allocate_pages(8, 8, "cuda")
    store(k, v, pages, slots, fmt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store(k, v, pages, slots, fmt)
    k.normal_()
    slots += 3
    pages.zero_()
    graph.replay()
    expected = torch.zeros_like(pages)
    store(k, v, expected, slots, fmt)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": torch.zeros(2, 3, 32, dtype=torch.float64)}, "v has dtype"),
        ({"k": torch.zeros(3, 3, 32)}, r"v has shape \(2, 3, 32\)"),
        ({"k": torch.zeros(2, 32, 3).transpose(1, 2)}, "k has stride 3"),
        ({"slot_mapping": torch.zeros(4, dtype=torch.int64)[::2]}, "slot_mapping is not contig"),
        ({"slot_mapping": torch.zeros(2)}, "slot_mapping has dtype"),
        ({"fmt": KVFormat(32, 3)}, "pages has shape.*k_bits=3"),
    ],
)
def test_errors(device: str, change: dict[str, object], match: str) -> None:
    fmt = KVFormat(32)
    arguments: dict[str, object] = {
        "k": torch.zeros(2, 3, 32),
        "v": torch.zeros(2, 3, 32),
        "pages": fmt.allocate_pages(2, 3),
        "slot_mapping": torch.tensor([0, 1]),
        "fmt": fmt,
        **change,
    }
    moved = {
        n: copy_to(x, device) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()
    }
    with pytest.raises(TQError, match=match):
        store(**moved)  # type: ignore[arg-type]


def test_float64_is_refused(device: str) -> None:
    fmt = KVFormat(32)
    x = torch.zeros(1, 1, 32, dtype=torch.float64, device=device)
    with pytest.raises(TQError, match="k has dtype torch.float64.*store_ref"):
        store(x, x, fmt.allocate_pages(1, 1, device), torch.tensor([0], device=device), fmt)


# The constants of the kernel.


@given(FORMATS, st.booleans(), st.sampled_from(DTYPES))
def test_rotation_parts_add_up(fmt: KVFormat, inverse: bool, dtype: torch.dtype) -> None:
    order = column_order("k", fmt.k_bits, fmt.head_dim)
    assert sorted(d for d in order if d >= 0) == list(range(fmt.head_dim))
    parts = rotation_parts(fmt, torch.device("cpu"), inverse, order, dtype)
    assert parts.matrix.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    whole = (parts.matrix.double().sum(0) * parts.factor).numpy()
    whole = whole if inverse else whole.T
    places = np.array(order)
    matrix = fmt.core_rotation.matrix[places[places >= 0]]
    np.testing.assert_allclose(whole[places >= 0], matrix, rtol=0, atol=2.0**-23)
    assert not whole[places < 0].any()


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_hadamard_of_powers_of_two_is_exact(dim: int) -> None:
    for seed in range(5):
        fmt = KVFormat(dim, seed=seed)
        for dtype, most in ((torch.float16, 1), (torch.bfloat16, 2)):
            parts = rotation_parts(fmt, torch.device("cpu"), dtype=dtype)
            assert parts.parts <= most
            exact = parts.matrix.double().sum(0).numpy() * parts.factor
            np.testing.assert_allclose(exact, fmt.core_rotation.matrix.T, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", range(16, 257, 16))
def test_code_table_is_the_codebook(dim: int, bits: int) -> None:
    fmt = KVFormat(dim, bits, bits)
    book = fmt.k_codebook
    assert book.step is not None
    unit = np.concatenate([np.linspace(-1, 1, 10001), book.boundaries, [0.0]])
    found = kernel.code_table(fmt, "k", torch.device("cpu"))
    table = found.entries.numpy().astype(int)
    index = np.floor(unit / (0.5 * book.step) + 1e-9).astype(int)
    if len(table) == 256:
        index = np.clip(index, -128, 127)
    assert np.abs(index + 0.5).max() < len(table) // 2 <= 1024
    entry = table[index % len(table)]
    codes = entry & (2**bits - 1)
    np.testing.assert_array_equal(codes, book.encode(unit))
    numbers = (entry + found.slope * codes + 2**23 - found.offset) / 2**bits
    np.testing.assert_allclose(numbers * book.step, book.centroids[codes], rtol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_lane_order_gives_neighbouring_bytes(dim: int, bits: int) -> None:
    width = dim * bits // 8
    column = np.arange(width)
    step, lane, low = column // 8, column // 2 % 4, column % 2
    for kind, byte in (
        ("k", lane * (width // 4) + 2 * step + low),
        ("v", 8 * step + 4 * low + lane),
    ):
        plain = np.array(column_order(kind, bits, dim)).reshape(-1, width)
        np.testing.assert_array_equal(
            np.array(lane_order(kind, bits, dim)).reshape(-1, width), plain[:, byte]
        )


@pytest.mark.parametrize("heads", [1, 6, 8])
@pytest.mark.parametrize("most", [40, 70000])
def test_few_numbers_of_tokens_need_all_kernels(heads: int, most: int) -> None:
    for hopper in (False, True):
        shapes = [
            {kernel.StoreShape.of(n, heads, 128, hopper=hopper) for n in counts}
            for counts in (kernel.token_counts(heads, most), range(1, most + 1))
        ]
        assert shapes[0] == shapes[1]


def test_warming_up_stores_nothing(device: str) -> None:
    warm_up_store(KVFormat(16), 3, 40, torch.float16, torch.device(device))
