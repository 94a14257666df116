"""Shapes of models: head dimensions, grouped heads, sliding windows, soft caps, shared keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tq_hf import TurboQuantCache
from tq_hf.layer import CompressedLayer
from tq_hf.testing import SMALL_MODEL, ReferenceLayer, feed, reference_cache
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

IMPLEMENTATIONS = ["sdpa", "eager", "turboquant"]
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def build(config: Any, implementation: str, dtype: Any = None) -> Any:
    """A random model in evaluation mode; large weights, so that attention is not uniform."""
    torch.manual_seed(0)
    # transformers' eager masks need float32: the lowest float64 is -inf in its softmax.
    dtype = dtype or (torch.float32 if implementation == "eager" else torch.float64)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=implementation
    )
    return model.eval()


def small(**changes: Any) -> dict[str, Any]:
    return {
        **SMALL_MODEL,
        "head_dim": 64,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        **changes,
    }


def check(model: Any, ids: Any = None, mask: Any = None, **options: Any) -> TurboQuantCache:
    """Logits equal the reference's, fed in uneven pieces."""
    cache = TurboQuantCache(model.config, **{"window_tokens": 8, "sink_tokens": 2, **options})
    reference = reference_cache(cache)
    if ids is None:
        ids = torch.randint(1, 97, (2, 90))
    sizes = [40, 1, 1, 1, 22, *[1] * 5, 20]
    ours, theirs = (feed(model, ids, c, sizes, mask) for c in (cache, reference))
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert torch.isfinite(theirs).all()
    if model.config._attn_implementation == "eager":
        assert torch.equal(ours, theirs)
    else:
        double = ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, atol=1e-9 if double else 2e-2, rtol=1e-7)
    assert any(isinstance(c, CompressedLayer) and c.history.tokens for c in cache.layers)
    return cache


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, name: str) -> None:
    check(build(LlamaConfig(**small(head_dim=head_dim)), name), k_bits=4, v_bits=3)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads: int, name: str) -> None:
    model = build(LlamaConfig(**small(num_key_value_heads=kv_heads)), name)
    ids = torch.randint(1, 97, (3, 90))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[2, :39] = 0
    check(model, ids, mask)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_query_and_key_norms(name: str) -> None:
    check(build(Qwen3Config(**small()), name))


GEMMAS = {
    "gemma2": Gemma2Config(
        **small(query_pre_attn_scalar=64, sliding_window=24, attn_logit_softcapping=3.0)
    ),
    "gemma3": Gemma3TextConfig(
        **small(num_hidden_layers=3, query_pre_attn_scalar=64, sliding_window=24),
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
}


@pytest.mark.parametrize("name", ["eager", "turboquant"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", GEMMAS)
def test_sliding_layers_keep_their_window_and_full_ones_are_compressed(
    config: str, padded: bool, name: str
) -> None:
    model = build(GEMMAS[config], name)
    ids = torch.randint(1, 97, (2, 90))
    mask = torch.ones_like(ids)
    mask[0, : 13 if padded else 0] = 0
    cache = check(model, ids, mask if padded else None)
    for layer, kind in zip(cache.layers, GEMMAS[config].layer_types, strict=True):
        assert isinstance(layer, CompressedLayer) is (kind == "full_attention")
        if kind != "full_attention":
            assert layer.keys.shape[-2] == 23
    usage = cache.memory_usage()
    assert usage.held_bytes >= usage.code_bytes + usage.spare_bytes


@pytest.mark.parametrize("config", GEMMAS)
def test_turboquant_attention_equals_eager(config: str) -> None:
    """Soft caps included, in compressed and in sliding layers."""
    model = build(GEMMAS[config], "turboquant")
    ids = torch.randint(1, 97, (2, 60))
    caches = [TurboQuantCache(model.config, window_tokens=8, sink_tokens=2) for _ in range(2)]
    ours = feed(model, ids, caches[0], [30, 1, 20, 9])
    # Float64 throughout, without padding: eager masks hold no row without a key.
    model.set_attn_implementation("eager")
    theirs = feed(model, ids, caches[1], [30, 1, 20, 9])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # eager's softmax is float32
    model.set_attn_implementation("turboquant")


def test_learned_sinks() -> None:
    config = GptOssConfig(
        **small(num_local_experts=2, num_experts_per_tok=1, sliding_window=24),
        layer_types=["sliding_attention", "full_attention"],
    )
    model = build(config, "eager", torch.float32)  # its experts take no float64
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    check(model)
    ids = torch.randint(1, 97, (2, 40))
    out = {}
    for name in ("eager", "turboquant"):
        model.set_attn_implementation(name)
        out[name] = feed(model, ids, TurboQuantCache(config, window_tokens=0), [20, 1, 19])
    torch.testing.assert_close(out["turboquant"], out["eager"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_shared_keys_and_values(name: str) -> None:
    from transformers import Gemma3nTextConfig

    config = Gemma3nTextConfig(
        **small(num_hidden_layers=6),
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 6,
        laurel_rank=8,
        altup_num_inputs=2,
    )
    cache = check(build(config, name))
    assert not getattr(cache, "shared_layers", {})  # nothing decoded outlives a step


@pytest.mark.skipif(not TRANSFORMERS_5, reason="layers of different dimensions came with 5")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_mixed_head_dims(name: str) -> None:
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        **small(num_hidden_layers=4),
        global_head_dim=128,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    cache = check(build(config, name))
    assert [layer.keys.shape[-1] for layer in cache.layers] == [64, 128, 64, 128]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_text_part_of_a_multimodal_model(name: str) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        image_size=8, patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small()), image_token_index=96)
    ).eval()
    model.set_attn_implementation(name)
    cache = TurboQuantCache(model.config, window_tokens=8)
    assert len(cache.layers) == 2
    assert cache.layers[0].options.reads_codes is (name != "eager")
    ids = torch.randint(1, 96, (1, 90))
    reference = reference_cache(cache)
    ours, theirs = (feed(model, ids, c, [40, *[10] * 5]) for c in (cache, reference))
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_metric", [False, True])
def test_searched_codes(name: str, in_metric: bool) -> None:
    model = build(LlamaConfig(**small()), name)
    factors = torch.randn(2, 2, 2, 4, 64)
    metrics = dict(enumerate((x.mT @ x).unbind() for x in factors)) if in_metric else None
    plain = check(model)
    found = check(model, search=True, metrics=metrics)
    for one, two in zip(plain.layers, found.layers, strict=True):
        for kind in ("keys", "values"):
            assert not torch.equal(getattr(one, kind), getattr(two, kind))
        assert (two.metrics is not None) is in_metric


def test_a_model_of_sliding_layers_alone_is_refused() -> None:
    with pytest.raises(Exception, match="no layer left to compress"):
        TurboQuantCache(MistralConfig(**small(sliding_window=16)))


def hybrid_reference(layer: Any) -> Any:
    """transformers' own layer, whose keys and values are those of a reference layer."""
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

    hybrid = LinearAttentionAndFullAttentionLayer()
    keys_and_values = ReferenceLayer(layer)
    hybrid.update = keys_and_values.update
    hybrid.get_seq_length = keys_and_values.get_seq_length
    return hybrid


@pytest.mark.skipif(not TRANSFORMERS_5, reason="4.57 has caches of these models' own")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba", "lfm2", "falcon_h1"])
def test_recurrent_layers(model_type: str, name: str) -> None:
    changes: dict[str, Any] = {
        "qwen3_next": {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "jamba": {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "falcon_h1": {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    }[model_type]
    config = transformers.AutoConfig.for_model(model_type, **small(**changes))
    model = build(config, name, torch.float32)
    cache = TurboQuantCache(model.config, window_tokens=8, sink_tokens=2)
    reference = reference_cache(cache)
    if model_type == "falcon_h1":
        reference.layers = [hybrid_reference(layer) for layer in cache.layers]
    ids = torch.randint(1, 97, (2, 90))
    sizes = [40, *[1] * 50]
    ours, theirs = (feed(model, ids, c, sizes) for c in (cache, reference))
    if name == "eager":
        assert torch.equal(ours, theirs)
    else:
        # A number on the boundary between two codes may fall to either side: rare, and then small.
        difference = (ours - theirs).abs()
        assert float(difference.quantile(0.95)) < 1e-3
        assert float(difference.max()) < 0.1
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    layer = next(c for c in cache.layers if isinstance(c, CompressedLayer))
    layer.batch_repeat_interleave(2)
    assert {t.shape[0] for t in layer.tensors()} == {6}
    layer.batch_select_indices(torch.tensor([0, 4]))
    assert {t.shape[0] for t in layer.tensors()} == {2}
