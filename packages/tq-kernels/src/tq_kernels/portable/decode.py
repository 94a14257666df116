"""Decode with the portable kernels: a plan owns the workspace, a run only launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from tq_core import TQError

from tq_kernels.aot import Variant
from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.format import KVFormat
from tq_kernels.ops.backend import portable_kernels
from tq_kernels.portable.attend import attend_pages
from tq_kernels.portable.rows import merge_partials, prepare_queries
from tq_kernels.portable.unpack import field_count, table_words, value_order
from tq_kernels.quantize import step_of

__all__ = ["PortableDecodePlan"]

LOG2E = 1.4426950408889634
#: Registers that a lane of `attend_pages` may take.
MOST_REGISTERS = 255
#: Tiles a split has at least.
LEAST_TILES = 2
#: Rows of queries that `prepare_queries` and `merge_partials` take at a time.
AROUND = 16


def key_columns(fmt: KVFormat) -> tuple[list[int], int]:
    """Dimension of every column of prepared queries, -1 for padding; columns a field."""
    fields = field_count(fmt.k_bits)
    words = fmt.head_dim // fields
    width = max(16, triton.next_power_of_2(words))
    return [fields * n + j if n < words else -1 for j in range(fields) for n in range(width)], width


@dataclass(frozen=True)
class Tiling:
    """Shape of a program: rows, quads of tokens a tile, warps, stages of the pipeline."""

    rows: int
    quads: int
    warps: int
    stages: int


def choose_tiling(spec: AttentionSpec) -> Tiling:
    """Tiling of a head_dim."""
    return Tiling(16, 16, 8 if spec.fmt.head_dim > 128 else 2, 2)


def register_limit() -> dict[str, int]:
    """Launch option of `attend_pages` on NVIDIA.

    Left alone, ptxas keeps to fewer registers for more programs at a time, and spills for it.
    """
    return {} if torch.version.hip else {"maxnreg": MOST_REGISTERS}


def choose_splits(spec: AttentionSpec, tiling: Tiling) -> int:
    """Splits of the history that fill the device about twice with a full batch."""
    if spec.device.type == "cpu":
        return 4
    units = torch.cuda.get_device_properties(spec.device).multi_processor_count
    programs = units * 8 // tiling.warps
    blocks = spec.max_batch * spec.kv_heads * -(-spec.group * spec.max_query_len // tiling.rows)
    return max(1, min(128, programs // blocks))


def prepare_constants(fmt: KVFormat, center: bool) -> dict[str, Any]:
    """Constants of `prepare_queries`."""
    dim = fmt.head_dim
    return {
        "D": dim,
        "WIDTH": len(key_columns(fmt)[0]),
        "ROWS": AROUND,
        "STEP": 32 if dim % 32 == 0 else 16,
        "CENTER": center,
    }


def attend_constants(
    spec: AttentionSpec, tiling: Tiling, center: bool, prefix: bool
) -> dict[str, Any]:
    """Constants of `attend_pages`."""
    fmt = spec.fmt
    k_table, v_table = table_words(fmt.k_codebook), table_words(fmt.v_codebook)
    return {
        "D": fmt.head_dim,
        "K_BITS": fmt.k_bits,
        "V_BITS": fmt.v_bits,
        "PAGE": fmt.page_size,
        "ROWS": tiling.rows,
        "QUADS": tiling.quads,
        "K_WIDTH": key_columns(fmt)[1],
        "V_WIDTH": max(16, triton.next_power_of_2(fmt.head_dim // 2)),
        "K0": k_table[0],
        "K1": k_table[1],
        "V0": v_table[0],
        "V1": v_table[1],
        "WINDOW": spec.sliding_window is not None,
        "CAP": spec.soft_cap is not None,
        "CENTER": center,
        "PREFIX": prefix,
        "FINE": spec.dtype != torch.bfloat16,
    }


def merge_warps(dim: int) -> int:
    """Warps of `merge_partials`."""
    return 2 if dim <= 128 else 4


def merge_constants(
    spec: AttentionSpec, tiling: Tiling, sinks: bool, prefix: bool
) -> dict[str, Any]:
    """Constants of `merge_partials`."""
    dim = spec.fmt.head_dim
    return {
        "D": dim,
        "WIDTH": triton.next_power_of_2(dim),
        "ROWS": AROUND,
        "STEP": 32 if dim % 32 == 0 else 16,
        "TILE": 4 * tiling.quads,
        "WINDOW": spec.sliding_window is not None,
        "SINKS": sinks,
        "PREFIX": prefix,
    }


class PortableDecodePlan:
    """Buffers and launches of attention on pages by the portable kernels.

    ``run`` allocates nothing and reads lengths on the device: it can be captured in a CUDA graph,
    which stays right when lengths, tables and pages change.

    Parameters
    ----------
    spec : AttentionSpec
    num_splits : int, optional
        Parts of the history that are attended in parallel; chosen from the device if not given.
    prefix : bool
        The queries follow after the stored tokens, instead of being the last of them.

    Raises
    ------
    TQError
        For values outside of these, and for a device that Triton cannot use.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        num_splits: int | None = None,
        prefix: bool = False,
    ) -> None:
        self.spec = spec
        fmt, device = spec.fmt, spec.device
        portable_kernels("decode", device)  # raises where Triton cannot run
        self.tiling = choose_tiling(spec)
        self.num_splits = choose_splits(spec, self.tiling) if num_splits is None else num_splits
        if not 1 <= self.num_splits <= 65535:
            raise TQError(f"num_splits={num_splits}: needs 1 to 65535, or None to choose")
        self._prefix = prefix
        dim = fmt.head_dim
        columns, _ = key_columns(fmt)
        rotation = fmt.rotation_matrix("cpu", torch.float64)
        index = torch.tensor(columns)
        forward = rotation.T[:, index.clamp_min(0)].masked_fill(index < 0, 0.0)
        self._forward = forward.to(device, torch.float32).contiguous()
        self._inverse = rotation[value_order(fmt)].to(device, torch.float32).contiguous()
        rows = spec.max_tokens * spec.heads
        self._digits = torch.empty(rows * 2 * len(columns), dtype=torch.float16, device=device)
        self._stats = torch.empty(rows * 2, dtype=torch.float32, device=device)
        splits = self.num_splits
        self._partial_out = torch.empty(splits * rows * dim, dtype=torch.float32, device=device)
        self._partial_stats = torch.empty(splits * rows * 2, dtype=torch.float32, device=device)
        self._one_each = torch.arange(spec.max_batch + 1, dtype=torch.int32, device=device)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all buffers."""
        tensors = (t for t in vars(self).values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

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
        """Attention of ``q`` on the pages into ``out`` and ``lse``; see ``DecodePlan.run``."""
        self.spec.check_run(
            q, pages, block_table, seq_lens, out, lse,
            cu_query_lens=cu_query_lens, sinks=sinks, key_center=key_center,
        )  # fmt: skip
        self.run_unchecked(
            q, pages, block_table, seq_lens, out, lse,
            cu_query_lens=cu_query_lens, sinks=sinks, key_center=key_center,
        )  # fmt: skip

    def run_unchecked(
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
        """`run` without checks; ``out`` may have another float dtype than ``q``."""
        if q.shape[0] == 0 or seq_lens.shape[0] == 0:
            return
        cu = self._one_each if cu_query_lens is None else cu_query_lens
        self._prepare(q, key_center)
        self._attend(pages, block_table, seq_lens, cu, key_center is not None)
        self._merge(seq_lens, cu, sinks, out, lse)

    def _blocks(self, rows: int) -> int:
        return -(-self.spec.group * self.spec.max_query_len // rows)

    def _prepare(self, q: Tensor, key_center: Tensor | None) -> None:
        spec = self.spec
        rows = q.shape[0] * spec.heads
        prepare_queries[(-(-rows // AROUND),)](
            q, self._forward, q if key_center is None else key_center, self._digits, self._stats,
            spec.scale * LOG2E * step_of(spec.fmt, "k"), spec.scale * LOG2E,
            rows, spec.heads, spec.group, q.stride(0), q.stride(1),
            **prepare_constants(spec.fmt, key_center is not None), num_warps=4,
        )  # fmt: skip

    def _attend(
        self, pages: Tensor, block_table: Tensor, lengths: Tensor, cu: Tensor, center: bool
    ) -> None:
        spec, tiling = self.spec, self.tiling
        blocks = self._blocks(tiling.rows)
        attend_pages[(lengths.shape[0] * spec.kv_heads * blocks, self.num_splits)](
            self._digits, self._stats, pages, block_table, lengths, cu,
            self._partial_out, self._partial_stats,
            spec.soft_cap or 0.0, spec.sliding_window or 0, self.num_splits, LEAST_TILES, blocks,
            spec.kv_heads, spec.group, spec.max_tokens * spec.heads,
            pages.stride(0), pages.stride(1), block_table.stride(0),
            **attend_constants(spec, tiling, center, self._prefix),
            num_warps=tiling.warps, num_stages=tiling.stages, **register_limit(),
        )  # fmt: skip

    def _merge(
        self, lengths: Tensor, cu: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor
    ) -> None:
        spec = self.spec
        blocks = self._blocks(AROUND)
        merge_partials[(lengths.shape[0] * spec.kv_heads * blocks,)](
            self._partial_out, self._partial_stats, lengths, cu, self._inverse,
            lse if sinks is None else sinks, out, lse,
            step_of(spec.fmt, "v"), spec.sliding_window or 0, self.num_splits, LEAST_TILES, blocks,
            spec.kv_heads, spec.group, spec.max_tokens * spec.heads,
            out.stride(0), out.stride(1), lse.stride(0),
            **merge_constants(spec, self.tiling, sinks is not None, self._prefix),
            num_warps=merge_warps(spec.fmt.head_dim),
        )  # fmt: skip


#: What the kernels are compiled with ahead of time: head_dim, bits, dtype, all options.
_CASES: tuple[tuple[int, int, int, str, bool], ...] = (
    *((dim, 4, 4, "bf16", False) for dim in (64, 80, 96, 128, 192, 256)),
    *((128, bits, bits, "bf16", False) for bits in (2, 3, 8)),
    *((256, bits, bits, "fp16", True) for bits in (2, 3, 4, 8)),
    *((80, bits, 3, "fp16", True) for bits in (3, 8)),
    (64, 4, 4, "fp16", True),
    (128, 3, 8, "fp32", True),
)
_QUICK = (128, 4, 4, "bf16", False)


def aot_variants() -> list[Variant]:
    """Variants over head_dim, bits, dtype and options."""
    integers = ("num_splits", "least", "row_blocks", "kv_heads", "group", "split_stride", "window")
    tensors = dict.fromkeys(("block_table", "seq_lens", "cu_query_lens"), "*i32")
    partials = dict.fromkeys(("partial_out", "partial_stats"), "*fp32")
    attend_strides = ("page_stride", "record_stride", "table_stride")
    found = []
    for dim, k_bits, v_bits, dtype, options in _CASES:
        spec = AttentionSpec(
            KVFormat(dim, k_bits, v_bits), 1, 1, 1, 1,
            {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
            torch.device("cpu"), None, 30.0 if options else None, 512 if options else None,
        )  # fmt: skip
        tiling = choose_tiling(spec)
        name = f"d{dim}-k{k_bits}v{v_bits}-{dtype}" + "-all" * options
        quick = (dim, k_bits, v_bits, dtype, options) == _QUICK
        found.append(
            Variant(
                name=f"attend-{name}",
                kernel=attend_pages,
                signature={
                    "q_digits": "*fp16", "q_stats": "*fp32", "pages": "*u8", **tensors, **partials,
                    "soft_cap": "fp32", **dict.fromkeys((*integers, *attend_strides), "i32"),
                },
                constexprs=attend_constants(spec, tiling, options, False),
                num_warps=tiling.warps,
                num_stages=tiling.stages,
                maxnreg=MOST_REGISTERS,
                spills=0 if dim in (64, 128) else 32,  # a few words, put away before the loop
                aligned=(*attend_strides, "split_stride"),
                quick=quick,
            )
        )  # fmt: skip
        if k_bits != 4:
            continue
        strides: tuple[str, ...] = ("q_token_stride", "q_head_stride")
        found.append(
            Variant(
                name=f"prepare-{name}",
                kernel=prepare_queries,
                signature={
                    "q": f"*{dtype}", "key_center": "*fp32", "matrix": "*fp32",
                    "q_digits": "*fp16", "q_stats": "*fp32",
                    "logit_scale": "fp32", "center_scale": "fp32",
                    **dict.fromkeys(("rows_total", "heads", "group", *strides), "i32"),
                },
                constexprs=prepare_constants(spec.fmt, options),
                aligned=strides,
                quick=quick,
            )
        )  # fmt: skip
        strides = ("out_token_stride", "out_head_stride", "lse_token_stride")
        found.append(
            Variant(
                name=f"merge-{name}",
                kernel=merge_partials,
                signature={
                    **partials, "seq_lens": "*i32", "cu_query_lens": "*i32", "matrix": "*fp32",
                    "sinks": "*fp32", "out": f"*{dtype}", "lse": "*fp32", "v_step": "fp32",
                    **dict.fromkeys((*integers, *strides), "i32"),
                },
                constexprs=merge_constants(spec, tiling, options, False),
                num_warps=merge_warps(dim),
                spills=16,  # sm_100 with all options: two words
                aligned=(*strides, "split_stride"),
                quick=quick,
            )
        )  # fmt: skip
    return found
