"""Variants of the NVIDIA decode kernels that are compiled ahead of time; see `tq_kernels.aot`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from tq_kernels.aot import Variant
from tq_kernels.attention_spec import AttentionSpec
from tq_kernels.format import KVFormat, RotationName
from tq_kernels.nvidia.decode import (
    AROUND_WARPS,
    REGISTERS,
    combine_constants,
    is_wide,
    partials_constants,
    prepare_constants,
    query_blocks,
    rotations,
    warps_per_sm,
    wide_constants,
    wide_stages,
)
from tq_kernels.nvidia.decode_kernel import decode_partials
from tq_kernels.nvidia.rows_kernel import combine_partials, prepare_queries
from tq_kernels.nvidia.wide_kernel import decode_wide

__all__ = ["aot_variants"]

#: Sequences that a program looks through: the least.
_BATCH_BLOCK = 32
#: Bytes of stack a lane that `decode_partials` may take, by head_dim and query blocks: measured on an
#: H200, more warps, or more query rows for every decoded tile, pay for some spilled words.
_SPILLS = {
    (64, 1): 16,
    (64, 2): 16,
    (64, 4): 32,
    (128, 1): 64,
    (128, 2): 64,
    (128, 4): 64,
    (256, 1): 96,
}
#: The same for 16 query rows of 8-bit values, of which a lane holds twice as many words as of 4-bit
#: ones, with 255 registers, the most that there are.
_SPILLS_WITH_WIDE_VALUES = 128
#: Two words more with all options, of which each is a number that a lane keeps.
_SPILLS_OF_OPTIONS = 8
#: The same for the others where they multiply with two matrices: a few words, on some targets.
_SPILLS_WITH_TWO_PARTS = 16
#: What attends: head_dim, bits, query rows, all options, dtype of queries.
_ATTEND = (
    *((128, k, v, 4, False, "bf16") for k, v in ((4, 4), (4, 3), (3, 3), (2, 2), (8, 4))),
    *((dim, 4, 4, 4, True, "bf16") for dim in (64, 128, 256)),
    (128, 4, 4, 8, False, "bf16"),
    (128, 4, 4, 16, False, "fp16"),
    (64, 3, 3, 16, False, "fp16"),
    (256, 8, 4, 4, False, "bf16"),
    (256, 4, 8, 4, False, "bf16"),
    *((128, k, v, 16, False, "bf16") for k, v in ((4, 4), (3, 3), (8, 4), (8, 8))),
    (128, 4, 4, 16, True, "bf16"),
    (64, 4, 2, 16, False, "bf16"),
)
_Around = tuple[tuple[int, int, bool, str, RotationName], ...]
#: The others: head_dim, query rows, all options, dtype of queries, rotation. `decode_partials` itself
#: rotates up to 8 rows by Hadamard rotations.
_PREPARE: _Around = (
    (128, 16, False, "bf16", "hadamard"),
    (128, 16, False, "fp16", "hadamard"),
    (64, 16, True, "bf16", "hadamard"),
    (128, 8, True, "bf16", "haar"),
    (256, 4, False, "bf16", "haar"),
)
_COMBINE: _Around = (
    (128, 4, False, "bf16", "hadamard"),
    (128, 16, True, "bf16", "hadamard"),
    (64, 4, False, "bf16", "hadamard"),
    (128, 8, False, "fp16", "haar"),
    (256, 4, False, "bf16", "hadamard"),
)
#: Targets, whether launches overlap and bytes of shared memory of a multiprocessor.
_GPUS = (
    (("sm_80",), False, 164 * 1024),
    (("sm_89",), False, 100 * 1024),
    (("sm_90", "sm_100"), True, 228 * 1024),
    (("sm_120",), True, 100 * 1024),
)
#: Types of the arguments that are no int32.
_TYPES = {
    "signs": "*i32", "key_center": "*fp32", "pages": "*u8", "q_digits": "*i8", "queries": "*i8",
    **dict.fromkeys(("block_table", "seq_lens", "cu_query_lens"), "*i32"),
    **dict.fromkeys(("q_affine", "partial_out", "partial_stats", "sinks", "lse"), "*fp32"),
    **dict.fromkeys(
        ("k_center", "v_center", "v_step", "logit_scale", "center_scale", "soft_cap"), "fp32"
    ),
    "rotation_scale": "fp32",
}  # fmt: skip
_ALIGNED = (
    "q_token_stride", "q_head_stride", "page_stride", "record_stride", "out_token_stride",
    "out_head_stride",
)  # fmt: skip
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _spec(fmt: KVFormat, rows: int, options: bool, dtype: str) -> AttentionSpec:
    return AttentionSpec(
        fmt, rows, 1, 1, 1, _DTYPES[dtype], torch.device("cpu"),
        None, 30.0 if options else None, 512 if options else None,
    )  # fmt: skip


def _spills(fmt: KVFormat, blocks: int, options: bool) -> int:
    if options:
        return _SPILLS[fmt.head_dim, blocks] + _SPILLS_OF_OPTIONS
    if blocks == 4 and fmt.v_bits == 8:
        return _SPILLS_WITH_WIDE_VALUES
    return _SPILLS[fmt.head_dim, blocks]


def _variant(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    targets: tuple[str, ...],
    overlap: bool,
    **launch: Any,
) -> Variant:
    names = [n for n in kernel.arg_names if n not in constants and n != "PDL"]
    return Variant(
        name=name,
        kernel=kernel,
        signature={n: {**_TYPES, **types}.get(n, "i32") for n in names},
        constexprs={**constants, "PDL": overlap},
        aligned=tuple(n for n in _ALIGNED if n in names),
        targets=targets,
        **launch,
    )


def _attending() -> Iterator[Variant]:
    for dim, k_bits, v_bits, rows, options, dtype in _ATTEND:
        spec = _spec(KVFormat(dim, k_bits, v_bits), rows, options, dtype)
        blocks, _ = query_blocks(spec)
        name = f"d{dim}-k{k_bits}v{v_bits}-rows{4 * blocks}" + "-all" * options
        common = (dim, k_bits, v_bits) == (128, 4, 4)
        for targets, overlap, shared in _GPUS:
            # Whether Triton takes 8 rows, or all options, shows on any target.
            quick = common and (not (options or blocks == 2) or "sm_90" in targets)
            maxnreg = REGISTERS[warps_per_sm(spec)]
            if is_wide(spec):
                yield _variant(
                    f"wide-{name}", decode_wide, {},
                    wide_constants(spec, _BATCH_BLOCK, wide_stages(spec.fmt, shared)),
                    targets, overlap, num_warps=1, maxnreg=maxnreg, quick=quick,
                )  # fmt: skip
            else:
                constants = partials_constants(spec, blocks, _BATCH_BLOCK)
                constants["CENTER"] = options and blocks == 1
                yield _variant(
                    f"partials-{name}", decode_partials, {"q": f"*{dtype}"}, constants,
                    targets, overlap, num_warps=1, maxnreg=maxnreg,
                    spills=_spills(spec.fmt, blocks, options), quick=quick,
                )  # fmt: skip


def _around() -> Iterator[Variant]:
    for cases, prepares in ((_PREPARE, True), (_COMBINE, False)):
        for (dim, rows, options, dtype, rotation), (targets, overlap, _) in product(cases, _GPUS):
            fmt = KVFormat(dim, rotation=rotation)
            spec = _spec(fmt, rows, options, dtype)
            forward, inverse = rotations(spec)
            types = {"q": f"*{dtype}", "out": f"*{dtype}", "rotation": "*fp16"}
            name = f"d{dim}-rows{rows}-{dtype}-{rotation}" + "-all" * options
            spills = _SPILLS_WITH_TWO_PARTS if forward.parts > 1 else 0
            quick = (dim, rows, options, dtype, rotation) in (_PREPARE[0], _COMBINE[0])
            if prepares:
                yield _variant(
                    f"prepare-{name}", prepare_queries, types,
                    prepare_constants(spec, forward.parts, options),
                    targets, overlap, num_warps=AROUND_WARPS, spills=spills, quick=quick,
                )  # fmt: skip
                continue
            for one_row in (True, False):
                constants = combine_constants(spec, inverse.parts, one_row, options, _BATCH_BLOCK)
                yield _variant(
                    f"combine-{name}-by{constants['ROWS']}", combine_partials, types, constants,
                    targets, overlap, num_warps=AROUND_WARPS, spills=spills, quick=quick and one_row,
                )  # fmt: skip


def aot_variants() -> list[Variant]:
    """Variants of all four kernels over head_dim, bits, query rows, dtype, rotation and options."""
    return [*_attending(), *_around()]
