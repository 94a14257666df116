"""Which layers to keep at 16 bits: sensitivity of each layer, and a schedule for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError

from tq_hf.verify.predictions import compare_predictions
from tq_hf.verify.scores import summarize

__all__ = ["LayerSensitivity", "layers_to_keep", "sweep_layers"]


@dataclass(frozen=True)
class LayerSensitivity:
    """Divergence, in nats a token, when only this layer is compressed."""

    layer: int
    kl: float


@torch.no_grad()
def sweep_layers(
    model: Any,
    windows: Sequence[Tensor],
    layers: Iterable[int],
    make_base: Callable[[], Any],
    make_cache: Callable[[int], Any],
    chunk: int = 32,
) -> list[LayerSensitivity]:
    """Compress one layer at a time.

    Parameters
    ----------
    model
    windows : sequence of int64 tensors [1, tokens + 1]
    layers : iterable of int
        Layers that can be compressed.
    make_base : callable
        Returns an empty 16-bit cache.
    make_cache : callable
        Takes a layer, returns an empty cache that compresses that layer only.
    chunk : int
        Tokens fed at a time.
    """
    found = []
    for layer in layers:
        parts = compare_predictions(
            model, windows, make_base, partial(make_cache, layer), chunk=chunk
        )
        found.append(LayerSensitivity(layer, summarize(s for s, _ in parts).kl_mean))
    return found


def layers_to_keep(
    sensitivities: Sequence[LayerSensitivity],
    coded_bytes: float,
    exact_bytes: float,
    budget: float,
) -> tuple[int, ...]:
    """The layers to keep at 16 bits within a budget: the most sensitive that it pays for.

    Parameters
    ----------
    sensitivities : sequence of LayerSensitivity
    coded_bytes, exact_bytes : float
        Bytes of a token in one layer, compressed and at 16 bits.
    budget : float
        Bytes of a token in all of these layers.

    Raises
    ------
    TQError
        If the budget does not pay for compressed layers.

    Examples
    --------
    >>> found = [LayerSensitivity(0, 0.01), LayerSensitivity(1, 0.002), LayerSensitivity(2, 0.03)]
    >>> layers_to_keep(found, 100, 500, 800)
    (2,)
    """
    least = len(sensitivities) * coded_bytes
    if budget < least:
        raise TQError(
            f"budget={budget:g} bytes a token: {len(sensitivities)} compressed layers take "
            f"{least:g}; raise it or take fewer bits"
        )
    count = min(len(sensitivities), int((budget - least) // (exact_bytes - coded_bytes)))
    worst = sorted(sensitivities, key=lambda s: -s.kl)[:count]
    return tuple(sorted(s.layer for s in worst))
