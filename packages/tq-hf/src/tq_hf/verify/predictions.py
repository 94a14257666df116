"""Predictions of a text through two caches at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from transformers import DynamicCache

from tq_hf.argument import cache_argument
from tq_hf.models.quality import CacheFactory
from tq_hf.verify.scores import TokenScores, compare_logits

__all__ = ["BASELINES", "baseline_factory", "compare_predictions"]

BASELINES: dict[str, torch.dtype | None] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "model": None,
}


class CastCache(DynamicCache):
    """transformers' own cache, whose keys and values are rounded to another float type."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__(config=config)
        self.stored_dtype = dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Round the new tokens, then store and return as the base class does."""
        key, value = (x.to(self.stored_dtype).to(x.dtype) for x in (key_states, value_states))
        return super().update(key, value, layer_idx, *args, **kwargs)


def baseline_factory(config: Any, name: str) -> CacheFactory:
    """Makes the cache to compare with: ``fp16``, ``bf16`` or ``model`` (the model's own type).

    Raises
    ------
    TQError
        For another name.
    """
    if name not in BASELINES:
        raise TQError(f"baseline={name!r}: choose one of {', '.join(BASELINES)}")
    dtype = BASELINES[name]
    if dtype is None:
        return lambda: DynamicCache(config=config)
    return lambda: CastCache(config, dtype)


@torch.no_grad()
def compare_predictions(
    model: Any,
    windows: Iterable[Tensor],
    make_base: CacheFactory,
    make_cache: CacheFactory,
    *,
    chunk: int = 32,
    unscored: int = 64,
) -> Iterator[tuple[TokenScores, Any]]:
    """Feed windows to both caches, ``chunk`` true tokens at a time.

    Parameters
    ----------
    model
        A causal language model.
    windows : iterable of int64 tensors [1, tokens + 1]
    make_base, make_cache : callable
        Return empty caches.
    chunk : int
        What a chunk sees of earlier ones comes out of the caches.
    unscored : int
        First predictions of a window left out, as there is no history to compress yet.

    Yields
    ------
    scores : TokenScores
        Of one chunk.
    cache : object
        The compressed cache, as filled so far.
    """
    for ids in windows:
        base, cache = make_base(), make_cache()
        for start in range(0, ids.shape[1] - 1, chunk):
            part = ids[:, start : min(start + chunk, ids.shape[1] - 1)]
            target = ids[0, start + 1 : start + 1 + part.shape[1]]
            first, second = (
                model(input_ids=part, use_cache=True, **cache_argument(model, c)).logits[0]
                for c in (base, cache)
            )
            skip = max(0, unscored - start)
            if skip < part.shape[1]:
                yield compare_logits(first[skip:], second[skip:], target[skip:]), cache
