"""Layers that the settings single out.

Those kept at 16 bits get vLLM's own backend, those with more bits a backend of larger pages.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from tq_core import TQError
from vllm.config import set_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tq_vllm.backend import FineTurboQuantBackend
from tq_vllm.center import load_center
from tq_vllm.older_pages import OLDER_PAGES, answer_with_pages
from tq_vllm.settings import load_settings, named_layers

if TYPE_CHECKING:
    from tq_vllm.impl import TurboQuantImpl

__all__ = ["assign_layer"]


def _own_layer(impl: TurboQuantImpl) -> tuple[str, Any]:
    """Name and module of the layer that an implementation belongs to."""
    for name, layer in impl.vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise TQError("no layer of the model has this attention implementation; report this as a bug")


@cache
def _backend_of_vllm(head_size: int, dtype: torch.dtype, sink: bool, sliding: bool) -> type[Any]:
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
    )
    path = current_platform.get_attn_backend_cls(None, attn_selector_config=config)
    found: type[Any] = resolve_obj_by_qualname(path)
    return found


def assign_layer(impl: TurboQuantImpl, act_dtype: torch.dtype) -> None:
    """Give the layer of ``impl`` the backend that the settings name for it.

    Called after the weights are loaded and before vLLM asks layers for the sizes of their pages.
    Settings that name layers mean those of the served model, not of a draft model.
    """
    settings, model = load_settings(), impl.vllm_config.model_config
    chosen = settings.singles_out_layers or settings.key_center is not None
    if not chosen and not OLDER_PAGES:
        return
    name, layer = _own_layer(impl)
    if chosen and getattr(model, "runner_type", None) != "draft":
        number = extract_layer_index(impl.kv_sharing_target_layer_name or name)
        total = model.get_total_num_hidden_layers()
        if number < total and _single_out(impl, layer, number, total, act_dtype):
            return
    if OLDER_PAGES:
        answer_with_pages(layer)


def _single_out(
    impl: TurboQuantImpl, layer: Any, number: int, total: int, act_dtype: torch.dtype
) -> bool:
    """Apply the settings to a layer of the served model; whether it is kept at 16 bits."""
    settings = load_settings()
    if settings.key_center is not None:
        impl.ops.key_center = load_center(settings.key_center, number, impl)

    def named(text: str) -> bool:
        numbers, sliding = named_layers(text, total)
        return number in numbers or (sliding and impl.sliding_window is not None)

    if named(settings.skip_layers):
        _keep_at_16_bits(impl, layer, act_dtype)
        return True
    if named(settings.fine_layer_names):
        impl.fine, layer.attn_backend = True, FineTurboQuantBackend
    return False


def _keep_at_16_bits(impl: TurboQuantImpl, layer: Any, act_dtype: torch.dtype) -> None:
    sinks, windowed = impl.ops.sinks is not None, impl.sliding_window is not None
    with set_current_vllm_config(impl.vllm_config):
        backend = _backend_of_vllm(impl.head_size, act_dtype, sinks, windowed)
        own = backend.get_impl_cls()(**impl.arguments)
    own.process_weights_after_loading(act_dtype)
    layer.attn_backend = backend
    layer.impl = own
    layer.backend = AttentionBackendEnum[backend.get_name()]
