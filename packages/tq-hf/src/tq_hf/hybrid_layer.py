"""A layer that has attention and a recurrent state side by side (transformers 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from tq_hf.layer import CompressedLayer, LayerOptions

__all__ = ["CompressedHybridLayer"]

_Recurrent: Any = LinearAttentionLayer


class CompressedHybridLayer(  # type: ignore[misc, no-untyped-call, override]
    LinearAttentionLayer, CompressedLayer
):
    """Compressed keys and values, and transformers' recurrent states as they are.

    Parameters
    ----------
    options, key_center, metrics
        See `CompressedLayer`.
    number_of_states : int
        Recurrent states of the layer.
    """

    is_compileable = False

    def __init__(
        self,
        options: LayerOptions,
        key_center: Tensor | None = None,
        metrics: tuple[Tensor, Tensor] | None = None,
        number_of_states: int = 1,
    ) -> None:
        _Recurrent.__init__(self, number_of_states=number_of_states)
        CompressedLayer.__init__(self, options, key_center, metrics)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """By position, the keys and values; by name, the recurrent states."""
        if args:
            CompressedLayer.lazy_initialization(self, *args)
        else:
            _Recurrent.lazy_initialization(self, **kwargs)

    def states(self) -> Iterator[Tensor]:
        """The recurrent states."""
        for states in (self.conv_states, self.recurrent_states):
            yield from (state for state in states.values() if state is not None)

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else function(state)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens; raises unless the recurrent states can follow."""
        _Recurrent.crop(self, tokens_to_remove)
        CompressedLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` of the batch becomes row ``beam_idx[i]``."""
        _Recurrent.reorder_cache(self, beam_idx)
        CompressedLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map_states(lambda x: x.repeat_interleave(repeats, dim=0))
        CompressedLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (or those where a mask is True) of the batch."""
        self._map_states(lambda x: x[indices.to(x.device), ...])
        CompressedLayer.batch_select_indices(self, indices)

    def reset(self) -> None:
        """Drop keys and values; zero the recurrent states."""
        _Recurrent.reset(self)
        CompressedLayer.reset(self)

    def offload(self) -> None:
        """Move what is held to the CPU."""
        _Recurrent.offload(self)
        CompressedLayer.offload(self)

    def prefetch(self) -> None:
        """Move what is held back to the device of the model's layer."""
        _Recurrent.prefetch(self)
        CompressedLayer.prefetch(self)
