"""vLLM's FlashAttention for the new tokens of a prompt and for expanded prefixes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tq_kernels.portable.dense import Dense

__all__ = ["dense_attention"]


@cache
def dense_attention(device: torch.device, head_dim: int) -> Dense | None:
    """The version of FlashAttention that vLLM uses on a device, None where it uses none."""
    if device.type != "cuda" or torch.version.hip:
        return None
    from vllm.v1.attention.backends import fa_utils

    if not fa_utils.is_flash_attn_varlen_func_available():
        return None
    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    if version is None:
        return None

    def attend(
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
        result, lse = fa_utils.flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=softmax_scale,
            causal=causal,
            return_softmax_lse=True,
            fa_version=version,
            out=out,
        )
        return result, lse.transpose(0, 1)

    return attend
