"""Checks of arguments; every message names the value, the limit and the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.format import KVFormat

__all__ = [
    "check_cumulative",
    "check_format",
    "check_pages",
    "check_range",
    "check_softmax",
    "check_tensor",
    "debug_mode",
    "values_checked",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)

_debug = os.environ.get("TQ_KERNELS_DEBUG", "0") not in ("", "0")


@contextmanager
def debug_mode(enabled: bool = True) -> Iterator[None]:
    """Check indices, and that what is stored is finite, on every device; this waits for it.

    The environment variable ``TQ_KERNELS_DEBUG=1`` does the same for the whole process. Contents
    of tensors on the CPU are always checked by the ``_ref`` operations.
    """
    global _debug
    previous, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = previous


def values_checked(tensor: Tensor | None = None) -> bool:
    """Whether contents are looked at: in debug mode, or if ``tensor`` is on the CPU."""
    return _debug or (tensor is not None and tensor.device.type == "cpu")


def check_format(fmt: object) -> None:
    """Raise unless ``fmt`` is a `KVFormat`."""
    if not isinstance(fmt, KVFormat):
        raise TQError(f"fmt is a {type(fmt).__name__}: pass a tq_kernels.KVFormat")


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
    why: str = "",
) -> None:
    """Raise unless ``tensor`` has one of ``dtypes``, the shape (None: any) and the device."""
    if not isinstance(tensor, Tensor):
        raise TQError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TQError(f"{name} has dtype {tensor.dtype}: supported are {names}; convert it")
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise TQError(
            f"{name} has shape {tuple(tensor.shape)}: needs [{wanted}]{why}; reshape it or pass "
            "the arguments that belong together"
        )
    if device is not None and tensor.device != device:
        raise TQError(f"{name} is on {tensor.device}: needs {device}; move it with .to({device})")


def check_softmax(
    softmax_scale: float | None, soft_cap: float | None, sliding_window: int | None
) -> None:
    """Raise unless the numbers that all attention takes are positive, or None."""
    if softmax_scale is not None and not 0 < softmax_scale < float("inf"):
        raise TQError(f"softmax_scale={softmax_scale}: needs a positive number, or None")
    if soft_cap is not None and not 0 < soft_cap < float("inf"):
        raise TQError(f"soft_cap={soft_cap}: needs a positive number, or None for no cap")
    if sliding_window is not None and sliding_window < 1:
        raise TQError(f"sliding_window={sliding_window}: needs at least 1, or None for no window")


def check_pages(
    pages: Tensor,
    fmt: KVFormat,
    kv_heads: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise unless ``pages`` is uint8 [num_pages, kv_heads, record_bytes] of contiguous records."""
    check_format(fmt)
    check_tensor(
        "pages",
        pages,
        (None, kv_heads, fmt.record_bytes),
        (torch.uint8,),
        device,
        f" (record_bytes of head_dim={fmt.head_dim}, k_bits={fmt.k_bits}, v_bits={fmt.v_bits}, "
        f"page_size={fmt.page_size})",
    )
    if pages.numel() and pages.stride(-1) != 1:
        raise TQError(
            f"pages have stride {pages.stride(-1)} in the last dimension: needs 1; records are "
            "contiguous, permute only the first two dimensions"
        )


def check_range(name: str, tensor: Tensor, low: int | None, high: int, remedy: str) -> None:
    """Raise unless ``low <= tensor < high`` everywhere; names the first bad entry.

    With ``low`` None any number below ``high`` will do.
    """
    wide = tensor.to(torch.int64)  # comparisons with larger numbers would wrap in int32
    bad = wide >= high
    if low is not None:
        bad |= wide < low
    if bool(bad.any()):
        index = [int(i) for i in bad.nonzero()[0]]
        value = int(tensor[tuple(index)])
        limits = f"at most {high - 1}" if low is None else f"{low} to {high - 1}"
        raise TQError(f"{name}{index} is {value}: needs {limits}; {remedy}")


def check_cumulative(name: str, tensor: Tensor, total: int) -> None:
    """Raise unless ``tensor`` starts at 0, never falls and ends at ``total``."""
    values = [int(v) for v in tensor.tolist()]
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise TQError(
            f"{name} is {values[:8]}{'...' if len(values) > 8 else ''}: needs a cumulative sum "
            f"from 0 to the number of query tokens, {total}; build it with torch.cumsum"
        )
