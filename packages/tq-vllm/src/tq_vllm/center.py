"""Key centers: a constant for each layer and head that is subtracted from keys before storing.

The softmax does not see a constant that is added to every logit, so ``q · (k - mu)`` gives the
same attention as ``q · k``, and keys that lie around a large mean lose less to rounding. Files are
safetensors with one tensor a layer, ``layers.N`` [kv_heads, head_dim], of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tq_core import TQError

if TYPE_CHECKING:
    from tq_vllm.impl import TurboQuantImpl

__all__ = ["load_center", "measure_centers", "rank_heads", "save_centers"]


def rank_heads(center: Tensor, kv_heads: int, rank: int, ranks: int) -> Tensor:
    """Rows of ``center`` [all KV heads, head_dim] that belong to a tensor-parallel rank.

    With fewer heads than ranks several ranks have the same head, as in vLLM.
    """
    total = center.shape[0]
    first = rank * kv_heads if total >= ranks else rank * total // ranks
    return center[first : first + kv_heads]


def load_center(path: Path, number: int, impl: TurboQuantImpl) -> Tensor:
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

    name, ranks = f"layers.{number}", get_tensor_model_parallel_world_size()
    try:
        with safe_open(path, framework="pt") as file:
            center = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise TQError(
            f"TQ_KEY_CENTER={path}: no tensor {name!r} ({error}); run tq center"
        ) from None
    part = rank_heads(center, impl.num_kv_heads, get_tensor_model_parallel_rank(), ranks)
    if part.shape != (impl.num_kv_heads, impl.head_size) or center.shape[0] > part.shape[0] * ranks:
        raise TQError(
            f"TQ_KEY_CENTER={path}: {name} has shape {tuple(center.shape)}, and the layer has "
            f"{impl.num_kv_heads} KV heads of {impl.head_size} on each of {ranks} ranks; run tq "
            "center for this model"
        )
    return part.to(current_platform.device_type, torch.float32).contiguous()


def save_centers(centers: dict[int, Tensor], path: Path) -> None:
    """Write the centers of layers."""
    save_file({f"layers.{n}": c.contiguous() for n, c in centers.items()}, path)


class _Mean:
    """Mean of the keys that pass a layer."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.sum: Tensor = torch.zeros(kv_heads, head_dim, dtype=torch.float64)
        self.count = 0

    def __call__(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        keys = arguments[1].view(-1, *self.sum.shape)
        self.sum += keys.sum(dim=0, dtype=torch.float64).cpu()
        self.count += keys.shape[0]

    @property
    def value(self) -> Tensor:
        return (self.sum / max(self.count, 1)).float()


def measure_centers(llm: Any, prompts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Mean keys of each layer over prompts.

    Parameters
    ----------
    llm : vllm.LLM
        Eager, in this process, on one rank and without prefix caching.
    prompts : sequence of sequences of int
        Token ids.

    Returns
    -------
    dict of int to float32 tensor [kv_heads, head_dim]
        By number of the layer.
    """
    from vllm import SamplingParams
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    means: dict[int, _Mean] = {}
    hooks: list[Callable[[], None]] = []
    for name, layer in context.items():
        if isinstance(layer, Attention) and layer.kv_sharing_target_layer_name is None:
            mean = _Mean(layer.num_kv_heads, layer.head_size)
            means[extract_layer_index(name)] = mean
            hooks.append(layer.register_forward_pre_hook(mean).remove)
    try:
        asked = SamplingParams(max_tokens=1, temperature=0)
        llm.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
    finally:
        for remove in hooks:
            remove()
    return {number: mean.value for number, mean in means.items()}
