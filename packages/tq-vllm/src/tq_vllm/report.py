"""What the log says: the format and its bytes, and a warning where vLLM pads pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from tq_vllm.pages import TurboQuantPages
from tq_vllm.settings import Settings, settings_of

__all__ = ["CacheBytes", "cache_bytes", "report_cache", "warn_of_padding"]

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger("vllm.plugins.turboquant")


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the KV cache on one rank.

    Attributes
    ----------
    token : float
        Of a token, all layers.
    token_16_bits : float
        The same at 16 bits.
    slots : tuple of int
        Of a token and KV head of compressed layers, each value once.
    layers, compressed : int
        Attention layers with a cache, and those with pages of codes.
    """

    token: float
    token_16_bits: float
    slots: tuple[int, ...]
    layers: int
    compressed: int

    @property
    def ratio(self) -> float:
        """How many times smaller than at 16 bits."""
        return self.token_16_bits / self.token


def cache_bytes(vllm_config: Any) -> CacheBytes:
    """Sum the page sizes of the specifications that vLLM allocates by."""
    token = plain = 0.0
    slots, layers, compressed = set(), 0, 0
    for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
        if layer.kv_sharing_target_layer_name is not None:
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is None:
            continue
        if hasattr(layer.attn_backend, "customize_spec"):
            spec = layer.attn_backend.customize_spec(spec)
        layers += 1
        token += spec.page_size_bytes / spec.block_size
        plain += layer.num_kv_heads * 2 * layer.head_size * 2
        if issubclass(layer.attn_backend, TurboQuantPages):
            compressed += 1
            slots.add(spec.page_size_bytes // (spec.block_size * layer.num_kv_heads))
    return CacheBytes(token, plain, tuple(sorted(slots)), layers, compressed)


def _left_out(settings: Settings) -> str:
    """Say what of a preset pages cannot do."""
    first, last = settings.tokens_at_16_bits
    if not first and not last:
        return ""
    return (
        f" The first {first} and last {last} tokens of a sequence, which caches for transformers "
        f"keep at 16 bits with preset {settings.preset}, are compressed too: a page has one format."
    )


def report_cache(vllm_config: Any) -> None:
    """Log the format and its bytes once a process."""
    settings, sizes = settings_of(vllm_config.cache_config), cache_bytes(vllm_config)
    logger.info_once(
        "TurboQuant KV cache: keys %d bits, values %d bits, prefill %s, scale %s; %d of %d layers "
        "compressed, %s bytes a token and KV head; %.0f bytes a token against %.0f at 16 bits "
        "(%.2fx smaller).%s",
        settings.key_bits,
        settings.value_bits,
        settings.prefill,
        settings.scale_name,
        sizes.compressed,
        sizes.layers,
        "/".join(map(str, sizes.slots)),
        sizes.token,
        sizes.token_16_bits,
        sizes.ratio,
        _left_out(settings),
    )


def warn_of_padding(spec: Any) -> None:
    """Warn if vLLM pads pages of codes to the size of larger ones of other layers."""
    padded = getattr(spec, "page_size_padded", None)
    if padded is not None and padded > spec.unpadded_page_size_bytes:
        logger.warning_once(
            "vLLM pads pages of %d bytes of codes to %d, the size of other layers' pages, so less "
            "memory is saved than the format saves. It does so for models with sliding-window "
            "layers whose other layers differ in size: set TQ_SKIP_LAYERS=none and "
            "TQ_FINE_LAYERS=none.",
            spec.unpadded_page_size_bytes,
            padded,
        )
