"""The pipeline of kvpress, with a cache whose layers cannot be assigned to."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tq_core import TQError

__all__ = ["kvpress_pipeline"]


def kvpress_pipeline(model: Any, tokenizer: Any) -> Any:
    """kvpress's text generation pipeline, which takes a `TurboQuantCache` as ``cache``.

    After each answer kvpress cuts the layers' ``keys`` and ``values`` back to the context, which
    a layer of codes refuses; here `crop` of the cache does it. Presses do not work with the cache:
    they assign the keys that they keep to a layer as well.

    Raises
    ------
    TQError
        If kvpress is not installed.
    """
    try:
        pipeline = import_module("kvpress.pipeline").KVPressTextGenerationPipeline
    except ImportError as error:
        raise TQError(
            f"kvpress cannot be imported ({error}): install it with pip install kvpress"
        ) from None
    made = pipeline(model=model, tokenizer=tokenizer)
    made._remove_answer_from_cache = _crop
    return made


def _crop(cache: Any, lengths: list[int]) -> None:
    cache.crop(max(lengths) - cache.get_seq_length())
