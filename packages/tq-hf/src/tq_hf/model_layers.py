"""Which layers a model has, and whether their cache can be compressed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from tq_core import TQError
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["ModelLayer", "leaves_shared_states", "model_layers", "text_config"]

Kind = Literal["full", "hybrid", "sliding", "linear", "none"]

_KINDS: dict[str, Kind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "hybrid_sliding": "sliding",
    "hybrid": "hybrid",
    "linear_attention": "linear",
    "conv": "linear",
    "mamba": "linear",
    "dummy": "none",
}


#: Models of transformers 5 that check the class of their cache.
_OWN_CACHE = ("minimax",)


@dataclass(frozen=True)
class ModelLayer:
    """A layer of a model, as its cache sees it.

    Attributes
    ----------
    kind : {"full", "hybrid", "sliding", "linear", "none"}
        Attention to everything, that and a recurrent state, attention to a window, a recurrent
        state, or no cache of its own.
    head_dim : int or None
        As far as the configuration says.
    kwargs : dict
        Arguments of transformers' own cache layer.
    type : str
        transformers' name of it.
    """

    kind: Kind
    head_dim: int | None
    kwargs: dict[str, Any]
    type: str

    def make(self) -> Any:
        """An empty 16-bit cache layer of transformers."""
        try:
            from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
        except ImportError:
            if self.kind == "sliding":
                return DynamicSlidingWindowLayer(**self.kwargs)
            plain: Any = DynamicLayer
            return plain()
        return DYNAMIC_LAYER_TYPE_MAPPING[self.type](**self.kwargs)


def text_config(config: object) -> Any:
    """The configuration of the model's decoder.

    Raises
    ------
    TQError
        If ``config`` is none, or of a model whose cache has another form.
    """
    if not isinstance(config, PretrainedConfig):
        raise TQError(f"config is a {type(config).__name__}: pass model.config")
    text: Any = config.get_text_config(decoder=True)
    for part in (config, text):
        if getattr(part, "is_encoder_decoder", False):
            raise TQError(
                f"{part.model_type} is an encoder-decoder model: TurboQuantCache is for "
                "decoder-only models; use EncoderDecoderCache"
            )
    if text.model_type in _OWN_CACHE:
        raise TQError(f"{text.model_type} takes no cache but its own; leave the cache out")
    if getattr(text, "kv_lora_rank", None):
        raise TQError(
            f"{text.model_type} has latent attention (kv_lora_rank={text.kv_lora_rank}), whose "
            "keys and values have different dimensions; use DynamicCache"
        )
    return text


def _types_and_kwargs(text: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """transformers' layer types and the arguments of their cache layers."""
    try:
        from transformers.cache_utils import get_layer_types_and_kwargs
    except ImportError:
        return _types_and_kwargs_4(text)
    types, kwargs = get_layer_types_and_kwargs(text)
    return list(types), list(kwargs)


def _types_and_kwargs_4(text: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The same, for transformers 4.57, whose models with other layers bring their own caches."""
    for name in ("layers_block_type", "mamba_d_state", "conv_L_cache", "hybrid_override_pattern"):
        if getattr(text, name, None) is not None:
            raise TQError(
                f"{text.model_type} has recurrent layers ({name}), for which transformers "
                f"{transformers.__version__} has a cache of the model's own; install "
                "transformers 5"
            )
    window = getattr(text, "sliding_window", None)
    window = window or getattr(text, "attention_chunk_size", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        one = "full_attention" if window is None else "sliding_attention"
        types = [one] * text.num_hidden_layers
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    types = list(types)[: len(types) - shared]
    if "linear_attention" in types or "conv" in types:
        raise TQError(
            f"{text.model_type} has recurrent layers, for which transformers "
            f"{transformers.__version__} has a cache of the model's own; install transformers 5"
        )
    sliding = ("sliding_attention", "chunked_attention")
    return types, [{"sliding_window": window} if t in sliding else {} for t in types]


def _layer_configs(text: Any, count: int) -> Iterator[Any]:
    yield from getattr(text, "per_layer_config", None) or [text] * count


def _head_dim(text: Any, layer: Any) -> int | None:
    dim = getattr(layer, "head_dim", None)
    if dim is None:
        heads = getattr(text, "num_attention_heads", None)
        hidden = getattr(text, "hidden_size", None)
        dim = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else None
    return dim if isinstance(dim, int) else None


def model_layers(config: object) -> list[ModelLayer]:
    """Layers of the model, in the order of the cache's.

    Raises
    ------
    TQError
        For models that a `TurboQuantCache` cannot serve.
    """
    text = text_config(config)
    types, kwargs = _types_and_kwargs(text)
    layers = []
    for index, (name, options, layer) in enumerate(
        zip(types, kwargs, _layer_configs(text, len(types)), strict=False)
    ):
        kind = _KINDS.get(name)
        if kind is None:
            raise TQError(
                f"layer {index} of {text.model_type} is {name!r}: TurboQuantCache knows "
                f"{', '.join(_KINDS)}; use DynamicCache"
            )
        dim = _head_dim(text, layer) if kind in ("full", "hybrid") else None
        v_dim = getattr(layer, "v_head_dim", None)
        if isinstance(v_dim, int) and dim is not None and v_dim != dim:
            raise TQError(
                f"layer {index} of {text.model_type} has head_dim={dim} and v_head_dim={v_dim}: "
                "TurboQuantCache needs them equal; use DynamicCache"
            )
        layers.append(ModelLayer(kind, dim, options, name))
    return layers


def leaves_shared_states(text: Any) -> bool:
    """Whether the model leaves keys and values for other layers in the cache (4.57)."""
    modes = hasattr(text, "kv_sharing_modes")
    return not modes and bool(getattr(text, "num_kv_shared_layers", 0))
