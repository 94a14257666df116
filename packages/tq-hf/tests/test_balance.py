"""Balanced weights: the same model, with keys and values that bear rounding better."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tq_core import TQError
from tq_hf.balance import _gradients, _states, balance
from tq_hf.models import held_out_text
from tq_hf.testing import SMALL_MODEL
from tq_hf.verify.calibration import key_value_states
from tq_hf.verify.roundings import turboquant
from tq_hf.verify.scores import compare_logits, summarize
from tq_hf.verify.simulate import rounded
from tq_hf.verify.texts import token_windows
from tq_kernels import KVFormat
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

SMALL: dict[str, Any] = {
    **SMALL_MODEL,
    "head_dim": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}

FULL = ["full_attention"] * 2
MIXED = ["sliding_attention", "full_attention"]


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A random model, biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, x in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            x.data += 0.3 * torch.randn_like(x)
    return model


def ids_of(config: Any, tokens: int = 1024) -> Tensor:
    return torch.randint(
        1, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL | {"num_key_value_heads": 4, "attention_bias": True}),
        MistralConfig(**SMALL, sliding_window=None),
        Qwen2Config(**SMALL | {"num_key_value_heads": 1}),
        Qwen3Config(**SMALL),
    ],
    ids=["llama", "llama-bias", "mistral", "qwen2", "qwen3"],
)
def test_the_model_computes_the_same(config: Any) -> None:
    model = build(config)
    ids = ids_of(config)
    before = copy.deepcopy(model.state_dict())
    logits = model(input_ids=ids).logits
    old = key_value_states(model, ids)
    balance(model, [ids])
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-9, atol=1e-9)
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    keyed = {"q_norm", "k_norm"} if config.model_type == "qwen3" else {"q_proj", "k_proj"}
    assert {n.split(".")[4] for n in changed} == {"v_proj", "o_proj"} | keyed
    for i, pair in key_value_states(model, ids).items():
        for now, then in zip(pair, old[i], strict=True):
            assert float((now - then).norm()) > 0.02 * float(then.norm())


def test_rounding_costs_less(single: Any) -> None:
    model, tokenizer = copy.deepcopy(single[0]), single[1]
    text = token_windows(tokenizer, [held_out_text("humanize")], 512, 2)
    own = token_windows(tokenizer, [held_out_text("einops")], 512, 8)
    base = [model(input_ids=ids[:, :-1]).logits[0] for ids in text]

    def divergence() -> float:
        with rounded(model, turboquant(KVFormat(128, 3, 3))):
            others = [model(input_ids=ids[:, :-1], use_cache=False).logits[0] for ids in text]
        parts = [
            compare_logits(a, b, ids[0, 1:]) for a, b, ids in zip(base, others, text, strict=True)
        ]
        return summarize(parts).kl_mean

    plain = divergence()
    balance(model, own, samples=2)
    assert divergence() < 0.9 * plain


def test_rounding_keys_costs_less_too() -> None:
    config = LlamaConfig(**SMALL)
    model, ids = build(config), ids_of(LlamaConfig(**SMALL))

    def costs() -> list[float]:
        parts = [layer.self_attn.k_proj for layer in model.model.layers]
        found = _gradients(model, parts, [ids], 4, 0)
        keys = [k for k, _ in _states(model, [ids])]
        return [
            float((k.square().sum(-1).T * g.unflatten(2, (2, -1)).square().sum(-1)).sum())
            for k, g in zip(keys, found, strict=True)
        ]

    before = costs()
    balance(model, [ids], values=False)
    for now, then in zip(costs(), before, strict=True):
        assert now < 0.99 * then


def test_gradients_are_those_of_their_modules() -> None:
    config = LlamaConfig(**SMALL)
    model, ids = build(config), ids_of(config, 90)
    layers = [layer.self_attn for layer in model.model.layers]
    parts = [layers[1].v_proj, layers[0].v_proj, layers[1].k_proj, layers[0].k_proj]
    for part, found in zip(parts, _gradients(model, parts, [ids], 2, 0), strict=True):
        torch.testing.assert_close(found, _gradients(model, [part], [ids], 2, 0)[0])


def test_keys_or_values_alone() -> None:
    config = LlamaConfig(**SMALL)
    for options, parts in (
        ({"keys": False}, {"v_proj", "o_proj"}),
        ({"values": False}, {"q_proj", "k_proj"}),
    ):
        model = build(config)
        before = copy.deepcopy(model.state_dict())
        balance(model, [ids_of(config)], **options)
        changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
        assert {n.split(".")[4] for n in changed} == parts


def test_a_seed_gives_the_same_weights_again(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL)
    one, two, other = (build(config, torch.bfloat16) for _ in range(3))
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        balance(model, [ids_of(config)], seed=seed)
    weights = [m.model.layers[0].self_attn.v_proj.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    one.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.model.layers[0].self_attn.v_proj.weight, weights[0])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97), {}, "gpt2 lacks q_proj"),
        (Phi3Config(**SMALL), {}, "phi3 lacks q_proj"),
        (Gemma3TextConfig(**SMALL, layer_types=FULL), {}, "balance its values alone"),
        (CohereConfig(**SMALL | {"num_key_value_heads": 4}), {}, "balance its values alone"),
    ],
    ids=["gpt2", "phi3", "gemma3", "cohere"],
)
def test_models_built_otherwise_are_refused_and_left_alone(
    config: Any, options: Any, message: str
) -> None:
    model = build(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TQError, match=message):
        balance(model, [ids_of(config)], **options)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


@pytest.mark.parametrize(
    "config", [CohereConfig(**SMALL), Gemma3TextConfig(**SMALL, layer_types=MIXED)]
)
def test_values_alone_of_other_rotary_embeddings(config: Any) -> None:
    model = build(config)
    logits = model(input_ids=ids_of(config)).logits
    balance(model, [ids_of(config)], keys=False)
    torch.testing.assert_close(model(input_ids=ids_of(config)).logits, logits, rtol=1e-9, atol=1e-9)


def test_too_little_text_is_refused() -> None:
    config = LlamaConfig(**SMALL)
    model, long, short = build(config), ids_of(config), ids_of(config, 64)
    for windows in ([], [long, short], [long[:, :1023]]):
        with pytest.raises(TQError, match="more than 64 tokens in each and 1024 in all"):
            balance(model, windows)
