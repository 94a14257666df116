"""TurboQuant for Hugging Face transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tq_hf.argument import cache_argument
    from tq_hf.cache import TurboQuantCache
    from tq_hf.layer import KeyCenterWarning
    from tq_hf.memory import MemoryUsage

__all__ = ["KeyCenterWarning", "MemoryUsage", "TurboQuantCache", "cache_argument"]

_MODULES = {
    "KeyCenterWarning": "tq_hf.layer",
    "MemoryUsage": "tq_hf.memory",
    "TurboQuantCache": "tq_hf.cache",
    "cache_argument": "tq_hf.argument",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without PyTorch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
