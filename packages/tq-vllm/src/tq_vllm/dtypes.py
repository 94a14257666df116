"""Presets as values of ``--kv-cache-dtype``, which vLLM takes from plugins since 0.33."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tq_kernels.presets import PRESETS

__all__ = ["PageDtype", "dtype_names", "register_dtypes"]


@dataclass(frozen=True)
class PageDtype:
    """What vLLM asks about a preset; it calls names of kinds of caches dtypes."""

    name: str

    def torch_dtype(self) -> torch.dtype:
        """Pages are bytes."""
        return torch.uint8

    def quant_mode(self) -> Any:
        """None: for layers kept at 16 bits vLLM's backends take all others for 8-bit floats."""
        from vllm.v1.kv_cache_interface import KVQuantMode

        return KVQuantMode.NONE


def dtype_names() -> tuple[str, ...]:
    """The presets, where this vLLM takes them."""
    from vllm.config import cache

    return tuple(PRESETS) if hasattr(cache, "register_kv_cache_dtype") else ()


def register_dtypes() -> None:
    """Offer the presets to vLLM; may be called any number of times."""
    from vllm.config import cache

    for name in dtype_names():
        if not cache.is_known_kv_cache_dtype(name):
            cache.register_kv_cache_dtype(name)(partial(PageDtype, name))
