# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Union of two results of attention, row by row, and of learned sinks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_rows"]


@triton.jit(
    do_not_specialize=[
        "rows_total",
        "lse_stride",
        "lse_head_stride",
        "lse_stride2",
        "lse_head_stride2",
    ],
    do_not_specialize_on_alignment=["lse", "lse2", "target_lse"],
)
def merge_kernel(
    out, lse, out2, lse2, target, target_lse, sinks, rows_total, heads,
    token_stride, head_stride, lse_stride, lse_head_stride,
    token_stride2, head_stride2, lse_stride2, lse_head_stride2,
    target_token_stride, target_head_stride, target_lse_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head); natural LSEs, -inf for an empty set."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_total
    token = (rows // heads).to(tl.int64)
    head = rows % heads
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < D)[None, :]
    a = tl.load(lse + token * lse_stride + head * lse_head_stride, mask=inside, other=0.0)
    b = tl.load(lse2 + token * lse_stride2 + head * lse_head_stride2, mask=inside, other=0.0)
    top = tl.maximum(a, b)
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, sink)
    safe = tl.maximum(top, -1e30)
    a = tl.exp(a - safe)
    b = tl.exp(b - safe)
    total = a + b
    if SINKS:
        total += tl.exp(sink - safe)
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    first = out + token[:, None] * token_stride + (head * head_stride)[:, None] + dims[None, :]
    second = out2 + token[:, None] * token_stride2 + (head * head_stride2)[:, None] + dims[None, :]
    x = tl.load(first, mask=mask, other=0.0).to(tl.float32) * (a * share)[:, None]
    x += tl.load(second, mask=mask, other=0.0).to(tl.float32) * (b * share)[:, None]
    place = token[:, None] * target_token_stride + (head * target_head_stride)[:, None]
    tl.store(target + place + dims[None, :], x.to(target.dtype.element_ty), mask=mask)
    value = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(target_lse + token * target_lse_stride + head, value, mask=inside)


def merge_constants(dim: int, sinks: bool) -> dict[str, int | bool]:
    """Constants of `merge_kernel`."""
    return {"D": dim, "WIDTH": triton.next_power_of_2(dim), "ROWS": 8, "SINKS": sinks}


def merge_rows(
    out: Tensor,
    lse: Tensor,
    out2: Tensor,
    lse2: Tensor,
    target: Tensor,
    target_lse: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Attention over both sets of keys, and ``sinks``, into ``target``, which may be ``out``.

    Parameters
    ----------
    out, out2, target : tensors [tokens, heads, head_dim], last dimension contiguous
    lse, lse2, target_lse : float32 tensors [tokens, heads]
        The last has a contiguous last dimension.
    sinks : float tensor [heads], optional
    """
    tokens, heads, dim = out.shape
    rows = tokens * heads
    merge_kernel[(-(-rows // 8),)](
        out, lse, out2, lse2, target, target_lse, lse if sinks is None else sinks, rows, heads,
        out.stride(0), out.stride(1), lse.stride(0), lse.stride(1),
        out2.stride(0), out2.stride(1), lse2.stride(0), lse2.stride(1),
        target.stride(0), target.stride(1), target_lse.stride(0),
        **merge_constants(dim, sinks is not None), num_warps=4,
    )  # fmt: skip
