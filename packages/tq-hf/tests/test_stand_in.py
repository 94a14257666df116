"""Stand-ins: right for every operation, without memory, and never written to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_core import TQError
from tq_hf import attention, snapshot
from tq_hf.history import SEGMENT_TOKENS
from tq_hf.snapshot import Snapshot
from tq_hf.stand_in import StandIn, snapshot_of, stand_ins
from tq_kernels import KVFormat, encode_tokens
from transformers.integrations.sdpa_attention import repeat_kv

sdpa = torch.nn.functional.scaled_dot_product_attention
FMT = KVFormat(32, k_bits=4, v_bits=3)


def make(
    head: int = 2,
    parts: tuple[int, ...] = (32, 16),
    tail: int = 7,
    batch: int = 2,
    kv_heads: int = 2,
    center: bool = False,
    seed: int = 0,
) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)

    def states(tokens: int) -> Any:
        shape = (batch, kv_heads, tokens, FMT.head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    codes = tuple(
        (encode_tokens(states(n), FMT, "k"), encode_tokens(states(n), FMT, "v")) for n in parts
    )
    middle = states(kv_heads)[0, :, 0] if center else None
    ends = [(states(n), states(n)) for n in (head, tail)]
    return Snapshot(ends[0], codes, ends[1], FMT, middle)


def query(heads: int, queries: int, batch: int = 2) -> Any:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, heads, queries, FMT.head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is decoded whole."""
    seen: list[str] = []
    dense = snapshot.Snapshot.dense

    def spy(self: Snapshot, kind: Any) -> Any:
        seen.append(kind)
        return dense(self, kind)

    monkeypatch.setattr(snapshot.Snapshot, "dense", spy)
    return seen


def close(ours: Any, theirs: Any) -> None:
    assert type(ours) is torch.Tensor
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    head=st.integers(0, 5),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    tail=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 9),
    mask=st.sampled_from([None, "bool", "float", "heads", "keys"]),
    center=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_that_of_the_decoded_tensors(
    head: int,
    parts: list[int],
    tail: int,
    kv_heads: int,
    group: int,
    queries: int,
    mask: str | None,
    center: bool,
    seed: int,
) -> None:
    seen = make(head, tuple(parts), tail, 2, kv_heads, center, seed)
    keys, values = stand_ins(seen)
    q = query(kv_heads * group, queries)
    shape = {
        "bool": (2, 1, queries, seen.tokens),
        "float": (2, 1, queries, seen.tokens),
        "heads": (1, kv_heads * group, queries, seen.tokens),
        "keys": (2, 1, 1, seen.tokens),
    }.get(str(mask))
    chosen = None
    if shape is not None:
        torch.manual_seed(seed)
        chosen = torch.randn(shape, dtype=torch.float64)
        if mask != "float":
            chosen = chosen > 0
            chosen[..., -1] = True
    ours = sdpa(q, keys, values, attn_mask=chosen, enable_gqa=True)
    close(ours, sdpa(q, seen.dense("k"), seen.dense("v"), attn_mask=chosen, enable_gqa=True))
    repeated = repeat_kv(keys, group), repeat_kv(values, group)
    assert all(isinstance(x, StandIn) for x in repeated)
    close(sdpa(q, *repeated, attn_mask=chosen), ours)


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("causal", [False, True])
def test_options_of_attention(scale: float | None, causal: bool, decoded: list[str]) -> None:
    seen = make()
    keys, values = stand_ins(seen)
    q = query(2, 60)
    ours = sdpa(q, keys, values, is_causal=causal, scale=scale)
    assert not decoded
    close(ours, sdpa(q, seen.dense("k"), seen.dense("v"), is_causal=causal, scale=scale))


def test_a_row_that_sees_nothing_is_zero() -> None:
    keys, values = stand_ins(make())
    mask = torch.zeros(2, 1, 3, keys.shape[2], dtype=torch.bool)
    mask[0] = True
    out = sdpa(query(2, 3), keys, values, attn_mask=mask)
    assert out[1].eq(0).all()
    assert out[0].ne(0).all()


def test_many_queries_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LOGITS", 2 * 4 * 57 * 5)
    seen = make()
    keys, values = stand_ins(seen)
    q = query(4, 23)
    mask = torch.rand(2, 1, 23, seen.tokens) > 0.3
    ours = sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)
    close(ours, sdpa(q, seen.dense("k"), seen.dense("v"), attn_mask=mask, enable_gqa=True))


def test_a_mask_of_another_length_is_refused() -> None:
    keys, values = stand_ins(make())
    mask = torch.ones(2, 1, 3, keys.shape[2] + 1, dtype=torch.bool)
    with pytest.raises(TQError, match="mask covers 58 tokens"):
        sdpa(query(2, 3), keys, values, attn_mask=mask)


OPERATIONS = {
    "matmul": lambda q, k, v: torch.softmax(q @ k.transpose(2, 3), -1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhqd,bhkd->bhqk", q, k) + v.sum(),
    "cat": lambda q, k, v: torch.cat((k, v, q), dim=2),
    "to": lambda q, k, v: k.to(torch.float32) + v.float(),
    "cast": lambda q, k, v: k.double() + v.contiguous(),
    "index": lambda q, k, v: k[:, 1] + v[:, 0],
    "slice": lambda q, k, v: k[:, :, -3:] + v[..., :3, :],
    "new axis": lambda q, k, v: k[:, None] + v[:, :, None],
    "index list": lambda q, k, v: k[[0, 1]] + v[torch.tensor([1, 0])],
    "expand": lambda q, k, v: k[:, :, None].expand(-1, -1, 2, -1, -1) + v[:, :, None],
    "expanded slice": lambda q, k, v: k[:, :, None].expand(2, 2, 3, 57, 32)[:, :, 1] + v,
    "repeat": lambda q, k, v: k.repeat(1, 2, 1, 1) + v.repeat_interleave(2, dim=1),
    "reshape": lambda q, k, v: k.reshape(2, 2, -1) + v.flatten(2),
    "unusual reshape": lambda q, k, v: (
        k[:, :, None].expand(2, 2, 3, 57, 32).reshape(2, 6, -1) + v.repeat(1, 3, 1, 1).flatten(2)
    ),
    "view": lambda q, k, v: k.view(4, 57, 32) + v.reshape(4, 57, 32),
    "norm": lambda q, k, v: k.norm(dim=-1) + v.pow(2).mean(-1),
    "mixed repeats": lambda q, k, v: sdpa(q, repeat_kv(k, 1), v),
    "keys as values": lambda q, k, v: sdpa(q, k, k),
    "plain values": lambda q, k, v: sdpa(q, k, v + 1),
    "batch of one": lambda q, k, v: sdpa(q[:1], k, v),
    "stand-in as query": lambda q, k, v: sdpa(k, k, v),
    "deepcopy": lambda q, k, v: k.clone() + copy.deepcopy(v + 0),
    "comparison": lambda q, k, v: (k > v).sum(),
    "detach": lambda q, k, v: k.detach() + v.clone(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_is_right(name: str) -> None:
    seen = make()
    q = query(2, 3)
    ours = OPERATIONS[name](q, *stand_ins(seen))
    close(ours, OPERATIONS[name](q, seen.dense("k"), seen.dense("v")))


WRITES = {
    "mul_": lambda k: k.mul_(2),
    "setitem": lambda k: k.__setitem__((0, 0), 1.0),
    "masked": lambda k: k.masked_fill_(torch.ones(57, 1, dtype=torch.bool), 0),
    "copy_": lambda k: k.copy_(torch.zeros(2, 2, 57, 32)),
    "out": lambda k: torch.add(torch.ones(k.shape), 1, out=k),
    "zero_": lambda k: torch.zero_(k),
    "add inplace": lambda k: k.__iadd__(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_is_refused(name: str) -> None:
    keys, _ = stand_ins(make())
    with pytest.raises(TQError, match="write into"):
        WRITES[name](keys)


def test_metadata_and_memory(decoded: list[str]) -> None:
    seen = make()
    keys, values = stand_ins(seen)
    for x in (keys, values):
        assert x.shape == seen.shape == (2, 2, 57, 32)
        assert (x.dtype, x.device, x.dim(), x.size(-2)) == (
            torch.float64,
            seen.tail[0].device,
            4,
            57,
        )
        assert not x.requires_grad
        assert "StandIn" in repr(x)
    assert not decoded


def test_pairs_that_do_not_belong_together_are_refused() -> None:
    first, second = stand_ins(make()), stand_ins(make(seed=1))
    with pytest.raises(TQError, match="different updates"):
        snapshot_of(first[0], second[1])
    assert snapshot_of(*first) is first[0].source.snapshot


def test_a_long_history_is_read_in_segments(decoded: list[str]) -> None:
    seen = make(parts=(SEGMENT_TOKENS, 100), batch=1)
    keys, values = stand_ins(seen)
    q = query(2, 1, batch=1)
    ours = sdpa(q, keys, values)
    assert not decoded
    close(ours, sdpa(q, seen.dense("k"), seen.dense("v")))
