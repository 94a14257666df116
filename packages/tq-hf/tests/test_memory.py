"""What is held, counted apart from `memory_usage`, and what a step needs beyond it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tq_hf import TurboQuantCache
from tq_hf.argument import cache_argument
from tq_hf.demo_measure import held_bytes
from tq_hf.history import SEGMENT_TOKENS
from tq_hf.models import load_model
from transformers import DynamicCache


def live_storages() -> dict[int, int]:
    """Bytes of every tensor storage of the process, by address."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            try:
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # no storage: meta and wrapper tensors
                continue
    return {address: size for address, size in found.items() if address}


@pytest.fixture(scope="module")
def small() -> Any:
    return load_model("tiny", dtype=torch.bfloat16)[0]


@pytest.mark.parametrize("name", ["sdpa", "eager", "turboquant"])
def test_the_process_holds_what_is_reported(small: Any, name: str) -> None:
    small.set_attn_implementation(name)
    ids = torch.randint(1, 4096, (1, 700))
    small(input_ids=ids[:, :8])  # tables and position tensors come to life here
    warm = TurboQuantCache(small.config, k_bits=4, v_bits=3)
    small(input_ids=ids, **cache_argument(small, warm))
    small(input_ids=ids[:, :1], **cache_argument(small, warm))
    warm = None
    before = live_storages()
    cache = TurboQuantCache(small.config, k_bits=4, v_bits=3)
    small(input_ids=ids, **cache_argument(small, cache))
    for step in range(20):
        small(input_ids=ids[:, step : step + 1], **cache_argument(small, cache))
    grown = sum(n for address, n in live_storages().items() if address not in before)
    usage = cache.memory_usage()
    assert usage.held_bytes == held_bytes(cache)
    assert 0 <= grown - usage.held_bytes < 4096
    assert usage.tokens == 720
    assert usage.baseline_bytes == 720 * 6 * 2 * 2 * 128 * 2
    assert usage.held_bytes == usage.code_bytes + usage.spare_bytes + usage.dense_bytes


def test_code_bytes_are_those_of_the_format(small: Any) -> None:
    cache = TurboQuantCache(small.config, k_bits=4, v_bits=3, sink_tokens=4, window_tokens=12)
    small(input_ids=torch.randint(1, 4096, (2, 512 + 16)), **cache_argument(small, cache))
    usage = cache.memory_usage()
    assert usage.code_bytes == 2 * 512 * 6 * 2 * (128 * 7 // 8 + 4)
    assert usage.dense_bytes == 2 * 16 * 6 * 2 * 2 * 128 * 2


def test_the_16_bit_cache_is_the_baseline(small: Any) -> None:
    ids = torch.randint(1, 4096, (2, 100))
    cache, plain = TurboQuantCache(small.config), DynamicCache()
    for c in (cache, plain):
        small(input_ids=ids, **cache_argument(small, c))
    assert cache.memory_usage().baseline_bytes == held_bytes(plain)


def test_what_is_unused_stays_small(small: Any) -> None:
    cache = TurboQuantCache(small.config, sink_tokens=0, window_tokens=0)
    history = cache.layers[0].history
    x = torch.randn(1, 2, 16, 128)
    for _ in range(3 * SEGMENT_TOKENS // 16):
        cache.update(x, x, 0)
        assert history.spare_tokens <= max(64, SEGMENT_TOKENS // 8)
        assert history.spare_tokens <= max(64, history.tokens // 8 + 16)
    before = cache.memory_usage().held_bytes
    cache.layers[0].crop(-2 * SEGMENT_TOKENS - 1000)
    assert history.spare_tokens <= max(64, history.tokens // 8 + 16)
    assert cache.memory_usage().held_bytes < before / 3


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and type(x) is torch.Tensor:
                fresh = not func.is_view and x.device.type == "cpu"
                self.bytes = max(self.bytes, x.numel() * x.element_size() if fresh else 0)
        return out


def largest(step: Any) -> int:
    with LargestTensor() as mode:
        step()
    return mode.bytes


@pytest.mark.parametrize("name", ["sdpa", "turboquant"])
def test_a_step_needs_the_same_memory_however_long_the_history(small: Any, name: str) -> None:
    small.set_attn_implementation(name)
    cache = TurboQuantCache(small.config)
    ids = torch.randint(1, 4096, (1, 8))

    def step(tokens: int) -> int:
        return largest(lambda: small(input_ids=ids[:, :tokens], **cache_argument(small, cache)))

    def grow(tokens: int) -> None:
        for layer in range(6):
            x = torch.randn(1, 2, tokens, 128, dtype=torch.bfloat16)
            cache.update(x, x, layer)

    grow(SEGMENT_TOKENS + 100)
    first = step(1), step(8)
    grow(3 * SEGMENT_TOKENS)
    assert (step(1), step(8)) <= first
    # Growing takes one segment, never a copy of the history.
    held = cache.memory_usage().code_bytes // 6
    one = torch.randn(1, 2, 16, 128, dtype=torch.bfloat16)
    grown = max(largest(lambda: cache.update(one, one, 0)) for _ in range(64))
    assert grown < held / 4


def test_the_bytes_of_an_eager_step_come_back(small: Any) -> None:
    small.set_attn_implementation("eager")
    cache = TurboQuantCache(small.config)
    small(input_ids=torch.randint(1, 4096, (1, 1024)), **cache_argument(small, cache))
    before = live_storages()
    small(input_ids=torch.randint(1, 4096, (1, 1)), **cache_argument(small, cache))
    new = {a: n for a, n in live_storages().items() if a not in before}
    assert max(new.values(), default=0) <= 2 * 64 * 128 * 2  # a window, no history
