"""Prefill kernels: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tq_core import TQError
from tq_kernels import KVFormat, prefill_ref
from tq_kernels.ops.prefill import prefill
from tq_kernels.portable.dense import attend_triton
from tq_kernels.portable.expand_pages import expand_pages, key_order
from tq_kernels.portable.prefill import PrefillPlan
from tq_kernels.portable.unpack import value_order
from tq_kernels.testing import attention_f64, random_cache, rounding_room

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINKS = torch.tensor([0.5, -30.0, 4.0, 60.0])


def new_tokens(tokens, heads, kv_heads, dim, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, dim, generator=rng)
    k, v = torch.randn(2, tokens, kv_heads, dim, generator=rng)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend_in_16_bits(q, k, v, cache, contexts, counts):
    """Attention as models compute it eagerly: products and weights rounded to the dtype of q."""
    outs, sums = [], []
    first = 0
    for n, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        new = slice(first, first := first + count)
        keys, values = (
            torch.cat((old[:context].to(q.dtype), t[new]))
            for old, t in zip(cache.decoded(n), (k, v), strict=True)
        )
        group = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (keys, values))
        logits = q[new].transpose(0, 1) @ keys.mT * q.shape[-1] ** -0.5
        unseen = torch.ones(count, context + count, dtype=torch.bool).triu(context + 1)
        logits = logits.masked_fill(unseen, -torch.inf).float()
        outs.append((logits.softmax(-1).to(q.dtype) @ values).transpose(0, 1))
        sums.append(logits.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(sums)


def check(fmt, contexts, counts, dtype, *, codes_query_len, dense=None, **options):
    """Compare a plan with float64; its error is at most twice that of the eager operation."""
    cache = random_cache(fmt, 2, contexts, seed=2)
    q, k, v = new_tokens(sum(counts), 4, 2, fmt.head_dim, dtype)
    cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    extra = {n: options.pop(n) for n in ("sinks", "key_center") if n in options}
    plan = PrefillPlan(
        fmt, 4, 2, len(counts), sum(counts), dtype, DEVICE,
        codes_query_len=codes_query_len, scratch_tokens=32, dense=dense, **options,
    )  # fmt: skip
    here = cache.to(DEVICE)
    out = torch.full((len(q) + 2, 4, fmt.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    lse = torch.full((len(q) + 2, 4), torch.nan, device=DEVICE)
    plan.run(
        *(t.to(DEVICE) for t in (q, k, v)), here.pages, here.block_table, cu.to(DEVICE),
        here.seq_lens, out[1:-1], lse[1:-1], query_lens_host=counts, context_lens_host=contexts,
        **{n: t.to(DEVICE) for n, t in extra.items()},
    )  # fmt: skip
    for edge in (out[0], out[-1], lse[0], lse[-1]):
        assert bool(edge.isnan().all())
    out, lse = out[1:-1].cpu(), lse[1:-1].cpu()
    rest = (cache.pages, cache.block_table, cu, cache.seq_lens, fmt)
    exact, exact_lse = prefill_ref(
        q.double(), k.double(), v.double(), *rest, **options, **extra
    )  # fmt: skip
    if dtype == torch.float32:
        eager, eager_lse = prefill_ref(q, k, v, *rest, **options, **extra)
    else:
        assert not {*options, *extra}
        eager, eager_lse = attend_in_16_bits(q, k, v, cache, contexts, counts)
    for got, same_dtype, want in ((out, eager, exact), (lse, eager_lse, exact_lse)):
        largest = float((got.double() - want).abs().max())
        usual = float((same_dtype.double() - want).abs().max())
        room = rounding_room(want, got.dtype, DEVICE)
        assert largest <= 2 * usual + room, (largest, usual, room)


OPTIONS = {
    "plain": {},
    "cap": {"soft_cap": 2.0},
    "window": {"sliding_window": 40},
    "sinks": {"sinks": SINKS},
    "center": {"key_center": torch.linspace(-1, 1, 128).view(2, 64)},
    "all": {
        "soft_cap": 2.0, "sliding_window": 20, "sinks": SINKS, "softmax_scale": 0.3,
        "key_center": torch.linspace(-1, 1, 128).view(2, 64),
    },
}  # fmt: skip


@pytest.mark.parametrize("codes_query_len", [0, 64], ids=["expanded", "codes"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_mixed_batches(name, codes_query_len):
    # A first chunk, a later chunk, one token after a prefix, nothing new.
    fmt = KVFormat(64, 4, 3)
    contexts, counts = [0, 70, 33, 5], [9, 3, 1, 0]
    options = dict(OPTIONS[name])
    check(fmt, contexts, counts, torch.float32, codes_query_len=codes_query_len, **options)


@pytest.mark.parametrize(
    ("dim", "k_bits", "v_bits"), [(80, 3, 3), (128, 8, 8), (16, 2, 4), (256, 4, 2), (48, 3, 8)]
)
def test_expanded_prefix_of_any_format(dim, k_bits, v_bits):
    fmt = KVFormat(dim, k_bits, v_bits, 32, seed=4)
    check(fmt, [41], [2], torch.float32, codes_query_len=0)


@pytest.mark.parametrize(("which", "error"), [(7, 1e-5), (8, 2e-5)], ids=["out", "lse"])
def test_a_small_error_would_be_seen(monkeypatch, which, error):
    run = PrefillPlan.run

    def run_with_error(plan, *args, **options):
        run(plan, *args, **options)
        args[which].view(-1)[0] += error

    monkeypatch.setattr(PrefillPlan, "run", run_with_error)
    with pytest.raises(AssertionError):
        check(KVFormat(64), [41], [2], torch.float32, codes_query_len=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes_query_len", [0, 64], ids=["expanded", "codes"])
def test_16_bits(dtype, codes_query_len):
    check(KVFormat(64), [40, 0], [3, 20], dtype, codes_query_len=codes_query_len)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_few_new_tokens_beside_many(name):
    # The last two sequences are read as codes, the second is expanded, the first has no prefix.
    options = dict(OPTIONS[name])
    check(KVFormat(64, 4, 3), [0, 70, 33, 9], [9, 6, 3, 1], torch.float32, codes_query_len=4,
          **options)  # fmt: skip


def dense_by_torch(calls, q, k, v, cu_q, cu_k, max_q, max_k, *, causal, softmax_scale, out=None):
    """A `Dense` in float64 that notes what it was called with."""
    calls.append((max_q, max_k, causal))
    outs, sums = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        first = 0 if causal else int(d - c)
        part, lse = attention_f64(
            q[a:b], k[c:d], v[c:d], first_position=first, softmax_scale=softmax_scale
        )
        outs.append(part)
        sums.append(lse)
    result = torch.cat(outs).to(q.dtype)
    return result if out is None else out.copy_(result), torch.cat(sums).float()


def test_given_dense_attention_serves_chunks_and_expanded_prefixes():
    calls: list[tuple[int, int, bool]] = []
    dense = partial(dense_by_torch, calls)
    check(KVFormat(64), [0, 70], [4, 5], torch.float32, codes_query_len=0, dense=dense,
          sinks=SINKS, key_center=torch.ones(2, 64))  # fmt: skip
    assert calls == [(5, 5, True), (5, 32, False), (5, 32, False), (5, 6, False)]


def test_given_dense_attention_of_first_chunks_may_write_to_the_output():
    calls: list[tuple[int, int, bool]] = []
    dense = partial(dense_by_torch, calls)
    check(KVFormat(64), [0, 0], [4, 5], torch.float32, codes_query_len=0, dense=dense)
    assert calls == [(5, 5, True)]


def test_plans_warm_up_on_every_path():
    calls: list[tuple[int, int, bool]] = []
    plan = PrefillPlan(KVFormat(64), 4, 2, 2, 40, torch.float16, DEVICE, codes_query_len=4,
                       scratch_tokens=8, dense=partial(dense_by_torch, calls))  # fmt: skip
    plan.warm_up(sinks=SINKS.to(DEVICE))
    new = [(1, 1, True), (17, 17, True), (1, 1, True)]
    assert calls == [*new, (17, 17, True), (17, 1, False), (17, 17, True), (17, 8, False),
                     (17, 8, False), (17, 1, False), (40, 40, True), (40, 1, False)]  # fmt: skip


def test_given_dense_attention_is_not_asked_for_what_it_lacks():
    calls: list[tuple[int, int, bool]] = []
    dense = partial(dense_by_torch, calls)
    check(KVFormat(64), [40], [3], torch.float32, codes_query_len=0, dense=dense, soft_cap=1.0)
    assert calls == []


@pytest.mark.parametrize(("start", "count"), [(0, 33), (12, 5), (32, 1)])
def test_expanded_tokens_are_those_of_the_format(start, count):
    fmt = KVFormat(80, 3, 8)
    cache = random_cache(fmt, 2, [33]).to(DEVICE)
    k, v = torch.full((2, count + 1, 2, 80), torch.nan, device=DEVICE)
    expand_pages(cache.pages, cache.block_table[0], start, k[:count], v[:count], fmt)
    assert bool(k[count].isnan().all() and v[count].isnan().all())
    rotation = fmt.rotation_matrix(DEVICE, torch.float64)
    for got, order, want in zip(
        (k, v), (key_order(fmt), value_order(fmt)), cache.decoded(0), strict=True
    ):
        rotated = (want[start : start + count] @ rotation.T)[..., order]
        torch.testing.assert_close(got[:count].double(), rotated, rtol=1e-6, atol=1e-6)


def test_dense_kernel_on_sequences_that_start_anywhere():
    q, k, v = new_tokens(70, 4, 2, 48, torch.float32)
    q = q[:21]
    cu_q, cu_k = torch.tensor([0, 20, 20, 21]), torch.tensor([0, 66, 68, 70])
    offsets = torch.tensor([30, 0, 1])
    out, lse = attend_triton(
        *(t.to(DEVICE) for t in (q, k, v, cu_q.int(), cu_k.int())), 20, offsets.int().to(DEVICE),
        causal=True, softmax_scale=0.2, sliding_window=25,
    )  # fmt: skip
    for n in range(3):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        want = attention_f64(
            q[rows], k[keys], v[keys], first_position=int(offsets[n]), softmax_scale=0.2,
            sliding_window=25,
        )  # fmt: skip
        torch.testing.assert_close(out[rows].cpu().double(), want[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse[rows].cpu().double(), want[1], rtol=1e-5, atol=2e-6)


def test_the_function_takes_the_arguments_of_its_reference():
    fmt = KVFormat(64)
    cache = random_cache(fmt, 2, [20, 0])
    q, k, v = new_tokens(3, 4, 2, 64, torch.float32)
    cu = torch.tensor([0, 1, 3])
    arguments = [q, k, v, cache.pages, cache.block_table.long(), cu, cache.seq_lens.long()]
    out, lse = prefill(*(t.to(DEVICE) for t in arguments), fmt, sinks=SINKS.to(DEVICE))
    want, want_lse = prefill_ref(*arguments, fmt, sinks=SINKS)
    torch.testing.assert_close(out.cpu(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_lens_host": [2]}, "query_lens_host has 1 lengths of sum 2"),
        ({"k": torch.zeros(2, 2, 64)}, r"k has shape \(2, 2, 64\)"),
        ({"cu_query_lens": torch.tensor([0, 2], dtype=torch.int32)}, "cu_query_lens is"),
    ],
)
def test_bad_runs_are_named(change, message):
    fmt = KVFormat(64)
    plan = PrefillPlan(fmt, 4, 2, 1, 3, torch.float32, DEVICE)
    arguments = {
        "q": torch.zeros(3, 4, 64),
        "k": torch.zeros(3, 2, 64),
        "v": torch.zeros(3, 2, 64),
        "pages": fmt.allocate_pages(1, 2),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "cu_query_lens": torch.tensor([0, 3], dtype=torch.int32),
        "context_lens": torch.ones(1, dtype=torch.int32),
        "out": torch.zeros(3, 4, 64),
        "lse": torch.zeros(3, 4),
    }
    merged = {**arguments, **change}
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in merged.items()}
    with pytest.raises(TQError, match=message):
        plan.run(**moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes_query_len": -1}, "codes_query_len=-1"),
        ({"scratch_tokens": 6}, "scratch_tokens=6"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
    ],
)
def test_bad_plans_are_named(change, message):
    arguments = {
        "fmt": KVFormat(64), "heads": 4, "kv_heads": 2, "max_batch": 1, "max_tokens": 3,
        "dtype": torch.float32, "device": DEVICE,
    }  # fmt: skip
    with pytest.raises(TQError, match=message):
        PrefillPlan(**{**arguments, **change})
