"""A cache as a safetensors file.

A file is checked whole before anything is read from it: names, types and shapes of all tensors
follow from a small description in the file's metadata, which has to fit the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tq_core import TQError
from tq_kernels import TokenCodes
from tq_kernels.codec import plane_bytes
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from tq_hf.history import SEGMENT_TOKENS
from tq_hf.layer import CompressedLayer

__all__ = ["FORMAT", "read_options", "restore", "store"]

#: Value of the metadata's "format".
FORMAT = "tq-hf cache 1"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _State:
    """Sizes of a stored layer.

    Attributes
    ----------
    batch, kv_heads, head_dim : int
    dtype : str
        Of the plain tokens: "F16", "BF16", "F32" or "F64".
    head, codes, tail : int
        Tokens at the beginning, of codes, and at the end; plain layers have only a tail.
    seen : int
        Tokens that a sliding-window layer has seen.
    center : bool
        Whether there is a key center.
    """

    batch: int
    kv_heads: int
    head_dim: int
    dtype: str
    head: int
    codes: int
    tail: int
    seen: int
    center: bool

    @classmethod
    def of_layer(cls, index: int, layer: Any) -> _State | None:
        if type(layer) is CompressedLayer:
            if not layer.is_initialized:
                return None
            head, tail = layer.head[0], layer.tail[0]
            batch, kv_heads, _, dim = tail.shape
            counts = (head.shape[-2], layer.history.tokens, tail.shape[-2])
            center = layer.key_center is not None
            return cls(batch, kv_heads, dim, _NAMES[tail.dtype], *counts, sum(counts), center)
        if not isinstance(layer, CacheLayerMixin) and getattr(layer, "keys", layer) is None:
            return None  # holds nothing by design
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TQError(
                f"layer {index} is a {type(layer).__name__}: only attention layers can be saved"
            )
        keys = layer.keys
        if not layer.is_initialized or keys is None or keys.dim() != 4:
            return None
        batch, kv_heads, tokens, dim = keys.shape
        if keys.dtype not in _NAMES or layer.values.shape != keys.shape:
            raise TQError(f"layer {index} holds {keys.dtype} keys or differently shaped values")
        seen = layer.get_seq_length()
        return cls(batch, kv_heads, dim, _NAMES[keys.dtype], 0, 0, tokens, seen, False)

    @classmethod
    def of_json(cls, index: int, data: object) -> _State:
        kinds: dict[str, type] = dict.fromkeys((field.name for field in fields(cls)), int)
        kinds |= {"dtype": str, "center": bool}
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            raise TQError(f"layer {index} needs the entries {sorted(kinds)}")
        for name, kind in kinds.items():
            if type(data[name]) is not kind:
                raise TQError(f"layer {index} has {name}={data[name]!r}: needs {kind.__name__}")
        state = cls(**data)
        sizes = (state.batch, state.kv_heads, state.head_dim)
        counts = (state.head, state.codes, state.tail, state.seen)
        if min(sizes) < 1 or min(counts) < 0 or max(*sizes, *counts) >= 2**40:
            raise TQError(f"layer {index} has impossible sizes {sizes} or counts {counts}")
        if state.dtype not in _DTYPES:
            raise TQError(f"layer {index} has dtype={state.dtype!r}: needs one of {list(_DTYPES)}")
        return state

    def check(self, index: int, layer: Any) -> None:
        """Raise unless the counts are those of a layer of this kind."""
        if isinstance(layer, CompressedLayer):
            options = layer.options
            fits = self.head <= options.sink_tokens and (
                self.head == options.sink_tokens or not (self.codes or self.tail)
            )
            fits = fits and self.seen == self.head + self.codes + self.tail
        else:
            fits = not (self.head or self.codes or self.center)
            if isinstance(layer, DynamicSlidingWindowLayer):
                fits = fits and self.tail == min(self.seen, max(layer.sliding_window - 1, 0))
            else:
                fits = fits and self.tail == self.seen
        if not fits:
            raise TQError(f"layer {index} has counts that its kind of layer cannot have: {self}")


def _segments(tokens: int) -> Iterator[tuple[int, int]]:
    for number, start in enumerate(range(0, tokens, SEGMENT_TOKENS)):
        yield number, min(SEGMENT_TOKENS, tokens - start)


def _contents(
    index: int, layer: Any, state: _State
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a layer."""
    lead = (state.batch, state.kv_heads)
    plain = _DTYPES[state.dtype]
    for end, tokens in (("head", state.head), ("tail", state.tail)):
        for kind in "kv":
            yield f"{index}.{end}.{kind}", plain, (*lead, tokens, state.head_dim)
    if state.center:
        yield f"{index}.center", torch.float32, (state.kv_heads, state.head_dim)
    for number, tokens in _segments(state.codes):
        for kind in "kv":
            fmt = layer.options.fmt
            bits = fmt.k_bits if kind == "k" else fmt.v_bits
            name = f"{index}.codes.{number}.{kind}"
            for plane, width in enumerate(plane_bytes(bits, state.head_dim)):
                yield f"{name}.{plane}", torch.uint8, (*lead, tokens, width)
            yield f"{name}.scales", torch.float16, (*lead, tokens)


def _tensors(index: int, layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and data of every tensor of a layer, in the order of `_contents`."""
    if not isinstance(layer, CompressedLayer):
        yield f"{index}.head.k", layer.keys[..., :0, :]
        yield f"{index}.head.v", layer.values[..., :0, :]
        yield f"{index}.tail.k", layer.keys
        yield f"{index}.tail.v", layer.values
        return
    for end, states in (("head", layer.head), ("tail", layer.tail)):
        yield f"{index}.{end}.k", states[0]
        yield f"{index}.{end}.v", states[1]
    if layer.key_center is not None:
        yield f"{index}.center", layer.key_center
    for number, pair in enumerate(layer.history.parts()):
        for kind, codes in zip("kv", pair, strict=True):
            name = f"{index}.codes.{number}.{kind}"
            for plane, data in enumerate(codes.planes):
                yield f"{name}.{plane}", data
            yield f"{name}.scales", codes.scales


def store(layers: list[Any], options: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write layers and the options of their cache; a file is there whole or not at all.

    Raises
    ------
    TQError
        For layers other than attention.
    """
    states = [_State.of_layer(i, layer) for i, layer in enumerate(layers)]
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        if state is not None:
            state.check(i, layer)
    tensors = {
        name: tensor.detach().contiguous()
        for i, (layer, state) in enumerate(zip(layers, states, strict=True))
        if state is not None
        for name, tensor in _tensors(i, layer)
    }
    described = [None if state is None else asdict(state) for state in states]
    metadata = {"format": FORMAT, "options": json.dumps(options), "layers": json.dumps(described)}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, str(partial), metadata)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _metadata(file: Any, path: object) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise TQError(
            f"{path} has format {metadata.get('format')!r}: needs {FORMAT!r}; write it with "
            "TurboQuantCache.save"
        )
    try:
        return {name: json.loads(metadata[name]) for name in ("options", "layers")}
    except (KeyError, ValueError, RecursionError) as error:
        raise TQError(f"{path} has a damaged description: {error}") from error


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        return safe_open(os.fspath(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise TQError(f"{path} is no whole safetensors file: {error}") from error


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of the cache in a file, as they are there.

    Raises
    ------
    TQError
        If it is no such file.
    """
    with _open(path) as file:
        options = _metadata(file, path)["options"]
    if not isinstance(options, dict):
        raise TQError(f"{path} has options of type {type(options).__name__}: needs an object")
    return options


def restore(layers: list[Any], path: str | os.PathLike[str], device: torch.device) -> None:
    """Fill the empty layers of a cache.

    Raises
    ------
    TQError
        If the file is damaged, does not belong to such layers, or holds numbers that are not
        finite. No layer is filled then.
    """
    with _open(path) as file:
        described = _metadata(file, path)["layers"]
        if not isinstance(described, list) or len(described) != len(layers):
            raise TQError(f"{path} is not of a model of {len(layers)} cache layers")
        states: list[_State | None] = []
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        names = set(file.keys())
        for i, (layer, data) in enumerate(zip(layers, described, strict=True)):
            state = None if data is None else _State.of_json(i, data)
            states.append(state)
            if state is None:
                continue
            state.check(i, layer)
            if state.codes > SEGMENT_TOKENS * len(names):
                raise TQError(f"{path} has no tensors for {state.codes} tokens of layer {i}")
            expected |= {name: (dtype, shape) for name, dtype, shape in _contents(i, layer, state)}
        _check_together(path, layers, states)
        if names != expected.keys():
            odd = sorted(names ^ expected.keys())
            raise TQError(f"{path} lacks, or should not have, tensors such as {odd[0]!r}")
        for name, (dtype, shape) in expected.items():
            _check_tensor(path, file, name, dtype, shape)
        tensors = {}
        for name in expected:
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TQError(f"{path} has numbers in {name!r} that are not finite")
            tensors[name] = tensor.to(device)
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        if state is not None:
            _fill(i, layer, state, tensors)


def _check_together(path: object, layers: list[Any], states: list[_State | None]) -> None:
    """Raise unless all layers that hold tokens hold the same number for the same batch."""
    found = {
        None if state is None else (state.batch, state.seen)
        for layer, state in zip(layers, states, strict=True)
        if isinstance(layer, CacheLayerMixin)
    }
    extra = any(
        state is not None and not isinstance(layer, CacheLayerMixin)
        for layer, state in zip(layers, states, strict=True)
    )
    if len(found) > 1 or extra:
        raise TQError(f"{path} has layers of different batches or lengths: {found}")


def _check_tensor(
    path: object, file: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    part = file.get_slice(name)
    kind = {"U8": torch.uint8, **_DTYPES}.get(part.get_dtype())
    if kind != dtype or tuple(part.get_shape()) != shape:
        raise TQError(
            f"{path} has {name!r} as {part.get_dtype()} {part.get_shape()}: needs {dtype} "
            f"{list(shape)}"
        )


def _fill(index: int, layer: Any, state: _State, tensors: dict[str, Tensor]) -> None:
    ends = [tuple(tensors[f"{index}.{end}.{kind}"] for kind in "kv") for end in ("head", "tail")]
    if not isinstance(layer, CompressedLayer):
        layer.update(*ends[1])
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = state.seen
        return
    parts = []
    for number, _ in _segments(state.codes):
        pair = []
        for kind, bits in (("k", layer.options.fmt.k_bits), ("v", layer.options.fmt.v_bits)):
            name = f"{index}.codes.{number}.{kind}"
            count = len(plane_bytes(bits, state.head_dim))
            planes = tuple(tensors[f"{name}.{plane}"] for plane in range(count))
            pair.append(TokenCodes(planes, tensors[f"{name}.scales"]))
        parts.append((pair[0], pair[1]))
    center = tensors[f"{index}.center"] if state.center else None
    layer.restore((ends[0][0], ends[0][1]), parts, (ends[1][0], ends[1][1]), center)
