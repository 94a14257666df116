"""TurboQuant attention on compressed KV caches, in PyTorch.

`store`, `decode`, `prefill`, `rotate` and `dequantize` are Triton kernels. Each has a reference in
eager torch, for any device, under its name with the suffix ``_ref``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tq_kernels.attend import attend_codes, attend_dense, merge_sink, merge_states
from tq_kernels.checks import debug_mode
from tq_kernels.decode_plan import DecodePlan
from tq_kernels.format import KVFormat
from tq_kernels.ops.decode import decode, decode_ref
from tq_kernels.ops.dequantize import dequantize, dequantize_ref
from tq_kernels.ops.prefill import prefill, prefill_ref
from tq_kernels.ops.rotate import rotate, rotate_ref
from tq_kernels.ops.store import store, store_ref, warm_up_store
from tq_kernels.quantize import TokenCodes, decode_tokens, encode_tokens

if TYPE_CHECKING:
    from tq_kernels.portable.prefill import PrefillPlan

__all__ = [
    "DecodePlan",
    "KVFormat",
    "PrefillPlan",
    "TokenCodes",
    "attend_codes",
    "attend_dense",
    "debug_mode",
    "decode",
    "decode_ref",
    "decode_tokens",
    "dequantize",
    "dequantize_ref",
    "encode_tokens",
    "merge_sink",
    "merge_states",
    "prefill",
    "prefill_ref",
    "rotate",
    "rotate_ref",
    "store",
    "store_ref",
    "warm_up_store",
]


def __getattr__(name: str) -> Any:
    """Import ``PrefillPlan`` when it is asked for: it needs Triton."""
    if name == "PrefillPlan":
        from tq_kernels.portable.prefill import PrefillPlan

        return PrefillPlan
    raise AttributeError(f"module 'tq_kernels' has no attribute {name!r}")
