"""Bits for each layer: how sensitive keys and values of it are, and a schedule for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tq_core import TQError
from tq_kernels import KVFormat

from tq_hf.bits import EXACT, WIDTHS
from tq_hf.verify.predictions import compare_predictions
from tq_hf.verify.scores import summarize

__all__ = ["SWEPT_BITS", "LayerSensitivity", "propose_bits", "sweep_layers"]

#: Bits at which a layer's keys, or its values, are measured; the other half gets 8.
SWEPT_BITS = (2, 3)


@dataclass(frozen=True)
class LayerSensitivity:
    """Divergence, in nats a token, when only this layer has codes.

    Attributes
    ----------
    layer : int
    k_kl, v_kl : mapping of int to float
        By bits of the keys, or of the values; the other half has 8.
    """

    layer: int
    k_kl: Mapping[int, float]
    v_kl: Mapping[int, float]

    def loss(self, pair: tuple[int, int], head_dim: int) -> float:
        """Divergence with these bits of keys and values.

        Bits that were not measured follow from the most that were, by the squared error of codes.
        """
        return sum(
            _expected(measured, bits, head_dim)
            for measured, bits in zip((self.k_kl, self.v_kl), pair, strict=True)
        )


@torch.no_grad()
def sweep_layers(
    model: Any,
    windows: Sequence[Tensor],
    layers: Iterable[int],
    make_base: Callable[[], Any],
    make_cache: Callable[[int, int, int], Any],
    chunk: int = 32,
) -> list[LayerSensitivity]:
    """Compress one layer at a time, once its keys and once its values hard.

    Parameters
    ----------
    model
    windows : sequence of int64 tensors [1, tokens + 1]
    layers : iterable of int
        Layers that can be compressed.
    make_base : callable
        Returns an empty 16-bit cache.
    make_cache : callable
        Takes a layer, bits of its keys and bits of its values; returns an empty cache that
        compresses that layer only.
    chunk : int
        Tokens fed at a time.
    """

    def divergence(layer: int, k_bits: int, v_bits: int) -> float:
        make = partial(make_cache, layer, k_bits, v_bits)
        parts = compare_predictions(model, windows, make_base, make, chunk=chunk)
        return summarize(s for s, _ in parts).kl_mean

    return [
        LayerSensitivity(
            layer,
            {bits: divergence(layer, bits, 8) for bits in SWEPT_BITS},
            {bits: divergence(layer, 8, bits) for bits in SWEPT_BITS},
        )
        for layer in layers
    ]


def _expected(measured: Mapping[int, float], bits: int, head_dim: int) -> float:
    if bits in measured or bits == EXACT[0]:
        return measured.get(bits, 0.0)
    most = max(measured)
    return measured[most] * _squared_error(bits, head_dim) / _squared_error(most, head_dim)


@lru_cache
def _squared_error(bits: int, head_dim: int) -> float:
    return KVFormat(head_dim, bits, bits).k_codebook.mse


def _bytes(pair: tuple[int, int], kv_heads: int, head_dim: int) -> int:
    if pair == EXACT:
        return 4 * kv_heads * head_dim
    return kv_heads * KVFormat(head_dim, *pair).slot_bytes


def propose_bits(
    sensitivities: Sequence[LayerSensitivity],
    shapes: Mapping[int, tuple[int, int]],
    budget: float,
) -> dict[int, tuple[int, int]]:
    """Bits of each layer with the least sum of divergences that a budget pays for.

    Divergences of layers, and of keys and values, are added. That is an approximation: measure
    what is proposed.

    Parameters
    ----------
    sensitivities : sequence of LayerSensitivity
    shapes : mapping of int to pair of int
        Key-value heads and head_dim of each of these layers.
    budget : float
        Bytes of a token in all of these layers.

    Returns
    -------
    dict of int to pair of int
        As ``TurboQuantCache(layer_bits=…)`` takes it.

    Raises
    ------
    TQError
        If the budget does not pay for the fewest bits everywhere.

    Examples
    --------
    >>> found = [
    ...     LayerSensitivity(0, {2: 0.0004, 3: 0.0001}, {2: 0.004, 3: 0.001}),
    ...     LayerSensitivity(1, {2: 0.04, 3: 0.01}, {2: 0.004, 3: 0.001}),
    ... ]
    >>> propose_bits(found, {0: (2, 128), 1: (2, 128)}, 2 * 2 * 132)
    {0: (2, 3), 1: (8, 3)}
    """
    pairs = [*product(WIDTHS, WIDTHS), EXACT]
    costs = {s.layer: [_bytes(p, *shapes[s.layer]) for p in pairs] for s in sensitivities}
    least = sum(min(c) for c in costs.values())
    if not budget >= least:
        raise TQError(
            f"budget={budget:g} bytes a token: {len(costs)} layers of 2 bits take {least:g}; raise "
            "it or keep fewer layers at 16 bits"
        )
    unit = math.gcd(*(c for row in costs.values() for c in row))
    room = int(min(budget, sum(max(c) for c in costs.values())) // unit)
    loss = np.zeros(room + 1)  # least sum for the layers so far within so many units
    picks = []
    for s in sensitivities:
        table = np.full((len(pairs), room + 1), np.inf)
        for row, pair, cost in zip(table, pairs, costs[s.layer], strict=True):
            size = cost // unit
            row[size:] = loss[: max(0, room + 1 - size)] + s.loss(pair, shapes[s.layer][1])
        picks.append(table.argmin(axis=0))
        loss = table.min(axis=0)
    found = {}
    for s, pick in zip(reversed(sensitivities), reversed(picks), strict=True):
        found[s.layer] = pairs[pick[room]]
        room -= costs[s.layer][pick[room]] // unit
    return dict(sorted(found.items()))
