"""Layers with a state beside attention: a small random model of LFM2's kind."""

from __future__ import annotations

import numpy as np
import pytest
import vllm
from packaging.version import Version

NEW = 8
PROMPTS = [[(7 * i * i + 3 * i + n) % 250 for i in range(40 + n)] for n in range(3)]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        layer_types=["conv", "full_attention"] * 2, tie_word_embeddings=False,
        conv_dim=128, conv_L_cache=3, conv_bias=False, block_dim=128, block_ff_dim=256,
        block_multiple_of=1, block_auto_adjust_ff_dim=False, block_ffn_dim_multiplier=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("lfm2")
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return folder


def logprobs(outs):
    for out in outs:
        got = out.outputs[0]
        yield [s[t].logprob for s, t in zip(got.logprobs, got.token_ids, strict=True)]


@pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.30"),
    reason="the convolution of vLLM 0.29 on CPUs is for bf16 and a width of 4",
)
def test_pages_and_states_share_blocks(start, hybrid):
    options = {"skip_tokenizer_init": True, "block_size": 16}
    with start(hybrid, {"TQ_CPU": "0"}, **options) as engine:
        plain = engine.generate(PROMPTS, NEW, logprobs=1)
    want = list(logprobs(plain))
    errors = {}
    for preset, settings in (
        ("tq8", {}),
        ("tq4", {}),
        ("tq4", {"TQ_FINE_LAYERS": "1"}),
    ):
        with start(hybrid, {"TQ_PRESET": preset, **settings}, **options) as engine:
            outs = engine.generate(PROMPTS, NEW, logprobs=1)
            assert [o.outputs[0].token_ids for o in outs] == [o.outputs[0].token_ids for o in plain]
            errors[preset] = np.abs(np.subtract(list(logprobs(outs)), want)).mean()
            blocks = engine.config.cache_config.num_gpu_blocks
            caches = {name: layer.kv_cache for name, layer in engine.layers.items()}
        # head_dim is 64; no page of codes has bytes that hold nothing.
        widths = [cache.shape[-1] for name, cache in caches.items() if name.endswith("attn")]
        assert widths == {"tq8": [132] * 2}.get(preset, [100, 68] if settings else [68] * 2)
        assert blocks == (8 << 20) // (16 * sum(widths))
    assert errors["tq8"] < 0.005 and errors["tq4"] > 2 * errors["tq8"]
