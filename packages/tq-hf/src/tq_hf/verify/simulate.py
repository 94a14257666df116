"""A model's logits with rounded keys and values, for all positions of a text in one pass.

Every query sees what it would see if the text were fed to a cache one token at a time: the first
tokens and the last ones as they came, everything between rounded. So any rounding can be measured
at the cost of one forward pass, with no cache and no kernels written for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tq_hf.verify.attending import attending

__all__ = ["RoundedHistory", "rounded", "visible_codes"]

#: Keys or values [batch, kv_heads, tokens, head_dim] and the layer's number, to what is restored.
Rounding = Callable[[Tensor, int], Tensor]
IMPLEMENTATION = "tq_rounded"
_ROWS = 256
_IN_USE: ContextVar[RoundedHistory | None] = ContextVar("rounded_history", default=None)


@dataclass(frozen=True)
class RoundedHistory:
    """What a cache does to old tokens.

    Attributes
    ----------
    keys, values : callable
        Restore keys (after the rotary embedding) or values from their codes. They get the tokens
        after the sinks, a multiple of ``block_tokens``.
    slot_bytes : float
        Bytes of a token and KV head.
    sink_tokens, window_tokens : int
        First and last tokens kept as they came.
    block_tokens : int
        Tokens leave the window in blocks of this many.
    skip_layers : frozenset of int
        Layers left as they are.
    """

    keys: Rounding
    values: Rounding
    slot_bytes: float
    sink_tokens: int = 4
    window_tokens: int = 32
    block_tokens: int = 16
    skip_layers: frozenset[int] = frozenset()


def visible_codes(position: int | Tensor, history: RoundedHistory) -> Any:
    """How many tokens after the sinks the query at ``position`` sees as codes."""
    excess = position - history.sink_tokens - history.window_tokens
    whole = excess // history.block_tokens * history.block_tokens
    return whole.clamp(min=0) if isinstance(whole, Tensor) else max(0, whole)


def _restored(x: Tensor, rounding: Rounding, layer: int, history: RoundedHistory) -> Tensor:
    """``x`` with every whole block after the sinks rounded."""
    first = history.sink_tokens
    count = max(0, x.shape[-2] - first) // history.block_tokens * history.block_tokens
    if not count:
        return x
    middle = rounding(x[..., first : first + count, :], layer).to(x.dtype)
    return torch.cat((x[..., :first, :], middle, x[..., first + count :, :]), dim=-2)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    history = _IN_USE.get()
    layer = getattr(module, "layer_idx", None)
    if history is None or layer is None:
        raise TQError(
            f"{IMPLEMENTATION!r} attention runs inside tq_hf.verify.simulate.rounded only"
        )
    odd = {n for n in ("softcap", "sliding_window", "s_aux") if kwargs.get(n) is not None}
    if odd or dropout:
        raise TQError(
            f"layer {layer} has {sorted(odd) or 'dropout'}: simulated rounding knows plain causal "
            "attention; measure the cache itself with `tq verify`"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(query * scale, key, value, int(layer), history)
    return out.transpose(1, 2).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int, history: RoundedHistory) -> Tensor:
    """Causal attention [batch, heads, tokens, head_dim] of scaled queries."""
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    if layer in history.skip_layers:
        k_old, v_old = k, v
    else:
        k_old = _restored(k, history.keys, layer, history)
        v_old = _restored(v, history.values, layer, history)
    q = q.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    k, v, k_old, v_old = (x[:, :, None] for x in (k, v, k_old, v_old))
    out = torch.empty_like(q)
    for start in range(0, tokens, _ROWS):
        stop = min(tokens, start + _ROWS)
        rows = torch.arange(start, stop, device=q.device)[:, None]
        near = min(start, history.sink_tokens + visible_codes(start, history))
        columns = torch.arange(near, stop, device=q.device)
        part = q[..., start:stop, :]
        logits = part @ k_old[..., :stop, :].transpose(-1, -2)
        fresh = columns >= history.sink_tokens + visible_codes(rows, history)
        exact = part @ k[..., near:stop, :].transpose(-1, -2)
        logits[..., near:] = torch.where(fresh, exact, logits[..., near:])
        logits[..., near:].masked_fill_(columns > rows, -torch.inf)
        weights = logits.softmax(-1)
        recent = weights[..., near:] * fresh
        weights[..., near:] -= recent
        out[..., start:stop, :] = weights @ v_old[..., :stop, :] + recent @ v[..., near:stop, :]
    return out.reshape(batch, heads, tokens, dim)


@contextmanager
def rounded(model: Any, history: RoundedHistory) -> Iterator[None]:
    """Let a model attend to a rounded history; call it with ``use_cache=False``, unpadded.

    Raises
    ------
    TQError
        During the call, for soft caps, sliding windows and learned sinks.
    """
    with attending(model, IMPLEMENTATION, _IN_USE, history):
        yield


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
