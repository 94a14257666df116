"""Prefill as stored: how a prompt is cut, cached or speculated changes no result."""

from __future__ import annotations

import numpy as np
import pytest
from tq_kernels import KVFormat

K4V4 = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
LENGTHS, NEW = (150, 37, 16, 90), 20


@pytest.fixture(scope="module")
def engine(start, tiny):
    with start(tiny, K4V4) as engine:
        yield engine


@pytest.fixture(scope="module")
def case(reference, decide, tiny):
    return decide(reference(tiny, KVFormat(128, 4, 4)), LENGTHS, NEW)


@pytest.fixture(scope="module")
def prompts(case):
    return case[0]


@pytest.fixture(scope="module")
def expected(case):
    return [answer.tokens for answer in case[1]]


def test_tokens_and_logprobs_are_those_of_transformers_with_the_same_rounding(
    engine, case, reference, tiny
):
    prompts, answers = case
    plain = reference(tiny, None, kept=range(6))
    near, far = [], []
    for out, prompt, want in zip(
        engine.generate(prompts, NEW, logprobs=1), prompts, answers, strict=True
    ):
        got = out.outputs[0]
        assert list(got.token_ids) == want.tokens
        logprobs = [step[t].logprob for step, t in zip(got.logprobs, got.token_ids, strict=True)]
        # A coordinate within rounding of a boundary may get either code, hence the tolerance.
        assert logprobs == pytest.approx(want.logprobs, abs=0.05)
        near += list(np.subtract(logprobs, want.logprobs))
        # Without compression the first token is predicted differently, by much more than that.
        far.append(plain(prompt, 1).logprobs[0] - want.logprobs[0])
    assert np.abs(near).mean() < 0.1 * np.abs(far).mean()


def test_cached_prefixes_change_nothing(engine, prompts, expected):
    engine.llm.reset_prefix_cache()
    first = engine.generate(prompts, NEW)
    again = engine.generate(prompts, NEW)
    assert all(not o.num_cached_tokens for o in first)
    assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // 16 * 16 for p in prompts]
    for outs in (first, again):
        assert [list(o.outputs[0].token_ids) for o in outs] == expected


def test_a_cached_prefix_is_seen_beside_decoding_sequences(engine, prompts, expected):
    """vLLM's built-in TurboQuant dropped the prefix of such a prefill."""
    from vllm import SamplingParams

    engine.llm.reset_prefix_cache()
    engine.generate(prompts[:1], 1)  # caches the prefix
    core = engine.llm.llm_engine
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    found: dict[str, list[int]] = {}
    cached: dict[str, int] = {}
    for n in (1, 3):
        core.add_request(str(n), {"prompt_token_ids": prompts[n]}, params)
    steps = 0
    while core.has_unfinished_requests():
        if steps == 5:  # the others are decoding by now
            core.add_request("late", {"prompt_token_ids": prompts[0]}, params)
        for out in core.step():
            name = out.request_id.split("-")[0]
            found[name] = list(out.outputs[0].token_ids)
            cached[name] = out.num_cached_tokens
        steps += 1
    assert cached["late"] == (len(prompts[0]) - 1) // 16 * 16
    assert found == {"late": expected[0], "1": expected[1], "3": expected[3]}


def test_without_prefix_caching_tokens_and_logprobs_are_the_same(engine, start, tiny, prompts):
    def answers(server):
        outs = server.generate(prompts, NEW, logprobs=1)
        tokens = [list(o.outputs[0].token_ids) for o in outs]
        logprobs = [
            step[t].logprob
            for o, ids in zip(outs, tokens, strict=True)
            for step, t in zip(o.outputs[0].logprobs, ids, strict=True)
        ]
        return [o.num_cached_tokens for o in outs], tokens, logprobs

    answers(engine)
    cached, with_tokens, with_logprobs = answers(engine)
    assert all(cached[n] for n in (0, 1, 3))
    with start(tiny, K4V4, enable_prefix_caching=False) as other:
        answers(other)
        cached, tokens, logprobs = answers(other)
    assert not any(cached)
    assert tokens == with_tokens
    assert logprobs == pytest.approx(with_logprobs, abs=0.05)


def test_chunked_prefill_changes_nothing(start, tiny, prompts, expected):
    options = {"max_num_batched_tokens": 40, "enable_prefix_caching": False}
    with start(tiny, K4V4, **options) as engine:
        assert engine.tokens(prompts, NEW) == expected


def test_preempted_sequences_are_recomputed_to_the_same_tokens(start, tiny, reference, decide):
    short, answers = decide(reference(tiny, KVFormat(128, 4, 4)), [16] * 5, 40, 0.02)
    blocks = 14  # each sequence grows from one block to four
    options = {"kv_cache_memory_bytes": blocks * 16 * 1584, "max_model_len": 128}
    with start(tiny, K4V4, **options) as engine:
        assert engine.config.cache_config.num_gpu_blocks == blocks
        assert engine.tokens(short, 40) == [a.tokens for a in answers]
        assert engine.metric("vllm:num_preemptions") > 0


def test_a_draft_model_gives_the_same_tokens(start, tiny, prompts, expected):
    speculation = {"model": str(tiny), "num_speculative_tokens": 2}
    with start(tiny, K4V4, speculative_config=speculation) as engine:
        assert engine.tokens(prompts, NEW) == expected
        assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0


def test_settings_that_name_layers_mean_those_of_the_served_model(start, tiny):
    speculation = {"model": str(tiny), "num_speculative_tokens": 2}
    settings = {"TQ_PRESET": "tq3", "TQ_FINE_LAYERS": "0,5"}
    with start(tiny, settings, speculative_config=speculation) as engine:
        slots = {n: layer.kv_cache.shape[-1] for n, layer in engine.layers.items()}
    served = [slot for name, slot in slots.items() if not name.startswith("draft")]
    assert served == [196, 100, 100, 100, 100, 196]
    assert [slot for name, slot in slots.items() if name.startswith("draft")] == [100] * 6


def test_ngram_speculation_gives_the_same_tokens(start, tiny, prompts, expected):
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    with start(tiny, K4V4, speculative_config=speculation) as engine:
        assert engine.tokens(prompts, NEW) == expected
        assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
