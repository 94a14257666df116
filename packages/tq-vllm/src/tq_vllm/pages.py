"""What a backend says of itself: what it supports, and the bytes of its pages."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tq_core import TQError
from tq_kernels import KVFormat
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tq_vllm.dtypes import dtype_names
from tq_vllm.older_pages import OLDER_PAGES, OlderPages, older_spec
from tq_vllm.settings import FINE_BITS, Settings, load_settings

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheLayout

__all__ = ["TurboQuantPages", "page_format"]


@cache
def page_format(head_dim: int, page_size: int, settings: Settings, fine: bool = False) -> KVFormat:
    """Format of pages of ``page_size`` tokens; ``fine``: of layers that get more bits."""
    k_bits, v_bits = FINE_BITS if fine else (settings.key_bits, settings.value_bits)
    return KVFormat(
        head_dim,
        k_bits,
        v_bits,
        page_size,
        rotation=settings.rotation,
        seed=settings.seed,
        scale=settings.scale_name,
    )


class TurboQuantPages(OlderPages, AttentionBackend):
    """Pages of codes; a page is exactly ``heads * tokens * slot_bytes`` bytes."""

    #: Settings of its layers; None: those of the environment.
    settings: ClassVar[Settings | None] = None
    #: Whether its layers get more bits.
    fine: ClassVar[bool] = False
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *dtype_names()]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    @cache
    def variant(cls, settings: Settings, fine: bool) -> type[TurboQuantPages]:
        """The same backend for layers of these settings."""
        name = f"Fine{cls.__name__}" if fine else cls.__name__  # by which vLLM tells them apart
        return type(name, (cls,), {"settings": settings, "fine": fine})

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layouts in which the bytes of a page and head are contiguous, best first.

        Where layers differ in bytes and in what they keep (a window, a state), vLLM pads all pages
        to the largest one unless blocks are outermost; then it packs pages of any sizes into
        blocks.
        """
        from vllm.v1.kv_cache_interface import KVCacheLayout

        first, packed = KVCacheLayout.LBHNC, KVCacheLayout.BLHNC
        if (cls.settings or load_settings()).singles_out_layers:
            first, packed = packed, first
        return first, packed, KVCacheLayout.LHBNC, KVCacheLayout.BHLNC

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Set the bytes of a token and head to those of the format.

        Raises
        ------
        TQError
            For layers that are no plain or sliding-window attention.
        """
        if getattr(spec, "state_content_bytes", None) or (
            OLDER_PAGES and spec.dtype == torch.uint8
        ):
            return spec  # done already
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise TQError(
                f"TurboQuant pages hold full and sliding-window attention, and a layer has "
                f"{type(spec).__name__}; serve this model without --attention-backend CUSTOM"
            )
        if spec.head_size_v != spec.head_size:
            raise TQError(
                f"keys of dimension {spec.head_size} and values of dimension {spec.head_size_v}: "
                "TurboQuant pages need equal ones; serve without --attention-backend CUSTOM"
            )
        settings = cls.settings or load_settings()
        slot = page_format(spec.head_size, 16, settings, cls.fine).slot_bytes
        if OLDER_PAGES:
            return older_spec(spec, slot)
        # Layers named for vLLM to skip make it ask for padding, to a size that is not this one's.
        return replace(spec, dtype=torch.uint8, state_content_bytes=slot, page_size_padded=None)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.supported_dtypes or (
            dtype == torch.float32 and current_platform.is_cpu()
        )

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and 16 <= head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)
