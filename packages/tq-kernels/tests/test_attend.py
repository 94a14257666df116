from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tq_core import TQError
from tq_kernels import (
    KVFormat,
    attend_codes,
    attend_dense,
    decode_tokens,
    encode_tokens,
    merge_sink,
    merge_states,
)

SEEDS = st.integers(0, 2**32)
#: Largest error over the largest value, of the output and, absolute, of the LSE.
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_offset: int = 0,
    sliding_window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one query and head at a time, in float64 NumPy."""
    queries, keys, values = (t.detach().cpu().double().numpy() for t in (q, k, v))
    batch, heads, count, dim = queries.shape
    group = heads // keys.shape[1]
    tokens = keys.shape[2]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    whole = None
    if mask is not None:
        whole = np.broadcast_to(
            mask.cpu().numpy() if mask.dtype == torch.bool else mask.cpu().double().numpy(),
            (batch, heads, count, tokens),
        )
    out = np.zeros_like(queries)
    lse = np.full((batch, heads, count), -np.inf)
    for b, h, n in np.ndindex(batch, heads, count):
        logits = keys[b, h // group] @ queries[b, h, n] * scale
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        seen = np.ones(tokens, dtype=bool)
        if query_positions is not None:
            position = int(query_positions.expand(batch, count)[b, n])
            at = np.arange(tokens) + key_offset
            seen &= at <= position
            if sliding_window is not None:
                seen &= at > position - sliding_window
        if whole is not None and whole.dtype == bool:
            seen &= whole[b, h, n]
        elif whole is not None:
            logits = logits + whole[b, h, n]
        seen &= logits > -np.inf
        if not seen.any():
            continue
        top = logits[seen].max()
        weights = np.exp(logits[seen] - top)
        out[b, h, n] = weights @ values[b, h // group][seen] / weights.sum()
        lse[b, h, n] = top + np.log(weights.sum())
    return out, lse


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Any, Any], error: float) -> None:
    out, lse = (t.detach().cpu().double().numpy() for t in got)
    exact, exact_lse = (np.asarray(t) for t in expected)
    assert out.shape == exact.shape and lse.shape == exact_lse.shape
    assert np.isfinite(out).all()
    assert np.max(np.abs(out - exact), initial=0) <= error * np.max(np.abs(exact), initial=1.0)
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(exact_lse))
    seen = np.isfinite(exact_lse)
    assert np.max(np.abs(lse[seen] - exact_lse[seen]), initial=0) <= error * 10
    assert not out[~seen].any()


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, options and seed of one attention."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries = draw(st.integers(1, 4))
    tokens = draw(st.one_of(st.integers(0, 3), st.integers(4, 40)))
    heads = kv_heads * draw(st.sampled_from([1, 2, 7]))
    rng = np.random.default_rng(draw(SEEDS))
    options: dict[str, Any] = {"chunk": draw(st.sampled_from([1, 5, 16, 4096]))}
    if draw(st.booleans()):
        options["softmax_scale"] = float(rng.uniform(0.05, 1.0))
    if draw(st.booleans()):
        options["soft_cap"] = float(rng.uniform(0.5, 5.0))
    if draw(st.booleans()):
        shape = (batch, queries) if draw(st.booleans()) else (queries,)
        options["query_positions"] = torch.from_numpy(rng.integers(-2, tokens + 2, size=shape))
        if draw(st.booleans()):
            options["sliding_window"] = int(rng.integers(1, tokens + 3))
    lead = [(), (1,), (batch, 1), (batch, heads)][draw(st.integers(0, 3))]
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind == "bool":
        options["mask"] = torch.from_numpy(rng.random((*lead, queries, tokens)) < 0.6)
    elif kind == "float":
        bias = rng.normal(size=(*lead, queries, tokens))
        bias[rng.random(bias.shape) < 0.3] = -np.inf
        options["mask"] = torch.from_numpy(bias)
    return {
        "q": torch.from_numpy(rng.normal(size=(batch, heads, queries, 32)) * 2),
        "k": torch.from_numpy(rng.normal(size=(batch, kv_heads, tokens, 32)) * 2),
        "v": torch.from_numpy(rng.normal(size=(batch, kv_heads, tokens, 32))),
        "options": options,
    }


def without_chunk(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "chunk"}


@settings(max_examples=60)
@given(problems(), st.integers(0, 5))
def test_dense_is_plain_attention(problem: dict[str, Any], key_offset: int) -> None:
    q, k, v, options = (problem[n] for n in ("q", "k", "v", "options"))
    got = attend_dense(q, k, v, key_offset=key_offset, **options)
    expected = softmax_attention(q, k, v, key_offset=key_offset, **without_chunk(options))
    assert_close(got, expected, 1e-12)


@settings(max_examples=60)
@given(problems(), st.sampled_from([2, 3, 4, 8]), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_codes_are_plain_attention_on_decoded_tokens(
    problem: dict[str, Any], k_bits: int, v_bits: int, centred: bool
) -> None:
    q, k, v, options = (problem[n] for n in ("q", "k", "v", "options"))
    fmt = KVFormat(32, k_bits, v_bits)
    keys, values = encode_tokens(k, fmt, "k"), encode_tokens(v, fmt, "v")
    decoded = decode_tokens(keys, fmt, "k", torch.float64)
    if centred:
        options["key_center"] = k.new_tensor(np.linspace(-1, 1, k.shape[1] * 32)).view(-1, 32)
        decoded = decoded + options["key_center"][:, None]
    got = attend_codes(q, keys, values, fmt, **options)
    options.pop("key_center", None)
    expected = softmax_attention(
        q, decoded, decode_tokens(values, fmt, "v", torch.float64), **without_chunk(options)
    )
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_sweep(dtype: torch.dtype, dim: int, bits: int, any_device: str) -> None:
    fmt = KVFormat(dim, bits, bits)
    generator = torch.Generator().manual_seed(dim + bits)
    q = torch.randn(1, 6, 2, dim, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 2, 50, dim, generator=generator, dtype=torch.float64)
    keys, values = encode_tokens(k, fmt, "k"), encode_tokens(v, fmt, "v")
    options = {"query_positions": torch.tensor([48, 49]), "sliding_window": 40, "soft_cap": 3.0}
    expected = softmax_attention(
        q,
        decode_tokens(keys, fmt, "k", torch.float64),
        decode_tokens(values, fmt, "v", torch.float64),
        **options,
    )
    options["query_positions"] = options["query_positions"].to(any_device)
    out, lse = attend_codes(
        q.to(any_device),
        keys.map(lambda t: t.to(any_device)),
        values.map(lambda t: t.to(any_device)),
        fmt,
        chunk=16,
        **options,
    )
    assert out.dtype == dtype and out.device.type == any_device
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close((out, lse), expected, ERRORS[dtype])


def test_bf16_numbers_stay_close() -> None:
    """With ``dtype`` bf16 only the query and the weights are rounded."""
    fmt = KVFormat(128)
    q, k, v = torch.randn(3, 1, 2, 64, 128, generator=torch.Generator().manual_seed(0))
    keys, values = encode_tokens(k, fmt, "k"), encode_tokens(v, fmt, "v")
    exact, _ = attend_codes(q, keys, values, fmt)
    rough, _ = attend_codes(q, keys, values, fmt, dtype=torch.bfloat16)
    error = float((exact - rough).norm() / exact.norm())
    assert 1e-5 < error < 1e-2


@given(problems(), st.integers(0, 40))
def test_merging_two_parts_is_the_whole(problem: dict[str, Any], cut: int) -> None:
    q, k, v, options = (problem[n] for n in ("q", "k", "v", "options"))
    options.pop("mask", None)
    cut = min(cut, k.shape[2])
    one = attend_dense(q, k[:, :, :cut], v[:, :, :cut], **options)
    two = attend_dense(q, k[:, :, cut:], v[:, :, cut:], key_offset=cut, **options)
    whole = softmax_attention(q, k, v, **without_chunk(options))
    assert_close(merge_states(*one, *two), whole, 1e-12)
    assert_close(merge_states(*two, *one), whole, 1e-12)


def test_merging_keeps_the_dtype_and_empty_parts() -> None:
    out = torch.randn(2, 3, 8).half()
    lse = torch.randn(2, 3)
    nothing = torch.full((2, 3), -math.inf)
    merged, total = merge_states(out, lse, torch.zeros_like(out), nothing)
    assert merged.dtype == torch.float16 and torch.equal(merged, out)
    torch.testing.assert_close(total, lse)
    merged, total = merge_states(torch.zeros_like(out), nothing, torch.zeros_like(out), nothing)
    assert not merged.any() and torch.equal(total, nothing)
    merged, _ = merge_states(out, lse + 1000.0, out, lse - 1000.0)
    torch.testing.assert_close(merged, out)


@given(problems(), SEEDS)
def test_a_sink_is_a_key_with_value_zero(problem: dict[str, Any], seed: int) -> None:
    q, k, v, options = (problem[n] for n in ("q", "k", "v", "options"))
    options.pop("mask", None)
    sinks = torch.from_numpy(np.random.default_rng(seed).normal(size=q.shape[1]) * 3)
    got = merge_sink(*attend_dense(q, k, v, **options), sinks[:, None])
    out, lse = softmax_attention(q, k, v, **without_chunk(options))
    logit = np.broadcast_to(sinks.numpy()[:, None], lse.shape)
    total = np.logaddexp(lse, logit)
    assert_close(got, (out * np.exp(lse - total)[..., None], total), 1e-12)


def test_a_sink_of_minus_infinity_changes_nothing() -> None:
    out, lse = torch.randn(1, 2, 1, 4), torch.tensor([[[0.5], [-math.inf]]])
    out[0, 1] = 0.0
    again, total = merge_sink(out, lse, torch.full((2, 1), -math.inf))
    assert torch.equal(again, out) and torch.equal(total, lse)


def test_no_keys() -> None:
    fmt = KVFormat(32)
    q, none = torch.randn(1, 2, 3, 32), torch.zeros(1, 1, 0, 32)
    for out, lse in (
        attend_dense(q, none, none),
        attend_codes(q, encode_tokens(none, fmt, "k"), encode_tokens(none, fmt, "v"), fmt),
    ):
        assert not out.any() and torch.isneginf(lse).all()


def test_large_logits_do_not_overflow() -> None:
    q = torch.full((1, 1, 1, 32), 100.0)
    k = torch.stack((torch.full((32,), 100.0), torch.full((32,), -100.0)))[None, None]
    v = torch.stack((torch.ones(32), torch.zeros(32)))[None, None]
    out, lse = attend_dense(q, k, v, softmax_scale=10.0)
    assert torch.equal(out, torch.ones_like(out)) and lse.item() == pytest.approx(3.2e6)


def test_errors() -> None:
    fmt = KVFormat(32)
    q, k = torch.randn(1, 3, 1, 32), torch.randn(1, 2, 4, 32)
    keys, values = encode_tokens(k, fmt, "k"), encode_tokens(k, fmt, "v")
    with pytest.raises(TQError, match="heads=3.*kv_heads=2"):
        attend_codes(q, keys, values, fmt)
    with pytest.raises(TQError, match="heads=3.*kv_heads=2"):
        attend_dense(q, k, k)
    q = torch.randn(1, 4, 1, 32)
    for call in (
        lambda **options: attend_codes(q, keys, values, fmt, **options),
        lambda **options: attend_dense(q, k, k, **options),
    ):
        with pytest.raises(TQError, match="query_positions"):
            call(sliding_window=2)
        with pytest.raises(TQError, match="mask has 2 heads: needs 1 or 4"):
            call(mask=torch.ones(1, 2, 1, 4, dtype=torch.bool))
