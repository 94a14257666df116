"""Host side of the NVIDIA decode kernel: a plan owns the workspace, a run only launches."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
import triton

from tq_kernels.nvidia.decode_kernel import decode_partials
from tq_kernels.nvidia.rows_kernel import combine_partials, prepare_queries

__all__ = ["NvidiaDecodePlan", "supported"]

LOG2E = 1.4426950408889634

#: Warps a multiprocessor runs at once, by number of query blocks: one wave of programs.
WARPS_PER_SM = {1: 12, 2: 8, 4: 5}


class _Codebook(Protocol):
    levels: np.ndarray
    step: float
    bits: int


def _table(codebook: _Codebook) -> tuple[int, int, int, int]:
    """Lookup registers of a codebook: level bytes 0-3, 4-7, 8-11, 12-15."""
    if codebook.bits == 8:
        return 0, 0, 0, 0
    levels = np.zeros(16, np.uint8)
    levels[: len(codebook.levels)] = codebook.levels
    words = levels.view("<i4")
    return int(words[0]), int(words[1]), int(words[2]), int(words[3])


def _center(codebook: _Codebook) -> float:
    # 8-bit codes become signed bytes, code - 128, and their grid is centred at -1/2.
    return -0.5 if codebook.bits == 8 else 63.5


def _exact_rotation(matrix: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, float]:
    """A rotation as ``scale`` times an fp16 matrix if that is exact, else as float32."""
    dim = matrix.shape[0]
    if dim & (dim - 1) == 0:
        for rounds in (1, 3, 2):
            scale = float(dim) ** (-rounds / 2)
            integers = matrix.double() / scale
            rounded = integers.round()
            if (integers - rounded).abs().max() < 1e-6 and rounded.abs().max() <= 2048:
                return rounded.half().to(device), scale
    return matrix.float().to(device), 1.0


def supported(head_dim: int, k_bits: int, v_bits: int, group: int, device: torch.device) -> bool:
    """Whether the kernel covers this format on this device."""
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    return head_dim in (64, 128, 256) and {k_bits, v_bits} <= {2, 3, 4, 8} and group <= 16


class NvidiaDecodePlan:
    """Buffers and launch parameters for decode on compressed pages.

    ``run`` allocates nothing, reads lengths on the device and can be captured in a CUDA
    graph; a graph stays right when lengths change.

    Parameters
    ----------
    head_dim, k_bits, v_bits, page_size
        Of the page format.
    k_codebook, v_codebook
        Grid codebooks (``levels``, ``step``) of keys and values.
    rotation_matrix
        ``[head_dim, head_dim]``, ``y = R x``.
    heads, kv_heads
        Query and KV heads.
    max_batch, max_query_len
        Upper bounds of what ``run`` is given.
    softmax_scale
        Factor of the logits; ``head_dim ** -0.5`` by default.
    soft_cap
        ``cap * tanh(logit / cap)``; 0 for none.
    sliding_window
        Number of most recent tokens each query sees, itself included; 0 for all.
    device
        A CUDA device.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        k_bits: int,
        v_bits: int,
        page_size: int,
        k_codebook: _Codebook,
        v_codebook: _Codebook,
        rotation_matrix: torch.Tensor,
        heads: int,
        kv_heads: int,
        max_batch: int,
        device: torch.device,
        max_query_len: int = 1,
        softmax_scale: float | None = None,
        soft_cap: float = 0.0,
        sliding_window: int = 0,
        warps_per_sm: int | None = None,
    ) -> None:
        if heads % kv_heads:
            raise ValueError(
                f"heads={heads} is not a multiple of kv_heads={kv_heads}; pass the model's own numbers"
            )
        self.group = heads // kv_heads
        blocks = max(1, math.ceil(self.group * max_query_len / 4))
        blocks = 1 << (blocks - 1).bit_length()
        if blocks > 4:
            raise ValueError(
                f"group {self.group} x max_query_len {max_query_len} needs {4 * blocks} query rows, "
                "at most 16 fit this kernel; use the portable decode"
            )
        self.head_dim, self.k_bits, self.v_bits, self.page_size = (
            head_dim,
            k_bits,
            v_bits,
            page_size,
        )
        self.heads, self.kv_heads, self.blocks, self.max_batch = heads, kv_heads, blocks, max_batch
        self.soft_cap, self.window = float(soft_cap), int(sliding_window)
        self.device = device
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.programs = sms * (warps_per_sm or WARPS_PER_SM[blocks])
        self.k_table, self.v_table = _table(k_codebook), _table(v_codebook)
        self.k_center, self.v_center = _center(k_codebook), _center(v_codebook)
        self.v_step = float(v_codebook.step)
        matrix, scale = _exact_rotation(rotation_matrix, device)
        self.rotation, self.rotation_scale = matrix.contiguous(), scale
        self.rotation_transposed = matrix.T.contiguous()
        self.precision = "tf32" if matrix.dtype == torch.float16 else "ieee"
        softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.logit_scale = softmax_scale * LOG2E * float(k_codebook.step) * scale

        pairs = max_batch * kv_heads
        rows = pairs * 4 * blocks
        slots = self.programs + pairs
        self.q_digits = torch.empty(rows * 2 * head_dim, dtype=torch.int8, device=device)
        self.q_affine = torch.empty(rows * 2, dtype=torch.float32, device=device)
        self.partial_out = torch.empty(
            slots * 4 * blocks * head_dim, dtype=torch.float32, device=device
        )
        self.partial_stats = torch.empty(slots * 4 * blocks * 2, dtype=torch.float32, device=device)
        self.one_query = torch.arange(max_batch + 1, dtype=torch.int32, device=device)
        self.no_sinks = torch.empty(1, dtype=torch.float32, device=device)

    def run(
        self,
        q: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        cu_query_lens: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attention of ``q`` on the pages into ``out`` and ``lse``.

        Parameters
        ----------
        q, out
            ``[tokens, heads, head_dim]``, fp16 or bf16, last dimension contiguous.
        pages
            uint8 ``[num_pages, kv_heads, record_bytes]``.
        block_table
            int32 ``[batch, max_pages]``.
        seq_lens
            int32 ``[batch]``, lengths with the queries included.
        lse
            float32 ``[tokens, heads]``, natural logarithm.
        cu_query_lens
            int32 ``[batch + 1]``; one query a sequence if left out.
        sinks
            ``[heads]`` learned sink logits.
        """
        batch = seq_lens.shape[0]
        pairs = batch * self.kv_heads
        rows = pairs * 4 * self.blocks
        cu = self.one_query if cu_query_lens is None else cu_query_lens
        batch_block = max(32, triton.next_power_of_2(batch))
        prepare_queries[(triton.cdiv(rows, 16),)](
            q, self.rotation_transposed, cu, self.q_digits, self.q_affine,
            self.logit_scale, self.k_center, self.group, self.kv_heads, pairs,
            q.stride(0), q.stride(1),
            D=self.head_dim, NB=self.blocks, ROWS=16, PRECISION=self.precision,
            num_warps=4,
        )  # fmt: skip
        decode_partials[(self.programs,)](
            pages, block_table, seq_lens, cu, self.q_digits, self.q_affine,
            self.partial_out, self.partial_stats,
            *self.k_table, *self.v_table, self.v_center, self.v_step, self.soft_cap, self.window,
            batch, self.kv_heads, self.group, self.programs,
            pages.stride(0), pages.stride(1), block_table.stride(0),
            K_BITS=self.k_bits, V_BITS=self.v_bits, D=self.head_dim, PAGE=self.page_size,
            NB=self.blocks, BATCH_BLOCK=batch_block, WINDOW=self.window > 0, CAP=self.soft_cap > 0,
            num_warps=1,
        )  # fmt: skip
        one_row = self.programs >= 8 * pairs
        combine_partials[(rows if one_row else triton.cdiv(rows, 16),)](
            self.partial_out, self.partial_stats, seq_lens, cu, self.rotation,
            self.no_sinks if sinks is None else sinks, out, lse,
            self.rotation_scale, batch, self.group, self.kv_heads, self.programs, pairs,
            out.stride(0), out.stride(1), lse.stride(0),
            D=self.head_dim, NB=self.blocks, ROWS=1 if one_row else 16,
            SPLITS=32 if one_row else 1, BATCH_BLOCK=batch_block,
            SINKS=sinks is not None, PRECISION=self.precision,
            num_warps=4,
        )  # fmt: skip
