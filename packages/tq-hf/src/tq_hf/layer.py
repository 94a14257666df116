"""A full-attention layer of the cache: codes, with a few 16-bit tokens at either end."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from tq_kernels import KVFormat, TokenCodes, encode_tokens
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tq_hf.attention import IMPLEMENTATION
from tq_hf.history import SEGMENT_TOKENS, CodeHistory
from tq_hf.modes import held
from tq_hf.snapshot import Snapshot
from tq_hf.stand_in import stand_ins

__all__ = ["CompressedLayer", "KeyCenterWarning", "LayerOptions"]

#: Tokens leave the window in blocks of this many.
BLOCK_TOKENS = 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Since transformers 5, ``crop`` takes the negated number of tokens to remove; before, a length.
_CROP_REMOVES = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters

#: Tokens from which, and share of energy above which, the mean of keys is judged too large.
_LEAST_JUDGED, _COMMON_SHARE = 64, 0.9


class KeyCenterWarning(UserWarning):
    """The keys of a model have a large common part that should be subtracted first."""


@dataclass(frozen=True)
class LayerOptions:
    """What all compressed layers of a cache share.

    Attributes
    ----------
    fmt : KVFormat
        Its ``head_dim`` is replaced by that of the layer's keys.
    sink_tokens, window_tokens : int
        First and last tokens kept as they came.
    config : object
        The model's text configuration. Its ``_attn_implementation`` is read at every update.
    search : bool
        Whether codes are searched; see `tq_kernels.encode_tokens`.
    """

    fmt: KVFormat
    sink_tokens: int
    window_tokens: int
    config: Any
    search: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerOptions:
        return self

    @property
    def reads_codes(self) -> bool:
        """Whether the model's attention takes stand-ins for tensors."""
        return getattr(self.config, "_attn_implementation", None) in ("sdpa", IMPLEMENTATION)


class CompressedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer.

    The first ``sink_tokens`` and the last ``window_tokens`` (up to 15 more, since tokens are
    encoded in blocks of 16) are kept as they came; everything between is codes, each encoded once.

    Parameters
    ----------
    options : LayerOptions
    key_center : float tensor [kv_heads, head_dim], optional
        Subtracted from the keys before they are encoded.
    metrics : pair of float tensors [kv_heads, head_dim, head_dim], optional
        What errors of keys and of values count for when codes are searched.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    def __init__(
        self,
        options: LayerOptions,
        key_center: Tensor | None = None,
        metrics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.options = options
        self.key_center = key_center
        self.metrics = metrics
        self.history = CodeHistory()
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = False
        self.history.clear()
        self.fmt: KVFormat | None = None
        self._head: tuple[Tensor, Tensor] | None = None
        self._tail: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        fmt = self.options.fmt
        return f"CompressedLayer(k_bits={fmt.k_bits}, v_bits={fmt.v_bits})"

    # What is held

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the sink tokens, [batch, kv_heads, tokens, head_dim]."""
        assert self._head is not None
        return self._head

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the window, [batch, kv_heads, tokens, head_dim]."""
        assert self._tail is not None
        return self._tail

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layer holds."""
        if self.is_initialized:
            yield from self.head
            yield from self.tail
            yield from self.history.tensors()
        if self.key_center is not None:
            yield self.key_center
        yield from self.metrics or ()
        yield from self.states()

    def states(self) -> Iterator[Tensor]:
        """What layers of other kinds hold besides keys and values."""
        yield from ()

    def snapshot(self) -> Snapshot:
        """What the layer holds, as attention sees it."""
        return Snapshot(self.head, self.history.parts(), self.tail, self.fmt, self.key_center)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The keys [batch, kv_heads, tokens, head_dim], decoded at every access; do not write."""
        return self.snapshot().dense("k") if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values [batch, kv_heads, tokens, head_dim], decoded at every access; do not write."""
        return self.snapshot().dense("v") if self.is_initialized else None

    # Lengths

    def get_seq_length(self) -> int:
        """Tokens held."""
        if not self.is_initialized:
            return 0
        return self.head[0].shape[-2] + self.history.tokens + self.tail[0].shape[-2]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a step sees (4.57 passes the positions)."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """No limit: -1."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit: -1."""
        return -1

    # Filling

    @held
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take batch, heads, head_dim, dtype and device from the first keys and values."""
        values = key_states if value_states is None else value_states
        _check_states(key_states, values)
        fmt = replace(self.options.fmt, head_dim=key_states.shape[-1])
        center = self.key_center
        if center is not None and center.shape != (key_states.shape[1], fmt.head_dim):
            raise TQError(
                f"key_center has shape {tuple(center.shape)}: this layer needs "
                f"[{key_states.shape[1]}, {fmt.head_dim}] (kv_heads, head_dim)"
            )
        if center is not None:
            self.key_center = center.to(key_states.device)
        if self.metrics is not None:
            one, two = (metric.to(key_states.device) for metric in self.metrics)
            self.metrics = one, two
        self.fmt = fmt
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = key_states[..., :0, :].clone(), values[..., :0, :].clone()
        self._head = self._tail = empty
        self.is_initialized = True

    @held
    def _add(self, key_states: Tensor, value_states: Tensor) -> Snapshot:
        """Hold new tokens; return what the step sees, codes as they were before it."""
        if self.tail[0].device != key_states.device:
            self.move(key_states.device)
        new = (key_states.detach(), value_states.detach())
        take = min(new[0].shape[-2], self.options.sink_tokens - self.head[0].shape[-2])
        head, tail = self.head, self.tail
        if take > 0:
            head = _cat(head, tuple(x[..., :take, :] for x in new), copy=True)
            new = (new[0][..., take:, :], new[1][..., take:, :])
        tail = _cat(tail, new)
        seen = Snapshot(head, self.history.parts(), tail, self.fmt, self.key_center)
        excess = tail[0].shape[-2] - self.options.window_tokens
        count = max(0, excess) // BLOCK_TOKENS * BLOCK_TOKENS
        self._encode(tail, count)
        self._head = head
        if count or tail[0] is new[0]:
            # A copy, so that the window does not keep the memory of all the new tokens.
            tail = (tail[0][..., count:, :].clone(), tail[1][..., count:, :].clone())
        self._tail = tail
        return seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens.

        Parameters
        ----------
        key_states, value_states : float tensors [batch, kv_heads, new tokens, head_dim]

        Returns
        -------
        keys, values : tensors [batch, kv_heads, all tokens, head_dim]
            The new tokens and the window as they came, and older ones as their codes say. With
            ``"sdpa"`` and ``"turboquant"`` attention they are stand-ins once there are codes.

        Raises
        ------
        TQError
            For tensors that do not fit what is held, or that need gradients. Nothing is added then.
        """
        fresh = not self.is_initialized
        if fresh:
            self.lazy_initialization(key_states, value_states)
        try:
            self._check_update(key_states, value_states)
            seen = self._add(key_states, value_states)
        except TQError:
            if fresh:
                self._forget()
            raise
        if seen.parts and self.options.reads_codes:
            return stand_ins(seen)
        return seen.dense("k"), seen.dense("v")

    def _encode(self, states: tuple[Tensor, Tensor], count: int) -> None:
        assert self.fmt is not None
        first = not self.history.tokens and count >= _LEAST_JUDGED
        if first and self.key_center is None and self.fmt.k_bits < 8:
            _warn_of_common_part(states[0][..., :count, :], self.fmt.k_bits)
        codes = []
        for start in range(0, count, SEGMENT_TOKENS):
            keys, values = (x[..., start : min(count, start + SEGMENT_TOKENS), :] for x in states)
            if self.key_center is not None:
                keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
                keys = keys - self.key_center[:, None]
            codes.append(self._codes(keys, values, self.fmt))
        for pair in codes:
            self.history.append(*pair)

    def _codes(self, keys: Tensor, values: Tensor, fmt: KVFormat) -> tuple[TokenCodes, TokenCodes]:
        """Codes of centred keys and of values [batch, kv_heads, tokens, head_dim]."""
        search = self.options.search
        k_metric, v_metric = self.metrics or (None, None)
        return (
            encode_tokens(keys, fmt, "k", search=search, metric=k_metric),
            encode_tokens(values, fmt, "v", search=search, metric=v_metric),
        )

    def _check_update(self, keys: Tensor, values: Tensor) -> None:
        _check_states(keys, values)
        held = self.tail[0]
        want = (held.shape[0], held.shape[1], held.shape[3])
        have = (keys.shape[0], keys.shape[1], keys.shape[3])
        if want != have or keys.dtype != held.dtype:
            raise TQError(
                f"update got batch, kv_heads, head_dim = {have} of {keys.dtype}: the cache holds "
                f"{want} of {held.dtype}; use one cache a batch, or cache.reset()"
            )

    @held
    def restore(
        self,
        head: tuple[Tensor, Tensor],
        parts: Iterable[tuple[TokenCodes, TokenCodes]],
        tail: tuple[Tensor, Tensor],
        key_center: Tensor | None,
    ) -> None:
        """Hold what another layer with the same options held."""
        self.key_center = key_center
        self.lazy_initialization(*tail)
        self._head = (head[0].clone(), head[1].clone())
        self._tail = (tail[0].clone(), tail[1].clone())
        for pair in parts:
            self.history.append(*pair)

    # Changing

    @held
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Parameters
        ----------
        tokens_to_remove : int
            Minus the number of tokens to remove. Before transformers 5 also, if it is not
            negative, the number of tokens to keep.

        Raises
        ------
        TQError
            For a positive number with a transformers that takes none.
        """
        held = self.get_seq_length()
        if tokens_to_remove > 0 and _CROP_REMOVES:
            raise TQError(
                f"crop({tokens_to_remove}): pass minus the number of tokens to remove, "
                f"here {tokens_to_remove - held}"
            )
        if tokens_to_remove < 0:
            keep = max(0, held + tokens_to_remove)
        else:
            keep = held if _CROP_REMOVES else tokens_to_remove
        if not self.is_initialized or keep >= held:
            return
        coded = self.history.tokens
        start = self.head[0].shape[-2]
        self._tail = _first(self.tail, max(0, keep - start - coded))
        if keep < start + coded:
            self.history.crop(max(0, keep - start))
        self._head = _first(self.head, min(start, keep))

    @held
    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._head = (function(self.head[0]), function(self.head[1]))
            self._tail = (function(self.tail[0]), function(self.tail[1]))
            self.history.map(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` of the batch becomes row ``beam_idx[i]``."""
        if not self.is_initialized:
            return
        index = beam_idx.to(self.tail[0].device)
        rows = torch.arange(self.tail[0].shape[0], device=index.device)
        if not torch.equal(index, rows):
            self._map_batch(lambda x: x.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (or those where a mask is True) of the batch."""
        self._map_batch(lambda x: x[indices.to(x.device), ...])

    def reset(self) -> None:
        """Drop everything."""
        self._forget()

    # Moving

    def move(self, device: torch.device | str) -> None:
        """Move what is held to a device."""
        self._map_batch(lambda x: x.to(device, non_blocking=True))
        if self.key_center is not None:
            self.key_center = self.key_center.to(device, non_blocking=True)
        if self.metrics is not None:
            one, two = (metric.to(device, non_blocking=True) for metric in self.metrics)
            self.metrics = one, two

    def offload(self) -> None:
        """Move what is held to the CPU."""
        if self.is_initialized:
            self.move("cpu")

    def prefetch(self) -> None:
        """Move what is held back to the device of the model's layer."""
        if self.is_initialized and self.tail[0].device != self.device:
            self.move(self.device)


def _cat(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, ...], copy: bool = False
) -> tuple[Tensor, Tensor]:
    """``old`` followed by ``new``: ``new`` itself where ``old`` is empty, unless ``copy``."""
    if old[0].shape[-2] == 0 and not copy:
        return new[0], new[1]
    return torch.cat((old[0], new[0]), dim=-2), torch.cat((old[1], new[1]), dim=-2)


def _first(states: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    if tokens >= states[0].shape[-2]:
        return states
    return states[0][..., :tokens, :].clone(), states[1][..., :tokens, :].clone()


def _warn_of_common_part(keys: Tensor, bits: int) -> None:
    """Warn if keys [batch, kv_heads, tokens, head_dim] are nearly all their mean, in every row."""
    part = keys[..., :SEGMENT_TOKENS, :].float()
    energy = part.square().sum(dim=-1).mean(dim=-1)
    share = part.mean(dim=-2).square().sum(dim=-1) / energy.clamp(min=1e-30)
    if bool((share.amin(dim=0) > _COMMON_SHARE).any()):
        warnings.warn(
            f"{_COMMON_SHARE:.0%} or more of the energy of this model's keys is the same for all "
            f"tokens, so {bits} bits leave little for what differs: pass key_center, the mean key of "
            "each layer and head over some text, which `tq calibrate` measures",
            KeyCenterWarning,
            stacklevel=2,
        )


def _check_states(keys: Tensor, values: Tensor) -> None:
    if keys.dim() != 4 or keys.shape != values.shape:
        raise TQError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: TurboQuantCache needs "
            "the same shape [batch, kv_heads, tokens, head_dim] for both (so no latent attention)"
        )
    if keys.dtype not in _FLOATS or values.dtype != keys.dtype:
        raise TQError(
            f"keys of {keys.dtype} and values of {values.dtype}: needs one of float16, bfloat16, "
            "float32, float64 for both"
        )
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise TQError(
            "keys and values need gradients, which codes do not have; run the model under "
            "torch.no_grad() or torch.inference_mode()"
        )
