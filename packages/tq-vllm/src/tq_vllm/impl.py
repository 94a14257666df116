"""Attention of one layer on compressed pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from tq_kernels import KVFormat
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from tq_vllm.center import load_center
from tq_vllm.layers import choose, find_layer, keep_at_16_bits
from tq_vllm.metadata import TurboQuantMetadata, batch_limits
from tq_vllm.older_pages import OLDER_PAGES, answer_with_pages
from tq_vllm.ops import Decodes, EagerOps, FusedOps, LayerShape, Prefills
from tq_vllm.pages import TurboQuantPages, page_format
from tq_vllm.settings import load_settings, settings_of

__all__ = ["TurboQuantImpl"]


class TurboQuantImpl(AttentionImpl[TurboQuantMetadata]):
    """Attention of one layer; arguments as for every implementation of vLLM's.

    Raises
    ------
    TQError
        For a layer that pages of codes cannot serve, with the reason.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        mm_prefix_clamp_sliding_window: bool = False,
        **other: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.vllm_config = get_current_vllm_config()
        self.settings = settings_of(self.vllm_config.cache_config)
        #: Whether the layer gets more bits.
        self.fine = False
        #: What a layer that is kept at 16 bits passes to its own implementation.
        self.arguments: dict[str, Any] = {
            "num_heads": num_heads,
            "head_size": head_size,
            "scale": scale,
            "num_kv_heads": self.num_kv_heads,
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "kv_cache_dtype": kv_cache_dtype,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": attn_type,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **({} if sinks is None else {"sinks": sinks}),
            # Of images, windows only hide earlier tokens, whatever this says.
            **({"mm_prefix_clamp_sliding_window": True} if mm_prefix_clamp_sliding_window else {}),
            **other,
        }
        self._check(alibi_slopes, attn_type, other)
        shape = LayerShape(
            self.num_heads,
            self.num_kv_heads,
            self.scale,
            logits_soft_cap or None,
            sliding_window,
            *batch_limits(self.vllm_config),
        )
        fused = current_platform.is_cuda_alike()
        self.ops = FusedOps(shape, sinks) if fused else EagerOps(shape, sinks)

    def _check(
        self, alibi_slopes: list[float] | None, attn_type: str, other: dict[str, Any]
    ) -> None:
        backend, dtype = TurboQuantPages, torch.get_default_dtype()
        allowed = ", ".join(backend.supported_kv_cache_dtypes)
        reasons = {
            "alibi slopes": alibi_slopes is not None,
            f"attention of type {attn_type!r}": attn_type != AttentionType.DECODER,
            f"head_dim {self.head_size}, no multiple of 16 from 16 to 256": (
                not backend.supports_head_size(self.head_size)
            ),
            f"activations of {dtype}": not backend.supports_dtype(dtype),
            f"--kv-cache-dtype {self.kv_cache_dtype}, which needs to be one of {allowed}": (
                not backend.supports_kv_cache_dtype(self.kv_cache_dtype)
            ),
            f"the arguments {', '.join(other)}": bool(other),
            "decode context parallelism": (
                getattr(self.vllm_config.parallel_config, "decode_context_parallel_size", 1) > 1
            ),
        }
        for reason, refused in reasons.items():
            if refused:
                raise TQError(
                    f"TurboQuant pages do not support {reason}; serve this model without "
                    "--attention-backend CUSTOM (on CPU: with TQ_CPU=0)"
                )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Let the settings keep the layer at 16 bits or give it more bits.

        Called after the weights are loaded and before vLLM asks layers for the sizes of their pages.
        """
        settings, config = self.settings, self.vllm_config
        name, layer = find_layer(config, self)
        windowed = self.sliding_window is not None
        choice = choose(settings, config, self.kv_sharing_target_layer_name or name, windowed)
        if settings.key_center is not None and choice.number is not None:
            self.ops.key_center = load_center(
                settings.key_center, choice.number, self.num_kv_heads, self.head_size
            )
        if choice.skipped:
            keep_at_16_bits(layer, self.arguments, config, act_dtype)
            return
        self.fine = choice.fine
        if self.fine or settings != load_settings():
            layer.attn_backend = layer.attn_backend.variant(settings, self.fine)
        if OLDER_PAGES:
            answer_with_pages(layer)

    def _format(self, page_size: int) -> KVFormat:
        return page_format(self.head_size, page_size, self.settings, self.fine)

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, KVFormat]:
        """View the cache [pages, heads, tokens, slot_bytes] as [pages, heads, record_bytes]."""
        pages = kv_cache.view(*kv_cache.shape[:2], -1)
        return pages, self._format(kv_cache.shape[2])

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Compress new keys and values into their slots."""
        if kv_cache.numel() == 0:  # profiling, before there is a cache
            return
        pages, fmt = self._pages(kv_cache)
        tokens = slot_mapping.shape[0]
        self.ops.store(key[:tokens], value[:tokens], pages, slot_mapping, fmt)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TurboQuantMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens, which are stored already.

        Parameters
        ----------
        query, output : tensors [tokens, heads, head_dim]
        key, value : tensors [tokens, kv_heads, head_dim]
        kv_cache : uint8 tensor [pages, kv_heads, tokens of a page, slot_bytes]
        """
        if output_scale is not None or output_block_scale is not None:
            raise TQError("TurboQuant attention writes no quantized output; disable that fusion")
        if attn_metadata is None:  # vLLM measures the memory that is needed
            fmt = self._format(self.vllm_config.cache_config.block_size)
            self.ops.reserve(fmt, query.dtype, query.device)
            return output.zero_()
        batch = attn_metadata
        pages, fmt = self._pages(kv_cache)
        decodes, first = batch.num_decodes, batch.num_decode_tokens
        stored = self.settings.prefill == "stored" or self.kv_sharing_target_layer_name is not None
        sums: list[Tensor] = []
        if decodes:
            several = batch.max_decode_query_len > 1
            these = Decodes(
                pages,
                fmt,
                batch.block_table[:decodes],
                batch.seq_lens[:decodes],
                batch.query_start_loc[: decodes + 1] if several else None,
            )
            sums += [self.ops.decode(query[:first], these, output[:first])]
        if batch.num_prefills:
            rows = slice(first, batch.num_tokens)
            assert batch.prefill_start_loc is not None and batch.context_lens is not None
            new = Prefills(
                pages,
                fmt,
                batch.block_table[decodes : decodes + batch.num_prefills],
                batch.prefill_start_loc,
                batch.context_lens,
                batch.slot_mapping[rows],
                batch.prefill_query_lens,
                batch.prefill_context_lens,
            )
            # A layer that shares another's cache may be given no keys of its own.
            if stored:
                sums += [self.ops.prefill_stored(query[rows], new, output[rows])]
            else:
                sums += [self.ops.prefill(query[rows], key[rows], value[rows], new, output[rows])]
        lse = torch.cat(sums) if batch.spans else None
        for start, last in batch.spans:
            span = slice(start, last + 1)
            if stored:
                k, v = self.ops.stored(pages, batch.slot_mapping[span], fmt, query.dtype)
            else:
                k, v = key[span], value[span]
            assert lse is not None
            self.ops.see_later(query[span], k, v, output[span], lse[span])
        return output
