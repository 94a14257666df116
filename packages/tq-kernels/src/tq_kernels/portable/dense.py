# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Attention of sequences of different lengths on plain keys and values, with the LSE.

`attend_flash` is PyTorch's flash attention, and `attend_triton` a kernel for everything that it
does not do: soft cap, sliding window, float32, and queries that start at any position.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

__all__ = ["Dense", "attend_flash", "attend_triton", "choose_dense"]

LOG2E = 1.4426950408889634
#: The interpreter multiplies the bits of bf16 numbers as integers.
_WIDEN = tl.constexpr(bool(knobs.runtime.interpret))


class Dense(Protocol):
    """Attention of sequence ``n``, rows ``cu[n]`` to ``cu[n + 1]`` of ``q``, on rows of ``k``.

    Parameters
    ----------
    q : tensor [tokens, heads, head_dim]
    k, v : tensors [keys, kv_heads, head_dim]
    cu_q, cu_k : int32 tensors [batch + 1]
    max_q, max_k : int
        Longest of the sequences.
    causal : bool
        Query ``i`` sees keys up to ``i``; then ``cu_q`` equals ``cu_k``.
    softmax_scale : float
    out : tensor like ``q``, optional
        Where the result may go; what is returned counts.

    Returns
    -------
    out : tensor [tokens, heads, head_dim]
    lse : float32 tensor [tokens, heads], natural logarithm
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        causal: bool,
        softmax_scale: float,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


@triton.jit(
    do_not_specialize_on_alignment=["cu_q", "cu_k", "offsets", "bias", "lse"],
)
def dense_kernel(
    q, k, v, cu_q, cu_k, offsets, bias, out, lse, logit_scale, soft_cap, window, group, kv_heads,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of query tokens of a head; ``offsets`` are positions of the first queries.

    Positions count from the first key. ``out`` [tokens, heads, D], ``lse`` and ``bias`` [tokens,
    heads], which is added to logits before the cap, are contiguous.
    """
    head = tl.program_id(1)
    heads = group * kv_heads
    sequence = tl.program_id(2)
    q_start = tl.load(cu_q + sequence)
    q_len = tl.load(cu_q + sequence + 1) - q_start
    k_start = tl.load(cu_k + sequence)
    k_len = tl.load(cu_k + sequence + 1) - k_start
    block = tl.program_id(0) * ROWS
    if block >= q_len:
        return
    offset = tl.load(offsets + sequence)
    rows = block + tl.arange(0, ROWS)
    inside = rows < q_len
    position = offset + rows
    dims = tl.arange(0, WIDTH)
    token = (q_start + rows).to(tl.int64)
    x = tl.load(
        q + token[:, None] * q_token_stride + head * q_head_stride + dims[None, :],
        mask=inside[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    added = tl.zeros([ROWS], tl.float32)
    if BIAS:
        added = tl.load(bias + token * heads + head, mask=inside, other=0.0) * 1.4426950408889634
    first = 0
    stop = k_len
    if CAUSAL:
        stop = tl.minimum(stop, offset + block + ROWS)
    if WINDOW:
        first = tl.maximum(offset + block - window + 1, 0) // KEYS * KEYS
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    k_head = k + (head // group) * k_head_stride
    v_head = v + (head // group) * v_head_stride
    for start in range(first, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        place = (k_start + keys).to(tl.int64)
        mask = (keys < k_len)[:, None] & (dims < D)[None, :]
        key = tl.load(
            k_head + place[:, None] * k_token_stride + dims[None, :], mask=mask, other=0.0
        )
        if _WIDEN and x.dtype == tl.bfloat16:
            key = key.to(tl.float32)
        s = tl.dot(x.to(key.dtype), tl.trans(key), input_precision=PRECISION) * logit_scale
        if BIAS:
            s += added[:, None]
        if CAP:
            s = (1.4426950408889634 * soft_cap) * (
                1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / soft_cap)))
            )  # fmt: skip
        visible = (keys < k_len)[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (keys[None, :] > position[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.maximum(new_top, -1e30)
        shrink = tl.exp2(top - safe)
        p = tl.exp2(s - safe[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        value = tl.load(
            v_head + place[:, None] * v_token_stride + dims[None, :], mask=mask, other=0.0
        )
        if _WIDEN and x.dtype == tl.bfloat16:
            value = value.to(tl.float32)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    place = (token * heads + head)[:, None] * D + dims[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[:, None] & (dims < D)[None, :])
    value = tl.where(empty, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + token * heads + head, value, mask=inside)


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    offsets: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as of `Dense` for queries that start at positions ``offsets`` [batch].

    Positions count from the first key of a sequence. ``bias`` float32 [tokens, heads] is added to
    the logits before the cap. ``out_dtype`` may be wider than that of ``q``.
    """
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    group, kv_heads = heads // k.shape[1], k.shape[1]
    shape = dense_shape(dim, q.dtype, max_q)
    constants = dense_constants(
        dim,
        q.dtype,
        shape,
        causal=causal,
        window=sliding_window is not None,
        cap=soft_cap is not None,
        bias=bias is not None,
    )
    dense_kernel[(-(-max_q // shape["ROWS"]), heads, len(offsets))](
        q, k, v, cu_q, cu_k, offsets, lse if bias is None else bias, out, lse,
        softmax_scale * LOG2E, 0.0 if soft_cap is None else soft_cap, sliding_window or 0,
        group, kv_heads,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        **constants, num_warps=shape["WARPS"], num_stages=2,
    )  # fmt: skip
    return out, lse


def dense_shape(dim: int, dtype: torch.dtype, max_q: int) -> dict[str, int]:
    """Query rows and keys of a block, and warps."""
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 32, "WARPS": 4}
    keys = 32 if dim > 64 else 64
    if max_q <= 16:
        return {"ROWS": 16, "KEYS": keys, "WARPS": 4}
    if 64 < dim <= 128:
        return {"ROWS": 128, "KEYS": keys, "WARPS": 8}
    return {"ROWS": 64, "KEYS": keys, "WARPS": 8 if dim > 128 else 4}


def dense_constants(
    dim: int,
    dtype: torch.dtype,
    shape: dict[str, int],
    *,
    causal: bool,
    window: bool,
    cap: bool,
    bias: bool,
) -> dict[str, object]:
    """Constants of `dense_kernel`."""
    return {
        "D": dim,
        "WIDTH": triton.next_power_of_2(dim),
        "ROWS": shape["ROWS"],
        "KEYS": shape["KEYS"],
        "CAUSAL": causal,
        "WINDOW": window,
        "CAP": cap,
        "BIAS": bias,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    softmax_scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention; see `Dense`. ``out`` is not written to."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=softmax_scale
    )
    return out, lse.transpose(0, 1)


def choose_dense(device: torch.device, dtype: torch.dtype) -> Dense | None:
    """PyTorch's flash attention where it runs, else None."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return attend_flash
