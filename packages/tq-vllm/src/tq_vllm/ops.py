"""The operations on pages: the one place that chooses between eager and fused ones.

Fused ones run on GPUs. They look at no length on the host and keep their buffers in plans that
all layers of one shape share; the plans are made while vLLM measures memory, and their size does
not depend on the length of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import tq_kernels
from torch import Tensor
from tq_kernels import (
    DecodePlan,
    KVFormat,
    decode_ref,
    dequantize,
    prefill_ref,
    store,
    store_ref,
)

from tq_vllm.dense import dense_attention

if TYPE_CHECKING:
    from tq_kernels import PrefillPlan

__all__ = ["EagerOps", "FusedOps", "LayerShape"]


HostLengths = tuple[list[int] | None, list[int] | None]


@dataclass(frozen=True)
class LayerShape:
    """What is fixed for a layer and for all layers like it.

    Attributes
    ----------
    heads, kv_heads : int
        Of this rank.
    softmax_scale : float
    soft_cap : float, optional
    sliding_window : int, optional
    max_batch : int
        Most sequences of a step.
    max_decode_query_len : int
        Most new tokens of a sequence that counts as decoding.
    max_tokens : int
        Most new tokens of a step.
    """

    heads: int
    kv_heads: int
    softmax_scale: float
    soft_cap: float | None = None
    sliding_window: int | None = None
    max_batch: int = 1
    max_decode_query_len: int = 1
    max_tokens: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that all attention operations share."""
        return {
            "softmax_scale": self.softmax_scale,
            "soft_cap": self.soft_cap,
            "sliding_window": self.sliding_window,
        }


class EagerOps:
    """Eager PyTorch, on any device.

    Attributes
    ----------
    shape : LayerShape
    sinks : tensor [heads], optional
        Learned logits that take part in the softmax.
    key_center : tensor [kv_heads, head_dim], optional
        Subtracted from keys before they are stored.
    """

    def __init__(self, shape: LayerShape, sinks: Tensor | None = None) -> None:
        self.shape, self.sinks = shape, sinks
        self.key_center: Tensor | None = None

    def centered(self, k: Tensor) -> Tensor:
        """Keys less the center."""
        return k if self.key_center is None else (k - self.key_center).to(k.dtype)

    def reserve(self, fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate all buffers, so that they are there when vLLM measures free memory."""

    def store(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, fmt: KVFormat) -> None:
        """Compress keys and values [tokens, kv_heads, head_dim] into their slots."""
        store_ref(self.centered(k), v, pages, slots, fmt)

    def decode(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        fmt: KVFormat,
        out: Tensor,
        cu_query_lens: Tensor | None,
    ) -> None:
        """Attention of the last few tokens of sequences on what is stored, into ``out``."""
        result, _ = decode_ref(
            q,
            pages,
            block_table,
            seq_lens,
            fmt,
            cu_query_lens=cu_query_lens,
            sinks=self.sinks,
            key_center=self.key_center,
            **self.shape.options,
        )
        out.copy_(result)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        block_table: Tensor,
        cu_query_lens: Tensor,
        context_lens: Tensor,
        fmt: KVFormat,
        out: Tensor,
        host: HostLengths = (None, None),
    ) -> None:
        """Attention of new tokens on each other and on what was stored before, into ``out``.

        ``host``: new and stored tokens of each sequence, where they are known on the host.
        """
        result, _ = prefill_ref(
            q,
            k,
            v,
            pages,
            block_table,
            cu_query_lens,
            context_lens,
            fmt,
            sinks=self.sinks,
            key_center=self.key_center,
            **self.shape.options,
        )
        out.copy_(result)

    def prefill_stored(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        cu_query_lens: Tensor,
        context_lens: Tensor,
        slots: Tensor,
        fmt: KVFormat,
        out: Tensor,
        host: HostLengths = (None, None),
    ) -> None:
        """As ``prefill``, but new tokens see each other as they are stored in their slots."""
        seq_lens = context_lens + cu_query_lens[1:] - cu_query_lens[:-1]
        self.decode(q, pages, block_table, seq_lens, fmt, out, cu_query_lens)


@lru_cache(maxsize=16)
def _decode_plan(
    shape: LayerShape, fmt: KVFormat, max_query_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[DecodePlan, Tensor]:
    """The plan of all layers of a shape, and a place for its sums."""
    plan = DecodePlan(
        fmt,
        shape.heads,
        shape.kv_heads,
        max_batch=shape.max_batch,
        max_query_len=max_query_len,
        dtype=dtype,
        device=device,
        **shape.options,
    )
    rows = shape.max_batch * max_query_len
    return plan, torch.empty(rows, shape.heads, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _prefill_plan(
    shape: LayerShape, fmt: KVFormat, dtype: torch.dtype, device: torch.device
) -> tuple[PrefillPlan, Tensor]:
    """As `_decode_plan`."""
    plan = tq_kernels.PrefillPlan(
        fmt,
        shape.heads,
        shape.kv_heads,
        shape.max_batch,
        shape.max_tokens,
        dtype,
        device,
        dense=dense_attention(device, fmt.head_dim),
        **shape.options,
    )
    return plan, torch.empty(shape.max_tokens, shape.heads, dtype=torch.float32, device=device)


class FusedOps(EagerOps):
    """Triton kernels."""

    def reserve(self, fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> None:
        for length in {1, self.shape.max_decode_query_len}:
            _decode_plan(self.shape, fmt, length, dtype, device)
        _prefill_plan(self.shape, fmt, dtype, device)
        # What a prefill passes between its kernels: four float32 outputs at most. Allocated and
        # freed, it counts in the peak that vLLM leaves room for.
        numbers = 4 * self.shape.max_tokens * self.shape.heads * fmt.head_dim
        torch.empty(numbers, dtype=torch.float32, device=device)

    def store(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, fmt: KVFormat) -> None:
        store(self.centered(k), v, pages, slots, fmt)

    def decode(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        fmt: KVFormat,
        out: Tensor,
        cu_query_lens: Tensor | None,
    ) -> None:
        longest = 1 if cu_query_lens is None else self.shape.max_decode_query_len
        plan, lse = _decode_plan(self.shape, fmt, longest, q.dtype, q.device)
        plan.run(
            q,
            pages,
            block_table,
            seq_lens,
            out,
            lse[: q.shape[0]],
            cu_query_lens=cu_query_lens,
            sinks=self.sinks,
            key_center=self.key_center,
        )

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        block_table: Tensor,
        cu_query_lens: Tensor,
        context_lens: Tensor,
        fmt: KVFormat,
        out: Tensor,
        host: HostLengths = (None, None),
    ) -> None:
        plan, lse = _prefill_plan(self.shape, fmt, q.dtype, q.device)
        plan.run(
            q,
            k,
            v,
            pages,
            block_table,
            cu_query_lens,
            context_lens,
            out,
            lse[: q.shape[0]],
            query_lens_host=host[0],
            context_lens_host=host[1],
            sinks=self.sinks,
            key_center=self.key_center,
        )

    def prefill_stored(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        cu_query_lens: Tensor,
        context_lens: Tensor,
        slots: Tensor,
        fmt: KVFormat,
        out: Tensor,
        host: HostLengths = (None, None),
    ) -> None:
        k, v = dequantize(pages, slots, fmt, q.dtype)
        if self.key_center is not None:
            k = (k + self.key_center).to(k.dtype)
        self.prefill(q, k, v, pages, block_table, cu_query_lens, context_lens, fmt, out, host)
