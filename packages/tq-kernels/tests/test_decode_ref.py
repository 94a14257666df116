from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, decode_ref, dequantize_ref
from tq_kernels.testing import PagedCache, attention_f64, random_cache

BITS = st.sampled_from([2, 3, 4, 8])


def expected(q, cache: PagedCache, counts, **options):
    """Outputs and LSEs of all sequences, concatenated, by the definition."""
    outs, sums, start = [], [], 0
    for n, count in enumerate(counts):
        first = int(cache.seq_lens[n]) - count
        k, v = cache.decoded(n)
        out, lse = attention_f64(q[start : start + count], k, v, first_position=first, **options)
        outs.append(out)
        sums.append(lse)
        start += count
    return torch.cat(outs), torch.cat(sums)


def bounds(counts) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([16, 32, 48]))
    fmt = KVFormat(
        draw(st.sampled_from([16, 48, 64, 80, 128])), draw(BITS), draw(BITS), page_size, seed=3
    )
    near_page = st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size])
    lengths = draw(st.lists(st.one_of(near_page, st.integers(0, 90)), min_size=1, max_size=4))
    counts = [draw(st.integers(0, min(4, length))) for length in lengths]
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (1, 7), (3, 4)]))
    options: dict[str, object] = {}
    if draw(st.booleans()):
        options["softmax_scale"] = draw(st.floats(0.01, 1.0))
    if draw(st.booleans()):
        options["soft_cap"] = draw(st.floats(0.5, 30.0))
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.integers(1, 60))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        options["sinks"] = torch.randn(kv_heads * group, generator=rng, dtype=torch.float64)
    if draw(st.booleans()):
        options["key_center"] = torch.randn(kv_heads, fmt.head_dim, generator=rng).double()
    q = torch.randn(sum(counts), kv_heads * group, fmt.head_dim, generator=rng).double()
    return q, random_cache(fmt, kv_heads, lengths, seed=draw(st.integers(0, 99))), counts, options


@settings(max_examples=60, deadline=None)
@given(cases())
def test_equals_softmax_attention_on_decoded_tokens(case):
    q, cache, counts, options = case
    out, lse = decode_ref(
        q,
        cache.pages,
        cache.block_table,
        cache.seq_lens,
        cache.fmt,
        cu_query_lens=bounds(counts),
        **options,
    )
    want_out, want_lse = expected(q, cache, counts, **options)
    torch.testing.assert_close(out, want_out, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_that_of_the_dtype(dtype):
    fmt = KVFormat(128)
    cache = random_cache(fmt, 2, [300, 33], seed=1)
    q = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, lse = decode_ref(q, cache.pages, cache.block_table, cache.seq_lens, fmt)
    want_out, want_lse = expected(q, cache, [1, 1])
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Only the output is rounded to the dtype.
    eps = torch.finfo(dtype).eps
    room = 0.6 * eps if dtype != torch.float32 else 40 * eps
    assert float((out.double() - want_out).abs().max()) <= room * float(want_out.abs().max())
    assert float((lse.double() - want_lse).abs().max()) < 5e-6


def test_query_without_key_gives_zero_and_minus_infinity():
    fmt = KVFormat(64)
    cache = random_cache(fmt, 1, [0, 2])
    q = torch.ones(4, 2, 64)
    out, lse = decode_ref(
        q,
        cache.pages,
        cache.block_table,
        cache.seq_lens,
        fmt,
        # One query of an empty sequence; three of a sequence of two tokens.
        cu_query_lens=torch.tensor([0, 1, 4]),
    )
    assert torch.equal(out[:2], torch.zeros(2, 2, 64))
    assert torch.equal(lse[:2], torch.full((2, 2), -torch.inf))
    assert bool(torch.isfinite(lse[2:]).all())


def test_one_token_returns_its_value():
    fmt = KVFormat(80, 4, 3)
    cache = random_cache(fmt, 2, [1])
    q = torch.randn(1, 6, 80).double()
    out, lse = decode_ref(q, cache.pages, cache.block_table, cache.seq_lens, fmt)
    k, v = dequantize_ref(cache.pages, cache.slots(0), fmt, torch.float64)
    heads = torch.arange(6) // 3
    torch.testing.assert_close(out[0], v[0, heads])
    torch.testing.assert_close(lse[0], (q[0] * k[0, heads]).sum(-1) * 80**-0.5)


def test_center_shifts_the_lse_alone():
    fmt = KVFormat(64)
    cache = random_cache(fmt, 2, [40])
    q = torch.randn(1, 4, 64).double()
    center = torch.randn(2, 64).double()
    args = (q, cache.pages, cache.block_table, cache.seq_lens, fmt)
    plain, centred = decode_ref(*args), decode_ref(*args, key_center=center)
    torch.testing.assert_close(centred[0], plain[0])
    shift = (q[0] * center.repeat_interleave(2, dim=0)).sum(-1) / 8
    torch.testing.assert_close(centred[1] - plain[1], shift[None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": torch.tensor([500])}, "seq_lens.*500.*widen block_table"),
        ({"block_table": torch.full((1, 4), 99)}, "block_table.*99.*pages of this cache"),
        ({"q": torch.zeros(1, 3, 64)}, "heads=3.*kv_heads=2"),
        ({"q": torch.zeros(2, 4, 64)}, "2 tokens for 1 sequences"),
        ({"softmax_scale": -1.0}, "softmax_scale=-1.0"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sinks": torch.zeros(3)}, "sinks has shape"),
        ({"cu_query_lens": torch.tensor([0, 2])}, "cu_query_lens is"),
    ],
)
def test_bad_input_is_named(change, message):
    fmt = KVFormat(64)
    cache = random_cache(fmt, 2, [40])
    arguments = {
        "q": torch.zeros(1, 4, 64),
        "pages": cache.pages,
        "block_table": cache.block_table,
        "seq_lens": cache.seq_lens,
        "fmt": fmt,
    }
    with pytest.raises(TQError, match=message):
        decode_ref(**{**arguments, **change})
