"""A 16-bit cache whose old tokens are rounded: what a `TurboQuantCache` has to equal.

It keeps plain tensors and replaces every token that leaves the window by its decoded codes, so
any attention runs on it and any operation of transformers' own layers applies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tq_kernels import decode_tokens, encode_tokens
from transformers.cache_utils import Cache, DynamicLayer

from tq_hf.argument import cache_argument
from tq_hf.cache import TurboQuantCache
from tq_hf.layer import BLOCK_TOKENS, CompressedLayer

__all__ = ["SMALL_MODEL", "ReferenceLayer", "feed", "reference_cache"]

#: Sizes of a small model, for configurations of transformers.
SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class ReferenceLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Plain keys and values, of which those between sinks and window are rounded.

    Parameters
    ----------
    layer : CompressedLayer
        What it stands for.
    """

    def __init__(self, layer: CompressedLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.options = layer.options
        self.key_center = layer.key_center
        self.metrics = layer.metrics or (None, None)
        self.coded = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values, then round those that leave the window."""
        seen: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        self.keys, self.values = (x.clone() for x in seen)
        start = self.options.sink_tokens + self.coded
        excess = seen[0].shape[-2] - start - self.options.window_tokens
        count = max(0, excess) // BLOCK_TOKENS * BLOCK_TOKENS
        fmt = replace(self.options.fmt, head_dim=key_states.shape[-1])
        center = 0.0 if self.key_center is None else self.key_center[:, None]
        wide = torch.promote_types(key_states.dtype, torch.float32)
        part = self.keys[..., start : start + count, :]
        search, (k_metric, v_metric) = self.options.search, self.metrics
        codes = encode_tokens(part.to(wide) - center, fmt, "k", search=search, metric=k_metric)
        part[:] = decode_tokens(codes, fmt, "k", wide) + center
        part = self.values[..., start : start + count, :]
        part[:] = decode_tokens(
            encode_tokens(part, fmt, "v", search=search, metric=v_metric), fmt, "v", wide
        )
        self.coded += count
        return seen

    def crop(self, tokens: int) -> None:
        """Remove tokens as transformers does."""
        super().crop(tokens)
        held = self.get_seq_length() - self.options.sink_tokens
        self.coded = max(0, min(self.coded, held))

    def reset(self) -> None:
        """Drop everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.coded = 0


def reference_cache(cache: TurboQuantCache) -> Cache:
    """The empty reference of an empty cache."""
    return Cache(
        layers=[
            ReferenceLayer(layer) if isinstance(layer, CompressedLayer) else copy.deepcopy(layer)
            for layer in cache.layers
        ]
    )


@torch.no_grad()
def feed(
    model: Any, ids: Tensor, cache: Any, sizes: Iterable[int], mask: Tensor | None = None
) -> Tensor:
    """Logits [batch, tokens, vocabulary] of ``ids`` [batch, tokens], fed in pieces of ``sizes``.

    ``mask`` [batch, past and new tokens] is 0 at padding.
    """
    out, start = [], 0
    past = cache.get_seq_length()
    for size in sizes:
        more: dict[str, Any] = (
            {} if mask is None else {"attention_mask": mask[:, : past + start + size]}
        )
        if mask is not None:
            positions = (mask[:, : past + start + size].long().cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, past + start :]
        part = ids[:, start : start + size]
        more |= cache_argument(model, cache)
        out.append(model(input_ids=part, use_cache=True, **more).logits)
        start += size
    return torch.cat(out, dim=1)
