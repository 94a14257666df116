"""``TurboQuantCache``: the cache that ``model.generate(cache=…)`` takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from tq_kernels import KVFormat
from tq_kernels.format import RotationName, ScaleName
from tq_kernels.presets import find_preset
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from tq_hf.attention import register
from tq_hf.bits import EXACT, layer_bits_checked, read_layer_bits
from tq_hf.layer import CompressedLayer, LayerOptions
from tq_hf.memory import MemoryUsage, measure_memory
from tq_hf.model_layers import ModelLayer, leaves_shared_states, model_layers, text_config
from tq_hf.shared_states import SharedStates
from tq_hf.stand_in import decoded
from tq_hf.storage import read_options, restore, store

__all__ = ["TurboQuantCache"]

#: Most rounds of a rotation that a file may ask for, as each costs memory.
_MOST_ROUNDS = 64

register()


class TurboQuantCache(Cache):
    """A KV cache of codes for decoder-only models of transformers.

    Full-attention layers hold 2, 3, 4 or 8 bits a number and one 16-bit scale a vector; their
    first ``sink_tokens`` and last ``window_tokens`` tokens stay as they came. Sliding-window
    layers, recurrent layers and ``skip_layers`` are those of transformers' own cache. A token is
    encoded once, when it leaves the window, and never again.

    Models with ``"sdpa"`` attention (the default) or ``"turboquant"`` attention read the codes
    in chunks, so a step needs no more memory for a long history than for a short one. With any
    other attention the layer at work is decoded for the time of its step.

    Parameters
    ----------
    config : PretrainedConfig
        ``model.config``.
    k_bits, v_bits : int
        Bits of keys and values: 2, 3, 4 or 8.
    sink_tokens : int
        First tokens kept as they came. With left padding the padding counts.
    window_tokens : int
        Last tokens kept as they came, and up to 15 more, since tokens are encoded 16 at a time.
    skip_layers : sequence of int
        Layers that are not compressed; negative numbers count from the end.
    layer_bits : mapping of int to pair of int
        Bits of keys and values of single layers, in place of ``k_bits`` and ``v_bits``;
        ``(16, 16)`` leaves a layer as it is.
    rotation, rounds, seed, scale
        See `tq_kernels.KVFormat`.
    key_center : mapping of int to float tensor [kv_heads, head_dim], or tensor of all layers
        Subtracted from the keys of a layer before they are encoded, for models whose keys have a
        large common part. Layers at 16 bits take none.
    search : bool
        Try a few scales on every vector and take the codes of least error: better codes of the same
        bytes, which take longer to find.
    metrics : mapping of int to pair of float tensors [kv_heads, head_dim, head_dim]
        What errors of the keys and of the values of a layer count for in a search.
    offloading : bool
        Keep all layers but the one at work on the CPU, as ``DynamicCache(offloading=True)`` does.

    Raises
    ------
    TQError
        For models and options that cannot work: encoder-decoders, latent attention, a
        ``head_dim`` that is no multiple of 16 or above 256, a model without full attention.

    Examples
    --------
    >>> from tq_hf import TurboQuantCache, cache_argument
    >>> from tq_hf.models import load_model
    >>> model, tokenizer = load_model("tiny")
    >>> cache = TurboQuantCache(model.config, k_bits=4, v_bits=3)
    >>> prompt = tokenizer("def add(a, b):", return_tensors="pt")
    >>> out = model.generate(prompt.input_ids, **cache_argument(model, cache), max_new_tokens=8)
    >>> cache.get_seq_length()
    14
    """

    def __init__(
        self,
        config: Any,
        k_bits: int = 4,
        v_bits: int = 4,
        *,
        sink_tokens: int = 4,
        window_tokens: int = 32,
        skip_layers: Sequence[int] = (),
        layer_bits: Mapping[int, Sequence[int]] | None = None,
        rotation: RotationName = "hadamard",
        rounds: int = 3,
        seed: int = 0,
        scale: ScaleName = "unbiased",
        key_center: Mapping[int, Tensor] | Tensor | None = None,
        search: bool = False,
        metrics: Mapping[int, tuple[Tensor, Tensor]] | None = None,
        offloading: bool = False,
    ) -> None:
        found = model_layers(config)
        text = text_config(config)
        for name, value in (("sink_tokens", sink_tokens), ("window_tokens", window_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise TQError(f"{name}={value!r}: needs an int of 0 or more")
        skipped = _skipped(skip_layers, len(found))
        able = [i for i, layer in enumerate(found) if layer.kind in ("full", "hybrid")]
        own_bits = layer_bits_checked(layer_bits or {}, len(found), set(able) - skipped)
        skipped |= {i for i, pair in own_bits.items() if pair == EXACT}
        compressed = [i for i in able if i not in skipped]
        if not compressed:
            raise TQError(
                f"{text.model_type} with layers {sorted(skipped)} at 16 bits has no layer left to "
                "compress (only full attention is); use DynamicCache(config=config)"
            )
        bits = {i: own_bits.get(i, (k_bits, v_bits)) for i in compressed}
        common = {"rotation": rotation, "rounds": rounds, "seed": seed, "scale": scale}
        _format(text.model_type, [found[i] for i in compressed], k_bits, v_bits, common)
        formats = {
            pair: _format(
                text.model_type,
                [found[i] for i in compressed if bits[i] == pair],
                *pair,
                common,
            )
            for pair in dict.fromkeys(bits.values())
        }
        if offloading and not torch.cuda.is_available():
            raise TQError("offloading=True: needs a CUDA device; leave it out")
        if not isinstance(search, bool):
            raise TQError(f"search={search!r}: needs True or False")
        if metrics is not None and not search:
            raise TQError("metrics are for a search: add search=True or leave them out")
        centers = _centers(key_center, compressed, skipped)
        own_metrics = _metrics(metrics or {}, compressed, skipped)
        options = {
            pair: LayerOptions(fmt, sink_tokens, window_tokens, text, search)
            for pair, fmt in formats.items()
        }
        layers = [
            _compressed(layer, options[bits[i]], centers.get(i), own_metrics.get(i))
            if i in bits
            else layer.make()
            for i, layer in enumerate(found)
        ]
        self._arguments = {
            "k_bits": k_bits,
            "v_bits": v_bits,
            "sink_tokens": sink_tokens,
            "window_tokens": window_tokens,
            "skip_layers": sorted(skipped),
            "layer_bits": {str(i): list(own_bits[i]) for i in sorted(own_bits) if i in bits},
            "rotation": rotation,
            "rounds": rounds,
            "seed": seed,
            "scale": scale,
            "search": search,
        }
        super().__init__(layers=layers, offloading=offloading)
        if leaves_shared_states(text):
            self.shared_layers = SharedStates(text)

    @classmethod
    def from_preset(cls, config: Any, preset: str = "tq4", **options: Any) -> TurboQuantCache:
        """A cache of a named format; see `tq_kernels.presets`.

        Parameters
        ----------
        config : PretrainedConfig
            ``model.config``.
        preset : str
        options
            Of the class, in place of the preset's or beside them.

        Raises
        ------
        TQError
            For an unknown name, and as the class does.
        """
        found = find_preset(preset)
        names = ("k_bits", "v_bits", "sink_tokens", "window_tokens", "skip_layers", "scale")
        return cls(config, **{name: getattr(found, name) for name in names} | options)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens to a layer; see `CompressedLayer.update`.

        Under ``torch.compile`` it runs outside of the graph and returns decoded tensors.
        """
        if torch.compiler.is_compiling():
            pair = self._update_decoded(key_states, value_states, layer_idx, *args, **kwargs)
            return pair[0], pair[1]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_decoded(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return decoded(keys), decoded(values)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every layer; see `CompressedLayer.crop`.

        Raises
        ------
        TQError
            If a sliding-window layer no longer has what it would need. Nothing is removed then.
        """
        for index, layer in enumerate(self.layers):
            if (
                isinstance(layer, DynamicSlidingWindowLayer)
                and layer.get_seq_length() >= layer.sliding_window
                and not getattr(layer, "record_past", False)
            ):
                raise TQError(
                    f"crop({tokens_to_remove}): sliding-window layer {index} saw "
                    f"{layer.get_seq_length()} tokens and keeps {layer.sliding_window - 1}; "
                    "transformers 5 can crop it after cache.activate_past_recording()"
                )
        super().crop(tokens_to_remove)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache, codes as they are, to a safetensors file; metrics are left out.

        Raises
        ------
        TQError
            For models with recurrent layers.
        """
        store(self.layers, self._arguments, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        device: torch.device | str = "cpu",
        metrics: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> TurboQuantCache:
        """Read a cache that `save` wrote, for the same model.

        Parameters
        ----------
        path : path
        config : PretrainedConfig
            ``model.config``.
        device : torch.device or str
            Where the model is.
        metrics
            Of the class, for the tokens to come.

        Raises
        ------
        TQError
            If the file is damaged, or written for another kind of model.
        """
        arguments = read_options(path)
        others = {"config", "key_center", "metrics", "offloading"}
        names = inspect.signature(cls).parameters.keys() - others
        if arguments.keys() != names:
            raise TQError(f"{path} has options {sorted(arguments)}: needs {sorted(names)}")
        if not isinstance(arguments["skip_layers"], list):
            raise TQError(f"{path} has skip_layers={arguments['skip_layers']!r}: needs a list")
        arguments["layer_bits"] = read_layer_bits(arguments["layer_bits"], str(path))
        rounds = arguments["rounds"]
        if not isinstance(rounds, int) or rounds > _MOST_ROUNDS:
            raise TQError(f"{path} has rounds={rounds!r}: needs an int of at most {_MOST_ROUNDS}")
        cache = cls(config, **arguments, metrics=metrics)
        restore(cache.layers, path, torch.device(device))
        return cache

    def memory_usage(self) -> MemoryUsage:
        """Bytes that the cache's tensors take, and those of a 16-bit cache."""
        return measure_memory(self.layers, self.get_seq_length())


def _compressed(
    layer: ModelLayer,
    options: LayerOptions,
    key_center: Tensor | None,
    metrics: tuple[Tensor, Tensor] | None,
) -> CompressedLayer:
    if layer.kind == "full":
        return CompressedLayer(options, key_center, metrics)
    from tq_hf.hybrid_layer import CompressedHybridLayer  # needs transformers 5

    return CompressedHybridLayer(options, key_center, metrics, **layer.kwargs)


def _skipped(skip_layers: Sequence[int], count: int) -> set[int]:
    for index in skip_layers:
        if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
            raise TQError(
                f"skip_layers has {index!r}: the model has layers 0 to {count - 1}; negative "
                "numbers count from the end"
            )
    return {index % count for index in skip_layers}


def _format(
    model_type: str, layers: Sequence[ModelLayer], k_bits: int, v_bits: int, common: dict[str, Any]
) -> KVFormat:
    """The format of the first layer, after building those of all."""
    formats = []
    for dim in dict.fromkeys(layer.head_dim for layer in layers):
        try:
            formats.append(KVFormat(128 if dim is None else dim, k_bits, v_bits, **common))
        except TQError as error:
            if dim is not None and (dim % 16 or not 16 <= dim <= 256):
                raise TQError(
                    f"{model_type} has head_dim={dim}: TurboQuantCache needs a multiple of 16 "
                    "from 16 to 256; use DynamicCache"
                ) from error
            raise
    return formats[0]


def _centers(
    key_center: Mapping[int, Tensor] | Tensor | None,
    compressed: Sequence[int],
    skipped: Collection[int],
) -> dict[int, Tensor]:
    if key_center is None:
        return {}
    pairs = key_center.items() if isinstance(key_center, Mapping) else enumerate(key_center)
    centers = {}
    for index, center in pairs:
        if not isinstance(center, Tensor) or center.dim() != 2:
            raise TQError(f"key_center[{index}]: needs a tensor [kv_heads, head_dim]")
        if not bool(torch.isfinite(center).all()):
            raise TQError(f"key_center[{index}] is not finite: recompute it")
        if index in compressed:
            centers[index] = center.detach().to(torch.float32).clone()
        elif isinstance(key_center, Mapping) and index not in skipped:
            raise TQError(f"key_center has layer {index}, which is not compressed; leave it out")
    return centers


def _metrics(
    metrics: Mapping[int, tuple[Tensor, Tensor]],
    compressed: Sequence[int],
    skipped: Collection[int],
) -> dict[int, tuple[Tensor, Tensor]]:
    found = {}
    for index, (keys, values) in metrics.items():
        for name, metric in (("keys", keys), ("values", values)):
            if metric.dim() != 3 or not bool(torch.isfinite(metric).all()):
                raise TQError(
                    f"metrics[{index}] of {name}: needs a finite tensor [kv_heads, head_dim, "
                    f"head_dim], not one of shape {tuple(metric.shape)}; run `tq calibrate --metrics`"
                )
        if index in compressed:
            found[index] = (keys.detach().float(), values.detach().float())
        elif index not in skipped:
            raise TQError(f"metrics has layer {index}, which is not compressed; leave it out")
    return found
