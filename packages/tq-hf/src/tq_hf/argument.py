"""The name under which a model takes its cache: transformers 5.24 renamed it."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["cache_argument"]


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``{"cache": cache}``, or ``{"past_key_values": cache}`` for models that take only that.

    ``model.generate(ids, **cache_argument(model, cache))`` works with every supported transformers.
    """
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
