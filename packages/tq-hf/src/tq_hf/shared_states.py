"""Keys and values that layers without their own read from an earlier layer, in transformers 4.57.

transformers 5 passes them from layer to layer; 4.57 leaves them in ``cache.shared_layers``, where
they would stay until the next step.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

__all__ = ["SharedStates"]


class SharedStates(dict[int, tuple[Tensor, Tensor]]):
    """Pairs of tensors by layer, each dropped when its last reader has taken it.

    Parameters
    ----------
    config
        Text configuration with ``layer_types`` and ``num_kv_shared_layers``: each of the last
        layers reads from the last layer of its type among the others.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        own = config.num_hidden_layers - config.num_kv_shared_layers
        sources = {kind: i for i, kind in enumerate(config.layer_types[:own])}
        self._readers = Counter(sources[kind] for kind in config.layer_types[own:])
        self._left: dict[int, int] = {}

    def __setitem__(self, layer: int, states: tuple[Tensor, Tensor]) -> None:
        """Keep ``states`` for the layers that read them, if any."""
        self._left[layer] = self._readers[layer]
        if self._left[layer]:
            super().__setitem__(layer, states)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the states of a layer, for the last time if no other layer reads them."""
        states = super().__getitem__(layer)
        self._left[layer] -= 1
        if not self._left[layer]:
            del self[layer]
        return states
