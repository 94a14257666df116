"""Pages of codes in vLLM 0.26, where a backend cannot set the bytes of a page.

A page of its specification is ``tokens * heads * (head_size + head_size_v)`` numbers. Half of a
slot's bytes as both head sizes, and bytes as numbers, make it exactly a page of codes. The layer
itself is asked for the specification, so the layer answers with that one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

__all__ = ["OLDER_PAGES", "OlderPages", "answer_with_pages", "older_spec"]

#: Whether this vLLM needs it.
OLDER_PAGES = "state_content_bytes" not in AttentionSpec.__dataclass_fields__


def older_spec(spec: Any, slot_bytes: int) -> Any:
    """Specification of pages whose slots have ``slot_bytes``, an even number."""
    half = slot_bytes // 2
    return replace(spec, dtype=torch.uint8, head_size=half, head_size_v=half)


def answer_with_pages(layer: Any) -> None:
    """Let a layer answer with the specification of its backend."""
    own = layer.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        spec = own(vllm_config)
        return None if spec is None else layer.attn_backend.customize_spec(spec)

    layer.get_kv_cache_spec = get_kv_cache_spec


class OlderPages:
    """The shape of the cache that vLLM 0.26 asks a backend for."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Pages, heads, tokens, bytes; ``head_size`` is that of `older_spec`."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size
