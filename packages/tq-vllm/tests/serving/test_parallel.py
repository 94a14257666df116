"""Two ranks give what one gives."""

from __future__ import annotations

import sys

import cloudpickle
from tq_kernels import KVFormat

LENGTHS, NEW = (150, 37, 16), 16


def test_two_tensor_parallel_ranks(start, reference, decide, tiny):
    prompts, answers = decide(reference(tiny, KVFormat(128, 4, 4)), LENGTHS, NEW)
    settings = {"TQ_K_BITS": "4", "TQ_V_BITS": "4", "TQ_PREFILL": "stored"}
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with start(tiny, settings, **options) as engine:
        assert engine.tokens(prompts, NEW) == [a.tokens for a in answers]
        assert engine.capacity == (8 << 20) // (16 * 1584 // 2) * 16  # half of the heads each


def join_stages(worker) -> list[int]:
    """Slots of a stage's layers, and room for what it gets from the stage before.

    vLLM's runner makes the room when it profiles, and its CPU workers do not profile eager models.
    """
    runner = worker.model_runner
    if worker.rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
    layers = runner.compilation_config.static_forward_context
    return [layer.kv_cache.shape[-1] for layer in layers.values()]


def test_two_pipeline_stages(start, reference, decide, tiny):
    """Settings name layers by their number in the whole model."""
    fine = {n: KVFormat(128, 8, 4) for n in (0, 5)}
    prompts, answers = decide(reference(tiny, KVFormat(128, 4, 4), formats=fine), LENGTHS, NEW)
    settings = {"TQ_PRESET": "tq4", "TQ_FINE_LAYERS": "0,-1", "TQ_PREFILL": "stored"}
    options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with start(tiny, settings, **options) as engine:
        slots = engine.llm.collective_rpc(join_stages)
        assert slots == [[196, 132, 132], [132, 132, 196]]
        assert engine.tokens(prompts, NEW) == [a.tokens for a in answers]
        assert engine.capacity == (8 << 20) // (16 * 2 * sum(slots[0])) * 16
