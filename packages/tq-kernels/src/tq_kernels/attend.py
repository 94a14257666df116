"""Attention on codes in chunks: building blocks for the references and for tq-hf.

Everything happens in the rotated space: the query is rotated once, the output is rotated back
once, and scales multiply logits and weights after the dot products. At no time is more than one
chunk of the history unpacked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tq_core import TQError

from tq_kernels.expand import expand, field_order
from tq_kernels.format import KVFormat
from tq_kernels.integer_dot import Digits, dot_half_integers, to_digits
from tq_kernels.ops.rotate import compute_dtype, rotate_unchecked
from tq_kernels.quantize import TokenCodes, step_of

__all__ = ["attend_codes", "attend_dense", "merge_sink", "merge_states"]


def merge_states(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys.

    Parameters
    ----------
    out, out2 : float tensors [..., head_dim]
    lse, lse2 : float tensors [...]
        Natural logarithms of the sums of exponentials; -inf for no key.

    Returns
    -------
    out, lse
        Computed in float32, or float64 if ``lse`` is; ``out`` in its dtype.
    """
    compute = compute_dtype(lse.dtype)
    first, second = lse.to(compute), lse2.to(compute)
    top = torch.maximum(first, second)
    safe = torch.where(top == -math.inf, 0.0, top)
    a, b = (first - safe).exp(), (second - safe).exp()
    total = a + b
    share = torch.where(total == 0, 1.0, total)
    merged = out.to(compute) * (a / share)[..., None] + out2.to(compute) * (b / share)[..., None]
    return merged.to(out.dtype), safe + total.log()


def merge_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add learned sink logits, broadcast against ``lse``: keys whose value is zero."""
    compute = compute_dtype(lse.dtype)
    total = torch.logaddexp(lse.to(compute), sinks.to(compute))
    safe = torch.where(total == -math.inf, 0.0, total)
    return (out.to(compute) * (lse - safe).exp()[..., None]).to(out.dtype), total


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, queries, dim] → [batch, kv_heads, group * queries, dim]."""
    heads = q.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise TQError(
            f"heads={heads} is no multiple of kv_heads={kv_heads}; pass the numbers of the model"
        )
    batch, _, queries, dim = q.shape
    return q.reshape(batch, kv_heads, heads // kv_heads * queries, dim)


class _Softmax:
    """Online softmax over chunks of keys, of query rows [batch, kv_heads, rows, head_dim]."""

    def __init__(self, rows: Tensor) -> None:
        self.top = torch.full(rows.shape[:-1], -math.inf, dtype=rows.dtype, device=rows.device)
        self.total = torch.zeros_like(self.top)
        self.out = torch.zeros_like(rows)

    def weights(self, logits: Tensor) -> Tensor:
        """Unnormalised weights of a chunk; rescales what was summed before. Overwrites logits."""
        top = torch.maximum(self.top, logits.amax(dim=-1))
        safe = torch.where(top == -math.inf, 0.0, top)
        weights = logits.sub_(safe[..., None]).exp_()
        old = (self.top - safe).exp()
        self.total = self.total * old + weights.sum(dim=-1)
        self.out *= old[..., None]
        self.top = top
        return weights

    def result(self) -> tuple[Tensor, Tensor]:
        """Output like the rows, and LSE [batch, kv_heads, rows]."""
        empty = self.total == 0
        out = self.out / torch.where(empty, 1.0, self.total)[..., None]
        return out, torch.where(empty, -math.inf, self.top + self.total.log())


def _mask(
    logits: Tensor,
    group: int,
    start: int,
    mask: Tensor | None,
    positions: Tensor | None,
    key_offset: int,
    sliding_window: int | None,
) -> Tensor:
    """Apply masks to logits [batch, kv_heads, group * queries, chunk] of keys from ``start``."""
    chunk = logits.shape[-1]
    batch, kv_heads, rows, _ = logits.shape
    split = logits.view(batch, kv_heads, group, rows // group, chunk)
    if positions is not None:
        keys = torch.arange(start, start + chunk, device=logits.device) + key_offset
        at = positions[..., None]
        hidden = keys > at
        if sliding_window is not None:
            hidden |= keys <= at - sliding_window
        while hidden.dim() < 3:
            hidden = hidden[None]
        split.masked_fill_(hidden[:, None, None], -math.inf)
    if mask is not None:
        part = mask[..., start : start + chunk]
        if part.dim() == 4 and part.shape[1] not in (1, kv_heads * group):
            raise TQError(
                f"mask has {part.shape[1]} heads: needs 1 or {kv_heads * group}; expand it"
            )
        while part.dim() < 4:
            part = part[None]
        shared = part.shape[1] == 1
        shaped = part.reshape(
            part.shape[0], *((1, 1) if shared else (kv_heads, group)), *part.shape[-2:]
        )
        if mask.dtype == torch.bool:
            split.masked_fill_(~shaped, -math.inf)
        else:
            split += shaped
    return logits


def _dot(rows: Tensor | Digits, numbers: Tensor, compute: torch.dtype) -> Tensor:
    """Products of rows with unpacked numbers, in float32 (float64)."""
    if isinstance(rows, Digits):
        return dot_half_integers(rows, numbers)
    return (rows @ numbers).to(compute)


def attend_codes(
    q: Tensor,
    keys: TokenCodes,
    values: TokenCodes,
    fmt: KVFormat,
    *,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sliding_window: int | None = None,
    key_center: Tensor | None = None,
    chunk: int = 2048,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries on codes.

    Parameters
    ----------
    q : float tensor [batch, heads, queries, head_dim]
    keys, values : TokenCodes
        Leading dimensions [batch, kv_heads]; ``heads`` is a multiple of ``kv_heads``.
    fmt : KVFormat
    softmax_scale : float, optional
        Factor of the logits, ``head_dim ** -0.5`` if not given.
    soft_cap : float, optional
        Logits become ``soft_cap * tanh(logit / soft_cap)``.
    mask : bool or float tensor, optional
        Broadcastable to [batch, heads or 1, queries, tokens]; True is seen, floats are added.
    query_positions : int tensor [queries] or [batch, queries], optional
        Key ``j`` is seen by queries of position ``j`` and more. Not given: all keys are seen.
    sliding_window : int, optional
        A query sees the keys of its own position and of the ``sliding_window - 1`` before it.
        Needs ``query_positions``.
    key_center : float tensor [kv_heads, head_dim], optional
        What was subtracted from the keys before they were stored.
    chunk : int
        Tokens unpacked at once.
    dtype : torch.dtype, optional
        Type of the unpacked numbers, in which codes are exact. With 16-bit floats the query and
        the weights are rounded to them; with int8, on the CPU only, to 16-bit integers. Not
        given: int8 for 16-bit queries on the CPU, else float32 (float64 for float64 queries).

    Returns
    -------
    out : tensor [batch, heads, queries, head_dim] like ``q``
        Zero where nothing is seen.
    lse : float32 (float64) tensor [batch, heads, queries]
        Natural logarithm of the sum of exponentials; -inf where nothing is seen.
    """
    batch, heads, queries, dim = q.shape
    kv_heads = keys.scales.shape[1]
    compute = compute_dtype(q.dtype)
    if dtype is None:
        half = q.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.int8 if half and q.device.type == "cpu" else compute
    if dtype == torch.int8 and q.device.type != "cpu":
        raise TQError(f"dtype=torch.int8 on {q.device}: runs on the CPU; leave dtype out")
    if sliding_window is not None and query_positions is None:
        raise TQError("sliding_window without query_positions: pass the positions of the queries")
    if softmax_scale is None:
        softmax_scale = dim**-0.5
    rows = _grouped(q.to(compute), kv_heads)
    bias = None
    if key_center is not None:
        bias = (rows * key_center.to(compute)[:, None]).sum(dim=-1, keepdim=True) * softmax_scale
    rotated = rotate_unchecked(rows, fmt)[..., field_order(fmt, "k", q.device)]
    rotated = rotated * (softmax_scale * step_of(fmt, "k"))
    prepared = to_digits(rotated) if dtype == torch.int8 else rotated.to(dtype)
    state = _Softmax(rows)
    for start in range(0, keys.tokens, chunk):
        stop = min(start + chunk, keys.tokens)
        part = keys.narrow(start, stop)
        numbers = expand(part.planes, fmt, "k", dtype)
        logits = _dot(prepared, numbers.transpose(-1, -2), compute)
        logits *= part.scales.to(compute)[:, :, None]
        if bias is not None:
            logits += bias
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = _mask(logits, heads // kv_heads, start, mask, query_positions, 0, sliding_window)
        weights = state.weights(logits)
        part = values.narrow(start, stop)
        weights *= part.scales.to(compute)[:, :, None]
        numbers = expand(part.planes, fmt, "v", dtype)
        prepared_weights = to_digits(weights) if dtype == torch.int8 else weights.to(dtype)
        state.out += _dot(prepared_weights, numbers, compute)
    fields, lse = state.result()
    out = torch.empty_like(fields)
    out[..., field_order(fmt, "v", q.device)] = fields * step_of(fmt, "v")
    out = rotate_unchecked(out, fmt, inverse=True)
    shape = (batch, heads, queries)
    return out.reshape(*shape, dim).to(q.dtype), lse.reshape(shape)


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    soft_cap: float | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_offset: int = 0,
    sliding_window: int | None = None,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Attention on plain keys and values, with the options and results of `attend_codes`.

    Parameters
    ----------
    q : float tensor [batch, heads, queries, head_dim]
    k, v : float tensors [batch, kv_heads, tokens, head_dim]
    key_offset : int
        Position of the first key.
    """
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    compute = compute_dtype(q.dtype)
    if sliding_window is not None and query_positions is None:
        raise TQError("sliding_window without query_positions: pass the positions of the queries")
    rows = _grouped(q.to(compute), kv_heads)
    scaled = rows * (dim**-0.5 if softmax_scale is None else softmax_scale)
    state = _Softmax(rows)
    for start in range(0, k.shape[-2], chunk):
        part = k[..., start : start + chunk, :].to(compute)
        logits = scaled @ part.transpose(-1, -2)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = _mask(
            logits, heads // kv_heads, start, mask, query_positions, key_offset, sliding_window
        )
        state.out += state.weights(logits) @ v[..., start : start + chunk, :].to(compute)
    out, lse = state.result()
    shape = (batch, heads, queries)
    return out.reshape(*shape, dim).to(q.dtype), lse.reshape(shape)
