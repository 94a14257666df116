"""The growing buffers of codes against plain concatenation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tq_hf import history as module
from tq_hf.history import CodeHistory
from tq_kernels import KVFormat, TokenCodes
from tq_kernels.codec import plane_bytes

FMT = KVFormat(16, k_bits=3, v_bits=4)


def codes(bits: int, tokens: int, batch: int, seed: int) -> TokenCodes:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Any:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    planes = tuple(numbers(batch, 2, tokens, width) for width in plane_bytes(bits, 16))
    return TokenCodes(planes, numbers(batch, 2, tokens).half())


def equal(a: TokenCodes, b: TokenCodes) -> bool:
    pairs = zip((*a.planes, a.scales), (*b.planes, b.scales), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module", autouse=True)
def _short_segments() -> Any:
    before, module.SEGMENT_TOKENS = module.SEGMENT_TOKENS, 96
    yield
    module.SEGMENT_TOKENS = before


steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 250)),
    st.tuples(st.just("crop"), st.integers(0, 400)),
    st.tuples(st.just("select"), st.integers(0, 2)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=1, max_size=8))
def test_like_concatenation(script: list[tuple[str, int]]) -> None:
    history = CodeHistory()
    model = [codes(bits, 0, 3, 0) for bits in (3, 4)]
    for seed, (name, number) in enumerate(script):
        if name == "append":
            new = [codes(bits, number, 3, seed) for bits in (3, 4)]
            history.append(new[0], new[1])
            model = [old.cat(more) for old, more in zip(model, new, strict=True)]
        elif name == "crop":
            before = [(k.planes[0].clone(), k) for k, _ in history.parts()]
            history.crop(number)
            model = [old.narrow(0, min(number, old.tokens)) for old in model]
            assert all(torch.equal(copy, k.planes[0]) for copy, k in before)
        else:
            index = torch.tensor([number, 0, 1])
            history.map(lambda x, index=index: x[index])
            model = [old.map(lambda x, index=index: x[index]) for old in model]
        assert history.tokens == model[0].tokens
        assert history.spare_tokens <= 64
        for which, expected in enumerate(model):
            at = 0
            for part in history.parts():
                assert part[which].tokens <= 96
                assert equal(part[which], expected.narrow(at, at + part[which].tokens))
                at += part[which].tokens
            assert at == expected.tokens


def test_views_keep_what_they_show() -> None:
    history = CodeHistory()
    history.append(codes(3, 40, 1, 0), codes(4, 40, 1, 1))
    view = history.parts()[0][0]
    shown = view.map(torch.clone)
    for seed in range(5):
        history.append(codes(3, 33, 1, seed), codes(4, 33, 1, seed))
        assert equal(view, shown)
    history.crop(20)
    history.append(codes(3, 33, 1, 9), codes(4, 33, 1, 9))
    assert equal(view, shown)


def test_a_long_append_makes_full_segments() -> None:
    history = CodeHistory()
    history.append(codes(3, 1000, 1, 0), codes(4, 1000, 1, 1))
    assert [k.tokens for k, _ in history.parts()] == [96] * 10 + [40]
    history.clear()
    assert history.tokens == 0
    assert not list(history.tensors())
