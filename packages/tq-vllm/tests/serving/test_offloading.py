"""Pages leave the cache for host memory and come back, through vLLM's two offloading connectors.

Their schedulers, workers and layouts are vLLM's; only what CUDA does is done here by other means:
streams and events, and the copy between addresses.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import vllm
from packaging.version import Version
from tq_kernels import KVFormat

pytestmark = pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.32"), reason="stands in for parts of vLLM 0.32"
)
LENGTHS, NEW = (150, 37, 16, 90), 20


class Stream:
    cuda_stream = 0

    def __init__(self, priority: int = 0) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return 1.0


class OnDevice(torch.Tensor):
    is_cuda = True


class Copies:
    """Copies between addresses; keeps the bytes of each, of stores and of loads."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.loaded: list[int] = []

    def batch(self, src, dst, sizes, is_src_access_order_any=False) -> None:
        """As vLLM's ``swap_blocks_batch``; loads read memory that nobody writes, in any order."""
        done = self.loaded if is_src_access_order_any else self.stored
        for a, b, n in zip(src.tolist(), dst.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(b, a, n)
            done.append(n)

    def driver(self, dst, src, sizes, count, attributes, *rest) -> int:
        """As the driver's ``cuMemcpyBatchAsync``."""
        numbers = (
            torch.tensor((ctypes.c_int64 * count).from_address(address)[:])
            for address in (src, dst, sizes)
        )
        self.batch(*numbers, ctypes.c_uint.from_address(attributes).value == 3)
        return 0


@pytest.fixture
def copies(monkeypatch) -> Copies:
    import vllm.v1.worker.cpu.shm  # noqa: F401  puts stand-ins of its own into torch
    from vllm.v1.kv_offload.cpu import gpu_worker, spec
    from vllm.v1.simple_kv_offload import cuda_mem_ops

    copies = Copies()
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda_mem_ops, "_batch_memcpy", (copies.driver, 1))
    platform = SimpleNamespace(
        is_cuda_alike=lambda: True,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        Stream=Stream,
        current_stream=Stream,
        stream=lambda stream: nullcontext(),
    )
    monkeypatch.setattr(spec, "current_platform", platform)
    monkeypatch.setattr(gpu_worker, "current_platform", platform)
    monkeypatch.setattr(gpu_worker, "ops", SimpleNamespace(swap_blocks_batch=copies.batch))
    create = spec.CPUOffloadingSpec.create_worker

    def on_device(self, kv_caches):
        for part in kv_caches.tensors:
            part.tensor = part.tensor.as_subclass(OnDevice)
        return create(self, kv_caches)

    monkeypatch.setattr(spec.CPUOffloadingSpec, "create_worker", on_device)
    return copies


def transfer(connector: str) -> dict[str, object]:
    return {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 8 << 20},
    }


@pytest.mark.parametrize(
    ("connector", "fine"),
    [
        ("OffloadingConnector", "none"),
        ("OffloadingConnector", "0,-1"),
        ("SimpleCPUOffloadConnector", "0,-1"),
    ],
)
def test_pages_from_host_memory_give_the_same_tokens(
    start, reference, decide, tiny, monkeypatch, copies, connector, fine
) -> None:
    more = {n: KVFormat(128, 8, 4) for n in (0, 5)} if fine != "none" else {}
    prompts, answers = decide(reference(tiny, KVFormat(128, 4, 4), formats=more), LENGTHS, NEW)
    want = [answer.tokens for answer in answers]
    settings = {"TQ_PRESET": "tq4", "TQ_FINE_LAYERS": fine, "TQ_PREFILL": "stored"}
    if fine != "none":  # OffloadingConnector would ask for another one
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    with start(tiny, settings, kv_transfer_config=transfer(connector)) as engine:
        assert engine.tokens(prompts, NEW) == want
        engine.generate([[1, 2, 3]], 2)  # pages of a step are stored in the next
        assert not copies.loaded
        engine.llm.reset_prefix_cache()
        for layer in engine.layers.values():
            layer.kv_cache.fill_(255)  # scales that are no numbers
        assert engine.tokens(prompts, NEW) == want
        hits = engine.metric("vllm:external_prefix_cache_hits")
        slots = [layer.kv_cache.shape[-1] for layer in engine.layers.values()]
    # The last token of a prompt is computed in any case; one of the two loads its page too.
    last = 0 if connector == "OffloadingConnector" else 1
    assert hits == sum((length - last) // 16 * 16 for length in LENGTHS)
    assert slots == ([132] * 6 if fine == "none" else [196, 132, 132, 132, 132, 196])
    # Exactly pages of codes: of one layer, or of all layers where blocks are outermost.
    assert set(copies.stored) == {16 * 2 * (132 if fine == "none" else sum(slots))}
    assert sum(copies.loaded) == hits * 2 * sum(slots)


def test_preempted_sequences_come_back_from_host_memory(
    start, reference, decide, tiny, copies
) -> None:
    prompts, answers = decide(reference(tiny, KVFormat(128, 4, 4)), [16] * 5, 40, 0.02)
    blocks = 14  # each sequence grows from one block to four
    settings = {"TQ_PRESET": "tq4", "TQ_PREFILL": "stored"}
    options = {
        "kv_cache_memory_bytes": blocks * 16 * 1584,
        "max_model_len": 128,
        "kv_transfer_config": transfer("OffloadingConnector"),
    }
    with start(tiny, settings, **options) as engine:
        assert engine.tokens(prompts, 40) == [answer.tokens for answer in answers]
        assert engine.metric("vllm:num_preemptions") > 0
    assert copies.loaded
