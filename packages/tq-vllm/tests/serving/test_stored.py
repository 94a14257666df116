"""Prefill as stored: how a prompt is cut, cached or speculated changes no result."""

from __future__ import annotations

import pytest

K4V4 = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
NEW = 24


@pytest.fixture(scope="module")
def engine(start, tiny):
    with start(tiny, K4V4) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(reference, tiny, prompts):
    from tq_kernels import KVFormat

    generate = reference(tiny, KVFormat(128, 4, 4))
    return [generate(p, NEW) for p in prompts]


def test_tokens_and_logprobs_are_those_of_transformers_with_the_same_rounding(
    engine, prompts, expected
):
    for out, want in zip(engine.generate(prompts, NEW, logprobs=1), expected, strict=True):
        got = out.outputs[0]
        assert list(got.token_ids) == want.tokens
        logprobs = [step[t].logprob for step, t in zip(got.logprobs, got.token_ids, strict=True)]
        assert logprobs == pytest.approx(want.logprobs, abs=2e-3)


def test_cached_prefixes_change_nothing(engine, prompts, expected):
    engine.llm.reset_prefix_cache()
    first = engine.generate(prompts, NEW)
    again = engine.generate(prompts, NEW)
    assert all(not o.num_cached_tokens for o in first)
    assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // 16 * 16 for p in prompts]
    for outs in (first, again):
        assert [list(o.outputs[0].token_ids) for o in outs] == [e.tokens for e in expected]


def test_a_cached_prefix_is_seen_beside_decoding_sequences(engine, prompts, expected):
    """vLLM's built-in TurboQuant dropped the prefix of such a prefill."""
    from vllm import SamplingParams

    engine.llm.reset_prefix_cache()
    engine.generate(prompts[:1], 1)  # caches the prefix
    core, params = engine.llm.llm_engine, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    found: dict[str, list[int]] = {}
    cached: dict[str, int] = {}
    waiting = list(enumerate(prompts[3:5])) + [("late", prompts[0])]
    steps = 0
    for name, prompt in waiting[:2]:
        core.add_request(str(name), {"prompt_token_ids": prompt}, params)
    while core.has_unfinished_requests():
        if steps == 5:  # the others are decoding by now
            core.add_request("late", {"prompt_token_ids": prompts[0]}, params)
        for out in core.step():
            found[out.request_id] = list(out.outputs[0].token_ids)
            cached[out.request_id] = out.num_cached_tokens
        steps += 1
    assert cached["late"] == (len(prompts[0]) - 1) // 16 * 16
    assert found["late"] == expected[0].tokens
    assert [found["0"], found["1"]] == [e.tokens for e in expected[3:5]]


def test_chunked_prefill_changes_nothing(start, tiny, prompts, expected):
    options = {"max_num_batched_tokens": 40, "enable_prefix_caching": False}
    with start(tiny, K4V4, **options) as engine:
        assert engine.tokens(prompts, NEW) == [e.tokens for e in expected]


def test_preempted_sequences_are_recomputed_to_the_same_tokens(start, tiny, prompts, expected):
    blocks = 20  # room for two of the longest sequences
    options = {"kv_cache_memory_bytes": blocks * 16 * 1584, "max_model_len": 256}
    with start(tiny, K4V4, **options) as engine:
        assert engine.config.cache_config.num_gpu_blocks == blocks
        assert engine.tokens(prompts, NEW) == [e.tokens for e in expected]
        assert engine.metric("vllm:num_preemptions") > 0


def test_ngram_speculation_gives_the_same_tokens(start, tiny, prompts, expected):
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    with start(tiny, K4V4, speculative_config=speculation) as engine:
        assert engine.tokens(prompts, NEW) == [e.tokens for e in expected]
        assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0


def test_a_draft_model_gives_the_same_tokens(start, tiny, prompts, expected):
    speculation = {"model": str(tiny), "num_speculative_tokens": 2}
    with start(tiny, K4V4, speculative_config=speculation) as engine:
        assert engine.tokens(prompts, NEW) == [e.tokens for e in expected]
        assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
