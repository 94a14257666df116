"""Random contents of caches: never zeros, no two calls on the same pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tq_kernels.bench.shapes import Decode
from tq_kernels.format import KVFormat
from tq_kernels.ops.store import store_ref

__all__ = ["Pool", "queries", "random_pages", "tables"]

#: Tokens that are drawn; larger pools repeat them.
DRAWN = 4096


def generator(device: torch.device) -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator(device).manual_seed(0)


def normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, device=device, generator=generator(device)).to(dtype)


def random_pages(fmt: KVFormat, kv_heads: int, device: torch.device) -> Tensor:
    """Pages of ``DRAWN`` stored tokens with normal keys and values."""
    pages = fmt.allocate_pages(DRAWN // fmt.page_size, kv_heads, device)
    k = normal((2 * DRAWN, kv_heads, fmt.head_dim), device, torch.bfloat16)
    store_ref(k[:DRAWN], k[DRAWN:], pages, torch.arange(DRAWN, device=device), fmt)
    return pages


@dataclass
class Pool:
    """Pages that are made once and grow when a shape needs more; one entry a key."""

    kept: dict[object, Tensor] = field(default_factory=dict)

    def get(self, key: object, drawn: Tensor, pages: int) -> Tensor:
        """At least ``pages`` pages that repeat ``drawn`` [some pages, ...]."""
        found = self.kept.get(key)
        if found is None or found.shape[0] < pages:
            self.kept.clear()
            times = -(-pages // drawn.shape[0])
            found = drawn.repeat(times, *[1] * (drawn.dim() - 1))
            self.kept[key] = found
        return found


def tables(shape: Decode, copies: int, device: torch.device) -> list[Tensor]:
    """Block tables int32 [batch, pages] over permuted pages, each copy over pages of its own."""
    need = shape.batch * shape.pages
    found = []
    for n in range(copies):
        order = torch.randperm(need, device=device, generator=generator(device).manual_seed(n))
        found.append((order + n * need).to(torch.int32).view(shape.batch, shape.pages))
    return found


def queries(shape: Decode, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries bf16 [tokens, heads, head_dim], their bounds and the lengths, int32."""
    tokens = shape.batch * shape.query_len
    q = normal((tokens, shape.heads, shape.head_dim), device, torch.bfloat16)
    bounds = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.query_len
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    return q, bounds, lengths
