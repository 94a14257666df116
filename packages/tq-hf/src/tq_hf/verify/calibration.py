"""Key centers: a vector of each layer and head that is subtracted from the keys; and metrics.

A constant added to all keys of a head adds the same to all logits of a query, so attention does
not see it; what is left after it is subtracted takes fewer bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tq_core import TQError
from transformers import DynamicCache

from tq_hf.argument import cache_argument
from tq_hf.model_layers import model_layers

__all__ = [
    "bias_centers",
    "key_centers",
    "key_value_states",
    "read_centers",
    "read_metrics",
    "write_centers",
    "write_metrics",
]


@torch.no_grad()
def key_value_states(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys (after the rotary embedding) and values of the full-attention layers.

    Parameters
    ----------
    model
        A causal language model.
    ids : int64 tensor [batch, tokens]

    Returns
    -------
    dict of int to pair of tensors [batch, kv_heads, tokens, head_dim]
    """
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    kinds = model_layers(model.config)
    layers: list[Any] = cache.layers
    return {
        i: (layer.keys, layer.values) for i, layer in enumerate(layers) if kinds[i].kind == "full"
    }


def key_centers(model: Any, windows: Iterable[Tensor], skip_tokens: int = 4) -> dict[int, Tensor]:
    """Mean key of each full-attention layer and head over calibration text.

    Parameters
    ----------
    model
    windows : iterable of int64 tensors [batch, tokens]
    skip_tokens : int
        First tokens of each window left out: sinks have keys of their own.

    Returns
    -------
    dict of int to float32 tensor [kv_heads, head_dim]
        As ``TurboQuantCache(key_center=…)`` takes it.

    Raises
    ------
    TQError
        If no window is longer than ``skip_tokens``.
    """
    sums: dict[int, Tensor] = {}
    count = 0
    for ids in windows:
        if ids.shape[1] <= skip_tokens:
            continue
        for layer, (keys, _) in key_value_states(model, ids).items():
            part = keys[:, :, skip_tokens:].double().sum(dim=(0, 2)).cpu()
            sums[layer] = sums[layer] + part if layer in sums else part
        count += ids.shape[0] * (ids.shape[1] - skip_tokens)
    if not count:
        raise TQError(f"calibration needs windows of more than {skip_tokens} tokens; give more")
    return {layer: (total / count).float() for layer, total in sums.items()}


@torch.no_grad()
def bias_centers(model: Any, tokens: int = 1024) -> dict[int, Tensor]:
    """Centers from the weights alone: the key bias, rotated and averaged over positions.

    Works for models built as Llama and Qwen2 are: ``model.model.layers[i].self_attn.k_proj`` and
    ``model.model.rotary_emb``.

    Raises
    ------
    TQError
        If the model has no such key bias.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    rotary = getattr(inner, "rotary_emb", None)
    if layers is None or rotary is None:
        raise TQError(f"{type(model).__name__} is not built as Llama is: calibrate on text instead")
    positions = torch.arange(tokens, device=model.device)[None]
    centers = {}
    for index, layer in enumerate(layers):
        attention: Any = getattr(layer, "self_attn", None)
        bias = getattr(getattr(attention, "k_proj", None), "bias", None)
        if bias is None:
            raise TQError(f"layer {index} has no key bias: calibrate on text instead")
        keys = bias.float().reshape(1, -1, 1, attention.head_dim).expand(-1, -1, tokens, -1)
        cos, sin = rotary(keys, positions)
        _, rotated = apply_rotary_pos_emb(keys, keys, cos, sin)
        centers[index] = rotated[0].mean(dim=1).cpu()
    return centers


def write_centers(centers: dict[int, Tensor], path: str | os.PathLike[str], source: str) -> None:
    """Write centers as safetensors, with a line on where they come from."""
    tensors = {f"key_center.{layer}": center.contiguous() for layer, center in centers.items()}
    save_file(tensors, path, metadata={"format": "tq-key-center-1", "source": source})


def read_centers(path: str | os.PathLike[str]) -> dict[int, Tensor]:
    """Read what `write_centers` wrote.

    Raises
    ------
    TQError
        If it is no such file.
    """
    centers = {}
    for name, tensor in _read(path).items():
        prefix, _, layer = name.rpartition(".")
        if prefix != "key_center" or not layer.isdecimal() or tensor.dim() != 2:
            raise TQError(f"{path} has {name!r}, which is no key center; run `tq calibrate`")
        centers[int(layer)] = tensor
    return centers


def write_metrics(
    metrics: dict[int, tuple[Tensor, Tensor]], path: str | os.PathLike[str], source: str
) -> None:
    """Write metrics of `tq_hf.verify.feedback.error_metrics`, with a line on their source."""
    tensors = {
        f"metric.{layer}.{kind}": metric.float().cpu().contiguous()
        for layer, pair in metrics.items()
        for kind, metric in zip("kv", pair, strict=True)
    }
    save_file(tensors, path, metadata={"format": "tq-metrics-1", "source": source})


def read_metrics(path: str | os.PathLike[str]) -> dict[int, tuple[Tensor, Tensor]]:
    """Read what `write_metrics` wrote, as ``TurboQuantCache(metrics=…)`` takes it.

    Raises
    ------
    TQError
        If it is no such file.
    """
    tensors = _read(path)
    found = (re.fullmatch(r"metric\.(\d+)\.[kv]", name) for name in tensors)
    layers = sorted({int(match[1]) for match in found if match})
    pairs = {i: (f"metric.{i}.k", f"metric.{i}.v") for i in layers}
    if tensors.keys() != {name for pair in pairs.values() for name in pair}:
        raise TQError(
            f"{path} has {sorted(tensors)[0]!r} and {len(tensors) - 1} more tensors, which are no "
            "metrics; run `tq calibrate --metrics`"
        )
    return {i: (tensors[k], tensors[v]) for i, (k, v) in pairs.items()}


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a file, in float32."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TQError(
            f"{path} cannot be read as safetensors ({error}); run `tq calibrate`"
        ) from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TQError(f"{path} has numbers in {name!r} that are not finite; run `tq calibrate`")
    if not tensors:
        raise TQError(f"{path} holds nothing; run `tq calibrate`")
    return {name: tensor.float() for name, tensor in tensors.items()}
