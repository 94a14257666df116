"""Error feedback: what it rounds, and in which metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from tq_core import TQError
from tq_hf.models import held_out_text
from tq_hf.verify.feedback import (
    IMPLEMENTATION,
    encode_with_feedback,
    error_metrics,
)
from tq_hf.verify.roundings import turboquant
from tq_kernels import KVFormat, decode_tokens, encode_tokens
from transformers import GPT2Config, GPT2LMHeadModel


def vectors(dim: int = 64) -> Tensor:
    return torch.randn(1, 2, 200, dim, generator=torch.Generator().manual_seed(0))


def uneven(dim: int = 64) -> Tensor:
    """Two metrics whose eigenvalues span four orders of magnitude, in bases of their own."""
    spread = torch.logspace(0, -4, dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        basis = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis)[0]
        found.append(basis * spread @ basis.T)
    return torch.stack(found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_an_even_metric_changes_nothing(bits: int, kind: Any) -> None:
    fmt = KVFormat(64, bits, bits)
    plain = encode_tokens(vectors(), fmt, kind)
    found = encode_with_feedback(vectors(), fmt, kind, 3 * torch.eye(64).expand(2, 64, 64))
    for ours, theirs in zip(found.planes, plain.planes, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found.scales, plain.scales, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_in_an_uneven_metric_is_less(bits: int) -> None:
    fmt, x, metric = KVFormat(64, bits, bits), vectors(), uneven()

    def error(codes: Any) -> float:
        e = (decode_tokens(codes, fmt, "k") - x).double()
        return float(torch.einsum("bhti,hij,bhtj->", e, metric, e))

    plain = error(encode_tokens(x, fmt, "k"))
    assert error(encode_with_feedback(x, fmt, "k", metric)) < 0.5 * plain
    # A metric of the other head is of no use.
    assert error(encode_with_feedback(x, fmt, "k", metric.flip(0))) > 0.9 * plain


def test_scales_are_unbiased_in_the_metric() -> None:
    fmt, x, metric = KVFormat(64, 3, 3), vectors(), uneven()
    restored = decode_tokens(encode_with_feedback(x, fmt, "k", metric), fmt, "k").double()
    damped = metric + 0.01 * metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(
        64, dtype=torch.float64
    )
    weighted = x.double() @ damped
    product = (weighted * restored).sum(-1) / (weighted * x.double()).sum(-1)
    torch.testing.assert_close(product, torch.ones_like(product), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_carrying_only_the_scale_changes(bits: int) -> None:
    fmt, x = KVFormat(64, bits, bits), vectors()
    plain = encode_tokens(x, fmt, "k")
    found = encode_with_feedback(x, fmt, "k", uneven(), carry=False)
    for ours, theirs in zip(found.planes, plain.planes, strict=True):
        assert torch.equal(ours, theirs)
    assert (found.scales / plain.scales - 1).abs().mean() > 0.005


def test_zero_vectors() -> None:
    fmt = KVFormat(64, 4, 4)
    codes = encode_with_feedback(torch.zeros(1, 2, 3, 64), fmt, "v", uneven())
    assert torch.equal(decode_tokens(codes, fmt, "v"), torch.zeros(1, 2, 3, 64))


def test_metrics_are_those_of_queries_and_output_projections(single: Any) -> None:
    model, tokenizer = single
    model.set_attn_implementation("sdpa")
    ids = tokenizer(held_out_text("humanize")[:900], return_tensors="pt").input_ids
    lengths = {}

    def keep(layer: int) -> Any:
        # The rotary embedding leaves lengths of queries as they are.
        return lambda _, __, out: lengths.update({layer: out.reshape(-1, 2, 2, 128).double()})

    handles = [
        layer.self_attn.q_proj.register_forward_hook(keep(i))
        for i, layer in enumerate(model.model.layers)
    ]
    metrics = error_metrics(model, [ids])
    for handle in handles:
        handle.remove()
    assert list(metrics) == [0, 1]
    assert model.config._attn_implementation == "sdpa"
    for i, (keys, values) in metrics.items():
        traces = keys.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(traces, lengths[i].square().sum(-1).mean(dim=(0, 2)))
        weight = model.model.layers[i].self_attn.o_proj.weight.double()
        e = torch.randn(128, dtype=torch.float64)
        for head in (0, 1):
            outputs = (weight[:, 128 * h : 128 * (h + 1)] @ e for h in (2 * head, 2 * head + 1))
            expected = sum(float(out.square().sum()) for out in outputs)
            assert float(e @ values[head] @ e) == pytest.approx(expected)


def test_a_history_with_feedback_is_nearer_in_the_metric() -> None:
    x, metric = vectors(), uneven()
    history = turboquant(KVFormat(64, 3, 3), metrics={0: (metric, metric.flip(0))})
    plain = turboquant(KVFormat(64, 3, 3))
    for own, name in ((metric, "keys"), (metric.flip(0), "values")):
        errors = []
        for h in (history, plain):
            e = (getattr(h, name)(x, 0) - x).double()
            errors.append(float(torch.einsum("bhti,hij,bhtj->", e, own, e)))
        assert errors[0] < 0.5 * errors[1]


def test_a_history_with_searched_codes() -> None:
    x, metric = vectors(), uneven()
    fmt = KVFormat(64, 4, 4)
    history = turboquant(fmt, search=True, metrics={0: (metric, metric.flip(0))})
    codes = encode_tokens(x, fmt, "v", search=True, metric=metric.flip(0))
    assert torch.equal(history.values(x, 0), decode_tokens(codes, fmt, "v"))
    codes = encode_tokens(x, fmt, "k", search=True)
    assert torch.equal(turboquant(fmt, search=True).keys(x, 0), decode_tokens(codes, fmt, "k"))


def test_metrics_need_output_projections() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97)
    with pytest.raises(TQError, match="o_proj"):
        error_metrics(GPT2LMHeadModel(config), [])


def test_bits_by_layer_of_a_history() -> None:
    x, bits = vectors(), [(2, 16), (8, 3)]
    history = turboquant(KVFormat(64), layer_bits=bits)
    assert history.slot_bytes == (16 + 2 + 128 + 64 + 2 + 24 + 2) / 2
    assert torch.equal(history.values(x, 0), x)
    for layer, (k, v) in enumerate(bits):
        fmt = KVFormat(64, k, 4 if v == 16 else v)
        one = turboquant(fmt)
        assert torch.equal(history.keys(x, layer), one.keys(x, layer))
        if v != 16:
            assert torch.equal(history.values(x, layer), one.values(x, layer))


def test_the_probe_is_of_no_other_use(single: Any) -> None:
    model, _ = single
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        with pytest.raises(TQError, match="inside"):
            model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    finally:
        model.set_attn_implementation("sdpa")
