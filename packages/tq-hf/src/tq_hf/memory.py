"""Bytes that a cache holds, counted on the tensors that are alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tq_hf.layer import CompressedLayer

__all__ = ["MemoryUsage", "measure_memory", "storage_bytes"]


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes of a cache.

    Attributes
    ----------
    held_bytes : int
        Memory of all tensors of the cache, unused parts of buffers included.
    code_bytes : int
        Of that, codes and scales of tokens, without the unused parts of their buffers.
    spare_bytes : int
        Of that, allocated for codes that are yet to come.
    dense_bytes : int
        Of that, everything else: sinks, windows and layers that are not compressed.
    baseline_bytes : int
        A 16-bit cache of the same tokens in the same layers.
    tokens : int
        Tokens a sequence.
    """

    held_bytes: int
    code_bytes: int
    spare_bytes: int
    dense_bytes: int
    baseline_bytes: int
    tokens: int

    @property
    def ratio(self) -> float:
        """How many times larger a 16-bit cache would be; 1 for an empty one."""
        return self.baseline_bytes / self.held_bytes if self.held_bytes else 1.0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once and whole."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _tensors(item: Any) -> Iterator[Tensor]:
    """Tensors of a cache layer of transformers."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _tensors(value)


def measure_memory(layers: Iterable[Any], tokens: int) -> MemoryUsage:
    """Count the bytes of cache layers."""
    everything: list[Tensor] = []
    codes = spare = baseline = 0
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            everything += layer.tensors()
            used = sum(k.nbytes + v.nbytes for k, v in layer.history.parts())
            codes += used
            spare += storage_bytes(layer.history.tensors()) - used
            if layer.is_initialized:
                batch, kv_heads, count, dim = layer.snapshot().shape
                baseline += 2 * 2 * batch * kv_heads * count * dim
            baseline += sum(2 * t.numel() for t in layer.states())
        else:
            own = list(_tensors(vars(layer)))
            everything += own
            baseline += sum(2 * t.numel() for t in own if t.is_floating_point())
    held = storage_bytes(everything)
    return MemoryUsage(held, codes, spare, held - codes - spare, baseline, tokens)
