"""Layers that the settings single out: named by number, or because they have a window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tq_core import TQError
from vllm.config import set_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tq_vllm.settings import Settings, named_layers

__all__ = ["Choice", "choose", "find_layer", "keep_at_16_bits"]


@dataclass(frozen=True)
class Choice:
    """What the settings say of a layer.

    Attributes
    ----------
    number : int, optional
        Of the layer in the served model, where settings mean it at all.
    skipped, fine : bool
        Whether it is kept at 16 bits, and whether it gets more bits.
    """

    number: int | None = None
    skipped: bool = False
    fine: bool = False


def find_layer(vllm_config: Any, impl: object) -> tuple[str, Any]:
    """Name and module of the layer that an implementation belongs to."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise TQError("no layer of the model has this attention implementation; report this as a bug")


def choose(settings: Settings, vllm_config: Any, layer: str, windowed: bool) -> Choice:
    """Look a layer up; settings that name layers mean those of the served model, no draft's."""
    model = vllm_config.model_config
    nothing = not settings.singles_out_layers and settings.key_center is None
    if nothing or getattr(model, "runner_type", None) == "draft":
        return Choice()
    number, total = extract_layer_index(layer), model.get_total_num_hidden_layers()
    if number >= total:
        return Choice()

    def named(text: str) -> bool:
        numbers, sliding = named_layers(text, total)
        return number in numbers or (sliding and windowed)

    skipped = named(settings.skip_layers)
    return Choice(number, skipped, not skipped and named(settings.fine_layer_names))


@cache
def _backend_of_vllm(
    head_size: int, dtype: torch.dtype, sink: bool, sliding: bool, images: bool
) -> type[Any]:
    """Backend that vLLM would choose if none was asked for."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        backend: type[Any] = CPUAttentionBackend
        return backend
    config = AttentionSelectorConfig(
        head_size=head_size,
        dtype=dtype,
        kv_cache_dtype="auto",
        block_size=None,
        has_sink=sink,
        has_sliding_window=sliding,
        use_mm_prefix=images,
    )
    path = current_platform.get_attn_backend_cls(None, attn_selector_config=config)
    found: type[Any] = resolve_obj_by_qualname(path)
    return found


def keep_at_16_bits(
    layer: Any, arguments: dict[str, Any], vllm_config: Any, act_dtype: torch.dtype
) -> None:
    """Give a layer vLLM's own backend.

    Parameters
    ----------
    layer : module
        Of vLLM.
    arguments : dict
        For the implementation of attention.
    vllm_config : VllmConfig
    act_dtype : torch.dtype
        Of the model's activations.
    """
    sinks, windowed = "sinks" in arguments, arguments["sliding_window"] is not None
    images = bool(getattr(vllm_config.model_config, "is_mm_prefix_lm", False))
    with set_current_vllm_config(vllm_config):
        backend = _backend_of_vllm(arguments["head_size"], act_dtype, sinks, windowed, images)
        own = backend.get_impl_cls()(**arguments | {"kv_cache_dtype": "auto"})
    own.process_weights_after_loading(act_dtype)
    layer.attn_backend = backend
    layer.impl = own
    layer.backend = AttentionBackendEnum[backend.get_name()]
    layer.kv_cache_dtype, layer.kv_cache_torch_dtype = "auto", vllm_config.model_config.dtype
