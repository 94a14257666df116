"""Key centers: a constant for each layer and head that is subtracted from keys before storing.

The softmax does not see a constant that is added to every logit, so ``q · (k - mu)`` gives the
same attention as ``q · k``, and keys that lie around a large mean lose less to rounding. ``tq
calibrate`` writes the files: safetensors with one tensor a layer, ``key_center.N`` [kv_heads,
head_dim], of all ranks together.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tq_core import TQError

__all__ = ["load_center", "rank_heads"]


def rank_heads(center: Tensor, kv_heads: int, rank: int, ranks: int) -> Tensor:
    """Rows of ``center`` [all KV heads, head_dim] that belong to a tensor-parallel rank.

    With fewer heads than ranks several ranks have the same head, as in vLLM.
    """
    total = center.shape[0]
    first = rank * kv_heads if total >= ranks else rank * total // ranks
    return center[first : first + kv_heads]


def load_center(path: Path, number: int, kv_heads: int, head_dim: int) -> Tensor:
    """Center of a layer, of the heads of this rank, float32 on the current device.

    Raises
    ------
    TQError
        If the file does not hold it in the layer's shape.
    """
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm.platforms import current_platform

    name, ranks = f"key_center.{number}", get_tensor_model_parallel_world_size()
    try:
        with safe_open(path, framework="pt") as file:
            center = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise TQError(
            f"TQ_KEY_CENTER={path}: no tensor {name!r} ({error}); run tq calibrate"
        ) from None
    if center.dim() != 2 or not bool(torch.isfinite(center).all()):
        raise TQError(
            f"TQ_KEY_CENTER={path}: {name} has shape {tuple(center.shape)} or numbers that are not "
            "finite: needs [kv_heads, head_dim]; run tq calibrate again"
        )
    part = rank_heads(center, kv_heads, get_tensor_model_parallel_rank(), ranks)
    if part.shape != (kv_heads, head_dim) or center.shape[0] > part.shape[0] * ranks:
        raise TQError(
            f"TQ_KEY_CENTER={path}: {name} has shape {tuple(center.shape)}, and the layer has "
            f"{kv_heads} KV heads of {head_dim} on each of {ranks} ranks; run tq "
            "calibrate for this model"
        )
    return part.to(current_platform.device_type, torch.float32).contiguous()
