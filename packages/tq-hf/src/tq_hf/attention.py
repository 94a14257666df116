"""Attention on a layer's codes, and its registration with transformers.

``model.set_attn_implementation("turboquant")`` selects `turboquant_attention`. Models with
``"sdpa"`` need no switch: the stand-ins that the cache returns answer the call of
``scaled_dot_product_attention`` themselves (see `tq_hf.stand_in`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tq_core import TQError
from tq_kernels import attend_codes, attend_dense, merge_sink, merge_states
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tq_hf.history import SEGMENT_TOKENS
from tq_hf.modes import exact
from tq_hf.snapshot import Snapshot

__all__ = ["IMPLEMENTATION", "attend", "register", "turboquant_attention"]

#: Name of the attention implementation.
IMPLEMENTATION = "turboquant"
#: Tokens unpacked at once: what caches of a CPU hold, or enough work for a launch on a GPU.
_CPU_CHUNK, _GPU_CHUNK = 1024, SEGMENT_TOKENS
#: Most logits formed at once.
_LOGITS = 2**23


@exact
def attend(
    query: Tensor,
    snapshot: Snapshot,
    *,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries on a snapshot; memory does not grow with the history.

    Parameters
    ----------
    query : float tensor [batch, heads, queries, head_dim]
    snapshot : Snapshot
    softmax_scale : float, optional
        ``head_dim ** -0.5`` if not given.
    soft_cap : float, optional
        Logits become ``soft_cap * tanh(logit / soft_cap)``.
    mask : bool or float tensor, optional
        Broadcastable to [batch, heads or 1, queries, tokens]; True is seen, floats are added.
    positions : int tensor [queries], optional
        A query sees keys up to its position. Not given: all of them.
    sinks : float tensor [heads], optional
        Learned logits of keys whose value is zero.

    Returns
    -------
    tensor [batch, heads, queries, head_dim] like ``query``

    Raises
    ------
    TQError
        If the mask is not as long as the snapshot.
    """
    batch, heads, queries, _ = query.shape
    if mask is not None and mask.shape[-1] != snapshot.tokens:
        raise TQError(
            f"mask covers {mask.shape[-1]} tokens: the cache and the new tokens are "
            f"{snapshot.tokens}; build it with cache.get_mask_sizes"
        )
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    block = max(1, min(queries, _LOGITS // (batch * heads * min(snapshot.tokens, _chunk(query)))))
    out = torch.empty_like(query)
    for start in range(0, queries, block):
        rows = slice(start, start + block)
        q = query[:, :, rows].to(compute)
        part_mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
        at = None if positions is None else positions[rows]
        part, lse = _attend_block(q, snapshot, softmax_scale, soft_cap, part_mask, at)
        if sinks is not None:
            part, _ = merge_sink(part, lse, sinks[:, None])
        out[:, :, rows] = part
    return out


def _chunk(query: Tensor) -> int:
    return _CPU_CHUNK if query.device.type == "cpu" else _GPU_CHUNK


def _attend_block(
    q: Tensor,
    snapshot: Snapshot,
    softmax_scale: float | None,
    soft_cap: float | None,
    mask: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    common: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "soft_cap": soft_cap,
        "chunk": max(16, min(_chunk(q), _LOGITS // (q.shape[0] * q.shape[1] * q.shape[2]))),
    }
    total, first = snapshot.tokens, snapshot.head[0].shape[-2]
    last = total - snapshot.tail[0].shape[-2]

    def options(start: int, stop: int) -> dict[str, Any]:
        part = None if mask is None else mask[..., start:stop]
        shifted = None if positions is None else positions - start
        return {**common, "mask": part, "query_positions": shifted}

    out, lse = attend_dense(q, *snapshot.tail, **options(last, total))
    if first:
        more = attend_dense(q, *snapshot.head, **options(0, first))
        out, lse = merge_states(out, lse, *more)
    start = first
    for keys, values in snapshot.parts:
        assert snapshot.fmt is not None
        span = options(start, start + keys.tokens)
        center = snapshot.key_center
        more = attend_codes(q, keys, values, snapshot.fmt, key_center=center, **span)
        out, lse = merge_states(out, lse, *more)
        start += keys.tokens
    return out, lse


def _refuse(module: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise TQError(
            f"dropout={dropout}: {IMPLEMENTATION!r} attention is for inference; call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise TQError(
            f"output_attentions=True: {IMPLEMENTATION!r} attention forms no weights; use "
            'model.set_attn_implementation("eager")'
        )
    if kwargs.get("head_mask") is not None:
        raise TQError(f"head_mask: not supported by {IMPLEMENTATION!r} attention; use 'eager'")


def turboquant_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' attention interface.

    Takes what a cache's ``update`` returned: stand-ins of a `TurboQuantCache`, whose codes it
    reads, or plain tensors of any other cache or layer. Soft caps and learned sinks are applied
    in both cases.

    Returns
    -------
    out : tensor [batch, queries, heads, head_dim]
    None
        Weights are never formed.

    Raises
    ------
    TQError
        For dropout, ``output_attentions`` or ``head_mask``.
    """
    from tq_hf.stand_in import StandIn, snapshot_of

    _refuse(module, dropout, kwargs)
    if softcap is None and s_aux is None and not isinstance(key, StandIn):
        more: dict[str, Any] = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, 0.0, scaling, is_causal, **more
        )
    snapshot = snapshot_of(key, value)
    queries, tokens = query.shape[-2], snapshot.tokens
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    positions = None
    if attention_mask is None and causal and queries > 1:
        positions = torch.arange(tokens - queries, tokens, device=query.device)
    out = attend(
        query,
        snapshot,
        softmax_scale=scaling,
        soft_cap=softcap,
        mask=_with_bias(attention_mask, position_bias),
        positions=positions,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return mask + bias


def register() -> None:
    """Make ``"turboquant"`` known to transformers; changes no model."""
    AttentionInterface.register(IMPLEMENTATION, turboquant_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
