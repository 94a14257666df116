"""The portable decode kernels: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, decode_ref
from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.portable.decode import PortableDecodePlan
from tq_kernels.testing import attention_f64, copy_to, random_cache, rounding_room

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_plan(plan, q, cache, cu, **extra):
    """Output and LSE of a plan, in the middle of poison that must stay as it is."""
    device = plan.spec.device
    tokens = q.shape[0]
    around = torch.full((tokens + 2, *q.shape[1:]), torch.nan, dtype=q.dtype, device=device)
    sums = torch.full((tokens + 2, q.shape[1]), torch.nan, device=device)
    here = cache.to(device)
    before = here.pages.clone()
    plan.run(
        copy_to(q, device),
        here.pages,
        here.block_table,
        here.seq_lens,
        around[1:-1],
        sums[1:-1],
        cu_query_lens=None if cu is None else cu.to(device),
        **{name: t.to(device) for name, t in extra.items()},
    )
    assert torch.equal(here.pages, before)
    for edge in (around[0], around[-1], sums[0], sums[-1]):
        assert bool(edge.isnan().all())
    return around[1:-1].cpu(), sums[1:-1].cpu()


def make_plan(fmt, *numbers, num_splits):
    """A float32 plan of heads, kv_heads, max_batch and max_query_len."""
    spec = AttentionSpec(fmt, *numbers, torch.float32, torch.device(DEVICE))
    return PortableDecodePlan(spec, num_splits=num_splits)


def check(fmt, heads, kv_heads, lengths, counts, dtype, *, seed=0, num_splits=2, **options):
    """Compare with float64; the error is at most twice that of the eager operation."""
    cache = random_cache(fmt, kv_heads, lengths, seed=seed, key_spread=2.0)
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(counts), heads, fmt.head_dim, generator=rng).to(dtype)
    extra = {n: options.pop(n) for n in ("sinks", "key_center") if n in options}
    one_each = counts == [1] * len(counts)
    cu = None if one_each else torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    limits = (len(lengths), max([1, *counts]), dtype, DEVICE)
    spec = AttentionSpec(fmt, heads, kv_heads, *limits, **options)
    plan = PortableDecodePlan(spec, num_splits=num_splits)
    out, lse = run_plan(plan, q, cache, cu, **extra)

    tables = (cache.pages, cache.block_table, cache.seq_lens, fmt)
    eager, eager_lse = decode_ref(q, *tables, cu_query_lens=cu, **options, **extra)
    exact, exact_lse = decode_ref(q.double(), *tables, cu_query_lens=cu, **options, **extra)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    assert bool(torch.isfinite(out).all())
    seen = torch.isfinite(exact_lse)
    for got, same_dtype, want in (
        (out, eager, exact),
        (lse[seen], eager_lse[seen], exact_lse[seen]),
    ):
        if want.numel():
            error = float((got.double() - want).abs().max())
            usual = float((same_dtype.double() - want).abs().max())
            room = rounding_room(want, got.dtype, DEVICE)
            assert error <= 2 * usual + room, (error, usual, room)


# Every pair of bits, each with another shape.
SHAPES = list(
    zip(
        itertools.product([2, 3, 4, 8], [2, 3, 4, 8]),
        itertools.cycle([64, 80, 96, 128, 192, 256, 16]),
        itertools.cycle([16, 32, 64, 128]),
        itertools.cycle([(4, 1), (7, 1), (4, 4), (16, 1), (6, 2)]),
        itertools.cycle(DTYPES),
        strict=False,
    )
)


@pytest.mark.parametrize(("bits", "dim", "page", "heads", "dtype"), SHAPES)
def test_error_is_at_most_twice_the_eager_one(bits, dim, page, heads, dtype):
    fmt = KVFormat(dim, *bits, page_size=page, seed=1)
    check(fmt, *heads, [1, 0, page + 1], [1, 1, 1], dtype)


@pytest.mark.parametrize("length", [127, 128, 129, 255, 257])
def test_lengths_around_a_split(length):
    # Splits of two tiles of 64 tokens.
    check(KVFormat(64), 2, 1, [length], [1], torch.float32, num_splits=2)


@pytest.mark.parametrize(("which", "error"), [(4, 1e-5), (5, 2e-5)], ids=["out", "lse"])
def test_a_small_error_would_be_seen(monkeypatch, which, error):
    run = PortableDecodePlan.run

    def run_with_error(plan, *args, **options):
        run(plan, *args, **options)
        args[which].view(-1)[0] += error

    monkeypatch.setattr(PortableDecodePlan, "run", run_with_error)
    with pytest.raises(AssertionError):
        check(KVFormat(64), 2, 1, [129], [1], torch.float32)


@pytest.mark.parametrize("counts", [[3, 1, 0, 2], [5, 5, 1, 1]])
def test_query_tokens_are_causal_and_batches_mixed(counts):
    check(KVFormat(64, 4, 3, 32), 14, 2, [40, 1, 0, 66], counts, torch.float32)


def test_more_rows_than_a_block():
    # 7 query heads x 11 tokens in blocks of 16 rows.
    check(KVFormat(64), 7, 1, [70], [11], torch.float16)


OPTIONS = {
    "scale": {"softmax_scale": 0.3},
    "cap": {"soft_cap": 2.0},
    "window": {"sliding_window": 40},
    "window-1": {"sliding_window": 1},
    "sinks": {"sinks": torch.tensor([0.5, -30.0, 4.0, 60.0])},
    "center": {"key_center": torch.linspace(-1, 1, 128).view(2, 64), "soft_cap": 3.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    check(KVFormat(64, page_size=32), 4, 2, [135, 3], [2, 1], torch.float32, **OPTIONS[name])


def test_all_options_together():
    options = {k: v for o in OPTIONS.values() for k, v in o.items()}
    check(KVFormat(64, 8, 2), 4, 2, [100, 0, 20], [1, 2, 4], torch.bfloat16, **options)


@st.composite
def cases(draw):
    page = draw(st.sampled_from([16, 32, 48]))
    dim = draw(st.sampled_from([16, 48, 64, 112]))
    bits = st.sampled_from([2, 3, 4, 8])
    fmt = KVFormat(
        dim, draw(bits), draw(bits), page, rotation=draw(st.sampled_from(["haar", "hadamard"]))
    )
    length = st.one_of(st.sampled_from([0, 1, page - 1, page, page + 1]), st.integers(0, 150))
    lengths = draw(st.lists(length, min_size=1, max_size=3))
    counts = [draw(st.integers(0, 4)) for _ in lengths]
    heads, kv_heads = draw(st.sampled_from([(1, 1), (3, 1), (10, 2)]))
    window = draw(st.one_of(st.none(), st.integers(1, 80)))
    options = {"sliding_window": window, "num_splits": draw(st.integers(1, 4))}
    return fmt, heads, kv_heads, lengths, counts, draw(st.sampled_from(DTYPES)), options


@settings(max_examples=8, deadline=None)
@given(cases(), st.integers(0, 99))
def test_any_shape(case, seed):
    *shape, options = case
    check(*shape, seed=seed, **options)


def test_offsets_past_two_gibibytes():
    # Pages far apart; the bytes between them are never touched.
    fmt = KVFormat(64, page_size=16)
    cache = random_cache(fmt, 1, [40])
    stride = 2**31 // (len(cache.pages) - 1) // 16 * 16 + 4096
    try:
        far = torch.empty(stride * (len(cache.pages) - 1) + fmt.record_bytes, dtype=torch.uint8)
    except RuntimeError:
        pytest.skip("needs 2 GiB of address space")
    pages = far.as_strided(cache.pages.shape, (stride, fmt.record_bytes, 1))
    pages.copy_(cache.pages)
    if DEVICE == "cuda":
        moved = torch.empty(far.shape, dtype=torch.uint8, device="cuda")
        moved = moved.as_strided(pages.shape, pages.stride())
        pages = moved.copy_(pages)
    q = torch.randn(1, 2, 64).to(DEVICE)
    out, lse = torch.empty_like(q), torch.empty(1, 2, device=DEVICE)
    plan = make_plan(fmt, 2, 1, 1, 1, num_splits=1)
    plan.run(q, pages, cache.block_table.to(DEVICE), cache.seq_lens.to(DEVICE), out, lse)
    want, _ = attention_f64(q.cpu(), *cache.decoded(0), first_position=39)
    assert float((out.cpu() - want).abs().max()) < 1e-5


def test_a_plan_serves_smaller_batches_again():
    fmt = KVFormat(64)
    plan = make_plan(fmt, 2, 1, 3, 2, num_splits=2)
    for lengths, counts in (([130, 5, 9], [2, 2, 2]), ([20], [1]), ([0], [2])):
        cache = random_cache(fmt, 1, lengths)
        q = torch.randn(sum(counts), 2, 64)
        cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        out, lse = run_plan(plan, q, cache, cu)
        tables = (cache.pages, cache.block_table, cache.seq_lens, fmt)
        want, want_lse = decode_ref(q, *tables, cu_query_lens=cu)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_queries_with_strides():
    fmt = KVFormat(64)
    cache = random_cache(fmt, 1, [30, 12])
    wide = torch.randn(2, 6, 64)
    q = wide[:, 1:3]  # as cut from a fused projection
    plan = make_plan(fmt, 2, 1, 2, 1, num_splits=1)
    out, _ = run_plan(plan, q, cache, None)
    want, _ = decode_ref(q, cache.pages, cache.block_table, cache.seq_lens, fmt)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads=5.*kv_heads=2"),
        ({"dtype": torch.float64}, "dtype=torch.float64.*_ref"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0"),
        ({"device": torch.device("meta")}, "device meta"),
    ],
)
def test_bad_plans_are_named(change, message):
    arguments = {
        "fmt": KVFormat(64),
        "heads": 4,
        "kv_heads": 2,
        "max_batch": 2,
        "max_query_len": 1,
        "dtype": torch.float32,
        "device": torch.device(DEVICE),
    }
    with pytest.raises(TQError, match=message):
        PortableDecodePlan(AttentionSpec(**{**arguments, **change}))


def test_a_bad_number_of_splits_is_named():
    with pytest.raises(TQError, match="num_splits=0"):
        make_plan(KVFormat(64), 4, 2, 2, 1, num_splits=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(1, 4, 64, dtype=torch.float16), "q has dtype torch.float16"),
        ("q", torch.zeros(3, 4, 64), "3 query tokens.*make a larger plan"),
        ("q", torch.zeros(1, 64, 4).transpose(1, 2), "q has stride 4"),
        ("pages", torch.zeros(3, 2, 7, dtype=torch.uint8), "pages has shape"),
        ("block_table", torch.zeros(1, 4, dtype=torch.int64), "block_table has dtype torch.int64"),
        ("seq_lens", torch.zeros(2, dtype=torch.int32), "block_table has shape"),
        ("lse", torch.zeros(1, 4, dtype=torch.float16), "lse has dtype"),
    ],
)
def test_bad_runs_are_named(name, value, message):
    fmt = KVFormat(64)
    plan = make_plan(fmt, 4, 2, 2, 1, num_splits=1)
    arguments = {
        "q": torch.zeros(1, 4, 64),
        "pages": fmt.allocate_pages(3, 2),
        "block_table": torch.zeros(1, 2, dtype=torch.int32),
        "seq_lens": torch.ones(1, dtype=torch.int32),
        "out": torch.zeros(1, 4, 64),
        "lse": torch.zeros(1, 4),
    }
    moved = {k: v.to(DEVICE) for k, v in {**arguments, name: value}.items()}
    with pytest.raises(TQError, match=message):
        plan.run(**moved)
