"""Times of calls on a GPU: replayed CUDA graphs, cold L2, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["copy_rate", "quantiles", "read_rate", "rotation", "times"]

Call = Callable[[], object]

#: Bytes other calls touch before a buffer is used again, in sizes of the L2 cache.
CACHES = 3
#: Most calls in a graph.
MOST_CALLS = 512


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache, 0 on the CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotation(call_bytes: int, device: torch.device) -> int:
    """Number of buffers to rotate over, so that a call finds none of its own in the L2 cache."""
    needed = CACHES * cache_bytes(device)
    return min(MOST_CALLS, 1 + max(1, -(-needed // max(1, call_bytes))))


def times(
    calls: Sequence[Call], device: torch.device, repeats: int = 30, *, captured: bool = True
) -> list[float]:
    """Milliseconds a call, one number for every repeat over all of ``calls``.

    On a GPU the calls are captured in one graph, after a first run of some outside of it, and the
    graph is replayed between events; or they are launched between them, if not ``captured``.
    """
    for call in calls[:3]:
        call()
    if device.type != "cuda":
        return [_wall_time(calls) for _ in range(repeats)]
    if not captured:
        return _between_events(lambda: [call() for call in calls], len(calls), device, repeats)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return _between_events(graph.replay, len(calls), device, repeats)


def _between_events(launch: Call, calls: int, device: torch.device, repeats: int) -> list[float]:
    marks = [_event() for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / calls for a, b in pairwise(marks)]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall_time(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e3 / len(calls)


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20%, 50% and 80% quantiles."""
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return {"p20": float(low), "p50": float(median), "p80": float(high)}


def _source(size: int, device: torch.device) -> Tensor:
    return torch.randn(size // 4, device=device)


def copy_rate(device: torch.device, size: int = 1 << 31) -> dict[str, float]:
    """Bytes a second of a copy on the device, bytes read plus bytes written.

    ``add`` with an output copies with the device's multiprocessors, as every kernel does.
    ``copy_`` would become a copy node of the graph, which is slower.
    """
    source = _source(size, device)
    target = torch.empty_like(source)
    found = quantiles(times([lambda: torch.add(source, 1, out=target)], device))
    return {**found, "bytes": 2.0 * size, "tbps": 2.0 * size / found["p50"] / 1e9}


def read_rate(device: torch.device, size: int = 1 << 31) -> dict[str, float]:
    """Bytes a second of reading alone (a sum)."""
    source = _source(size, device)
    found = quantiles(times([lambda: source.sum()], device))
    return {**found, "bytes": float(size), "tbps": size / found["p50"] / 1e9}
