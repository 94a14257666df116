"""Modes of PyTorch that must not change what is held or read."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["exact", "held"]

P = ParamSpec("P")
T = TypeVar("T")


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` without autocast, which would round rotations and codes to 16 bits."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return call


def held(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` so that it makes tensors that can be written to in any mode later.

    Tensors made in inference mode cannot be written to outside of it, and a cache may be filled
    in one mode and used in another.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return exact(call)
