"""The operations of a layer on pages, in eager PyTorch and in fused kernels.

Fused ones run on GPUs. They read no tensor on the host and keep their buffers in plans that
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
    attend_dense,
    decode_ref,
    dequantize,
    dequantize_ref,
    merge_states,
    prefill_ref,
    store,
    store_ref,
    warm_up_store,
)

from tq_vllm.dense import dense_attention

if TYPE_CHECKING:
    from tq_kernels import PrefillPlan

__all__ = ["Decodes", "EagerOps", "FusedOps", "LayerShape", "Prefills"]


@dataclass(frozen=True, eq=False)
class Decodes:
    """Sequences whose few new tokens are stored already.

    Attributes
    ----------
    pages : uint8 tensor [pages, kv_heads, record_bytes]
    fmt : KVFormat
    block_table : int32 tensor [sequences, max_pages]
    seq_lens : int32 tensor [sequences]
        Stored tokens, new ones included.
    cu_query_lens : int32 tensor [sequences + 1], optional
        Where the queries of each sequence start; not given: one each.
    """

    pages: Tensor
    fmt: KVFormat
    block_table: Tensor
    seq_lens: Tensor
    cu_query_lens: Tensor | None


@dataclass(frozen=True, eq=False)
class Prefills:
    """Sequences with many new tokens, which are stored already too.

    Attributes
    ----------
    pages, fmt, block_table
        As of `Decodes`.
    cu_query_lens : int32 tensor [sequences + 1]
        Where the new tokens of each sequence start.
    context_lens : int32 tensor [sequences]
        Tokens that were stored before the new ones.
    slots : int64 tensor [tokens]
        Where the new tokens are stored.
    query_lens_host, context_lens_host : list of int, optional
        New and earlier tokens of each sequence, where they are known on the host.
    """

    pages: Tensor
    fmt: KVFormat
    block_table: Tensor
    cu_query_lens: Tensor
    context_lens: Tensor
    slots: Tensor
    query_lens_host: list[int] | None = None
    context_lens_host: list[int] | None = None


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

    @property
    def extras(self) -> dict[str, Any]:
        """The tensors that all attention operations take, None where there is none."""
        return {"sinks": self.sinks, "key_center": self.key_center}

    def centered(self, k: Tensor) -> Tensor:
        """Keys less the center."""
        return k if self.key_center is None else (k - self.key_center).to(k.dtype)

    def reserve(self, fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate all buffers, so that they are there when vLLM measures free memory."""

    def store(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, fmt: KVFormat) -> None:
        """Compress keys and values [tokens, kv_heads, head_dim] into their slots."""
        store_ref(self.centered(k), v, pages, slots, fmt)

    def stored(
        self, pages: Tensor, slots: Tensor, fmt: KVFormat, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of slots as they are stored, [slots, kv_heads, head_dim]."""
        k, v = self._dequantize(pages, slots, fmt, dtype)
        return k if self.key_center is None else (k + self.key_center).to(k.dtype), v

    _dequantize = staticmethod(dequantize_ref)

    def decode(self, q: Tensor, batch: Decodes, out: Tensor) -> Tensor:
        """Attention of the last few tokens of sequences on what is stored, into ``out``.

        Returns the logarithms of the sums of the softmax, float32 [tokens, heads].
        """
        result, lse = decode_ref(
            q,
            batch.pages,
            batch.block_table,
            batch.seq_lens,
            batch.fmt,
            cu_query_lens=batch.cu_query_lens,
            **self.extras,
            **self.shape.options,
        )
        out.copy_(result)
        return lse

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, batch: Prefills, out: Tensor) -> Tensor:
        """Attention of new tokens on each other and on what was stored before, into ``out``.

        Returns what `decode` does.
        """
        result, lse = prefill_ref(
            q,
            k,
            v,
            batch.pages,
            batch.block_table,
            batch.cu_query_lens,
            batch.context_lens,
            batch.fmt,
            **self.extras,
            **self.shape.options,
        )
        out.copy_(result)
        return lse

    def prefill_stored(self, q: Tensor, batch: Prefills, out: Tensor) -> Tensor:
        """As ``prefill``, but new tokens see each other as they are stored in their slots."""
        starts = batch.cu_query_lens
        seq_lens = batch.context_lens + starts[1:] - starts[:-1]
        new = Decodes(batch.pages, batch.fmt, batch.block_table, seq_lens, starts)
        return self.decode(q, new, out)

    def see_later(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add to causal attention of some tokens in a row what they see of the later ones.

        Parameters
        ----------
        q, out : tensors [tokens, heads, head_dim]
        k, v : tensors [tokens, kv_heads, head_dim]
        lse : float32 tensor [tokens, heads]
            Of the attention in ``out``.
        """
        later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        more, more_lse = attend_dense(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            softmax_scale=self.shape.softmax_scale,
            soft_cap=self.shape.soft_cap,
            mask=later,
            chunk=256,
        )
        merged, _ = merge_states(out, lse, more[0].transpose(0, 1), more_lse[0].T)
        out.copy_(merged)


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
    """As `_decode_plan`, for prefills."""
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


@lru_cache(maxsize=16)
def _warm_up(
    shape: LayerShape,
    fmt: KVFormat,
    dtype: torch.dtype,
    device: torch.device,
    sinks: torch.dtype | None,
    key_center: torch.dtype | None,
) -> None:
    """Compile the kernels of a shape, which the first requests would wait for."""
    extras: dict[str, Tensor] = {}
    if sinks is not None:
        extras["sinks"] = torch.zeros(shape.heads, dtype=sinks, device=device)
    if key_center is not None:
        size = shape.kv_heads, fmt.head_dim
        extras["key_center"] = torch.zeros(size, dtype=key_center, device=device)
    for length in {1, shape.max_decode_query_len}:
        _decode_plan(shape, fmt, length, dtype, device)[0].warm_up(**extras)
    _prefill_plan(shape, fmt, dtype, device)[0].warm_up(**extras)
    warm_up_store(fmt, shape.kv_heads, shape.max_tokens, dtype, device)


class FusedOps(EagerOps):
    """Fused kernels, with plans that all layers of a shape share."""

    def reserve(self, fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> None:
        for length in {1, self.shape.max_decode_query_len}:
            _decode_plan(self.shape, fmt, length, dtype, device)
        _prefill_plan(self.shape, fmt, dtype, device)
        if device.type == "cuda":
            sinks, center = (None if t is None else t.dtype for t in self.extras.values())
            _warm_up(self.shape, fmt, dtype, device, sinks, center)
        # What a prefill passes between its kernels: four float32 outputs at most. Allocated and
        # freed, it counts in the peak that vLLM leaves room for.
        numbers = 4 * self.shape.max_tokens * self.shape.heads * fmt.head_dim
        torch.empty(numbers, dtype=torch.float32, device=device)

    def store(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, fmt: KVFormat) -> None:
        store(self.centered(k), v, pages, slots, fmt)

    _dequantize = staticmethod(dequantize)

    def decode(self, q: Tensor, batch: Decodes, out: Tensor) -> Tensor:
        longest = 1 if batch.cu_query_lens is None else self.shape.max_decode_query_len
        plan, lse = _decode_plan(self.shape, batch.fmt, longest, q.dtype, q.device)
        plan.run(
            q,
            batch.pages,
            batch.block_table,
            batch.seq_lens,
            out,
            lse[: q.shape[0]],
            cu_query_lens=batch.cu_query_lens,
            **self.extras,
        )
        return lse[: q.shape[0]]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, batch: Prefills, out: Tensor) -> Tensor:
        plan, lse = _prefill_plan(self.shape, batch.fmt, q.dtype, q.device)
        plan.run(
            q,
            k,
            v,
            batch.pages,
            batch.block_table,
            batch.cu_query_lens,
            batch.context_lens,
            out,
            lse[: q.shape[0]],
            query_lens_host=batch.query_lens_host,
            context_lens_host=batch.context_lens_host,
            **self.extras,
        )
        return lse[: q.shape[0]]

    def prefill_stored(self, q: Tensor, batch: Prefills, out: Tensor) -> Tensor:
        k, v = self.stored(batch.pages, batch.slots, batch.fmt, q.dtype)
        return self.prefill(q, k, v, batch, out)
