"""Mixed requests under cache pressure: no wrong token, no leak. SOAK_SECONDS makes it longer."""

from __future__ import annotations

import os
import random
import time

import pytest
from tq_kernels import KVFormat

LENGTHS, NEW, LEAST = (130, 70, 33, 16, 90), 40, 25
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def case(reference, decide, tiny):
    return decide(reference(tiny, KVFormat(128, 4, 4)), LENGTHS, NEW, 0.02)


@pytest.mark.parametrize("speculation", [None, NGRAM], ids=["plain", "ngram"])
def test_soak(start, tiny, case, speculation):
    from vllm import SamplingParams

    prompts, answers = case
    seconds = float(os.environ.get("SOAK_SECONDS", "15"))
    blocks = 30  # the eight sequences at once would need about 60
    options = {
        "kv_cache_memory_bytes": blocks * 16 * 1584,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
        "speculative_config": speculation,
    }
    settings = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
    draw = random.Random(1)
    with start(tiny, settings, **options) as engine:
        core = engine.llm.llm_engine
        running: dict[str, tuple[int, int]] = {}
        number = finished = aborted = 0
        until = time.monotonic() + seconds

        def more() -> bool:
            return time.monotonic() < until or finished < LEAST or not aborted

        while running or more():
            while len(running) < 10 and more():
                which, tokens = draw.randrange(len(prompts)), draw.randint(1, NEW)
                name = f"r{number}"
                number += 1
                params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
                inputs = {"prompt_token_ids": prompts[which]}
                core.add_request(name, inputs, params)
                running[name] = (which, tokens)
            for out in core.step():
                which, tokens = running[out.request_id]
                got = list(out.outputs[0].token_ids)
                assert got == answers[which].tokens[: len(got)], f"after {finished} requests"
                if out.finished:
                    assert len(got) == tokens
                    del running[out.request_id]
                    finished += 1
            if running and draw.random() < 0.05:
                victim = draw.choice(sorted(running))
                core.abort_request([victim])
                del running[victim]
                aborted += 1
        assert engine.metric("vllm:num_preemptions") > 0
        assert engine.metric("vllm:prefix_cache_hits") > 0
        assert not core.has_unfinished_requests()
        pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == blocks - 1  # all but the null block
