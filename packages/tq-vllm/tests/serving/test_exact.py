"""The default: new tokens see each other at 16 bits; layers kept at 16 bits; capacity."""

from __future__ import annotations

import json
import shutil

import pytest
from tq_kernels import KVFormat
from tq_vllm.older_pages import OLDER_PAGES

LENGTHS, NEW = (150, 37, 64), 16


def logprobs_of(outs):
    for out in outs:
        got = out.outputs[0]
        yield [s[t].logprob for s, t in zip(got.logprobs, got.token_ids, strict=True)]


def check(engine, case, tolerance=0.05):
    prompts, answers = case
    outs = engine.generate(prompts, NEW, logprobs=1)
    assert [list(o.outputs[0].token_ids) for o in outs] == [a.tokens for a in answers]
    for got, want in zip(logprobs_of(outs), answers, strict=True):
        assert got == pytest.approx(want.logprobs, abs=tolerance)


@pytest.mark.parametrize("bits", [(4, 4), (4, 3)], ids="K{0[0]}V{0[1]}".format)
def test_continuations_are_those_of_transformers_with_the_same_rounding(
    start, reference, decide, tiny, bits
):
    k_bits, v_bits = bits
    fmt = KVFormat(128, k_bits, v_bits, seed=7)
    case = decide(reference(tiny, fmt, exact=True), LENGTHS, NEW)
    settings = {"TQ_K_BITS": str(k_bits), "TQ_V_BITS": str(v_bits), "TQ_SEED": "7"}
    with start(tiny, settings) as engine:
        check(engine, case)
        # Bytes a token, from the tensor that vLLM allocated.
        slot = 16 * (k_bits + v_bits) + 4
        shapes = {tuple(layer.kv_cache.shape) for layer in engine.layers.values()}
        assert shapes == {(engine.config.cache_config.num_gpu_blocks, 2, 16, slot)}
        strides = {layer.kv_cache.stride() for layer in engine.layers.values()}
        assert strides == {(2 * 16 * slot, 16 * slot, slot, 1)}
        storage = engine.layers["model.layers.0.self_attn.attn"].kv_cache.untyped_storage()
        layers = 1 if OLDER_PAGES else 6  # of an allocation
        assert storage.nbytes() == engine.capacity * slot * 2 * layers


def test_the_capacity_vllm_reports_grows_by_the_ratio_of_the_format(start, tiny):
    memory = 64 << 20
    options = {"kv_cache_memory_bytes": memory, "block_size": 32, "dtype": "bfloat16"}
    with start(tiny, {"TQ_CPU": "0"}, **options) as engine:
        plain = engine.capacity
        assert {type(i.impl).__name__ for i in engine.layers.values()} == {
            "CPUAttentionBackendImpl"
        }
    with start(tiny, {"TQ_PRESET": "tq4"}, **options) as engine:
        ours = engine.capacity
        assert engine.tokens([[5, 6, 7]], 2)
    assert plain == memory // (512 * 2 * 6 * 32) * 32
    assert ours == memory // (132 * 2 * 6 * 32) * 32
    assert ours / plain == pytest.approx(512 / 132, rel=0.01)


def test_half_precision_activations(start, reference, decide, tiny):
    case = decide(reference(tiny, KVFormat(128, 4, 4), exact=True), LENGTHS, NEW, 0.3)
    with start(tiny, {"TQ_K_BITS": "4"}, dtype="bfloat16") as engine:
        check(engine, case, tolerance=0.3)


def test_layers_kept_at_16_bits_are_vllms_own(start, reference, decide, tiny):
    case = decide(reference(tiny, KVFormat(128, 3, 3), exact=True, kept=(0, 1, 5)), LENGTHS, NEW)
    settings = {"TQ_PRESET": "tq3", "TQ_SKIP_LAYERS": "0,1,-1", "TQ_FINE_LAYERS": "none"}
    with start(tiny, settings, block_size=32) as engine:
        names = [type(layer.impl).__name__ for layer in engine.layers.values()]
        own, ours = "CPUAttentionBackendImpl", "TurboQuantImpl"
        assert names == [own, own, ours, ours, ours, own]
        check(engine, case)
        bytes_a_token = 2 * (3 * 100 + 3 * 1024)  # vLLM's layers hold float32 here
        assert engine.capacity == (8 << 20) // (bytes_a_token * 32) * 32


def test_layers_with_more_bits(start, reference, decide, tiny):
    fine = KVFormat(128, 8, 4)
    generate = reference(tiny, KVFormat(128, 2, 2), exact=True, formats={0: fine, 1: fine, 5: fine})
    case = decide(generate, LENGTHS, NEW)
    settings = {"TQ_PRESET": "tq2", "TQ_FINE_LAYERS": "0,1,-1"}
    with start(tiny, settings) as engine:
        slots = [layer.kv_cache.shape[-1] for layer in engine.layers.values()]
        assert slots == [196, 196, 68, 68, 68, 196]
        assert engine.capacity == (8 << 20) // (2 * 16 * sum(slots)) * 16
        check(engine, case)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, tiny):
    """The model with a window of 32 tokens in every other layer: for vLLM and transformers."""
    folders = []
    for name, architecture in (("llama", "Llama"), ("ministral", "Ministral")):
        folder = tmp_path_factory.mktemp(name)
        for file in ("model.safetensors", "tokenizer.json"):
            shutil.copy(tiny / file, folder)
        config = json.loads((tiny / "config.json").read_text())
        config["layer_types"] = ["sliding_attention", "full_attention"] * 3
        config |= {"sliding_window": 32, "model_type": name}
        config["architectures"] = [f"{architecture}ForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("settings", [{}, {"TQ_SKIP_LAYERS": "sliding"}, {"TQ_FINE_LAYERS": "1"}])
def test_sliding_window_layers_beside_full_ones(start, reference, decide, windowed, settings):
    if OLDER_PAGES and settings:
        pytest.skip("vLLM 0.26 refuses windowed layers that differ in bytes from others")
    sliding = range(0, 6, 2)
    generate = reference(
        windowed[1],
        KVFormat(128, 4, 4),
        exact=True,
        kept=sliding if "TQ_SKIP_LAYERS" in settings else (),
        formats={1: KVFormat(128, 8, 4)} if "TQ_FINE_LAYERS" in settings else {},
    )
    case = decide(generate, LENGTHS, NEW)
    with start(windowed[0], {"TQ_PRESET": "tq4", **settings}, block_size=32) as engine:
        windows = [layer.impl.sliding_window for layer in engine.layers.values()]
        assert [w in (None, -1) for w in windows] == [n not in sliding for n in range(6)]
        check(engine, case)
        cache = engine.config.cache_config
        if (
            "TQ_SKIP_LAYERS" not in settings and not OLDER_PAGES
        ):  # vLLM's attention for CPUs makes it pad pages
            packed = "TQ_FINE_LAYERS" in settings
            assert cache.kv_cache_layout == ("BLHNC" if packed else "LBHNC")
            slots = 2 * 132 + 196 if packed else 3 * 132
            assert cache.num_gpu_blocks == (8 << 20) // (2 * 32 * slots)


def test_logprobs_are_those_of_the_cache_for_transformers(start, reference, held_out, tiny):
    """The same format there: prompts are codes up to their last multiple of 16 tokens.

    The step after a prompt of such a length differs in one token, which is a code here and has 16
    bits there.
    """
    import torch
    from tq_hf import TurboQuantCache, cache_argument
    from transformers import DynamicCache

    prompts = held_out([64, 96, 128, 160, 192, 256, 320, 384])
    model = reference(tiny, None).model
    with start(tiny, {"TQ_PRESET": "tq4"}) as engine:
        outs = engine.generate(prompts, 2, logprobs=1)

    def forced(cache, prompt, tokens):
        """Log-probabilities of tokens after a prompt."""
        found, ids = [], torch.tensor([prompt])
        for token in tokens:
            with torch.no_grad():
                logits = model(ids, **cache_argument(model, cache), use_cache=True).logits[0, -1]
            found.append(float(logits.log_softmax(-1)[token]))
            ids = torch.tensor([[token]])
        return found

    near, far = [], []
    for prompt, out, own in zip(prompts, outs, logprobs_of(outs), strict=True):
        tokens = out.outputs[0].token_ids
        cache = TurboQuantCache(model.config, sink_tokens=0, window_tokens=0)
        first, second = forced(cache, prompt, tokens)
        plain = forced(DynamicCache(config=model.config), prompt, tokens)
        assert own[0] == pytest.approx(first, abs=1e-3)
        near.append(abs(own[1] - second))
        far.append(abs(own[1] - plain[1]))
    assert max(near) < 0.03
    assert sum(near) < 0.2 * sum(far)
