"""How well each layer's keys, values and attention outputs survive the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tq_hf.attention import turboquant_attention
from tq_hf.layer import CompressedLayer
from tq_hf.verify.attending import attending

__all__ = ["LayerScores", "measure_layers"]

IMPLEMENTATION = "tq_layer_probe"
#: First queries left out: they see little but themselves.
SKIPPED_QUERIES = 64


@dataclass(frozen=True)
class LayerScores:
    """Of one layer; its inputs are those of the model with a 16-bit cache.

    Attributes
    ----------
    layer : int
    k_cosine, v_cosine, out_cosine : float
        Mean cosine of keys, values and attention outputs (a head's, before the output
        projection) with what they were, over tokens and heads.
    k_cosine_min, v_cosine_min, out_cosine_min : float
        Least cosine.
    k_error, v_error, out_error : float
        Norm of the difference over the norm, of all vectors together.
    """

    layer: int
    k_cosine: float
    k_cosine_min: float
    k_error: float
    v_cosine: float
    v_cosine_min: float
    v_error: float
    out_cosine: float
    out_cosine_min: float
    out_error: float


@dataclass
class _Probe:
    cache: Any
    sums: dict[int, dict[str, _Sums]]


_PROBE: ContextVar[_Probe | None] = ContextVar("layer_probe", default=None)


class _Sums(list[float]):
    """Sum and least of the cosines, their number, squared norms of difference and original."""

    def __init__(self) -> None:
        super().__init__([0.0, 2.0, 0.0, 0.0, 0.0])

    def add(self, was: Tensor, is_now: Tensor) -> None:
        a, b = was.double(), is_now.double()
        norms = (a * a).sum(-1).sqrt() * (b * b).sum(-1).sqrt()
        cosine = ((a * b).sum(-1) / norms)[norms > 0]
        if cosine.numel():
            self[0] += float(cosine.sum())
            self[1] = min(self[1], float(cosine.min()))
            self[2] += cosine.numel()
        self[3] += float((a - b).square().sum())
        self[4] += float(a.square().sum())

    def scores(self) -> tuple[float, float, float]:
        mean = self[0] / self[2] if self[2] else 1.0
        return mean, min(self[1], 1.0), (self[3] / self[4]) ** 0.5 if self[4] else 0.0


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    probe = _PROBE.get()
    if probe is None:
        raise TQError(f"{IMPLEMENTATION!r} attention runs inside tq_hf.verify.layers only")
    out, _ = turboquant_attention(module, query, key, value, attention_mask, **kwargs)
    index = getattr(module, "layer_idx", None)
    layer = probe.cache.layers[index] if isinstance(index, int) else None
    if isinstance(layer, CompressedLayer):
        layer.reset()
        layer.update(key, value)
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        coded = slice(0, layer.history.tokens)
        sums = probe.sums.setdefault(int(index or 0), {n: _Sums() for n in ("k", "v", "out")})
        sums["k"].add(key[..., coded, :], keys[..., coded, :])
        sums["v"].add(value[..., coded, :], values[..., coded, :])
        got, _ = turboquant_attention(module, query, keys, values, attention_mask, **kwargs)
        sums["out"].add(out[:, SKIPPED_QUERIES:], got[:, SKIPPED_QUERIES:])
    return out, None


@torch.no_grad()
def measure_layers(
    model: Any, windows: Iterable[Tensor], make_cache: Callable[[], Any]
) -> list[LayerScores]:
    """Compare what each compressed layer restores with what it was given.

    Layers do not see each other's errors: each gets the keys, values and queries of the model
    with exact history. Every token is a code, the query's own too.

    Parameters
    ----------
    model
        A causal language model.
    windows : iterable of int64 tensors [1, tokens]
    make_cache : callable
        Returns an empty `TurboQuantCache` without sinks and window.

    Raises
    ------
    TQError
        If no window is longer than 64 tokens.
    """
    with attending(model, IMPLEMENTATION, _PROBE, _Probe(make_cache(), {})) as probe:
        for ids in windows:
            if ids.shape[1] > SKIPPED_QUERIES:
                model(input_ids=ids, use_cache=False)
    if not probe.sums:
        raise TQError(f"the text has no window of more than {SKIPPED_QUERIES} tokens; give more")
    names = [f.name for f in fields(LayerScores)][1:]
    result = []
    for layer, sums in sorted(probe.sums.items()):
        numbers = [x for kind in sums.values() for x in kind.scores()]
        result.append(LayerScores(layer, **dict(zip(names, numbers, strict=True))))
    return result


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
