"""Weights that make keys and values easier to round, of a model that computes the same.

The error of a code is as large in all directions. Values ``v`` come from one matrix and go through
another: with ``T v`` in the cache and ``inv(T)`` folded into the output projection nothing changes,
but rounding costs less if ``T`` shrinks what values hold much of and predictions need little of.
The same holds for keys and queries, as far as the rotary embedding allows: one factor for each pair
of dimensions that it rotates. What predictions need is measured by gradients on calibration text;
see `tq_core.balancing_matrix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from tq_core import TQError, balancing_matrix, balancing_scales

from tq_hf.model_layers import model_layers, text_config
from tq_hf.verify.calibration import key_value_states

__all__ = ["balance"]

#: Change of logits, in shares of their size, that is taken for rounding of the weights.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
_ROUNDING_16_BIT = 0.05
#: First predictions of a window that are left out: they read next to no codes.
_UNSCORED = 64
#: First tokens of a window that are left out: sinks have keys and values of their own.
_SINKS = 4
#: Least tokens of text for each dimension of a head.
_TOKENS_PER_DIMENSION = 32
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def balance(
    model: Any,
    windows: Sequence[Tensor],
    *,
    keys: bool = True,
    values: bool = True,
    samples: int = 4,
    seed: int = 0,
) -> None:
    """Change the weights, in place, so that rounding keys and values costs less.

    The model computes what it did before, up to the rounding of the weights that change. What
    differs is in the cache only. Keys are balanced for a cache that centres them, with centers that
    are measured on the balanced model.

    Parameters
    ----------
    model
        With ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` in every layer of full attention,
        as Llama, Mistral, Qwen2 and Qwen3 have.
    windows : sequence of int64 tensors [1, tokens]
        Calibration text, more than 64 tokens a window and 32 for each dimension of a head in all:
        fewer tell too little of a head.
    keys, values : bool
        What to balance. Keys need a rotary embedding of whole heads, in halves, as Llama's.
    samples : int
        Gradients of each window, of predictions drawn from the model.
    seed : int
        Of the draws.

    Raises
    ------
    TQError
        For models that are built otherwise, which are left as they were, and for too little text.
    """
    layers = _attention_layers(model, keys)
    lengths = [ids.shape[1] for ids in windows]
    least = _TOKENS_PER_DIMENSION * max(layer.head_dim for layer in layers)
    if sum(lengths) < least or min(lengths) <= _UNSCORED:
        raise TQError(
            f"windows of {lengths} tokens: balancing needs more than {_UNSCORED} tokens in each and "
            f"{least} in all; give a longer text or more windows"
        )
    states = _states(model, windows)
    k_parts = [getattr(x, "k_norm", None) or x.k_proj for x in layers] if keys else []
    v_parts = [x.v_proj for x in layers] if values else []
    gradients = _gradients(model, [*k_parts, *v_parts], windows, samples, seed)
    kept = [(x, x.clone()) for layer in layers for x in _weights(layer)]
    before = _some_logits(model, windows[0])
    with torch.no_grad():
        for layer, (k, _), gradient in zip(layers, states, gradients[: len(k_parts)], strict=False):
            _balance_keys(layer, k, gradient)
        for layer, (_, v), gradient in zip(layers, states, gradients[len(k_parts) :], strict=False):
            _balance_values(layer, v, gradient)
        change = float((_some_logits(model, windows[0]) - before).norm() / before.norm())
        if not change <= _ROUNDING.get(model.dtype, _ROUNDING_16_BIT):
            for weight, value in kept:
                weight.copy_(value)
            remedy = "balance its values alone: keys=False" if keys else "use it as it is"
            raise TQError(
                f"{_type(model)} would not compute the same with balanced weights (logits change "
                f"by {change:.2g} of their size); {remedy}"
            )


def _type(model: Any) -> str:
    return str(text_config(model.config).model_type)


def _attention_layers(model: Any, keys: bool) -> list[Any]:
    """The attention modules of the layers whose keys and values a cache compresses."""
    kinds = [layer.kind for layer in model_layers(model.config)]
    modules = {
        m.layer_idx: m
        for m in model.modules()
        if all(type(getattr(m, name, None)) is Linear for name in _PARTS)
    }
    full = [i for i, kind in enumerate(kinds) if kind == "full"]
    missing = [i for i in full if i not in modules]
    if missing or not full:
        raise TQError(
            f"{_type(model)} lacks {', '.join(_PARTS)} as plain linear layers in "
            f"{missing or 'all'} of its layers of full attention: balancing needs them; use the "
            "model as it is"
        )
    found = [modules[i] for i in full]
    for layer in found:
        norms = [getattr(layer, name, None) for name in ("q_norm", "k_norm")]
        sizes = [sum(x.numel() for x in norm.parameters()) for norm in norms if norm is not None]
        if keys and any(size != layer.head_dim for size in sizes):
            raise TQError(
                f"{_type(model)} normalizes queries and keys with {sizes} weights: balancing keys "
                f"needs {layer.head_dim} of each; balance its values alone: keys=False"
            )
    return found


def _weights(layer: Any) -> Iterator[Tensor]:
    names = [*_PARTS, "q_norm", "k_norm"]
    for part in (getattr(layer, name, None) for name in names):
        if part is not None:
            yield from (x.data for x in part.parameters())


@torch.no_grad()
def _some_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[:, :256], use_cache=False).logits
    return logits.double()


@torch.no_grad()
def _states(model: Any, windows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Keys, less their mean, and values of each layer, [kv_heads, tokens, head_dim]."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for ids in windows:
        for i, pair in key_value_states(model, ids).items():
            kept = tuple(x[0, :, _SINKS:].double().cpu() for x in pair)
            parts.setdefault(i, []).append(kept)  # type: ignore[arg-type]
    found = []
    for pairs in parts.values():
        k, v = (torch.cat(x, dim=1) for x in zip(*pairs, strict=True))
        found.append((k - k.mean(dim=1, keepdim=True), v))
    return found


def _gradients(
    model: Any, parts: list[Any], windows: Sequence[Tensor], samples: int, seed: int
) -> list[Tensor]:
    """Gradients of -log p of drawn tokens, for what modules return.

    Returns
    -------
    list of tensors [samples, tokens, heads and head_dim]
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[] for _ in parts]
    for ids in windows:
        with torch.enable_grad(), _probed(parts) as added:
            logits = model(input_ids=ids, use_cache=False).logits[0, _UNSCORED:]
            logs = logits.float().log_softmax(-1)
            chances = logs.detach().exp().cpu()
            drawn = torch.multinomial(chances, samples, replacement=True, generator=generator)
            losses = [-logs.gather(1, x[:, None]).sum() for x in drawn.T.to(logs.device)]
            probes = [added[part] for part in parts]
            found = [torch.autograd.grad(x, probes, retain_graph=True) for x in losses]
        for row, part in zip(rows, zip(*found, strict=True), strict=True):
            by_token = torch.cat([x.transpose(1, 2) if _by_head(x, ids) else x for x in part])
            row.append(by_token[:, _SINKS:].flatten(2).double().cpu())
    return [torch.cat(row, dim=1) for row in rows]


def _by_head(x: Tensor, ids: Tensor) -> bool:
    """Whether it is [1, heads, tokens, head_dim], as norms of some models return it."""
    return x.dim() == 4 and x.shape[1] != ids.shape[1]


@contextmanager
def _probed(parts: list[Any]) -> Iterator[dict[Any, Tensor]]:
    """Add zeros to what modules return, to take gradients with respect to; by module."""
    added: dict[Any, Tensor] = {}

    def probe(part: Any, _: Any, out: Tensor) -> Tensor:
        added[part] = torch.zeros_like(out, requires_grad=True)
        return out + added[part]

    handles = [part.register_forward_hook(probe) for part in parts]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def _of_all_samples(x: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of vectors and gradients [kv_heads, n, head_dim]."""
    split = gradients.reshape(*gradients.shape[:2], len(x), -1).transpose(1, 2)
    one, two = (y.transpose(0, 1).flatten(1, 2) for y in (x.expand_as(split), split))
    return one, two


def _balance_values(layer: Any, values: Tensor, gradients: Tensor) -> None:
    pairs = zip(*_of_all_samples(values, gradients), strict=True)
    maps = torch.stack([torch.from_numpy(balancing_matrix(v, g)) for v, g in pairs])
    for x in (layer.v_proj.weight, layer.v_proj.bias):
        if x is not None:
            rows = x.double().cpu().reshape(*maps.shape[:2], -1)
            x.copy_((maps @ rows).reshape(x.shape))
    weight = layer.o_proj.weight
    columns = weight.double().cpu().reshape(len(weight), len(maps), -1, maps.shape[1])
    moved = torch.einsum("okgd,kde->okge", columns, torch.linalg.inv(maps))
    weight.copy_(moved.reshape(weight.shape))


def _balance_keys(layer: Any, keys: Tensor, gradients: Tensor) -> None:
    heads = zip(*_of_all_samples(keys, gradients), strict=True)
    pairs = [[x.square().unflatten(-1, (2, -1)).sum(-2) for x in head] for head in heads]
    norm = getattr(layer, "k_norm", None)
    if norm is not None:  # one weight for all heads
        pairs = [[torch.cat(x) for x in zip(*pairs, strict=True)]]
    scales = torch.stack([torch.from_numpy(balancing_scales(*pair)) for pair in pairs]).repeat(1, 2)
    if norm is not None:
        targets = ((norm, scales), (layer.q_norm, 1 / scales))
    else:
        targets = ((layer.k_proj, scales), (layer.q_proj, 1 / scales))
    for part, factors in targets:
        for x in part.parameters():
            rows = x.double().cpu().reshape(len(scales), -1, scales.shape[1], x[0].numel())
            x.copy_((rows * factors[:, None, :, None]).reshape(x.shape))
