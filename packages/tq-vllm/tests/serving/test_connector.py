"""Pages are plain bytes: a KV connector saves them and another engine loads them."""

from __future__ import annotations

import pytest
from tq_kernels import KVFormat

LENGTHS, NEW = (150, 37, 16), 16


@pytest.mark.parametrize("fine", ["none", "0,-1"])
def test_saved_pages_give_the_same_tokens(start, reference, decide, tiny, tmp_path, fine):
    more = {n: KVFormat(128, 8, 4) for n in (0, 5)} if fine != "none" else {}
    prompts, answers = decide(reference(tiny, KVFormat(128, 4, 4), formats=more), LENGTHS, NEW)
    settings = {"TQ_PRESET": "tq4", "TQ_FINE_LAYERS": fine, "TQ_PREFILL": "stored"}
    options = {
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    }
    whole_pages = sum((length - 1) // 16 * 16 for length in LENGTHS)
    for loaded in (0, whole_pages):
        with start(tiny, settings, **options) as engine:
            outs = engine.generate(prompts, NEW)
            assert [list(o.outputs[0].token_ids) for o in outs] == [a.tokens for a in answers]
            assert engine.metric("vllm:external_prefix_cache_hits") == loaded
