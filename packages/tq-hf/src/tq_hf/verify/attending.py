"""A model whose attention is another function for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["attending"]

T = TypeVar("T")


@contextmanager
def attending(
    model: Any, implementation: str, variable: ContextVar[T | None], value: T
) -> Iterator[T]:
    """Attend by a registered implementation, which finds ``value`` in ``variable``."""
    before = model.config._attn_implementation
    token = variable.set(value)
    model.set_attn_implementation(implementation)
    try:
        yield value
    finally:
        model.set_attn_implementation(before)
        variable.reset(token)
