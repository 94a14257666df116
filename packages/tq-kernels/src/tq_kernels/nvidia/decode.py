"""Host side of the NVIDIA decode kernel: a plan owns the workspace, a run only launches."""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
from torch import Tensor
from tq_core import Codebook, HadamardRotation, TQError

from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.format import KVFormat
from tq_kernels.nvidia.decode_kernel import decode_partials, partial_dims
from tq_kernels.nvidia.rows_kernel import combine_partials, prepare_queries
from tq_kernels.nvidia.stages import place_of
from tq_kernels.nvidia.tile_loads import rows_of_a_line
from tq_kernels.nvidia.wide_kernel import decode_wide, wide_dims
from tq_kernels.portable.rotation_tile import RotationParts, rotation_parts, step_width
from tq_kernels.quantize import codebook_of, step_of

__all__ = [
    "AROUND_WARPS",
    "REGISTERS",
    "NvidiaDecodePlan",
    "combine_constants",
    "is_wide",
    "partials_constants",
    "prepare_constants",
    "query_blocks",
    "rotations",
    "unsupported",
    "warps_per_sm",
    "wide_constants",
    "wide_stages",
]

LOG2E = 1.4426950408889634

#: Query blocks of 4 rows that a warp takes at most, by head_dim.
MOST_BLOCKS = {64: 4, 128: 4, 256: 1}
#: Warps that a multiprocessor runs at once, by head_dim and query blocks: one wave of programs,
#: the same number for each of its four schedulers.
WARPS_PER_SM = {
    (64, 1): 16,
    (64, 2): 12,
    (64, 4): 8,
    (128, 1): 16,
    (128, 2): 8,
    (128, 4): 8,
    (256, 1): 12,
}
#: The same for head_dim 256 with 8-bit keys, which would spill half a row into memory at 12.
WARPS_WITH_WIDE_KEYS = 8
#: Warps of `decode_wide` that a multiprocessor runs at once, and groups of 16 tokens that one takes at
#: a time.
WIDE_WARPS, WIDE_STEPS = 8, 2
#: For how many times that a warp has room in shared memory, and where there is less of it.
WIDE_STAGES, FEW_WIDE_STAGES = 3, 2
#: Registers a lane that let so many warps run.
REGISTERS = {16: 128, 12: 168, 8: 255}
#: Fewest tiles of 64 tokens that a program attends.
LEAST_TILES = 1
#: Query rows that one combining program merges, if there are more than FEW_ROWS and each has fewer
#: than MANY_PARTS parts.
MERGED_ROWS = 16
FEW_ROWS = 64
MANY_PARTS = 16
#: Warps of a program of the kernels before and after the attending one.
AROUND_WARPS = 4
#: Programs up to which those that combine at most FEW_ROWS rows may start beside them.
FEW_PROGRAMS = 264


def _of_device(device: torch.device) -> tuple[tuple[int, int], int, int]:
    """Compute capability, number of multiprocessors and shared memory of each in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return (
        torch.cuda.get_device_capability(device),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )


def unsupported(spec: AttentionSpec) -> str | None:
    """Why the kernel does not cover a plan, or None if it does."""
    if spec.device.type != "cuda" or torch.version.hip:
        return f"device {spec.device} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(spec.device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if spec.fmt.head_dim not in MOST_BLOCKS:
        return f"head_dim {spec.fmt.head_dim} is none of {', '.join(map(str, MOST_BLOCKS))}"
    if spec.fmt.head_dim == 256 and spec.fmt.k_bits == spec.fmt.v_bits == 8:
        return "8-bit keys and values of head_dim 256 do not fit the registers"
    if spec.dtype == torch.float32:
        return "float32 queries keep 16 bits in this kernel"
    return None


def _table(codebook: Codebook) -> tuple[int, int, int, int]:
    """Lookup registers of a codebook: level bytes 0-3, 4-7, 8-11, 12-15."""
    if codebook.bits == 8:
        return 0, 0, 0, 0
    levels = np.zeros(16, np.uint8)
    assert codebook.levels is not None
    levels[: 2**codebook.bits] = codebook.levels
    first, second, third, fourth = (int(word) for word in levels.view("<i4"))
    return first, second, third, fourth


def _center(codebook: Codebook) -> float:
    # 8-bit codes become signed bytes, code - 128, and their grid is centred at -1/2.
    return -0.5 if codebook.bits == 8 else 63.5


def query_blocks(spec: AttentionSpec) -> tuple[int, int]:
    """Query blocks of a program and how many programs share the rows of a KV head."""
    needed = max(1, math.ceil(spec.group * spec.max_query_len / 4))
    most = MOST_BLOCKS[spec.fmt.head_dim]
    if needed > most:
        return most, math.ceil(needed / most)
    return 1 << (needed - 1).bit_length(), 1


def _batch_block(batch: int) -> int:
    """Sequences that a program looks through: few sizes, since each is compiled for seconds."""
    size = 32
    while size < batch:
        size *= 4
    return size


def is_wide(spec: AttentionSpec) -> bool:
    """Whether `decode_wide` attends: 16 query rows of bf16; it rounds weights to bf16."""
    return query_blocks(spec)[0] == 4 and spec.dtype == torch.bfloat16 and spec.fmt.v_bits < 8


def warps_per_sm(spec: AttentionSpec) -> int:
    """Warps of the attending kernel that a multiprocessor runs at once, a key of `REGISTERS`."""
    if is_wide(spec):
        return WIDE_WARPS
    if spec.fmt.head_dim == 256 and spec.fmt.k_bits == 8:
        return WARPS_WITH_WIDE_KEYS
    return WARPS_PER_SM[spec.fmt.head_dim, query_blocks(spec)[0]]


def rotations(spec: AttentionSpec) -> tuple[RotationParts, RotationParts]:
    """What rotates queries, and what rotates the dimensions of partial results back."""
    fmt = spec.fmt
    order = wide_dims(fmt.head_dim) if is_wide(spec) else partial_dims(fmt.head_dim)
    return (
        rotation_parts(fmt, spec.device),
        rotation_parts(fmt, spec.device, inverse=True, order=tuple(order)),
    )


def _rotates(fmt: KVFormat, blocks: int) -> bool:
    """Whether `decode_partials` rotates queries itself; with more rows it would compile for long."""
    return fmt.rotation == "hadamard" and blocks <= 2


def _sign_words(fmt: KVFormat) -> Tensor:
    """Signs of a Hadamard rotation, int32 [rounds, 8]: a bit for each of ``head_dim / 8``."""
    rotation = fmt.core_rotation
    assert isinstance(rotation, HadamardRotation)
    width = fmt.head_dim // 8
    negative = (rotation.signs < 0).reshape(fmt.rounds, 8, width)
    words = (negative.astype(np.uint32) << np.arange(width, dtype=np.uint32)).sum(-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def _attending_constants(spec: AttentionSpec, batch_block: int) -> dict[str, object]:
    """Constants that `decode_partials` and `decode_wide` share."""
    fmt = spec.fmt
    return {
        "K_BITS": fmt.k_bits,
        "V_BITS": fmt.v_bits,
        "D": fmt.head_dim,
        "PAGE": fmt.page_size,
        "BATCH_BLOCK": batch_block,
        "WINDOW": spec.sliding_window is not None,
        "CAP": spec.soft_cap is not None,
    }


def partials_constants(spec: AttentionSpec, blocks: int, batch_block: int) -> dict[str, object]:
    """Constants of `decode_partials`, other than ``CENTER`` and ``PDL``."""
    return {
        **_attending_constants(spec, batch_block),
        "NB": blocks,
        "SPREAD": rows_of_a_line(spec.fmt.head_dim, spec.fmt.k_bits),
        "ROTATE": _rotates(spec.fmt, blocks),
    }


def wide_stages(fmt: KVFormat, shared: int) -> int:
    """Stages of `decode_wide` for which all its warps fit into so many bytes of shared memory."""
    stage = WIDE_STEPS * place_of("end", fmt.k_bits, fmt.v_bits, fmt.head_dim)
    # The driver takes 1 KiB of each program's.
    fits = WIDE_WARPS * (WIDE_STAGES * stage + 1024) <= shared
    return WIDE_STAGES if fits else FEW_WIDE_STAGES


def wide_constants(spec: AttentionSpec, batch_block: int, stages: int) -> dict[str, object]:
    """Constants of `decode_wide`, other than ``PDL``."""
    return {
        **_attending_constants(spec, batch_block),
        "STEPS": WIDE_STEPS,
        "STAGES": stages,
    }


def prepare_constants(spec: AttentionSpec, parts: int, center: bool) -> dict[str, object]:
    """Constants of `prepare_queries`, other than ``PDL``."""
    return {
        "D": spec.fmt.head_dim,
        "NB": query_blocks(spec)[0],
        "ROWS": MERGED_ROWS,
        "CENTER": center,
        "WIDE": is_wide(spec),
        "STEP": step_width(spec.fmt.head_dim),
        "PARTS": parts,
    }


def combine_constants(
    spec: AttentionSpec, parts: int, one_row: bool, sinks: bool, batch_block: int
) -> dict[str, object]:
    """Constants of `combine_partials`, other than ``PDL``."""
    return {
        "D": spec.fmt.head_dim,
        "NB": query_blocks(spec)[0],
        "ROWS": 1 if one_row else MERGED_ROWS,
        "SPLITS": 32 if one_row else 1,
        "BATCH_BLOCK": batch_block,
        "WINDOW": spec.sliding_window is not None,
        "SINKS": sinks,
        "STEP": step_width(spec.fmt.head_dim),
        "PARTS": parts,
    }


class NvidiaDecodePlan:
    """Buffers and launches of decode by the NVIDIA kernels; see `tq_kernels.DecodePlan`.

    ``run`` allocates nothing and reads lengths on the device: it can be captured in a CUDA graph,
    which stays right when lengths, tables and pages change.

    Parameters
    ----------
    spec : AttentionSpec

    Raises
    ------
    TQError
        If `unsupported` names a reason.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        reason = unsupported(spec)
        if reason is not None:
            raise TQError(f"{reason}: use tq_kernels.DecodePlan, which falls back")
        self.spec = spec
        fmt, device = spec.fmt, spec.device
        self.blocks, self.chunks = query_blocks(spec)
        # Programmatic dependent launch hides the gaps between kernels, the one before included.
        capability, sms, shared = _of_device(device)
        self._overlap = capability >= (9, 0)
        self._wide = is_wide(spec)
        warps = warps_per_sm(spec)
        self.programs, self._registers = sms * warps, REGISTERS[warps]
        keys, values = codebook_of(fmt, "k"), codebook_of(fmt, "v")
        self._k_table, self._v_table = _table(keys), _table(values)
        self._k_center, self._v_center = _center(keys), _center(values)
        self._stages = wide_stages(fmt, shared) if self._wide else 0
        self._v_step = step_of(fmt, "v")
        self._forward, self._inverse = rotations(spec)
        self._rotates = _rotates(fmt, self.blocks)
        # What signs and sums in the kernel give has the same factor as the product with integers.
        self._logit_scale = spec.scale * LOG2E * step_of(fmt, "k") * self._forward.factor
        signs = _sign_words(fmt) if self._rotates else torch.empty(0, dtype=torch.int32)
        self._signs = signs.to(device)

        pairs = spec.max_batch * spec.kv_heads * self.chunks
        rows = pairs * 4 * self.blocks
        slots = (self.programs + pairs) * 4 * self.blocks
        prepared = 0 if self._rotates else rows
        self._q_digits = torch.empty(prepared * 2 * fmt.head_dim, dtype=torch.int8, device=device)
        self._q_affine = torch.empty(prepared * 4, dtype=torch.float32, device=device)
        self._partial_out = torch.empty(slots * fmt.head_dim, dtype=torch.float32, device=device)
        self._partial_stats = torch.empty(slots * 2, dtype=torch.float32, device=device)
        self._one_each = torch.arange(spec.max_batch + 1, dtype=torch.int32, device=device)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all buffers, without the matrices, which plans share."""
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
        spec = self.spec
        spec.check_run(
            q, pages, block_table, seq_lens, out, lse,
            cu_query_lens=cu_query_lens, sinks=sinks, key_center=key_center,
        )  # fmt: skip
        batch = seq_lens.shape[0]
        if batch == 0 or q.shape[0] == 0:
            return
        pairs = batch * spec.kv_heads * self.chunks
        rows = pairs * 4 * self.blocks
        cu = self._one_each if cu_query_lens is None else cu_query_lens
        batch_block = _batch_block(batch)
        window = spec.sliding_window or 0
        center = q if key_center is None else key_center
        after = {"launch_pdl": True} if self._overlap else {}
        # No more programs than the table has room for tiles.
        tiles = pairs * triton.cdiv(block_table.shape[1] * spec.fmt.page_size, 64)
        programs = min(self.programs, max(1, tiles))
        early = int(rows <= FEW_ROWS and programs <= FEW_PROGRAMS)
        if not self._rotates:
            prepare_queries[(triton.cdiv(rows, MERGED_ROWS),)](
                q, self._forward.matrix, cu, center, self._q_digits, self._q_affine,
                self._logit_scale, spec.scale * LOG2E,
                self._k_center,
                spec.group, spec.kv_heads, self.chunks, pairs, q.stride(0), q.stride(1),
                **prepare_constants(spec, self._forward.parts, key_center is not None),
                PDL=self._overlap, num_warps=AROUND_WARPS, **after,
            )  # fmt: skip
        if self._wide:
            decode_wide[(programs,)](
                pages, block_table, seq_lens, cu, self._q_digits, self._q_affine,
                self._partial_out, self._partial_stats, *self._k_table, *self._v_table, 1,
                self._v_center, self._v_step, spec.soft_cap or 0.0, window,
                batch, spec.kv_heads, self.chunks, spec.group, programs, LEAST_TILES,
                pages.stride(0), pages.stride(1), block_table.stride(0),
                **wide_constants(spec, batch_block, self._stages),
                PDL=self._overlap, num_warps=1, maxnreg=self._registers, **after,
            )  # fmt: skip
        else:
            decode_partials[(programs,)](
                q, self._signs, center, pages, block_table, seq_lens, cu,
                self._q_digits, self._q_affine, self._partial_out, self._partial_stats,
                *self._k_table, *self._v_table, 1, self._k_center, self._v_center, self._v_step,
                self._logit_scale, spec.scale * LOG2E, spec.soft_cap or 0.0, window, spec.fmt.rounds,
                batch, spec.kv_heads, self.chunks, spec.group, programs, LEAST_TILES, early,
                q.stride(0), q.stride(1), pages.stride(0), pages.stride(1), block_table.stride(0),
                **partials_constants(spec, self.blocks, batch_block),
                CENTER=key_center is not None and self._rotates,
                PDL=self._overlap, num_warps=1, maxnreg=self._registers, **after,
            )  # fmt: skip
        one_row = rows <= FEW_ROWS or programs >= MANY_PARTS * pairs
        combine_partials[(rows if one_row else triton.cdiv(rows, MERGED_ROWS),)](
            self._partial_out, self._partial_stats, seq_lens, cu, self._inverse.matrix,
            lse if sinks is None else sinks, out, lse, self._inverse.factor,
            batch, spec.group, spec.kv_heads, self.chunks, programs, LEAST_TILES,
            pairs, window,
            out.stride(0), out.stride(1), lse.stride(0),
            **combine_constants(
                spec, self._inverse.parts, one_row, sinks is not None, batch_block
            ),
            PDL=self._overlap, num_warps=AROUND_WARPS, **after,
        )  # fmt: skip
