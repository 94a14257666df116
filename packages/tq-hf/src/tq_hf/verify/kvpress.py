"""The pipeline of kvpress, with a cache whose layers cannot be assigned to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tq_core import TQError
from transformers import DynamicCache

from tq_hf.cache import TurboQuantCache

__all__ = ["kvpress_pipeline"]

#: Presses that also work on the cache while tokens are generated.
_DECODING = ("DecodingPress", "PrefillDecodingPress", "DMSPress")


def kvpress_pipeline(model: Any, tokenizer: Any) -> Any:
    """kvpress's text generation pipeline, which takes a `TurboQuantCache` as ``cache``.

    A press removes tokens from the prompt first; what it keeps is encoded then, each token once.
    While the prompt runs, it is held at 16 bits. After each answer kvpress cuts the layers'
    ``keys`` and ``values`` back to the context, which a layer of codes refuses; here `crop` of the
    cache does it.

    Raises
    ------
    TQError
        If kvpress is not installed; in a call, for a press that works while tokens are generated.
    """
    try:
        pipeline = import_module("kvpress.pipeline").KVPressTextGenerationPipeline
    except ImportError as error:
        raise TQError(
            f"kvpress cannot be imported ({error}): install it with pip install kvpress"
        ) from None
    made = pipeline(model=model, tokenizer=tokenizer)
    forward = made._forward

    def pressed(
        inputs: Any, max_new_tokens: int = 50, press: Any = None, cache: Any = None
    ) -> list[str]:
        if press is not None and isinstance(cache, TurboQuantCache):
            press = _before_encoding(press, cache)
        answers: list[str] = forward(inputs, max_new_tokens, press, cache)
        return answers

    made._forward = pressed
    made._remove_answer_from_cache = _crop
    return made


def _before_encoding(press: Any, cache: TurboQuantCache) -> Any:
    """A press of the same class that works on 16-bit layers, which then go into the cache."""
    kinds = {kind.__name__ for kind in type(press).__mro__}
    if kinds & set(_DECODING):
        raise TQError(
            f"{type(press).__name__} removes tokens while others are generated, which codes do not "
            "allow; take a press that works on the prompt"
        )

    @contextmanager
    def call(self: Any, model: Any) -> Iterator[None]:
        layers: list[Any] = cache.layers
        cache.layers = DynamicCache(config=model.config).layers
        try:
            with press(model):
                yield
            pressed: list[Any] = cache.layers
        finally:
            cache.layers = layers
        for layer, exact in zip(layers, pressed, strict=True):
            layer.update(exact.keys, exact.values)

    other = copy.copy(press)
    other.__class__ = type(type(press).__name__, (type(press),), {"__call__": call})
    return other


def _crop(cache: Any, lengths: list[int]) -> None:
    cache.crop(max(lengths) - cache.get_seq_length())
