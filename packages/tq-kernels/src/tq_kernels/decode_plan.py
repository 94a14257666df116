"""``DecodePlan``: the fastest decode kernel that covers a layer on a device."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import portable_kernels

if TYPE_CHECKING:
    from tq_kernels.nvidia.decode import NvidiaDecodePlan
    from tq_kernels.portable.decode import PortableDecodePlan

__all__ = ["DecodePlan"]


class DecodePlan:
    """Buffers and launches of attention of the last tokens of sequences on their pages.

    Planned once for a layer's shape. ``run`` allocates nothing and reads lengths on the device: it
    can be captured in a CUDA graph, which stays right when lengths, tables and pages change.
    NVIDIA GPUs from compute capability 8.0 on run int8 tensor-core kernels for head_dim 64, 128
    and 256 and 16-bit queries; everything else runs portable Triton kernels.

    Parameters
    ----------
    fmt : KVFormat
    heads, kv_heads : int
        Query and KV heads; ``heads`` is a multiple of ``kv_heads``.
    max_batch : int
        Most sequences of a run.
    max_query_len : int
        Most query tokens of one sequence in a run.
    dtype : torch.dtype
        Of queries and outputs: fp16, bf16 or float32.
    device : torch.device or str
    softmax_scale, soft_cap, sliding_window
        See `decode_ref`.

    Attributes
    ----------
    kernels : {"nvidia", "portable"}
        Which kernels run.

    Raises
    ------
    TQError
        For values outside of these, and for a device that Triton cannot use.
    """

    def __init__(
        self,
        fmt: KVFormat,
        heads: int,
        kv_heads: int,
        *,
        max_batch: int,
        max_query_len: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        softmax_scale: float | None = None,
        soft_cap: float | None = None,
        sliding_window: int | None = None,
    ) -> None:
        self.spec = spec = AttentionSpec(
            fmt,
            heads,
            kv_heads,
            max_batch,
            max_query_len,
            dtype,
            torch.device(device),
            softmax_scale,
            soft_cap,
            sliding_window,
        )
        portable_kernels("decode", spec.device)  # raises where Triton cannot run
        from tq_kernels.nvidia.decode import NvidiaDecodePlan, unsupported

        self.kernels: Literal["nvidia", "portable"]
        self._plan: NvidiaDecodePlan | PortableDecodePlan
        if unsupported(spec) is None:
            self.kernels, self._plan = "nvidia", NvidiaDecodePlan(spec)
            return
        from tq_kernels.portable.decode import PortableDecodePlan

        self.kernels, self._plan = "portable", PortableDecodePlan(spec)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all buffers."""
        return self._plan.workspace_bytes

    def run(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        cu_query_lens: Tensor | None = None,
        sinks: Tensor | None = None,
        key_center: Tensor | None = None,
    ) -> None:
        """Attention of ``q`` on the pages into ``out`` and ``lse``; see `decode_ref`.

        Parameters
        ----------
        q, out : tensors [tokens, heads, head_dim] of the plan's dtype
        pages : uint8 tensor [num_pages, kv_heads, record_bytes]
        block_table : int32 tensor [batch, max_pages]
        seq_lens : int32 tensor [batch]
        lse : float32 tensor [tokens, heads]
        cu_query_lens : int32 tensor [batch + 1], optional
            Not given: one query a sequence.
        sinks : float tensor [heads], optional
        key_center : float tensor [kv_heads, head_dim], optional

        Raises
        ------
        TQError
            For shapes, dtypes, strides or devices that do not fit the plan.
        """
        self._plan.run(
            q,
            pages,
            block_table,
            seq_lens,
            out,
            lse,
            cu_query_lens=cu_query_lens,
            sinks=sinks,
            key_center=key_center,
        )

    def warm_up(self, *, sinks: Tensor | None = None, key_center: Tensor | None = None) -> None:
        """Compile what runs of any size need, by runs on sequences without tokens.

        Otherwise the first run of a size waits for the compiler for seconds. Pass what runs will
        get: kernels with and without it differ.

        Parameters
        ----------
        sinks : float tensor [heads], optional
        key_center : float tensor [kv_heads, head_dim], optional
        """
        spec, device = self.spec, self.spec.device
        sizes = {2**n for n in range(spec.max_batch.bit_length())} | {spec.max_batch}
        pages = torch.zeros(
            1, spec.kv_heads, spec.fmt.record_bytes, dtype=torch.uint8, device=device
        )
        # Programs of a table of one page are fewer than those of a wide one.
        for batch, width in product(sorted(sizes), (1, 1024)):
            q = torch.zeros(batch, spec.heads, spec.fmt.head_dim, dtype=spec.dtype, device=device)
            table = torch.zeros(batch, width, dtype=torch.int32, device=device)
            one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)
            self.run(
                q,
                pages,
                table,
                table[:, 0].contiguous(),
                torch.empty_like(q),
                torch.empty(batch, spec.heads, device=device),
                cu_query_lens=None if spec.max_query_len == 1 else one_each,
                sinks=sinks,
                key_center=key_center,
            )
