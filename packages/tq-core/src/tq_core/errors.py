"""The one family of exceptions that this package raises."""

from __future__ import annotations

__all__ = ["ConvergenceError", "TQError"]


class TQError(ValueError):
    """An argument or an input is outside what the operation supports.

    The message names the value, the limit and the remedy.
    """


class ConvergenceError(TQError):
    """An iterative solver stopped before it met its criterion."""
