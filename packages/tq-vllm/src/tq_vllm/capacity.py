"""How much context a GPU holds: bytes of a token, from a model's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_core import PageLayout, TQError
from tq_kernels.presets import PRESETS

from tq_vllm.settings import EDGES, FINE_BITS, named_layers

__all__ = ["CacheFormat", "Capacity", "ModelShape", "capacity", "formats", "read_config"]

#: More layers than any model has; a list of them still fits into memory.
_MOST_LAYERS = 10_000
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelShape:
    """What the size of a model's cache depends on.

    Attributes
    ----------
    layers : tuple of (int or None)
        For each attention layer the window, None for all tokens.
    numbers : tuple of int
        Number in the model of each attention layer; other kinds of layers leave gaps.
    total : int
        Layers of the model.
    kv_heads, head_dim : int
    longest : int
        Positions that the model supports.
    """

    layers: tuple[int | None, ...]
    numbers: tuple[int, ...]
    total: int
    kv_heads: int
    head_dim: int
    longest: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the configuration of a model of transformers.

        Raises
        ------
        TQError
            For a configuration without the numbers that are needed, and for caches that are not
            one key and one value a token and head.
        """
        text = config.get("text_config") or config
        if not isinstance(text, Mapping):
            raise TQError(f"the configuration has text_config={text!r:.40}: needs an object")
        if text.get("kv_lora_rank"):
            raise TQError(
                "the model has multi-head latent attention (MLA): its cache is no keys and values by "
                "head"
            )

        def given(name: str, limit: int = 2**31) -> int | None:
            value = text.get(name)
            if value is None:
                return None
            if type(value) is not int or not 1 <= value <= limit:
                raise TQError(
                    f"the configuration has {name}={value!r:.40}: needs an integer from 1 to {limit}"
                )
            return value

        def need(*names: str, limit: int = 2**31) -> int:
            for name in names:
                if (value := given(name, limit)) is not None:
                    return value
            raise TQError(f"the configuration has none of {', '.join(names)}; is it a decoder's?")

        total = need("num_hidden_layers", "n_layer", limit=_MOST_LAYERS)
        heads = need("num_attention_heads", "n_head")
        window = given("sliding_window")
        kinds = text.get("layer_types")
        if kinds is None:
            used = window is not None and text.get("use_sliding_window", True)
            kinds = [_SLIDING if used else _FULL] * total
        if not isinstance(kinds, list) or len(kinds) != total:
            raise TQError(f"the configuration has layer_types={kinds!r:.40}: needs one a layer")
        attention = [n for n, kind in enumerate(kinds) if kind in (_FULL, _SLIDING)]
        if not attention:
            raise TQError("the configuration has no layer of attention: there is no cache to plan")
        if _SLIDING in kinds and window is None:
            raise TQError("the configuration has sliding layers and no sliding_window")
        head_dim = given("head_dim") or need("hidden_size", "n_embd") // heads
        if head_dim == 0:
            raise TQError(
                f"the configuration has fewer dimensions than its {heads} heads; give head_dim or a "
                "larger hidden_size"
            )
        return cls(
            tuple(window if kinds[n] == _SLIDING else None for n in attention),
            tuple(attention),
            total,
            given("num_key_value_heads") or heads,
            head_dim,
            need("max_position_embeddings", "n_positions", "n_ctx"),
        )


@dataclass(frozen=True)
class CacheFormat:
    """A way to store the cache.

    Attributes
    ----------
    name : str
    k_bits, v_bits : int
        8 or 16 without codes for ``fp8`` and ``bf16``.
    skip_layers, fine_layers : str
        Layers kept at 16 bits and layers with more bits, as ``TQ_SKIP_LAYERS`` and
        ``TQ_FINE_LAYERS``.
    codes : bool
        Whether it is pages of codes, with two scales a token and head.
    """

    name: str
    k_bits: int
    v_bits: int
    skip_layers: str = "none"
    fine_layers: str = "none"
    codes: bool = True

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of a token and KV head in most layers."""
        if self.codes:
            return PageLayout(head_dim, self.k_bits, self.v_bits, 16).slot_bytes
        return head_dim * (self.k_bits + self.v_bits) // 8


def formats(
    k_bits: int | None = None,
    v_bits: int | None = None,
    skip_layers: str = "none",
    fine_layers: str | None = None,
) -> list[CacheFormat]:
    """The presets beside bf16 and fp8, or instead of the presets the bits that are asked for."""
    plain = [CacheFormat("bf16", 16, 16, codes=False), CacheFormat("fp8", 8, 8, codes=False)]
    if k_bits is None and v_bits is None:
        presets = [
            CacheFormat(
                name,
                preset.k_bits,
                preset.v_bits,
                skip_layers,
                (EDGES if preset.k_bits <= 3 else "none") if fine_layers is None else fine_layers,
            )
            for name, preset in PRESETS.items()
        ]
        return plain + presets
    k, v = (4 if bits is None else bits for bits in (k_bits, v_bits))
    return [*plain, CacheFormat(f"k{k}v{v}", k, v, skip_layers, fine_layers or "none")]


@dataclass(frozen=True)
class Capacity:
    """What fits into a cache.

    Attributes
    ----------
    format : CacheFormat
    slot_bytes : int
        Of a token and KV head of a compressed layer.
    token_bytes : int
        Of a token, in all layers that keep all tokens.
    window_bytes : int
        Of a sequence, in the layers that keep a window, when it is full.
    longest : int
        Tokens of the longest sequence that fits, at most the positions of the model.
    requests : int
        Sequences of the given length that fit at once.
    ratio : float
        How many times smaller than at 16 bits a sequence of the given length is.
    """

    format: CacheFormat
    slot_bytes: int
    token_bytes: int
    window_bytes: int
    longest: int
    requests: int
    ratio: float


def _layer_bytes(shape: ModelShape, fmt: CacheFormat) -> list[int]:
    """Bytes of a token in each attention layer."""
    kept, kept_windows = named_layers(fmt.skip_layers, shape.total)
    fine, fine_windows = named_layers(fmt.fine_layers, shape.total)
    slots = []
    for n, window in zip(shape.numbers, shape.layers, strict=True):
        if n in kept or (kept_windows and window is not None):
            slots.append(4 * shape.head_dim)
        elif n in fine or (fine_windows and window is not None):
            slots.append(PageLayout(shape.head_dim, *FINE_BITS, 16).slot_bytes)
        else:
            slots.append(fmt.slot_bytes(shape.head_dim))
    return [shape.kv_heads * slot for slot in slots]


def _sequence_bytes(shape: ModelShape, layers: list[int], tokens: int) -> int:
    return sum(
        size * (tokens if window is None else min(tokens, window))
        for size, window in zip(layers, shape.layers, strict=True)
    )


def capacity(shape: ModelShape, fmt: CacheFormat, cache_bytes: int, tokens: int) -> Capacity:
    """What fits into a cache of ``cache_bytes``, with sequences of ``tokens`` tokens."""
    layers = _layer_bytes(shape, fmt)
    sequence = _sequence_bytes(shape, layers, tokens)
    plain = [4 * shape.head_dim * shape.kv_heads] * len(layers)
    low, high = 0, shape.longest
    while low < high:  # the longest sequence that fits
        middle = (low + high + 1) // 2
        if _sequence_bytes(shape, layers, middle) <= cache_bytes:
            low = middle
        else:
            high = middle - 1
    return Capacity(
        fmt,
        fmt.slot_bytes(shape.head_dim),
        sum(size for size, w in zip(layers, shape.layers, strict=True) if w is None),
        sum(size * w for size, w in zip(layers, shape.layers, strict=True) if w is not None),
        low,
        cache_bytes // sequence,
        _sequence_bytes(shape, plain, tokens) / sequence,
    )


def read_config(model: str) -> dict[str, Any]:
    """Read a configuration from a file, a folder, or by its id on the Hugging Face hub.

    Raises
    ------
    TQError
        If there is none.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists():
        path = Path(_download(model))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TQError(
            f"{path}: no configuration of a model ({error}); name its config.json"
        ) from None
    if not isinstance(config, dict):
        raise TQError(f"{path}: no configuration of a model; name its config.json")
    return config


def _download(model: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TQError(
            f"{model!r} is no file or folder, and the hub does not give it ({reason}); name a "
            "config.json"
        ) from None
