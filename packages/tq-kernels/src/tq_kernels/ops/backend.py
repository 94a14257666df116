"""Where the Triton kernels of an operation can run; they are imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.format import KVFormat

__all__ = ["check_slot_count", "portable_kernels"]


def portable_kernels(name: str, device: torch.device) -> Any:
    """Module ``tq_kernels.portable.<name>``; raise where Triton cannot run on ``device``."""
    try:
        knobs = importlib.import_module("triton").knobs
    except ImportError as error:
        raise TQError(
            f"{name}: the kernel needs Triton, which is not installed; install it (pip install "
            f"triton, on Linux) or use {name}_ref"
        ) from error
    if device.type == "cpu" and not knobs.runtime.interpret:
        raise TQError(
            f"{name} on device cpu: the kernel needs a GPU; use {name}_ref, or set "
            "TRITON_INTERPRET=1 before the import to run it slowly in Triton's interpreter"
        )
    if device.type not in ("cpu", "cuda"):
        raise TQError(
            f"{name} on device {device}: the kernel runs on NVIDIA and AMD GPUs ('cuda'); use "
            f"{name}_ref"
        )
    return importlib.import_module(f"tq_kernels.portable.{name}")


def check_slot_count(pages: Tensor, fmt: KVFormat) -> None:
    """Raise unless kernels can number the slots of ``pages`` in 32 bits."""
    count = pages.shape[0] * fmt.page_size
    if count >= 2**31:
        raise TQError(
            f"pages hold {count} slots: kernels take fewer than 2**31; split the cache, for "
            "example by layer"
        )
