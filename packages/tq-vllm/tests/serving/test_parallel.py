"""Two ranks give what one gives."""

from __future__ import annotations

from tq_kernels import KVFormat

LENGTHS, NEW = (150, 37, 16), 16


def test_two_tensor_parallel_ranks(start, reference, decide, tiny):
    prompts, answers = decide(reference(tiny, KVFormat(128, 4, 4)), LENGTHS, NEW)
    settings = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with start(tiny, settings, **options) as engine:
        assert engine.tokens(prompts, NEW) == [a.tokens for a in answers]
        assert engine.capacity == (8 << 20) // (16 * 1584 // 2) * 16  # half of the heads each
