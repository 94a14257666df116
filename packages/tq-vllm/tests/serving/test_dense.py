"""The wrapper of vLLM's FlashAttention, with a stand-in for the kernel, which needs a GPU."""

from __future__ import annotations

import pytest
import torch
from tq_kernels import attend_dense
from tq_vllm.dense import dense_attention


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention's interface on top of plain attention; notes the version asked for."""
    from vllm.v1.attention.backends import fa_utils

    asked: list[int] = []

    def varlen(
        *, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        return_softmax_lse, fa_version, out,
    ):  # fmt: skip
        assert return_softmax_lse
        asked.append(fa_version)
        outs, sums = [], []
        for a, b, c, d in zip(
            cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
        ):
            assert b - a <= max_seqlen_q
            assert d - c <= max_seqlen_k
            parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            positions = torch.arange(int(b - a)) if causal else None
            part, lse = attend_dense(*parts, softmax_scale=softmax_scale, query_positions=positions)
            outs.append(part[0].transpose(0, 1))
            sums.append(lse[0])
        result = torch.cat(outs)
        return result if out is None else out.copy_(result), torch.cat(sums, dim=1)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", varlen, raising=False)
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: 3)
    dense_attention.cache_clear()
    yield asked
    dense_attention.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_sums_come_in_the_shape_that_prefill_takes(flash, causal) -> None:
    attend = dense_attention(torch.device("cuda"), 64)
    q, k, v = (torch.randn(12, heads, 64) for heads in (4, 2, 2))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    place = torch.full_like(q, torch.nan)
    out, lse = attend(q, k, v, cu, cu, 7, 7, causal=causal, softmax_scale=0.1, out=place)
    assert out is place
    assert flash == [3]
    assert (out.shape, lse.shape) == (q.shape, (12, 4))
    positions = torch.arange(7) if causal else None
    parts = (x[5:].transpose(0, 1)[None] for x in (q, k, v))
    want, sums = attend_dense(*parts, softmax_scale=0.1, query_positions=positions)
    torch.testing.assert_close(out[5:], want[0].transpose(0, 1))
    torch.testing.assert_close(lse[5:], sums[0].T)


def test_other_devices_have_none(flash) -> None:
    assert dense_attention(torch.device("cpu"), 64) is None
