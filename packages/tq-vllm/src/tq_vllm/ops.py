"""The operations on pages: the one place that chooses between eager and fused ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from tq_kernels import KVFormat, decode_ref, prefill_ref, store_ref

__all__ = ["LayerOps"]


@dataclass(frozen=True)
class LayerOps:
    """The operations with what is fixed for a layer.

    Attributes
    ----------
    fmt : KVFormat
    softmax_scale : float
    soft_cap : float, optional
    sliding_window : int, optional
    sinks : tensor [heads], optional
    """

    softmax_scale: float
    soft_cap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None

    def store(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, fmt: KVFormat) -> None:
        """Write new keys and values to their slots."""
        store_ref(k, v, pages, slots, fmt)

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
        """Attention of the last tokens of sequences on what is stored, into ``out``."""
        result, _ = decode_ref(
            q,
            pages,
            block_table,
            seq_lens,
            fmt,
            cu_query_lens=cu_query_lens,
            softmax_scale=self.softmax_scale,
            soft_cap=self.soft_cap,
            sliding_window=self.sliding_window,
            sinks=self.sinks,
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
    ) -> None:
        """Attention of new tokens on each other and on what was stored before, into ``out``."""
        result, _ = prefill_ref(
            q,
            k,
            v,
            pages,
            block_table,
            cu_query_lens,
            context_lens,
            fmt,
            softmax_scale=self.softmax_scale,
            soft_cap=self.soft_cap,
            sliding_window=self.sliding_window,
            sinks=self.sinks,
        )
        out.copy_(result)
