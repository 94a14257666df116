from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_kernels import KVFormat, prefill_ref
from tq_kernels.testing import attention_f64, random_cache

BITS = st.sampled_from([2, 3, 4, 8])


def expected(q, k, v, cache, counts, *, key_center=None, **options):
    """Outputs and LSEs of all sequences by the definition; the centre joins stored keys only."""
    outs, sums, start = [], [], 0
    for n, count in enumerate(counts):
        rows = slice(start, start + count)
        old_k, old_v = cache.decoded(n)
        if key_center is not None:
            old_k = old_k + key_center
        keys, values = torch.cat((old_k, k[rows].double())), torch.cat((old_v, v[rows].double()))
        first = int(cache.seq_lens[n])
        out, lse = attention_f64(q[rows], keys, values, first_position=first, **options)
        outs.append(out)
        sums.append(lse)
        start += count
    return torch.cat(outs), torch.cat(sums)


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([16, 32]))
    fmt = KVFormat(draw(st.sampled_from([16, 64, 96])), draw(BITS), draw(BITS), page_size, seed=5)
    edge = st.sampled_from([0, 0, 1, page_size - 1, page_size, page_size + 1])
    contexts = draw(st.lists(st.one_of(edge, st.integers(0, 80)), min_size=1, max_size=4))
    counts = [draw(st.one_of(st.just(1), st.integers(0, 20))) for _ in contexts]
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (1, 7)]))
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
    tokens = sum(counts)
    q = torch.randn(tokens, kv_heads * group, fmt.head_dim, generator=rng).double()
    k, v = torch.randn(2, tokens, kv_heads, fmt.head_dim, generator=rng).double().unbind()
    cache = random_cache(fmt, kv_heads, contexts, seed=draw(st.integers(0, 99)))
    return q, k, v, cache, counts, options


@settings(max_examples=50, deadline=None)
@given(cases())
def test_equals_softmax_attention_on_decoded_and_new_tokens(case):
    q, k, v, cache, counts, options = case
    cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    out, lse = prefill_ref(
        q, k, v, cache.pages, cache.block_table, cu, cache.seq_lens, cache.fmt, **options
    )
    want_out, want_lse = expected(q, k, v, cache, counts, **options)
    torch.testing.assert_close(out, want_out, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(dtype):
    fmt = KVFormat(64)
    cache = random_cache(fmt, 2, [50, 0])
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(12, 4, 64, generator=rng).to(dtype)
    k, v = torch.randn(2, 12, 2, 64, generator=rng).to(dtype).unbind()
    cu = torch.tensor([0, 5, 12])
    out, lse = prefill_ref(q, k, v, cache.pages, cache.block_table, cu, cache.seq_lens, fmt)
    want, want_lse = expected(q, k, v, cache, [5, 7])
    assert out.dtype == dtype and lse.dtype == torch.float32
    room = 0.6 * torch.finfo(dtype).eps * float(want.abs().max())
    assert float((out.double() - want).abs().max()) <= room
    assert float((lse.double() - want_lse).abs().max()) < 5e-6


def test_new_keys_of_another_shape_are_named():
    fmt = KVFormat(64)
    cache = random_cache(fmt, 2, [5])
    q, k = torch.zeros(3, 4, 64), torch.zeros(2, 2, 64)
    args = (cache.pages, cache.block_table, torch.tensor([0, 3]), cache.seq_lens, fmt)
    with pytest.raises(TQError, match=r"k has shape \(2, 2, 64\): needs \[3, 2, 64\]"):
        prefill_ref(q, k, k, *args)
